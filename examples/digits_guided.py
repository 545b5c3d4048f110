"""Handwritten digits, guided: what a scale of guidance buys in accuracy, and what it costs in diversity.

    python examples/digits_guided.py            # about 2 minutes on 2 CPU cores
    python examples/digits_guided.py --smoke    # everything tiny: a check that it runs

Needs `pip install "flowsolve[examples]"`. Data and classifier are those of `digits.py` beside it, batches those of
`latent_digits.py`. One flow is trained, with every tenth label dropped; each row of the table is another wrapper around
it, sampled from the same noise. Expect about:

                           accuracy  Frechet  precision  recall  spread
    scale 0                   0.078    14.32      0.750   0.894    42.0
    scale 1                   0.999     2.07      0.958   0.786    32.0
    scale 1.25                0.999     1.89      0.964   0.739    32.3
    scale 1.5                 1.000     2.14      0.972   0.722    32.8
    scale 2                   1.000     2.58      0.972   0.706    34.3
    scale 3                   1.000     3.39      0.942   0.678    37.4
    scale 5                   1.000     6.97      0.886   0.739    41.6
    3 for 0.2 < t < 0.8       1.000     2.71      0.953   0.667    36.1
    3, rescaled               1.000     3.01      0.942   0.703    37.3
    3, projected (APG)        1.000     3.52      0.939   0.664    37.7
    3, CFG-Zero*              1.000     3.59      0.942   0.656    37.2
    real, training            1.000     1.50      0.936   0.911    37.0

(Scale 0 has no label, scale 1 no guidance. A little guidance helps; more of it gives up recall, then overshoots.)

Written to `outputs/digits_guided/`: the same noises at several scales, and the curves, guided.png.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

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
SCALES = (0.0, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
PICTURED = (0.0, 1.0, 2.0, 5.0)


class Size(NamedTuple):
    """How much of everything."""

    steps: int
    batch: int
    width: int
    classifier_steps: int
    samples: int  # of each row, a multiple of 10
    solver_steps: int


FULL = Size(steps=1_800, batch=256, width=256, classifier_steps=1_500, samples=1_000, solver_steps=16)
SMOKE = Size(steps=4, batch=16, width=16, classifier_steps=4, samples=20, solver_steps=3)


def train_flow(train: Split, size: Size, key: jax.Array) -> fs.AbstractFlow:
    """The flow with averaged weights; a label is dropped with probability 0.1, each example for itself."""
    network_key, batch_key, loss_key = jax.random.split(key, 3)
    network = eqx.filter_jit(fs.nn.ResidualMLP)(
        LIKE, width=size.width, depth=3, num_classes=CLASSES, dropout=0.2, hidden=2 * size.width, key=network_key
    )
    flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
    dropout = fs.losses.ConditionDropout(0.1, jnp.asarray(network.null_label))
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, size.steps // 20, size.steps)
    *_, state = fs.training.fit(
        fs.losses.Regression(times=fs.times.LogitNormal(std=1.5), dropout=dropout),
        flow,
        training_batches(train, size, batch_key),
        optax.adamw(rate, weight_decay=0.01),
        steps=size.steps,
        key=loss_key,
        ema=0.99,
    )
    return state.ema_flow


def guided_flows(flow: fs.AbstractFlow) -> dict[str, fs.AbstractFlow]:
    """The rows of the table: flows around one flow."""
    null = jnp.asarray(flow.network.null_label)
    rows = {f"scale {scale:g}": fs.guidance.ClassifierFree(flow, scale, null) for scale in SCALES}
    middle = fs.guidance.Interval(3.0, 0.2, 0.8)
    return rows | {
        "3 for 0.2 < t < 0.8": fs.guidance.ClassifierFree(flow, middle, null),
        "3, rescaled": fs.guidance.ClassifierFree(flow, 3.0, null, rule=fs.guidance.Rescaled(0.7)),
        "3, projected (APG)": fs.guidance.ClassifierFree(flow, 3.0, null, rule=fs.guidance.Projected()),
        "3, CFG-Zero*": fs.guidance.ClassifierFree(flow, 3.0, null, rule=fs.guidance.ZeroStar()),
    }


class Judged(NamedTuple):
    """A row of the table."""

    accuracy: float
    frechet: float
    precision: float
    recall: float
    spread: float


def spread(images: np.ndarray, labels: np.ndarray) -> float:
    """The root mean square distance between two images of one class, in levels, mean over classes."""
    of_class = [np.asarray(images)[np.asarray(labels) == label].reshape(-1, 64) for label in range(CLASSES)]
    return float(np.mean([np.sqrt(2 * np.var(rows, axis=0, ddof=1).sum()) for rows in of_class]))


def draw_picture(rows: dict[str, np.ndarray], judged: dict[str, Judged], file: Path) -> None:
    """Left the same ten noises, one a class, at several scales; right the curves over the scale."""
    figure = plt.figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.55, 1))
    axes = left.subplots(len(PICTURED), 1, squeeze=False)[:, 0]
    for axis, scale in zip(axes, PICTURED, strict=True):
        images = rows[f"scale {scale:g}"][: 2 * CLASSES].reshape(2, CLASSES, 8, 8)
        strip = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1))).transpose(0, 2, 1, 3).reshape(20, 10 * CLASSES)
        axis.imshow(strip, cmap="gray_r", vmin=0, vmax=LEVELS - 1)
        axis.set(xticks=[], yticks=[], ylabel=f"scale {scale:g}")
    axes[0].set_title("two noises of each class 0, ..., 9, the same at all scales")
    curves = right.subplots(3, 1, sharex=True)
    for axis, name in zip(curves, ("accuracy", "frechet", "recall"), strict=True):
        values = [getattr(judged[f"scale {scale:g}"], name) for scale in SCALES]
        axis.plot(SCALES, values, "o-", color="tab:blue")
        axis.axhline(getattr(judged["real, training"], name), color="0.6", linestyle="--")
        axis.set_ylabel(name.replace("frechet", "Frechet distance"))
    curves[0].set_title("dashed: training images")
    curves[-1].set_xlabel("scale of guidance")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="everything tiny: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/digits_guided"), help="folder for what is written")
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL
    jax.config.update("jax_disable_most_optimizations", options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    train_key, classifier_key, sample_key = jax.random.split(jax.random.key(0), 3)
    train, held_out = load()
    classifier = train_classifier(train, size.classifier_steps, classifier_key)
    classify = jax.jit(jax.vmap(lambda image: (classifier.features(image), jnp.argmax(classifier(image)))))
    real_features = classify(held_out.images)[0]
    real = fs.metrics.Moments.of(real_features)
    flow = train_flow(train, size, train_key)
    trained = time.perf_counter()

    # Labels 0, ..., 9, 0, ..., 9, ...
    labels = jnp.arange(size.samples) % CLASSES
    judged, pictures = {}, {}
    print(f"\n{'':<22}{'accuracy':>9}{'Frechet':>9}{'precision':>11}{'recall':>8}{'spread':>8}")

    def row(name: str, images: jax.Array, wanted: jax.Array) -> None:
        features, guesses = classify(images)
        near = fs.metrics.precision_recall(real_features, features[: len(real_features)])
        judged[name] = found = Judged(
            float(jnp.mean(guesses == wanted)),
            float(fs.metrics.frechet_distance(real, fs.metrics.Moments.of(features))),
            float(near.precision),
            float(near.recall),
            spread(np.asarray(images), np.asarray(wanted)),
        )
        pictures[name] = np.asarray(images)
        print(
            f"{name:<22}{found.accuracy:>9.3f}{found.frechet:>9.2f}{found.precision:>11.3f}{found.recall:>8.3f}"
            f"{found.spread:>8.1f}",
            flush=True,
        )

    settings = {"solver": fs.solvers.UniPC(2), "grid": fs.grids.Uniform(size.solver_steps)}
    for name, guided in guided_flows(flow).items():
        x = fs.sample(guided, LIKE, num=size.samples, key=sample_key, args=labels, **settings)
        row(name, quantise(x), labels)
    row("real, training", train.images, train.labels)
    print(
        f"\naccuracy: of the classifier on the wanted labels\nFrechet, precision, recall: against {len(real_features)} "
        "held-out digits in the classifier's features\nspread: root mean square distance between two images of a "
        "class, in levels of 0 to 16"
    )
    file = options.out / "guided.png"
    draw_picture(pictures, judged, file)
    done = time.perf_counter()
    print(f"picture: {file}\ntotal {done - began:.0f} s: training {trained - began:.0f} s")


if __name__ == "__main__":
    main()
