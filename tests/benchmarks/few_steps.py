"""How good is a sample of one or two network evaluations? And what does a step of training for it cost?

    python tests/benchmarks/few_steps.py            # half an hour on 2 CPU cores that did other work too
    python tests/benchmarks/few_steps.py --smoke

`objective`: one network is trained on a ring of eight Gaussians in the plane by each objective, with the same number of
steps, batches, optimiser and average; its samples are compared with draws of the data by the Wasserstein distance.
Reference is flow matching with 100 steps of Euler.

`cost`: the time of a compiled gradient of each loss over that of flow matching, interleaved (see timing.py).
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from pages import markdown, page_options, show
from timing import interleaved, ratio

import flowsolve as fs
from flowsolve import losses, times
from flowsolve.flowmaps import FlowMap

HEADING = """\
# Few steps

    python tests/benchmarks/few_steps.py
"""

OBJECTIVE = """\
## Objectives

A ring of eight Gaussians in the plane, of radius 1.4 and standard deviation 0.1. A residual MLP of width 128 is trained
by each objective, {steps:,} steps of {batch} fresh examples, Adam, the power-function average of width 0.1. The
Wasserstein distance of {samples:,} samples to as many draws of the data, the mean of {repeats} such pairs, and over
that of the reference, flow matching with 100 steps. Two sets of draws of the data are {floor:.3f} apart. Bold: more
than 1.5 of the reference.
"""

COST = """\
## A step of training

Milliseconds of the compiled gradient of each loss at one network, with batches of 256, the median of {rounds}
interleaved rounds, and over that of flow matching.
"""

LIKE = jax.ShapeDtypeStruct((2,), jnp.float32)
ANGLES = 2 * np.pi * np.arange(8) / 8
DATA = fs.testing.GaussianMixture(np.ones(8), 1.4 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1), 0.1**2)


def draws(key: Array, num: int) -> Array:
    return _draws(jax.random.split(key, num))


_draws = jax.jit(jax.vmap(DATA.sample_data))


class Objective(NamedTuple):
    """The losses of equal parts of the training, the flow that they train around a network, and how it is sampled."""

    stages: tuple[eqx.Module, ...]
    flow: Callable[[fs.nn.ResidualMLP], fs.AbstractFlow]
    solver: diffrax.AbstractSolver
    evaluations: tuple[int, ...]


def flow_map(network: fs.nn.ResidualMLP) -> FlowMap:
    return FlowMap(network, fs.paths.Linear())


def plain(network: fs.nn.ResidualMLP) -> fs.Flow:
    return fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())


REFERENCE = "flow matching, Euler"
PAIRS = times.TimePairs(times.LogitNormal(-0.4, 1.0))
JUMP, EULER = fs.solvers.Jump(), diffrax.Euler()
OBJECTIVES = {
    REFERENCE: Objective((losses.Regression(),), flow_map, EULER, (100, 2, 1)),
    "MeanFlow": Objective((losses.MeanFlow(PAIRS),), flow_map, JUMP, (1, 2)),
    "MeanFlow, power 0": Objective((losses.MeanFlow(PAIRS, power=0.0),), flow_map, JUMP, (1, 2)),
    "MeanFlow, predicted tangent": Objective((losses.MeanFlow(PAIRS, predicted_tangent=True),), flow_map, JUMP, (1, 2)),
    "Shortcut": Objective((losses.Shortcut(),), flow_map, JUMP, (1, 2)),
    "moment matching, groups of 4": Objective((losses.InductiveMomentMatching(),), flow_map, JUMP, (1, 2)),
    "consistency (ECT), 8 stages": Objective(
        tuple(losses.Consistency(times.Tightening(n, times.LogNormal(-0.45, 1.6), b=0.5)) for n in range(8)),
        plain,
        fs.solvers.ConsistencySampling(),
        (1, 2),
    ),
}


def train(objective: Objective, options: argparse.Namespace) -> fs.AbstractFlow:
    network = fs.nn.ResidualMLP(
        LIKE, width=options.width, depth=3, time_embedding=fs.nn.IntervalEmbedding(), key=jax.random.key(0)
    )

    def batches() -> Iterator[Array]:
        for n in range(options.steps):
            yield draws(jax.random.fold_in(jax.random.key(1), n), options.batch)

    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, options.steps // 20, options.steps)
    state, drawn, optimiser = objective.flow(network), batches(), optax.adam(rate)
    for number, loss in enumerate(objective.stages, 1):
        *_, state = fs.training.fit(
            loss,
            state,
            drawn,
            optimiser,
            steps=round(options.steps * number / len(objective.stages)),
            key=jax.random.key(2) if number == 1 else None,
            ema=fs.averages.PowerFunction(0.1),
            every=500,
            progress=False,
        )
    return state.ema_flow


def distance(flow: fs.AbstractFlow, solver: diffrax.AbstractSolver, steps: int, options: argparse.Namespace) -> float:
    """The mean over pairs of samples and data."""
    found = []
    for n in range(options.repeats):
        x = fs.sample(
            flow, LIKE, num=options.samples, key=jax.random.key(10 + n), solver=solver, grid=fs.grids.Uniform(steps)
        )
        found.append(float(fs.metrics.wasserstein(x, draws(jax.random.key(20 + n), options.samples))))
    return statistics.mean(found)


def floor(options: argparse.Namespace) -> float:
    keys = [(jax.random.key(20 + n), jax.random.key(30 + n)) for n in range(options.repeats)]
    return statistics.mean(
        float(fs.metrics.wasserstein(*(draws(key, options.samples) for key in pair))) for pair in keys
    )


def objective_section(options: argparse.Namespace) -> str:
    rows, reference = [], None
    for name in options.objectives:
        objective = OBJECTIVES[name]
        trained = train(objective, options)
        for evaluations in objective.evaluations:
            found = distance(trained, objective.solver, evaluations, options)
            reference = found if reference is None else reference
            share = f"{found / reference:.2f}"
            share = f"**{share}**" if found > 1.5 * reference else share
            rows.append([name, str(evaluations), f"{found:.3f}", share])
            print(*rows[-1], sep=" | ", flush=True)
    header = ["objective", "evaluations", "Wasserstein", "over the reference"]
    return OBJECTIVE.format(**vars(options), floor=floor(options)) + "\n" + markdown(header, rows)


def cost_section(options: argparse.Namespace) -> str:
    x = draws(jax.random.key(1), 256)
    network = fs.nn.ResidualMLP(
        LIKE,
        width=options.cost_width,
        depth=3,
        time_embedding=fs.nn.IntervalEmbedding(),
        key=jax.random.key(0),
    )
    gradient = eqx.filter_jit(
        lambda loss, flow, x: eqx.filter_value_and_grad(lambda flow: loss(flow, x, key=jax.random.key(3))[0])(flow)
    )

    def step(objective: Objective) -> Callable[[], object]:
        flow = objective.flow(network)
        return lambda: jax.block_until_ready(gradient(objective.stages[-1], flow, x))

    steps = {name: step(objective) for name, objective in OBJECTIVES.items()}
    for call in steps.values():
        call()
    found = interleaved(steps, rounds=options.rounds)
    rows = [
        [name, f"{1e3 * statistics.median(found[name]):.2f}", f"{ratio(found, name, REFERENCE):.2f}"] for name in steps
    ]
    return COST.format(**vars(options)) + "\n" + markdown(["loss", "ms", "over flow matching"], rows)


def main() -> None:
    parser = page_options(__doc__.splitlines()[0])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--parts", nargs="+", choices=("objective", "cost"), default=["objective", "cost"])
    options = parser.parse_args()
    options.steps, options.batch, options.width, options.cost_width = 6_000, 256, 128, 256
    options.samples, options.repeats, options.rounds = 2_000, 5, 21
    if options.smoke:
        options.steps, options.batch, options.width, options.cost_width = 20, 16, 16, 16
        options.samples, options.repeats, options.rounds = 50, 1, 3
        options.objectives = options.objectives[:2]
    sections = {"objective": objective_section, "cost": cost_section}
    show("few_steps", HEADING, [sections[part](options) for part in options.parts], options)


if __name__ == "__main__":
    main()
