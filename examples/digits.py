"""Handwritten digits: train a class-conditional flow, sample it with eleven solvers, judge the samples.

    python examples/digits.py                # about 3 minutes on 2 CPU cores
    python examples/digits.py --checkpoint outputs/digits/flow.eqx      # without training
    python examples/digits.py --smoke        # everything tiny: a check that it runs

Needs `pip install "flowsolve[examples]"`. The data are the 1,797 images of 8 x 8 pixels that come with scikit-learn:
nothing is downloaded. A residual network of 1.2 million parameters learns the velocity of the straight path; a small
classifier of real digits then judges what each solver draws from it. Expect about these numbers (2 CPU cores):

    solver                            NFE  ms/image  Frechet  accuracy  nearest
    Euler, 50 steps                    50      0.64     2.51     0.999     14.9
    Heun, 25 steps                     50      0.60     2.63     0.999     15.1
    DDIM, 20 steps                     20      0.24     2.44     0.999     14.7
    DPM-Solver++ 2M, 10 steps          10      0.13     2.18     0.999     14.5
    UniPC-3, 8 steps                    8      0.10     2.19     0.999     14.4
    tuned, 6 steps                      6      0.08     2.61     0.999     15.1
    Tsit5, adaptive 1e-3               44      0.62     2.61     0.999     15.0
    Dopri5, adaptive 1e-3              36      0.55     2.55     0.999     15.0
    reverse SDE, Euler, 100 steps     100      1.22     2.35     1.000     14.3
    DDPM ancestral, 50 steps           50      0.62     2.47     1.000     14.0
    SDE-DPM-Solver++ 2M, 20 steps      20      0.25     2.58     0.999     14.3
    real digits                                         1.56     0.983     17.1

(The most accurate of these, Heun, Tsit5 and Dopri5, have 2.55 to 2.63: a smaller Frechet distance at few steps does not
mean a smaller error.)

    100 held-out digits: 2.507 +- 0.046 bits per pixel (uniform: 4.087)

Written to `outputs/digits/`: the trained flow, flow.eqx, and ten samples of each class, samples.png.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import flowsolve as fs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEVELS = 17  # pixels are integers from 0 to 16
CLASSES = 10
LIKE = jax.ShapeDtypeStruct((8, 8), jnp.float32)  # one example


class Size(NamedTuple):
    """How much of everything."""

    steps: int  # of training the flow
    batch: int
    width: int
    depth: int
    classifier_steps: int
    samples: int  # per solver, a multiple of 10
    likelihoods: int  # held-out images whose density is computed
    tuning_noises: int  # from which the tuned solver learns
    tuning_updates: int


FULL = Size(1_800, 256, 256, 3, 1_500, samples=1_000, likelihoods=100, tuning_noises=1_000, tuning_updates=600)
SMOKE = Size(20, 64, 32, 2, 20, samples=20, likelihoods=2, tuning_noises=10, tuning_updates=4)


# --- the data -------------------------------------------------------------------------------------
#
# A density needs continuous data. Each integer level k of 0, ..., 16 becomes a uniform draw from its own bin
# [k, k + 1), and the bins together are scaled to [-1, 1]. Back again is a rounding down, which loses nothing.


class Split(NamedTuple):
    """Images as float32 levels (n, 8, 8), and their labels (n,)."""

    images: jax.Array
    labels: jax.Array


def load() -> tuple[Split, Split]:
    """1,437 images to train on and 360 held out, each class in proportion; always the same."""
    digits = load_digits()
    images, labels = digits.images.astype(np.float32), digits.target.astype(np.int32)
    parts = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    train_images, held_out_images, train_labels, held_out_labels = map(jnp.asarray, parts)
    return Split(train_images, train_labels), Split(held_out_images, held_out_labels)


@jax.jit
def dequantise(levels: jax.Array, key: jax.Array) -> jax.Array:
    """Levels to [-1, 1], each uniform in its bin of width 2/17."""
    return 2 / LEVELS * (levels + jax.random.uniform(key, levels.shape)) - 1


@jax.jit
def quantise(x: jax.Array) -> jax.Array:
    """Back to levels."""
    return jnp.clip(jnp.floor(LEVELS / 2 * (x + 1)), 0, LEVELS - 1)


def training_batches(train: Split, size: Size, key: jax.Array) -> Iterator:
    """Batches (x, labels) without end, with fresh noise inside the bins each time."""
    order_key, noise_key = jax.random.split(key)
    batches = fs.data.Batches(train.images, train.labels, batch_size=size.batch, key=order_key)
    for n, (levels, labels) in enumerate(batches):
        yield dequantise(levels, jax.random.fold_in(noise_key, n)), labels


# --- the flow -------------------------------------------------------------------------------------


@eqx.filter_jit
def make_flow(size: Size, key: jax.Array) -> fs.Flow:
    """An untrained flow on the straight path, whose network predicts the velocity."""
    network = fs.nn.ResidualMLP(
        LIKE, width=size.width, depth=size.depth, num_classes=CLASSES, dropout=0.2, hidden=2 * size.width, key=key
    )
    return fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())


def train_flow(flow: fs.Flow, train: Split, size: Size, key: jax.Array, file: Path) -> fs.AbstractFlow:
    """Train, save the averaged weights, return the flow with them."""
    batch_key, loss_key = jax.random.split(key)
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, size.steps // 20, size.steps)
    loss = fs.losses.Regression(times=fs.times.LogitNormal(std=1.5))
    for state in fs.training.fit(
        loss,
        flow,
        training_batches(train, size, batch_key),
        optax.adamw(rate, weight_decay=0.01),
        steps=size.steps,
        key=loss_key,
        ema=0.99,
    ):
        eqx.tree_serialise_leaves(file, state.ema_flow)
    return state.ema_flow


# --- eleven ways to sample it ---------------------------------------------------------------------


class Setting(NamedTuple):
    """A row of the table."""

    name: str
    options: dict  # everything but the flow, the shape, the number and the key, for `fs.sample`
    evaluations: int | None = None  # of the network per image; None where an image takes as many as it needs


def solver_settings(flow: fs.AbstractFlow, train: Split, size: Size, key: jax.Array) -> list[Setting]:
    """One flow, eleven ways to sample it: nothing is trained again or rebuilt."""
    steps = fs.grids.Uniform
    adaptive = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    # Euler's noise, g^2 = 2t/(1 - t), is infinite at t = 1: start a little below it, from the moments there.
    scaled = 2 / LEVELS * (train.images + 0.5) - 1
    below = {"t_start": 0.99, "data_mean": jnp.mean(scaled), "data_std": jnp.std(scaled)}
    reverse = {"solver": diffrax.Euler(), "grid": steps(100), "dynamics": fs.dynamics.ReverseSDE(eta=1.0)}
    # Six steps whose times and coefficients are learnt: a minute at most, once for a flow.
    labels = jnp.arange(size.tuning_noises) % CLASSES
    counts = {"num": size.tuning_noises, "updates": size.tuning_updates, "batch_size": min(128, size.tuning_noises)}
    tuned = fs.tuning.tune(flow, LIKE, steps=6, key=key, args=labels, **counts)
    return [
        Setting("Euler, 50 steps", {"solver": diffrax.Euler(), "grid": steps(50)}, 50),
        Setting("Heun, 25 steps", {"solver": diffrax.Heun(), "grid": steps(25)}, 50),
        Setting("DDIM, 20 steps", {"solver": fs.solvers.DDIM(), "grid": steps(20)}, 20),
        Setting("DPM-Solver++ 2M, 10 steps", {"solver": fs.solvers.DPMSolverPP(2), "grid": steps(10)}, 10),
        Setting("UniPC-3, 8 steps", {"solver": fs.solvers.UniPC(3), "grid": steps(8)}, 8),
        Setting("tuned, 6 steps", {"solver": tuned.solver, "grid": tuned.grid}, 6),
        Setting("Tsit5, adaptive 1e-3", {"solver": diffrax.Tsit5(), "controller": adaptive}),
        Setting("Dopri5, adaptive 1e-3", {"solver": diffrax.Dopri5(), "controller": adaptive}),
        Setting("reverse SDE, Euler, 100 steps", reverse | below, 100),
        Setting("DDPM ancestral, 50 steps", {"solver": fs.solvers.DDIM(eta=1.0), "grid": steps(50)}, 50),
        Setting("SDE-DPM-Solver++ 2M, 20 steps", {"solver": fs.solvers.SDEDPMSolverPP(2), "grid": steps(20)}, 20),
    ]


def mean_evaluations(flow: fs.AbstractFlow, options: dict, key: jax.Array) -> float:
    """Network evaluations per image of an adaptive solver: the mean over an image of each class."""

    def one(x_start, label):
        return fs.solve(flow, x_start, label, **options).stats["nfe"]

    return float(jnp.mean(jax.vmap(one)(jax.random.normal(key, (CLASSES, *LIKE.shape)), jnp.arange(CLASSES))))


# --- the judge ------------------------------------------------------------------------------------


class Classifier(eqx.Module):
    """A small network on real digits; its last hidden layer gives the features."""

    body: eqx.nn.MLP
    last: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        body_key, last_key = jax.random.split(key)
        relu = jax.nn.relu
        self.body = eqx.nn.MLP(64, 32, 256, 1, activation=relu, final_activation=relu, key=body_key)
        self.last = eqx.nn.Linear(32, CLASSES, key=last_key)

    def features(self, levels: jax.Array) -> jax.Array:
        """(32,) features of one image."""
        return self.body(jnp.ravel(levels) / 8 - 1)

    def __call__(self, levels: jax.Array) -> jax.Array:
        """The logits of one image."""
        return self.last(self.features(levels))


@eqx.filter_jit
def train_classifier(train: Split, steps: int, key: jax.Array) -> Classifier:
    """On real digits with noise of two levels, as one compiled loop."""
    model_key, loop_key = jax.random.split(key)
    parameters, static = eqx.partition(Classifier(model_key), eqx.is_array)
    optimiser = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=0.1)

    def step(carry, key):
        parameters, optimiser_state = carry
        batch_key, noise_key = jax.random.split(key)
        chosen = jax.random.randint(batch_key, (128,), 0, len(train.labels))
        levels = train.images[chosen] + 2 * jax.random.normal(noise_key, (128, 8, 8))

        def loss(parameters):
            logits = jax.vmap(eqx.combine(parameters, static))(levels)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, train.labels[chosen]))

        updates, optimiser_state = optimiser.update(jax.grad(loss)(parameters), optimiser_state, parameters)
        return (optax.apply_updates(parameters, updates), optimiser_state), None

    start = (parameters, optimiser.init(parameters))
    (parameters, _), _ = jax.lax.scan(step, start, jax.random.split(loop_key, steps))
    return eqx.combine(parameters, static)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) for features of shape (n, d), in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # C_a C_b has the eigenvalues of the symmetric R C_b R with R R = C_a.
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance_b @ root), 0)).sum()
    difference = a.mean(axis=0) - b.mean(axis=0)
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def nearest_distance(images: np.ndarray, others: np.ndarray) -> float:
    """The Euclidean distance from an image to the nearest of others, in levels, mean over images."""
    a, b = np.asarray(images).reshape(len(images), -1), np.asarray(others).reshape(len(others), -1)
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return float(np.sqrt(np.maximum(squared.min(axis=1), 0)).mean())


def bits_per_dimension(flow: fs.AbstractFlow, split: Split, key: jax.Array) -> tuple[float, float]:
    """Bits per pixel of real images under the flow: mean over images and its standard error.

    The density is that of the dequantised image in [-1, 1], so a bin is 2/17 wide: the bits of one pixel are those of
    ln p per dimension minus log2(2/17). A model that finds all 17 levels equally likely has log2(17) = 4.09.
    """
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)

    @eqx.filter_jit
    def bits(flow, x, labels):
        def one(x, label):
            log_prob = fs.log_prob(flow, x, label, divergence=fs.divergence.Exact(), controller=controller)
            return fs.bits_per_dim(log_prob, x.size, bin_width=2 / LEVELS)

        return jax.vmap(one)(x, labels)

    values = np.asarray(bits(flow, dequantise(split.images, key), split.labels))
    return values.mean(), values.std() / np.sqrt(len(values))


def draw_picture(images: np.ndarray, file: Path) -> None:
    """A row of ten images per class."""
    columns = images.shape[1]
    figure, axes = plt.subplots(
        CLASSES, columns, squeeze=False, figsize=(7, 7), gridspec_kw={"wspace": 0.08, "hspace": 0.08}
    )
    for row, images_of_class in zip(axes, images, strict=True):
        for axis, image in zip(row, images_of_class, strict=True):
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=LEVELS - 1, interpolation="bicubic")
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)


# --- the run --------------------------------------------------------------------------------------


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="everything tiny: a check that it runs")
    parser.add_argument("--checkpoint", type=Path, help="a saved flow of the same size: skip training")
    parser.add_argument("--out", type=Path, default=Path("outputs/digits"), help="folder for what is written")
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL
    # So small, a program takes longer to optimise than to run.
    jax.config.update("jax_disable_most_optimizations", options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    model_key, train_key, classifier_key, sample_key, noise_key = jax.random.split(jax.random.key(0), 5)
    tuning_key = jax.random.fold_in(noise_key, 1)
    train, held_out = load()

    flow = make_flow(size, model_key)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(flow, eqx.is_inexact_array)))
    print(f"{len(train.labels)} images to train on, {len(held_out.labels)} held out; {parameters:,} parameters")
    if options.checkpoint is None:
        flow = train_flow(flow, train, size, train_key, options.out / "flow.eqx")
    else:
        flow = eqx.tree_deserialise_leaves(options.checkpoint, flow)
    trained = time.perf_counter()

    classifier = train_classifier(train, size.classifier_steps, classifier_key)
    classify = eqx.filter_jit(jax.vmap(lambda image: (classifier.features(image), jnp.argmax(classifier(image)))))
    train_features, _ = classify(train.images)
    held_out_features, guesses = classify(held_out.images)
    real_accuracy = float(jnp.mean(guesses == held_out.labels))

    # Labels 0, ..., 9, 0, ..., 9, ...
    labels = jnp.arange(size.samples) % CLASSES
    print(f"\n{'solver':<31}{'NFE':>6}{'ms/image':>10}{'Frechet':>9}{'accuracy':>10}{'nearest':>9}")
    best, best_images = np.inf, None
    for name, setting, nfe in solver_settings(flow, train, size, tuning_key):
        draw = partial(fs.sample, flow, LIKE, num=size.samples, key=sample_key, args=labels, **setting)
        jax.block_until_ready(draw())  # the first call compiles
        start = time.perf_counter()
        images = quantise(jax.block_until_ready(draw()))
        milliseconds = 1e3 * (time.perf_counter() - start) / size.samples
        nfe = mean_evaluations(flow, setting, noise_key) if nfe is None else nfe
        features, guesses = classify(images)
        frechet = frechet_distance(features, held_out_features)
        accuracy = float(jnp.mean(guesses == labels))
        nearest = nearest_distance(images, train.images)
        print(f"{name:<31}{nfe:>6.0f}{milliseconds:>10.2f}{frechet:>9.2f}{accuracy:>10.3f}{nearest:>9.1f}")
        if frechet < best:
            best, best_images = frechet, images
    floor = frechet_distance(train_features, held_out_features)
    nearest = nearest_distance(held_out.images, train.images)
    print(f"{'real digits':<31}{'':>16}{floor:>9.2f}{real_accuracy:>10.3f}{nearest:>9.1f}")
    sampled = time.perf_counter()
    print(
        "\nFrechet: distance to held-out digits in the classifier's features (real: training images)\n"
        "accuracy: of the classifier on the wanted labels (real: held-out images)\n"
        "nearest: distance to the nearest training image, in levels of 0 to 16 (real: held-out images)"
    )

    subset = Split(held_out.images[: size.likelihoods], held_out.labels[: size.likelihoods])
    bits, error = bits_per_dimension(flow, subset, noise_key)
    uniform = np.log2(LEVELS)
    print(f"{size.likelihoods} held-out digits: {bits:.3f} +- {error:.3f} bits per pixel (uniform: {uniform:.3f})")
    file = options.out / "samples.png"
    by_class = np.asarray(best_images).reshape(-1, CLASSES, *LIKE.shape).swapaxes(0, 1)
    draw_picture(by_class[:, : min(10, by_class.shape[1])], file)
    done = time.perf_counter()
    print(f"picture: {file}")
    print(
        f"total {done - began:.0f} s: training {trained - began:.0f} s, eleven solvers and the judge "
        f"{sampled - trained:.0f} s, likelihood and picture {done - sampled:.0f} s"
    )


if __name__ == "__main__":
    main()
