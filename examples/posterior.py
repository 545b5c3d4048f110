"""Posteriors: what do data say about the parameters of a simulator, and does the answer know its own errors?

    python examples/posterior.py            # about 6 minutes on 2 CPU cores
    python examples/posterior.py --smoke    # everything tiny: a check that it runs

Needs `pip install "flowsolve[examples]"`. Three simulators of Lueckmann et al. (2021), arXiv 2101.04653: a linear
Gaussian one, whose posterior is known, two moons, and SLCP, "simple likelihood, complex posterior". A flow over the
parameters, given the data, learns each posterior from simulated pairs (Wildberger et al. 2023, arXiv 2305.17161). Then,
over 1,000 new pairs: how far the coverage of its regions of highest density is off, and what is allowed; the mean
log-density that it gains on the prior, the exact gain, and what it is short by, in nats per dimension; and a two-sample
test (0.5 is best). Expect about:

    simulator        coverage off  allowed    gain   exact         short by    C2ST
    Gaussian linear         0.037    0.051   0.338   0.339   0.001 +- 0.000   0.506
    two moons               0.026    0.051   2.521   2.590   0.069 +- 0.007   0.541
    SLCP                    0.046    0.051   1.010   1.523   0.513 +- 0.019   0.780

(A posterior as narrow, four-fold and bent as that of SLCP takes a larger network and a longer training: what the flow
makes of it here is too broad, which coverage alone does not tell.)

Written to `outputs/posterior/`: coverage, and exact and learnt posteriors of one observation each, posterior.png.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax.scipy.special import gammaln
from jax.scipy.stats import norm
from scipy.stats import kstest, kstwo

import flowsolve as fs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ACCURATE = {"solver": diffrax.Tsit5(), "controller": diffrax.PIDController(rtol=1e-4, atol=1e-4)}
EARLY = fs.times.LogitNormal(mean=-1.5, std=1.5)  # times near the data, where a narrow posterior takes its shape


class Size(NamedTuple):
    """How much of everything."""

    steps: int
    batch: int
    width: int
    tests: int  # pairs of parameters and data, for coverage and densities
    candidates: int  # draws for the evidence of each
    observations: int  # for the two-sample test
    samples: int  # of each posterior
    judge_steps: int  # of the classifier


FULL = Size(
    steps=5_000, batch=256, width=128, tests=1_000, candidates=4_000, observations=5, samples=1_000, judge_steps=1_000
)
SMOKE = Size(steps=10, batch=16, width=16, tests=8, candidates=64, observations=1, samples=16, judge_steps=10)


# --- the three simulators ---------------------------------------------------------------------------


class Task(NamedTuple):
    """A simulator as published, and its exact posterior; functions of one example.

    `propose` draws a parameter and the probability with which to keep it: those kept are the posterior. The evidence
    p(x) is exp(log_mass(x)) times the mean of that probability.
    """

    dim: int
    from_normal: Callable  # a standard normal vector to a parameter of the prior
    simulate: Callable  # key, parameter -> data
    log_likelihood: Callable  # parameter, data -> ln p(x | theta)
    propose: Callable  # key, data -> parameter, probability
    log_mass: Callable  # data -> ln


def uniform(bound: float) -> Callable:
    """Standard normal numbers made uniform in [-bound, bound]."""
    return lambda z: bound * (2 * norm.cdf(z) - 1)


def within(theta: jax.Array, bound: float) -> jax.Array:
    return jnp.all(jnp.abs(theta) <= bound).astype(theta.dtype)


def gaussian_linear() -> Task:
    """Ten numbers of variance 0.1, seen through noise of variance 0.1."""

    def propose(key: jax.Array, x: jax.Array) -> tuple:
        return 0.5 * x + math.sqrt(0.05) * jax.random.normal(key, x.shape), jnp.ones(())

    return Task(
        dim=10,
        from_normal=lambda z: math.sqrt(0.1) * z,
        simulate=lambda key, theta: theta + math.sqrt(0.1) * jax.random.normal(key, theta.shape),
        log_likelihood=lambda theta, x: norm.logpdf(x, theta, math.sqrt(0.1)).sum(),
        propose=propose,
        log_mass=lambda x: norm.logpdf(x, 0, math.sqrt(0.2)).sum(),
    )


def two_moons() -> Task:
    """A crescent 0.01 thick about a place that two parameters, uniform in [-1, 1], have in common: two crescents."""

    def crescent(key: jax.Array) -> jax.Array:
        angle_key, radius_key = jax.random.split(key)
        angle = jax.random.uniform(angle_key, minval=-jnp.pi / 2, maxval=jnp.pi / 2)
        radius = 0.1 + 0.01 * jax.random.normal(radius_key)
        return jnp.stack([radius * jnp.cos(angle) + 0.25, radius * jnp.sin(angle)])

    def place(theta: jax.Array) -> jax.Array:
        return jnp.stack([-jnp.abs(theta[0] + theta[1]), theta[1] - theta[0]]) / math.sqrt(2)

    def log_likelihood(theta: jax.Array, x: jax.Array) -> jax.Array:
        across, along = x - place(theta) - jnp.asarray([0.25, 0])
        radius = jnp.hypot(across, along)
        # A crescent is a half circle: polar coordinates, half a turn.
        return jnp.where(across > 0, norm.logpdf(radius, 0.1, 0.01) - jnp.log(jnp.pi * radius), -jnp.inf)

    def propose(key: jax.Array, x: jax.Array) -> tuple:
        sign_key, key = jax.random.split(key)
        total, difference = (x - crescent(key)) * math.sqrt(2)
        # `place` has an absolute value: both signs, unless it is the wrong side of zero.
        signed = jax.random.rademacher(sign_key, (), x.dtype) * total
        theta = jnp.stack([signed - difference, signed + difference]) / 2
        return theta, jnp.where(total <= 0, within(theta, 1), 0)

    return Task(
        dim=2,
        from_normal=uniform(1),
        simulate=lambda key, theta: crescent(key) + place(theta),
        log_likelihood=log_likelihood,
        propose=propose,
        # The prior's density is 1/4, and each of two signs was drawn half the time.
        log_mass=lambda x: jnp.log(0.5),
    )


def slcp() -> Task:
    """Simple likelihood, complex posterior: four points of a Gaussian whose five moments are bent, uniform in [-3, 3].

    With S the scatter of the points about their mean m, a prior that is flat in the parameters makes their covariance C
    inverse Wishart with 5/2 degrees of freedom and scale S, times (1 - rho^2)^(1/4), and their mean N(m, C/4).
    """

    def moments(theta: jax.Array) -> tuple:
        scales = theta[2:4] ** 2
        return theta[:2], scales, jnp.tanh(theta[4])

    def factor(scales: jax.Array, rho: jax.Array) -> jax.Array:
        return scales[:, None] * jnp.stack([jnp.stack([1.0, 0.0]), jnp.stack([rho, jnp.sqrt(1 - rho**2)])])

    def simulate(key: jax.Array, theta: jax.Array) -> jax.Array:
        mean, scales, rho = moments(theta)
        return (mean[None] + jax.random.normal(key, (4, 2)) @ factor(scales, rho).T).ravel()

    def log_likelihood(theta: jax.Array, x: jax.Array) -> jax.Array:
        mean, scales, rho = moments(theta)
        first, second = ((x.reshape(4, 2) - mean[None]) / scales[None]).T
        rest = 1 - rho**2
        squares = (first**2 - 2 * rho * first * second + second**2) / rest
        return -0.5 * squares.sum() - 4 * jnp.log(2 * jnp.pi * scales[0] * scales[1]) - 2 * jnp.log(rest)

    def scatter(x: jax.Array) -> tuple:
        """The mean of the points, and the triangular root of their scatter."""
        points = x.reshape(4, 2)
        mean = points.mean(axis=0)
        first, second = (points - mean[None]).T
        corner = jnp.linalg.norm(first)
        below = first @ second / corner
        return mean, corner, below, jnp.linalg.norm(second - below * first / corner)

    def propose(key: jax.Array, x: jax.Array) -> tuple:
        keys = jax.random.split(key, 5)
        mean, corner, below, last = scatter(x)
        # Bartlett: the triangular root of a Wishart matrix, here of its inverse's other side.
        a, c = (jnp.sqrt(2 * jax.random.gamma(k, d / 2)) for k, d in zip(keys[:2], (2.5, 1.5), strict=True))
        b = jax.random.normal(keys[2])
        inverse = jnp.stack([jnp.stack([1 / a, -b / (a * c)]), jnp.stack([jnp.zeros(()), 1 / c])])
        root = jnp.stack([jnp.stack([corner, jnp.zeros(())]), jnp.stack([below, last])]) @ inverse
        scales = jnp.linalg.norm(root, axis=1)
        rest = (corner * last / (a * c * scales[0] * scales[1])) ** 2  # 1 - rho^2
        rho = root[0] @ root[1] / (scales[0] * scales[1])
        theta = jnp.concatenate(
            [
                mean + 0.5 * root @ jax.random.normal(keys[3], (2,)),
                jax.random.rademacher(keys[4], (2,), x.dtype) * jnp.sqrt(scales),
                jnp.arctanh(rho)[None],
            ]
        )
        return theta, within(theta, 3) * rest**0.25

    def log_mass(x: jax.Array) -> jax.Array:
        _, corner, _, last = scatter(x)
        log_gamma = 0.5 * math.log(math.pi) + gammaln(1.25) + gammaln(0.75)  # of two dimensions, at 5/4
        constants = 2.5 * math.log(2) + log_gamma - 3 * math.log(2 * math.pi) - math.log(16) - 5 * math.log(6)
        return constants - 2.5 * jnp.log(corner * last)

    return Task(5, uniform(3), simulate, log_likelihood, propose, log_mass)


TASKS = {"Gaussian linear": gaussian_linear(), "two moons": two_moons(), "SLCP": slcp()}


class Pairs(NamedTuple):
    """Parameters and what was simulated from each."""

    z: jax.Array  # standard normal
    theta: jax.Array
    x: jax.Array


@eqx.filter_jit
def draw_pairs(task: Task, key: jax.Array, num: int) -> Pairs:
    def one(key: jax.Array) -> Pairs:
        z_key, x_key = jax.random.split(key)
        z = jax.random.normal(z_key, (task.dim,))
        theta = task.from_normal(z)
        return Pairs(z, theta, task.simulate(x_key, theta))

    return jax.vmap(one)(jax.random.split(key, num))


def log_evidence(task: Task, x: jax.Array, size: Size, key: jax.Array) -> jax.Array:
    """ln p(x) of each of many."""

    def one(x: jax.Array, *, key: jax.Array) -> jax.Array:
        kept = jax.vmap(lambda k: task.propose(k, x)[1])(jax.random.split(key, size.candidates))
        return task.log_mass(x) + jnp.log(kept.mean())

    return fs.batched(one, chunk=50)(x, key=key)


@eqx.filter_jit
def propose_many(task: Task, x: jax.Array, key: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
    """Candidates of one posterior, and which to keep."""
    propose_key, keep_key = jax.random.split(key)
    theta, probability = jax.vmap(lambda k: task.propose(k, x))(jax.random.split(propose_key, num))
    return theta, jax.random.uniform(keep_key, (num,)) < probability


def exact_draws(task: Task, x: jax.Array, size: Size, key: jax.Array) -> np.ndarray:
    """(samples, dim) parameters of the exact posterior of one x, by rejection."""
    found, rounds = [], 0
    while sum(map(len, found)) < size.samples:
        theta, kept = propose_many(task, x, jax.random.fold_in(key, rounds), 10 * size.samples)
        found.append(np.asarray(theta)[np.asarray(kept)])
        rounds += 1
    return np.concatenate(found)[: size.samples]


# --- the flow ---------------------------------------------------------------------------------------


def embed_time(t: jax.Array) -> jax.Array:
    """Sines of ln t, as a posterior that is 0.01 wide takes its shape where t is about 0.01."""
    return fs.nn.SinusoidalEmbedding(32, max_period=12, min_period=0.5)(jnp.log(t + 0.003))


class Conditional(eqx.Module):
    """A network of parameters and data, of whose output the part for the parameters is the velocity."""

    joint: fs.nn.ResidualMLP
    mean: jax.Array
    std: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        # Constants of the data, not to be trained.
        mean, std = jax.lax.stop_gradient((self.mean, self.std))
        return self.joint(t, (z, (x - mean) / std), key=key)[0]


def train(task: Task, size: Size, key: jax.Array) -> fs.AbstractFlow:
    network_key, moments_key, draw_key, loss_key = jax.random.split(key, 4)
    some = draw_pairs(task, moments_key, 10_000)
    like = some.z[0], some.x[0]
    joint = fs.nn.ResidualMLP(
        like, width=size.width, depth=3, embedding_dim=64, time_embedding=embed_time, key=network_key
    )
    network = Conditional(joint, some.x.mean(axis=0), some.x.std(axis=0))
    flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())

    def draw(key: jax.Array) -> tuple:
        pairs = draw_pairs(task, key, size.batch)
        return pairs.z, pairs.x

    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, size.steps // 20, size.steps)
    for state in fs.training.fit(
        fs.losses.Regression(times=EARLY),
        flow,
        fs.data.Draws(draw, key=draw_key),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate)),
        steps=size.steps,
        key=loss_key,
        ema=fs.averages.PowerFunction(0.05),
        every=500,
    ):
        flow = state.ema_flow
    return flow


# --- what it is worth -------------------------------------------------------------------------------


class Measured(NamedTuple):
    """A row of the table, and what is drawn of it."""

    levels: np.ndarray  # sorted
    off: float
    gain: np.ndarray  # ln posterior/prior at the true parameter, per dimension
    exact_gain: np.ndarray  # the same of the exact posterior
    accuracies: list[float]
    theta: np.ndarray  # true parameters of the observations
    drawn: np.ndarray  # (observations, samples, dim), of the flow
    exact: np.ndarray


def levels_of(flow: fs.AbstractFlow, pairs: Pairs) -> np.ndarray:
    """The mass of the smallest credible region that holds the true parameter, one number for each pair.

    A region is what the flow makes of a ball of noise; its mass is that of the ball, chi squared of the radius. So the
    true parameter is encoded, and no sample is drawn.
    """
    noise = fs.batched(eqx.Partial(fs.encode, **ACCURATE), chunk=250)(flow, pairs.z, pairs.x)
    return np.sort(jax.scipy.stats.chi2.cdf((noise**2).sum(axis=1), noise.shape[1]))


def gain_of(flow: fs.AbstractFlow, pairs: Pairs) -> jax.Array:
    """ln posterior/prior at each true parameter; that of its normal number is the same."""
    log_density = fs.batched(eqx.Partial(fs.log_prob, **ACCURATE), chunk=250)(flow, pairs.z, pairs.x)
    return log_density - norm.logpdf(pairs.z).sum(axis=1)


def measure(task: Task, flow: fs.AbstractFlow, size: Size, key: jax.Array) -> Measured:
    pairs_key, evidence_key, sample_key, exact_key, judge_key = jax.random.split(key, 5)
    pairs = draw_pairs(task, pairs_key, size.tests)
    levels = levels_of(flow, pairs)
    gain = gain_of(flow, pairs)
    evidence = log_evidence(task, pairs.x, size, evidence_key)
    exact_gain = jax.vmap(task.log_likelihood)(pairs.theta, pairs.x) - evidence
    # Of a few pairs of SLCP no candidate is kept, and the evidence is not known.
    known = np.isfinite(np.asarray(evidence))

    observed = pairs.x[: size.observations]
    like = jax.ShapeDtypeStruct((task.dim,), jnp.float32)
    x = jnp.repeat(observed, size.samples, axis=0)
    z = fs.sample(flow, like, num=len(x), key=sample_key, args=x, chunk=1_000, **ACCURATE)
    drawn = np.asarray(task.from_normal(z)).reshape(len(observed), size.samples, task.dim)
    keys = jax.random.split(exact_key, len(observed))
    exact = np.stack([exact_draws(task, x, size, key) for x, key in zip(observed, keys, strict=True)])
    keys = jax.random.split(judge_key, len(observed))
    tests = [
        fs.metrics.classifier_two_sample(a, b, key=k, steps=size.judge_steps)
        for a, b, k in zip(drawn, exact, keys, strict=True)
    ]
    return Measured(
        levels,
        float(kstest(levels, "uniform").statistic),
        np.asarray(gain)[known] / task.dim,
        np.asarray(exact_gain)[known] / task.dim,
        [float(test.accuracy) for test in tests],
        np.asarray(pairs.theta[: size.observations]),
        drawn,
        exact,
    )


# --- the picture ------------------------------------------------------------------------------------


def draw_picture(rows: dict[str, Measured], allowed: float, file: Path) -> None:
    """Coverage of the three, and posteriors of one observation: exact above, of the flow below."""
    figure = plt.figure(figsize=(15, 6.6), layout="constrained")
    grid = figure.add_gridspec(2, 5)
    axis = figure.add_subplot(grid[:, :2])
    level = np.linspace(0, 1, 201)
    axis.fill_between(
        level, level - allowed, level + allowed, color="0.88", label="99 % of exact posteriors stay within"
    )
    axis.plot([0, 1], [0, 1], color="0.5", linewidth=1)
    for (name, row), colour in zip(rows.items(), ("tab:green", "tab:blue", "tab:red"), strict=True):
        share = np.arange(1, len(row.levels) + 1) / len(row.levels)
        axis.step(row.levels, share, where="post", color=colour, label=f"{name}: {row.off:.3f} off")
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="mass of the credible region", ylabel="share of true parameters inside")
    axis.set_title("coverage")
    axis.set_aspect("equal")
    axis.legend(loc="upper left")
    columns = (("two moons", 0, 1), ("SLCP", 0, 1), ("SLCP", 2, 3))
    for column, (name, first, second) in enumerate(columns, start=2):
        row = rows[name]
        truth = row.theta[0]
        # A square around the exact posterior: two moons are small.
        ends = np.stack([row.exact[0].min(axis=0), row.exact[0].max(axis=0)])[:, [first, second]]
        middle, reach = ends.mean(axis=0), 0.6 * np.ptp(ends, axis=0).max()
        for place, (samples, title) in enumerate(((row.exact, "exact"), (row.drawn, "flow"))):
            axis = figure.add_subplot(grid[place, column])
            axis.plot(*samples[0][:, [first, second]].T, ".", color="0.35" if place == 0 else "tab:blue", markersize=2)
            axis.plot(truth[first], truth[second], "*", color="tab:red", markeredgecolor="white", markersize=14)
            axis.set(xlim=middle[0] + reach * np.array([-1, 1]), ylim=middle[1] + reach * np.array([-1, 1]))
            axis.set_title(f"{name}, {title}")
            axis.set(xlabel=rf"$\theta_{first + 1}$", ylabel=rf"$\theta_{second + 1}$")
            axis.set_aspect("equal")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="everything tiny: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/posterior"), help="folder for what is written")
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL
    jax.config.update("jax_disable_most_optimizations", options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    train_key, measure_key = jax.random.split(jax.random.key(0))
    allowed = kstwo.ppf(0.99, size.tests)

    rows = {}
    print(f"{'simulator':<17}{'coverage off':>12}{'allowed':>9}{'gain':>8}{'exact':>8}{'short by':>17}{'C2ST':>8}")
    for name, task in TASKS.items():
        rows[name] = row = measure(task, train(task, size, train_key), size, measure_key)
        short = row.exact_gain - row.gain
        error = short.std() / np.sqrt(len(short))
        print(
            f"{name:<17}{row.off:>12.3f}{allowed:>9.3f}{row.gain.mean():>8.3f}{row.exact_gain.mean():>8.3f}"
            f"{short.mean():>8.3f} +- {error:.3f}{np.mean(row.accuracies):>8.3f}"
        )
    file = options.out / "posterior.png"
    draw_picture(rows, allowed, file)
    print(f"picture: {file}\ntotal {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
