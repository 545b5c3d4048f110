"""Do all objectives learn the same law? The log-density of trained flows against the exact one.

    python tests/benchmarks/objectives.py            # about 6 minutes on 2 CPU cores
    python tests/benchmarks/objectives.py --smoke

Data is a mixture of five Gaussians in four dimensions, whose density is known. The same network is trained on it by
each objective, with the same number of steps, and the log-density of its flow is compared with the exact one at the
same fresh draws of the data: the mean difference is the Kullback-Leibler divergence of the flow from the data.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pages import markdown, page_options, show

import flowsolve as fs
from flowsolve import couplings, losses, paths, predictions, sources, times, weights

HEADING = """\
# Objectives

One network (a residual MLP of width 128) trained on a mixture of five Gaussians in four dimensions by each objective,
{steps:,} steps of {batch} fresh examples, Adam, the power-function average of width 0.1. The log-density of its flow
against the exact one, at {held_out} fresh draws, in nats per dimension: the mean difference (the Kullback-Leibler
divergence of the flow from the data, with its standard error) and the mean absolute difference. Bold: a divergence
above 0.05.

    python tests/benchmarks/objectives.py
"""

DIM, COMPONENTS = 4, 5
LIKE = jax.ShapeDtypeStruct((DIM,), jnp.float32)


class Objective(NamedTuple):
    """A path, what the network predicts, a loss; with a preconditioner or another source."""

    path: paths.AbstractPath
    prediction: predictions.AbstractPrediction
    loss: losses.Regression
    preconditioner: fs.EDMPreconditioner | None = None
    source: sources.AbstractSource = sources.Normal()


COUPLED = sources.CoupledNormal()
OBJECTIVES = {
    "velocity, independent pairs": Objective(
        paths.Linear(), predictions.Velocity(), losses.Regression(times.LogitNormal())
    ),
    "velocity, assignment": Objective(
        paths.Linear(),
        predictions.Velocity(),
        losses.Regression(times.LogitNormal(), coupling=couplings.Assignment()),
        source=COUPLED,
    ),
    "velocity, Sinkhorn": Objective(
        paths.Linear(),
        predictions.Velocity(),
        losses.Regression(times.LogitNormal(), coupling=couplings.Sinkhorn()),
        source=COUPLED,
    ),
    "score matching, weight sigma^2": Objective(
        paths.VP(), predictions.Noise(), losses.Regression(target=predictions.Score(), weight=weights.SNR())
    ),
    "v, min-SNR": Objective(
        paths.Cosine(), predictions.V(), losses.Regression(times.Stratified(times.Uniform()), weight=weights.MinSNR())
    ),
    "EDM": Objective(
        paths.EDM(),
        predictions.Data(),
        losses.Regression(times.LogNormal(), weight=weights.EDM(1.0)),
        fs.EDMPreconditioner(1.0),
    ),
}


def mixture() -> fs.testing.GaussianMixture:
    """Well apart, of different widths, with about unit variance in all."""
    rng = np.random.default_rng(0)
    means = 1.1 * rng.normal(size=(COMPONENTS, DIM))
    return fs.testing.GaussianMixture(rng.uniform(0.5, 1, COMPONENTS), means, rng.uniform(0.05, 0.3, COMPONENTS))


def train(objective: Objective, options: argparse.Namespace) -> fs.AbstractFlow:
    """The averaged flow after training."""
    network = fs.nn.ResidualMLP(LIKE, width=options.width, depth=3, key=jax.random.key(0))
    path, prediction, loss, preconditioner, source = objective
    flow = fs.Flow(network, path, prediction, preconditioner, source)
    oracle = mixture()

    @jax.jit
    def draw(n: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), n), options.batch)
        return jax.vmap(oracle.sample_data)(keys)

    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, options.steps // 20, options.steps)
    settings = {"steps": options.steps, "key": jax.random.key(2), "ema": fs.averages.PowerFunction(0.1)}
    batches = map(draw, np.arange(options.steps))
    for state in fs.training.fit(loss, flow, batches, optax.adam(rate), **settings, every=500, progress=False):
        flow = state.ema_flow
    return flow


def row(name: str, options: argparse.Namespace) -> list[str]:
    start = time.perf_counter()
    flow = train(OBJECTIVES[name], options)
    seconds = time.perf_counter() - start
    oracle = mixture()
    x = jax.vmap(oracle.sample_data)(jax.random.split(jax.random.key(3), options.held_out))
    exact = jax.vmap(lambda x: oracle.log_prob(paths.Linear(), 0.0, x))(x)
    difference = np.asarray(exact - fs.batched(fs.log_prob)(flow, x), float) / DIM
    divergence = difference.mean()
    error = difference.std() / np.sqrt(len(x))
    shown = f"{divergence:.4f} ± {error:.4f}"
    return [
        name,
        type(flow.path).__name__,
        shown if divergence <= 0.05 else f"**{shown}**",
        f"{np.abs(difference).mean():.4f}",
        f"{statistics.median(np.abs(difference)):.4f}",
        f"{seconds:.0f}",
    ]


def main() -> None:
    parser = page_options(__doc__.splitlines()[0])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    options = parser.parse_args()
    options.steps, options.batch, options.width, options.held_out = 6_000, 256, 128, 1_000
    if options.smoke:
        options.steps, options.batch, options.width, options.held_out = 20, 16, 16, 4
        options.objectives = options.objectives[:2]
    rows = []
    for name in options.objectives:
        rows.append(row(name, options))
        print(*rows[-1], sep=" | ", flush=True)
    header = ["objective", "path", "mean", "mean absolute", "median absolute", "seconds of training"]
    show("objectives", HEADING.format(**vars(options)), [markdown(header, rows)], options)


if __name__ == "__main__":
    main()
