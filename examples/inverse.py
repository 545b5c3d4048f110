"""Inverse problems: one flow, trained without them, fills in, sharpens and enlarges images.

    python examples/inverse.py            # about 5 minutes on 2 CPU cores
    python examples/inverse.py --smoke    # everything tiny: a check that it runs

Needs `pip install "flowsolve[examples]"`. Digits of scikit-learn, and patches of the two photographs that come with it:
nothing is downloaded. Half of the pixels, all of them blurred, or the means of 2 x 2 are measured with noise; a flow of
each kind of images, given that, draws the rest. Their peak signal-to-noise ratio, of one draw and of the mean of eight,
beside the smallest solution (pseudo-inverse); the strength of each method was chosen on such images. Expect about:

    PSNR in dB                                  a draw  mean of 8
    digits, inpainting          pseudo-inverse    10.2
                                RePaint           20.3     21.0
                                DPS               20.3     21.4
                                PiGDM             20.0     21.5
                                MMPS              20.4     21.6
    digits, deblurring          pseudo-inverse     5.2
                                DPS               19.2     20.9
                                PiGDM             20.2     21.6
                                MMPS              19.8     21.4
    digits, super-resolution    pseudo-inverse    13.1
                                DPS               17.1     19.0
                                PiGDM             15.0     17.4
                                MMPS              16.0     18.3
    patches, inpainting         pseudo-inverse    11.4
                                RePaint           23.1     23.7
                                DPS               22.5     23.8
                                PiGDM             23.1     24.1
                                MMPS              22.9     22.9
    patches, deblurring         pseudo-inverse     5.4
                                DPS               22.8     24.2
                                PiGDM             25.5     26.6
                                MMPS              25.1     26.1
    patches, super-resolution   pseudo-inverse    23.7
                                DPS               22.1     23.5
                                PiGDM             23.1     24.1
                                MMPS              23.2     24.2

(A mean has fewer errors than a draw, which is as sharp as an image; so for enlarged patches a draw is behind the
pseudo-inverse.)

Written to `outputs/inverse/`: what was measured, the truth, two draws and the mean, inverse.png.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

import flowsolve as fs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STD = 0.05  # of the noise on every measured number; pixels run from -1 to 1


class Size(NamedTuple):
    """How much of everything."""

    steps: int  # of training
    width: int
    images: int  # to restore
    draws: int  # of each
    solver_steps: int
    problems: dict[str, list[str]]  # of each kind of images


ALL = ["inpainting", "deblurring", "super-resolution"]
FULL = Size(2_000, 384, 48, draws=8, solver_steps=40, problems={"digits": ALL, "patches": ALL})
SMOKE = Size(4, 16, 2, draws=2, solver_steps=2, problems={"digits": ALL[:1], "patches": ALL[1:2]})


# --- the data: images of 8 x 8 pixels, from -1 to 1 ---------------------------------------------------------


def digits() -> tuple[np.ndarray, np.ndarray]:
    """(to train on, held out), (n, 8, 8, 1)."""
    images = load_digits().images[..., None] / 8 - 1
    return train_test_split(images, test_size=360, random_state=0)


def patches() -> tuple[np.ndarray, np.ndarray]:
    """The same of the photographs of a temple and a flower, (n, 8, 8, 3); the right sixth of each is held out."""
    train, held_out = [], []
    for photograph in load_sample_images().images:
        photograph = photograph / 127.5 - 1
        border = photograph.shape[1] * 5 // 6
        train.append(windows(photograph[:, :border], 4))
        held_out.append(windows(photograph[:, border:], 8))
    return np.concatenate(train), np.concatenate(held_out)


def windows(image: np.ndarray, stride: int) -> np.ndarray:
    """All patches of 8 x 8 pixels, `stride` apart."""
    views = np.lib.stride_tricks.sliding_window_view(image, (8, 8), axis=(0, 1))[::stride, ::stride]
    return np.moveaxis(views, 2, -1).reshape(-1, 8, 8, image.shape[2])


# --- what is measured of them -------------------------------------------------------------------------------


class Mask(eqx.Module):
    """Keeps some of the pixels: a vector of them."""

    rows: np.ndarray = eqx.field(converter=np.asarray)
    columns: np.ndarray = eqx.field(converter=np.asarray)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x[self.rows, self.columns]


def blur(x: jax.Array) -> jax.Array:
    """A Gaussian of standard deviation 1 pixel along both axes, the border repeated."""
    kernel = np.exp(-0.5 * np.arange(-2, 3) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (0, 1):
        padded = jnp.pad(x, [(2, 2) if a == axis else (0, 0) for a in range(3)], mode="edge")
        x = sum(k * jax.lax.slice_in_dim(padded, i, i + 8, axis=axis) for i, k in enumerate(kernel))
    return x


def shrink(x: jax.Array) -> jax.Array:
    """The mean of each 2 x 2 pixels."""
    return x.reshape(4, 2, 4, 2, -1).mean(axis=(1, 3))


KEPT = np.random.default_rng(0).permutation(64)[:32]
OPERATORS = dict(zip(ALL, (Mask(*np.divmod(KEPT, 8)), blur, shrink), strict=True))


def pseudo_inverse(operator: Callable, like: jax.ShapeDtypeStruct) -> np.ndarray:
    """The matrix that takes a measurement to the smallest image that would give it."""
    jacobian = jax.jacobian(lambda flat: operator(flat.reshape(like.shape)).ravel())
    return np.linalg.pinv(jacobian(jnp.zeros(like.size)), rcond=1e-4)


# --- the flow and what it restores --------------------------------------------------------------------------


def train(images: np.ndarray, size: Size, key: jax.Array) -> fs.AbstractFlow:
    """A flow of the images, which knows of no measurement."""
    network_key, batch_key, loss_key = jax.random.split(key, 3)
    like = jax.ShapeDtypeStruct(images.shape[1:], jnp.float32)
    network = fs.nn.ResidualMLP(like, width=size.width, depth=3, dropout=0.1, key=network_key)
    flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
    batches = fs.data.Batches(jnp.asarray(images, jnp.float32), batch_size=256, key=batch_key)
    loss = fs.losses.Regression(times=fs.times.LogitNormal(std=1.5))
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, size.steps // 20, size.steps)
    for state in fs.training.fit(
        loss, flow, batches, optax.adamw(rate, weight_decay=0.01), steps=size.steps, key=loss_key, ema=0.99
    ):
        flow = state.ema_flow
    return flow


def methods(flow: fs.AbstractFlow, operator: Callable, std: float) -> dict[str, fs.AbstractFlow]:
    """The flow given a measurement, in three ways."""
    measurement = fs.posterior.Measurement(operator, std=STD)
    return {
        "DPS": fs.posterior.DPS(flow, measurement, zeta=16.0),
        "PiGDM": fs.posterior.PiGDM(flow, measurement, data_std=std),
        # The Jacobian of so small a network is rough: more steps of conjugate gradients follow it too far.
        "MMPS": fs.posterior.MMPS(flow, measurement, max_steps=1),
    }


def restore(
    guided: fs.AbstractFlow, ys: jax.Array, like: jax.ShapeDtypeStruct, moments: dict, size: Size, key: jax.Array
) -> np.ndarray:
    """`draws` samples for each measurement, (images, draws, 8, 8, channels)."""
    repeated = jnp.repeat(ys, size.draws, axis=0)
    x = fs.sample(
        guided,
        like,
        num=len(repeated),
        key=key,
        args=fs.posterior.Observed(repeated),
        solver=fs.solvers.DDIM(eta=1.0),
        grid=fs.grids.Uniform(size.solver_steps),
        # Nearer to pure noise the Jacobian of a trained network says nothing; the start has the moments there.
        t_start=0.8,
        **moments,
    )
    return np.asarray(x).reshape(-1, size.draws, *like.shape)


def repaint(flow: fs.AbstractFlow, ys: jax.Array, like: jax.ShapeDtypeStruct, size: Size, key: jax.Array) -> np.ndarray:
    """The same by replacing what is known, as often as the noise of a step is drawn anew."""
    chosen = OPERATORS["inpainting"]
    mask = jnp.zeros(like.shape, bool).at[chosen.rows, chosen.columns].set(True)

    @jax.vmap
    def one(y: jax.Array, key: jax.Array) -> jax.Array:
        known = jnp.zeros(like.shape).at[chosen.rows, chosen.columns].set(y)
        solver = fs.solvers.RePaint(fs.solvers.DDIM(), mask, known, repeats=5)
        return fs.sample(flow, like, num=size.draws, key=key, solver=solver, grid=fs.grids.Uniform(size.solver_steps))

    return np.asarray(one(ys, jax.random.split(key, len(ys))))


def psnr(x: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all images; from black to white is 2."""
    return float(10 * np.log10(4 / np.mean((np.clip(x, -1, 1) - truth) ** 2)))


class Result(NamedTuple):
    """One problem on one kind of images."""

    title: str
    measured: np.ndarray  # as an image
    columns: dict[str, np.ndarray]  # what comes of it


def solve(flow: fs.AbstractFlow, images: tuple, problem: str, kind: str, size: Size, key: jax.Array) -> Result:
    """Measure, restore by every method, print a line for each."""
    train_images, truth = images
    like = jax.ShapeDtypeStruct(truth.shape[1:], jnp.float32)
    moments = {"data_mean": train_images.mean(), "data_std": train_images.std()}
    operator = OPERATORS[problem]
    noise_key, draw_key = jax.random.split(key)
    exact = jax.vmap(operator)(jnp.asarray(truth, jnp.float32))
    ys = exact + STD * jax.random.normal(noise_key, exact.shape)
    smallest = (np.asarray(ys).reshape(len(ys), -1) @ pseudo_inverse(operator, like).T).reshape(truth.shape)
    print(f"{kind + ', ' + problem:<28}{'pseudo-inverse':<16}{psnr(smallest, truth):>6.1f}", flush=True)
    columns = {"truth": truth, "pseudo-inverse": smallest}
    draws = {}
    if problem == "inpainting":
        draws["RePaint"] = repaint(flow, ys, like, size, draw_key)
    for name, guided in methods(flow, operator, float(train_images.std())).items():
        draws[name] = restore(guided, ys, like, moments, size, draw_key)
    for name, x in draws.items():
        print(f"{'':<28}{name:<16}{psnr(x, truth[:, None]):>6.1f}{psnr(x.mean(axis=1), truth):>9.1f}", flush=True)
    columns |= {"a draw": draws["MMPS"][:, 0], "another": draws["MMPS"][:, 1], "mean": draws["MMPS"].mean(axis=1)}
    if problem == "inpainting":
        measured = np.full(truth.shape, np.nan)
        measured[:, operator.rows, operator.columns] = ys
    else:
        measured = np.asarray(ys)
    return Result(f"{problem} of {kind}, by MMPS", measured, columns)


def draw_picture(results: list[Result], rows: int, file: Path) -> None:
    """For each problem a block: a column for each way to look at some images of more contrast than most."""
    names = ["measured", *results[0].columns]
    across = min(3, len(results))
    down = -(-len(results) // across)
    figure = plt.figure(figsize=(5.6 * across, (0.9 * rows + 0.6) * down), layout="constrained")
    blocks = figure.subfigures(down, across, squeeze=False, wspace=0.05, hspace=0.05)
    for result, block in zip(results, blocks.flat, strict=False):
        block.suptitle(result.title, fontsize=9)
        axes = block.subplots(rows, len(names), squeeze=False)
        truth = result.columns["truth"]
        shown = np.argsort(-truth.std(axis=(1, 2)).mean(axis=1))[:: max(1, len(truth) // (2 * rows))][:rows]
        for column, images in enumerate((result.measured, *result.columns.values())):
            axes[0, column].set_title(names[column], fontsize=7)
            for axis, chosen in zip(axes[:, column], shown, strict=True):
                image = np.clip((images[chosen] + 1) / 2, 0, 1)
                # A pixel that was not measured is red.
                missing = np.isnan(image)[..., :1]
                image = np.where(missing, [1.0, 0.5, 0.5], np.broadcast_to(image, (*image.shape[:2], 3)))
                axis.imshow(image, interpolation="nearest")
                axis.axis("off")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="everything tiny: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/inverse"), help="folder for what is written")
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL
    jax.config.update("jax_disable_most_optimizations", options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    print(f"{'PSNR in dB':<44}{'a draw':>6}{'mean of ' + str(size.draws):>11}")
    for number, (kind, load) in enumerate((("digits", digits), ("patches", patches))):
        train_key, choice_key, key = jax.random.split(jax.random.key(number), 3)
        train_images, held_out = load()
        flow = train(train_images, size, train_key)
        chosen = jax.random.permutation(choice_key, len(held_out))[: size.images]
        images = train_images, held_out[np.asarray(chosen)]
        for place, problem in enumerate(size.problems[kind]):
            results.append(solve(flow, images, problem, kind, size, jax.random.fold_in(key, place)))
    file = options.out / "inverse.png"
    draw_picture(results, min(4, size.images), file)
    print(f"picture: {file}\ntotal {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
