"""Handwritten digits in one step: a flow map learnt from scratch, without a teacher.

    python examples/meanflow_digits.py            # about 5 minutes on 2 CPU cores
    python examples/meanflow_digits.py --smoke    # everything tiny: a check that it runs

Needs `pip install "flowsolve[examples]"`. Data and classifier are those of `digits.py` beside it, batches those of
`latent_digits.py`. A network of two times is trained as a flow map by MeanFlow, and once more as a flow, with the same
batches and number of steps. Expect about:

                                       NFE  accuracy  Frechet
    MeanFlow, 1 jump                     1     1.000     5.52
    MeanFlow, 2 jumps                    2     1.000     2.21
    MeanFlow, 4 jumps                    4     1.000     2.52
    MeanFlow, 50 Euler steps            50     0.999     3.05
    flow matching, 1 Euler step          1     1.000    12.91
    flow matching, 4 Euler steps         4     1.000     2.75
    flow matching, 50 Euler steps       50     1.000     2.08
    real, training                             1.000     1.49

(One step of flow matching gives the mean of a class, which the classifier knows well: the Frechet distance tells.)

Written to `outputs/meanflow_digits/`: the same noises in 1, 2 and 4 jumps and in 50 steps of both, samples.png.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from digits import CLASSES, LEVELS, Split, load, quantise, train_classifier
from latent_digits import training_batches

import flowsolve as fs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LIKE = jax.ShapeDtypeStruct((8, 8), jnp.float32)  # one example


class Size(NamedTuple):
    """How much of everything."""

    steps: int
    batch: int
    width: int
    classifier_steps: int
    samples: int  # of each row, a multiple of 10


FULL = Size(steps=2_400, batch=256, width=256, classifier_steps=1_500, samples=1_000)
SMOKE = Size(steps=4, batch=16, width=16, classifier_steps=4, samples=20)


def make_flow_map(size: Size, key: jax.Array) -> fs.flowmaps.FlowMap:
    """An untrained network of two times, told them as t and t - r."""
    network = eqx.filter_jit(fs.nn.ResidualMLP)(
        LIKE,
        width=size.width,
        depth=3,
        num_classes=CLASSES,
        dropout=0.2,
        hidden=2 * size.width,
        time_embedding=fs.nn.IntervalEmbedding(),
        key=key,
    )
    return fs.flowmaps.FlowMap(network, fs.paths.Linear())


def train_with(loss: eqx.Module, train: Split, size: Size, key: jax.Array) -> fs.flowmaps.FlowMap:
    """The flow map with averaged weights."""
    network_key, batch_key, loss_key = jax.random.split(key, 3)
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, size.steps // 20, size.steps)
    *_, state = fs.training.fit(
        loss,
        make_flow_map(size, network_key),
        training_batches(train, size, batch_key),
        optax.adamw(rate, weight_decay=0.01),
        steps=size.steps,
        key=loss_key,
        ema=0.99,
    )
    return state.ema_flow


def draw_picture(rows: dict[str, np.ndarray], file: Path) -> None:
    """The same twenty noises, two of each class, sampled in each way."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(7, 1.7 * len(rows)), layout="constrained")
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        grid = images[: 2 * CLASSES].reshape(2, CLASSES, 8, 8)
        strip = np.pad(grid, ((0, 0), (0, 0), (1, 1), (1, 1))).transpose(0, 2, 1, 3).reshape(20, 10 * CLASSES)
        axis.imshow(strip, cmap="gray_r", vmin=0, vmax=LEVELS - 1)
        axis.set(xticks=[], yticks=[])
        axis.set_title(name, fontsize=10)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="everything tiny: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/meanflow_digits"), help="folder for what is written")
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL
    jax.config.update("jax_disable_most_optimizations", options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    train_key, classifier_key, sample_key = jax.random.split(jax.random.key(0), 3)
    train, held_out = load()
    classifier = train_classifier(train, size.classifier_steps, classifier_key)
    classify = jax.jit(jax.vmap(lambda image: (classifier.features(image), jnp.argmax(classifier(image)))))
    real = fs.metrics.Moments.of(classify(held_out.images)[0])

    # The same network, the same batches and number of steps, trained as a flow and as a flow map.
    times = fs.times.LogitNormal(std=1.5)
    matching = train_with(fs.losses.Regression(times=times), train, size, train_key)
    mean_flow = fs.losses.MeanFlow(fs.times.TimePairs(times, equal=0.5))
    flow_map = train_with(mean_flow, train, size, train_key)
    trained = time.perf_counter()

    labels = jnp.arange(size.samples) % CLASSES  # 0, ..., 9, 0, ..., 9, ...
    print(f"\n{'':<34}{'NFE':>4}{'accuracy':>10}{'Frechet':>9}")
    pictures = {}

    def row(name: str, nfe: int, images: jax.Array, wanted: jax.Array) -> None:
        features, guesses = classify(images)
        frechet = float(fs.metrics.frechet_distance(real, fs.metrics.Moments.of(features)))
        pictures[name] = np.asarray(images)
        print(f"{name:<34}{nfe or '':>4}{float(jnp.mean(guesses == wanted)):>10.3f}{frechet:>9.2f}", flush=True)

    def sample(flow: fs.AbstractFlow, solver: diffrax.AbstractSolver, steps: int) -> jax.Array:
        settings = {"solver": solver, "grid": fs.grids.Uniform(steps)}
        return quantise(fs.sample(flow, LIKE, num=size.samples, key=sample_key, args=labels, **settings))

    for steps in (1, 2, 4):
        name = f"MeanFlow, {steps} jump{'s' if steps > 1 else ''}"
        row(name, steps, sample(flow_map, fs.solvers.Jump(), steps), labels)
    row("MeanFlow, 50 Euler steps", 50, sample(flow_map, diffrax.Euler(), 50), labels)
    for steps in (1, 4, 50):
        name = f"flow matching, {steps} Euler step{'s' if steps > 1 else ''}"
        row(name, steps, sample(matching, diffrax.Euler(), steps), labels)
    kept = [name for name in pictures if name.startswith("MeanFlow") or "50" in name]
    row("real, training", 0, train.images, train.labels)
    print(
        "\naccuracy: of the classifier on the wanted labels\nFrechet: distance to held-out digits in the classifier's "
        "features"
    )
    file = options.out / "samples.png"
    draw_picture({name: pictures[name] for name in kept}, file)
    done = time.perf_counter()
    print(f"picture: {file}\ntotal {done - began:.0f} s: training {trained - began:.0f} s")


if __name__ == "__main__":
    main()
