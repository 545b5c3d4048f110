"""Handwritten digits in few steps: one teacher, distilled in three ways.

    python examples/distill_digits.py            # 15 minutes on 2 CPU cores that did other work too
    python examples/distill_digits.py --smoke    # everything tiny: a check that it runs

Needs `pip install "flowsolve[examples]"`. Data and classifier are those of `digits.py` beside it, batches those of
`latent_digits.py`. Every student begins as the teacher. Expect about:

                                 NFE  accuracy  Frechet
    teacher, Euler                50     1.000     2.28
    teacher, Euler                 1     1.000    12.78
    teacher, Euler                 2     1.000     4.97
    teacher, Euler                 4     1.000     2.85
    reflow, 2 rounds, Euler        1     1.000     2.61
    reflow, 2 rounds, Euler        2     1.000     2.70
    reflow, 2 rounds, Euler        4     1.000     2.72
    consistency                    1     1.000     3.69
    consistency                    2     1.000     3.16
    consistency                    4     1.000     3.78
    DMD2                           1     1.000     4.73
    DMD2                           2     1.000     3.51
    DMD2                           4     0.999     6.56

    curvature of the paths, teacher and each round: 0.0681, 0.0032, 0.0017

(One step of the teacher gives the mean of a class, which the classifier knows well: the Frechet distance tells. The
student of DMD2 has one fake for all of its four times, which sees their samples together: while those of one step are
too much alike, those of four make up for it and overshoot.)

Written to `outputs/distill_digits/`: the same noises sampled by the teacher and by its students, samples.png.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import CLASSES, Split, load, quantise, train_classifier
from latent_digits import training_batches
from meanflow_digits import draw_picture

import flowsolve as fs

LIKE = jax.ShapeDtypeStruct((8, 8), jnp.float32)  # one example
STEPS = (1, 2, 4)  # of the students
TIMES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of a student of DMD2


class Size(NamedTuple):
    """How much of everything."""

    steps: int  # of training the teacher
    rounds: int  # of reflow
    reflow_steps: int  # in each
    pairs: int  # in each, a multiple of 10
    consistency_steps: int
    matching_steps: int  # of DMD2
    batch: int
    width: int
    classifier_steps: int
    samples: int  # of each row, a multiple of 10


FULL = Size(1_800, 2, 1_000, 10_000, 800, 1_500, 256, 256, classifier_steps=1_500, samples=1_000)
SMOKE = Size(4, 1, 2, 20, 2, 3, 16, 16, classifier_steps=4, samples=20)


def make_flow(size: Size, key: jax.Array) -> fs.Flow:
    """An untrained flow."""
    network = eqx.filter_jit(fs.nn.ResidualMLP)(
        LIKE, width=size.width, depth=3, num_classes=CLASSES, dropout=0.2, hidden=2 * size.width, key=key
    )
    return fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())


def fitted(
    loss: eqx.Module,
    flow: fs.AbstractFlow,
    batches: Iterator,
    optimiser: optax.GradientTransformation,
    steps: int,
    key: jax.Array,
) -> fs.AbstractFlow:
    """The flow with averaged weights."""
    *_, state = fs.training.fit(loss, flow, batches, optimiser, steps=steps, key=key, ema=0.99)
    return state.ema_flow


def adamw(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps), weight_decay=0.01)


# --- three ways --------------------------------------------------------------------------------------


def reflowed(teacher: fs.Flow, size: Size, key: jax.Array) -> tuple[fs.Flow, list[float]]:
    """Reflow: a flow of the pairs that the flow before makes, and how curved each flow's paths are."""
    flow, curvatures = teacher, []
    labels = jnp.arange(size.pairs) % CLASSES

    def curvature(flow: fs.AbstractFlow) -> float:
        some = labels[: min(1_000, size.pairs)]
        return float(fs.reflow.curvature(flow, LIKE, num=len(some), key=key, args=some))

    curvatures.append(curvature(flow))
    for n in range(size.rounds):
        key_pairs, key_batches, key_loss = jax.random.split(jax.random.fold_in(key, n), 3)
        pairs = fs.reflow.pairs(flow, LIKE, num=size.pairs, key=key_pairs, args=labels)
        # It begins as the flow before, on pairs of which neither end is drawn anew.
        flow = fs.Flow(flow.network, flow.path, flow.prediction, source=fs.sources.CoupledNormal())
        batches = fs.data.Batches(pairs, labels, batch_size=size.batch, key=key_batches)
        optimiser = adamw(1e-3, size.reflow_steps)
        flow = fitted(fs.losses.Regression(), flow, iter(batches), optimiser, size.reflow_steps, key_loss)
        curvatures.append(curvature(flow))
    return flow, curvatures


def consistent(teacher: fs.Flow, train: Split, size: Size, key: jax.Array) -> fs.AbstractFlow:
    """Consistency distillation: f at x_t is f of where the teacher goes from there in one step."""
    key_batches, key_loss = jax.random.split(key)
    loss = fs.losses.Consistency(fs.times.Tightening(2.0, fs.times.Uniform()), teacher=teacher, weight=None)
    batches, optimiser = iter(training_batches(train, size, key_batches)), adamw(5e-4, size.consistency_steps)
    return fitted(loss, teacher, batches, optimiser, size.consistency_steps, key_loss)


def matched(teacher: fs.Flow, train: Split, size: Size, key: jax.Array) -> fs.AbstractFlow:
    """DMD2: the student's samples move to where the teacher finds them likelier than a flow of these samples does."""
    key_batches, key_loss = jax.random.split(key)
    loss = fs.distillation.DMD2(teacher, ts=TIMES, start=fs.distillation.SimulatedSDE(), every=2)
    optimiser = loss.optimiser(student=optax.adam(2e-4, b1=0.0), fake=optax.adam(5e-4, b1=0.0))
    both = fs.distillation.Distillation(teacher, teacher)
    batches = iter(training_batches(train, size, key_batches))
    return fitted(loss, both, batches, optimiser, size.matching_steps, key_loss).student


# --- the run -----------------------------------------------------------------------------------------


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="everything tiny: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/distill_digits"), help="folder for what is written")
    parser.add_argument("--teacher", type=Path, help="a teacher saved by an earlier run: skip its training")
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL
    jax.config.update("jax_disable_most_optimizations", options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    keys = jax.random.split(jax.random.key(0), 8)
    train, held_out = load()
    classifier = train_classifier(train, size.classifier_steps, keys[0])
    classify = jax.jit(jax.vmap(lambda image: (classifier.features(image), jnp.argmax(classifier(image)))))
    real = fs.metrics.Moments.of(classify(held_out.images)[0])

    teacher = make_flow(size, keys[1])
    if options.teacher is None:
        matching = fs.losses.Regression(times=fs.times.LogitNormal(std=1.5))
        batches = iter(training_batches(train, size, keys[2]))
        teacher = fitted(matching, teacher, batches, adamw(2e-3, size.steps), size.steps, keys[3])
        eqx.tree_serialise_leaves(options.out / "teacher.eqx", teacher)
    else:
        teacher = eqx.tree_deserialise_leaves(options.teacher, teacher)
    times = {"teacher": time.perf_counter() - began}
    labels = jnp.arange(size.samples) % CLASSES  # 0, ..., 9, 0, ..., 9, ...
    pictures = {}
    print(f"\n{'':<28}{'NFE':>4}{'accuracy':>10}{'Frechet':>9}")

    def row(name: str, flow: fs.AbstractFlow, solver: diffrax.AbstractSolver, steps: int) -> None:
        settings = {"solver": solver, "grid": fs.grids.Uniform(steps)}
        images = quantise(fs.sample(flow, LIKE, num=size.samples, key=keys[7], args=labels, **settings))
        features, guesses = classify(images)
        frechet = float(fs.metrics.frechet_distance(real, fs.metrics.Moments.of(features)))
        if steps in (1, 50):
            pictures[f"{name}, {steps} step{'s' if steps > 1 else ''}"] = np.asarray(images)
        print(f"{name:<28}{steps:>4}{float(jnp.mean(guesses == labels)):>10.3f}{frechet:>9.2f}", flush=True)

    for steps in (50, *STEPS):
        row("teacher, Euler", teacher, diffrax.Euler(), steps)
    start = time.perf_counter()
    flow, curvatures = reflowed(teacher, size, keys[4])
    times["reflow"] = time.perf_counter() - start
    for steps in STEPS:
        row(f"reflow, {size.rounds} rounds, Euler", flow, diffrax.Euler(), steps)
    for name, distil, key in (("consistency", consistent, keys[5]), ("DMD2", matched, keys[6])):
        start = time.perf_counter()
        student = distil(teacher, train, size, key)
        times[name] = time.perf_counter() - start
        for steps in STEPS:
            row(name, student, fs.solvers.ConsistencySampling(), steps)
    print(
        f"\ncurvature of the paths, teacher and each round: {', '.join(f'{c:.4f}' for c in curvatures)}\naccuracy: of "
        "the classifier on the wanted labels\nFrechet: distance to held-out digits in the classifier's features"
    )
    file = options.out / "samples.png"
    draw_picture(pictures, file)
    print(f"picture: {file}\nseconds: {', '.join(f'{name} {seconds:.0f}' for name, seconds in times.items())}")


if __name__ == "__main__":
    main()
