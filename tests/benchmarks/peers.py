"""Is flowsolve faster than its PyTorch peers, at the same answer?

    pip install torch diffusers torchcfm torchdiffeq flow_matching     # the CPU build of torch will do
    python tests/benchmarks/peers.py                                   # all rows: a quarter of an hour on 2 CPU cores
    python tests/benchmarks/peers.py --smoke                           # small networks, few rows: under a minute
    python tests/benchmarks/peers.py --networks tiny image --rounds 21

Each row is a whole solve of one batch on the CPU by a peer and by flowsolve: the same weights (see
peers_networks.py), the same noise, the same solver, the same times. First the two outputs are compared: the largest
difference, relative to the root mean square of the output, must be at most 1e-4, or the script raises. Then both are
timed in turn (see timing.py), and the ratio is that of the medians.

- diffusers: DPM-Solver++ 2M, UniPC (order 2, bh2) and DDIM predict the noise of DDPM's path of 1000 timesteps, over
  timesteps with trailing spacing. The loop is that of its pipelines.
- torchcfm trains velocities and leaves sampling to torchdiffeq: `odeint` with fixed steps, and adaptive dopri5, which
  solves the batch jointly and so takes other steps than flowsolve for each example, to the same tolerance.
- flow_matching: `ODESolver.sample`, and `compute_likelihood` with the exact divergence and with Hutchinson's, where
  both get the same probes. (Its exact divergence takes vectors only.)

flowsolve is called as its users do, `fs.batched` of `fs.solve` or `fs.log_prob`. PyTorch gets what makes it fastest in
each row: one thread or as many as there are cores, the network as it is or under `torch.compile`, without gradients
wherever the peer does not take them itself. What was fastest stands behind the peer's name.
"""

import functools
import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from networks import Dit, Mlp
from pages import markdown, page_options, show
from timing import interleaved, ratio

import flowsolve as fs

PEERS = ("torch", "diffusers", "torchcfm", "torchdiffeq", "flow_matching")
try:
    import torch
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
    from flow_matching.solver import ODESolver
    from peers_networks import twin
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchdiffeq import odeint
except ModuleNotFoundError as error:
    raise SystemExit(f"No module named {error.name}: the peers are needed, pip install {' '.join(PEERS)}.") from error

TOLERANCE = 1e-4  # of the outputs of both
ADAPTIVE = 1e-6  # rtol and atol
TIMESTEPS = 1000  # of the discrete path
FIXED = {"euler": diffrax.Euler(), "midpoint": diffrax.Midpoint(), "heun2": diffrax.Heun()}
SEED = 0

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Case(NamedTuple):
    """One network of both frameworks and a batch of standard normal noise."""

    name: str
    network: Mlp | Dit
    model: torch.nn.Module
    x: np.ndarray
    steps: int
    methods: tuple[str, ...]  # of torchdiffeq, with fixed steps


class Row(NamedTuple):
    """One solve by a peer, given a model, and by flowsolve."""

    peer: str
    method: str
    theirs: Callable[[Model], torch.Tensor]
    ours: Callable[[], Array]
    evaluations: Callable[[], int] | None = None  # of flowsolve, where it does not follow from the method
    gradients: bool = False


def cases(smoke: bool) -> Iterator[Case]:
    """The three sizes; for a smoke test two smaller ones."""
    key, rng = jax.random.key(SEED), np.random.default_rng(SEED)
    if smoke:
        sizes = {
            "tiny": (Mlp(2, 16, 2, key=key), (16, 2)),
            "image": (Dit(8, 3, width=32, depth=2, heads=2, key=key), (2, 8, 8, 3)),
        }
    else:
        sizes = {
            "tiny": (Mlp(2, 64, 2, key=key), (256, 2)),
            "medium": (Mlp(64, 512, 3, key=key), (64, 64)),
            "image": (Dit(16, 4, width=128, depth=4, heads=4, key=key), (8, 16, 16, 4)),
        }
    for name, (network, shape) in sizes.items():
        if isinstance(network, Dit):
            # Smooth in time, as after training: unheard, the high frequencies cost adaptive steps no evaluations.
            heard = np.tile(np.exp(-np.geomspace(1, 1000, 128) / 4), 2)
            network = eqx.tree_at(lambda n: n.time, network, network.time * heard / np.sqrt(np.mean(heard**2)))
        x = rng.normal(size=shape).astype(np.float32)
        methods = ("euler",) if smoke else ("euler", "midpoint", "heun2")
        yield Case(name, network, twin(network), x, 5 if smoke else 20, methods)


# --- diffusers ------------------------------------------------------------------------------------


class AtTimesteps(eqx.Module):
    """A network trained on the integer timesteps k of a discrete path, which is given k/T."""

    network: Mlp | Dit
    path: fs.paths.Discrete

    def __call__(self, t, x, args=None, *, key=None):
        return self.network(self.path.timestep(t) / len(self.path.betas), x, args, key=key)


def diffusers_sample(case: Case, scheduler: Any, model: Model) -> torch.Tensor:
    x = torch.from_numpy(case.x)
    scheduler.set_timesteps(case.steps)
    for timestep in scheduler.timesteps:
        output = model(timestep / TIMESTEPS, x)
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
    return x


def diffusers_rows(case: Case) -> Iterator[Row]:
    path, grid = fs.paths.Discrete.linear(TIMESTEPS), fs.grids.Trailing(case.steps)
    flow = fs.Flow(AtTimesteps(case.network, path), path, fs.predictions.Noise())
    settings = {
        "num_train_timesteps": TIMESTEPS,
        "prediction_type": "epsilon",
        "timestep_spacing": "trailing",
    }
    # Onto the clean data all of them go at order 1.
    pairs = {
        "DPM-Solver++ 2M": (DPMSolverMultistepScheduler(**settings, solver_order=2), fs.solvers.DPMSolverPP(2)),
        "UniPC 2, bh2": (UniPCMultistepScheduler(**settings, solver_order=2), fs.solvers.UniPC(2, bh=2)),
        "DDIM": (DDIMScheduler(**settings, clip_sample=False), fs.solvers.DDIM()),
    }
    for method, (scheduler, solver) in pairs.items():
        scheduler.set_timesteps(case.steps)
        assert scheduler.timesteps.tolist() == grid.timesteps(path).tolist()
        theirs = functools.partial(diffusers_sample, case, scheduler)
        yield Row("diffusers", method, theirs, *solve(flow, case, solver=solver, grid=grid))


def solve(flow: fs.AbstractFlow, case: Case, **settings: Any) -> tuple[Callable[[], Array], Callable[[], int]]:
    """flowsolve's samples from the noise, and its number of network evaluations."""
    batched, x = fs.batched(eqx.Partial(fs.solve, **settings)), jnp.asarray(case.x)
    return (
        lambda: jax.block_until_ready(batched(flow, x).ys),
        lambda: int(jnp.max(batched(flow, x).stats["nfe"])),
    )


# --- torchcfm with torchdiffeq --------------------------------------------------------------------


def velocity_flow(case: Case) -> fs.Flow:
    """The flow of a network that was trained in the peers' time: noise at 0, data at 1."""
    path, prediction = fs.paths.Linear(), fs.predictions.Velocity()
    return fs.Flow(fs.TimeReversed(case.network, path, prediction), path, prediction)


def check_convention() -> None:
    """Raise unless torchcfm and flowsolve train the same field: the same x_t, velocities of opposite sign."""
    noise, data = torch.randn(2, 4, 3)
    t, x, velocity = ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(noise, data)
    path, data, noise = fs.paths.Linear(), jnp.asarray(data.numpy()), jnp.asarray(noise.numpy())
    d_alpha, d_sigma = path.derivatives(0.5)
    interpolated = jax.vmap(path.interpolate)(1 - jnp.asarray(t.numpy()), data, noise)
    check_equal("torchcfm's x_t", x.numpy(), np.asarray(interpolated))
    check_equal("torchcfm's velocity", -velocity.numpy(), np.asarray(d_alpha * data + d_sigma * noise))


def torchdiffeq_sample(case: Case, settings: dict[str, Any], model: Model) -> torch.Tensor:
    return odeint(model, torch.from_numpy(case.x), torch.tensor([0.0, 1.0]), **settings)[-1]


def torchcfm_rows(case: Case) -> Iterator[Row]:
    flow, name, grid = velocity_flow(case), "torchcfm, torchdiffeq", fs.grids.Uniform(case.steps)
    for method in case.methods:
        theirs = {"method": method, "options": {"step_size": 1 / case.steps}}
        ours = solve(flow, case, solver=FIXED[method], grid=grid)
        yield Row(name, method, functools.partial(torchdiffeq_sample, case, theirs), *ours)
    tolerances = {"rtol": ADAPTIVE, "atol": ADAPTIVE}
    theirs = {"method": "dopri5", **tolerances}
    ours = solve(flow, case, solver=diffrax.Dopri5(), controller=diffrax.PIDController(**tolerances))
    yield Row(name, f"dopri5, {ADAPTIVE:.0e}", functools.partial(torchdiffeq_sample, case, theirs), *ours)


# --- flow_matching --------------------------------------------------------------------------------


def flow_matching_sample(case: Case, method: str, model: Model) -> torch.Tensor:
    solver = ODESolver(lambda x, t: model(t, x))
    return solver.sample(torch.from_numpy(case.x), 1 / case.steps, method)


def flow_matching_likelihood(case: Case, method: str, exact: bool, model: Model) -> torch.Tensor:
    torch.manual_seed(SEED)
    solver = ODESolver(lambda x, t: model(t, x))
    return solver.compute_likelihood(
        torch.from_numpy(case.x), standard_normal, 1 / case.steps, method, exact_divergence=exact
    )[1]


def standard_normal(x: torch.Tensor) -> torch.Tensor:
    """ln N(x; 0, I) of each example."""
    flat = x.flatten(1)
    return -0.5 * (flat.square().sum(1) + flat.shape[1] * math.log(2 * math.pi))


class GivenProbe(eqx.Module):
    """In place of a distribution of probes."""

    probe: Array

    def __call__(self, key, like):
        return self.probe


def log_prob_with_probe(solver, grid, flow, x, probe):
    """Hutchinson's estimate with the given probe; nothing is drawn with the key."""
    divergence = fs.divergence.Hutchinson(1, GivenProbe(probe))
    return fs.log_prob(flow, x, divergence=divergence, key=jax.random.key(SEED), solver=solver, grid=grid)


def log_prob(function: Callable[..., Array], *arguments: Any) -> Callable[[], Array]:
    """flowsolve's densities of a batch."""
    batched = fs.batched(function)
    return lambda: jax.block_until_ready(batched(*arguments))


def flow_matching_rows(case: Case) -> Iterator[Row]:
    flow, name, grid = velocity_flow(case), "flow_matching", fs.grids.Uniform(case.steps)
    x = jnp.asarray(case.x)
    torch.manual_seed(SEED)
    probes = jnp.asarray(np.where(torch.randn(case.x.shape).numpy() < 0, 1, -1), x.dtype)
    for method in case.methods[:2]:
        solver = FIXED[method]
        theirs = functools.partial(flow_matching_sample, case, method)
        yield Row(name, f"sample, {method}", theirs, *solve(flow, case, solver=solver, grid=grid))
        if case.x.ndim == 2:
            theirs = functools.partial(flow_matching_likelihood, case, method, True)
            ours = log_prob(eqx.Partial(fs.log_prob, solver=solver, grid=grid), flow, x)
            yield Row(name, f"likelihood, exact, {method}", theirs, ours, gradients=True)
        theirs = functools.partial(flow_matching_likelihood, case, method, False)
        ours = log_prob(eqx.Partial(log_prob_with_probe, solver, grid), flow, x, probes)
        yield Row(name, f"likelihood, Hutchinson, {method}", theirs, ours, gradients=True)


# --- one measurement ------------------------------------------------------------------------------


def check_equal(what: str, theirs: np.ndarray, ours: np.ndarray) -> float:
    """The largest difference relative to the root mean square; raise if it is too large."""
    difference = float(np.max(np.abs(theirs - ours)) / np.sqrt(np.mean(np.square(theirs))))
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{what} differs from flowsolve by {difference:.1e} of its size: what is compared is not equal."
        )
    return difference


def setups(case: Case, row: Row, compiling: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """The peer's call by set-up: for one thread and for as many as cores, whichever is faster, compiled or not."""
    mode = torch.enable_grad if row.gradients else torch.inference_mode

    def call(model: Model, threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        with mode():
            return row.theirs(model)

    found = {}
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        name = f"{threads} thread{'s' if threads > 1 else ''}"
        calls = {name: functools.partial(call, case.model, threads)}
        if compiling:
            compiled = functools.partial(call, torch.compile(case.model, dynamic=False), threads)
            try:
                compiled()
            except RuntimeError as error:  # the compiler does not take all that a peer does
                print(f"Not compiled for {row.peer}, {row.method}: {error}".splitlines()[0], file=sys.stderr)
            else:
                calls[f"{name}, compiled"] = compiled
        trial = interleaved(calls, rounds=3, least=0.0)
        name = fastest(trial, calls)
        found[name] = calls[name]
    return found


def fastest(times: dict[str, list[float]], names: Iterable[str]) -> str:
    return min(names, key=lambda name: statistics.median(times[name]))


def count_evaluations(case: Case, row: Row) -> int:
    """How often a peer calls its model."""
    calls = []

    def counting(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        calls.append(t)
        return case.model(t, x)

    row.theirs(counting)
    return len(calls)


def measure(case: Case, row: Row, rounds: int, compiling: bool) -> tuple[list[str], float]:
    """A line of the table, and the ratio."""
    evaluations = str(count_evaluations(case, row))
    if row.evaluations is not None and str(row.evaluations()) != evaluations:
        evaluations = f"{evaluations} and {row.evaluations()}"
    theirs, ours = setups(case, row, compiling), np.asarray(row.ours())
    if row.evaluations is not None:
        ours = ours[:, -1]  # the last of the times that a solve saves
    what = f"{row.peer}, {row.method}, on {case.name}"
    difference = max(check_equal(what, call().numpy(), ours) for call in theirs.values())
    # A machine that is not idle is hardest on several threads: the set-up is chosen by the same rounds as the ratio.
    times = interleaved({**theirs, "flowsolve": row.ours, **networks(case, row, evaluations)}, rounds=rounds)
    setup = fastest(times, theirs)
    found = ratio(times, setup, "flowsolve")
    cells = [case.name, f"{row.peer} ({setup})", row.method, evaluations, f"{difference:.0e}"]
    cells += [
        f"{1e3 * statistics.median(times[name]):.3g}" if name in times else "-"
        for name in (setup, "flowsolve", "network in JAX")
    ]
    return [*cells, f"{found:.2f}"], found


def networks(case: Case, row: Row, evaluations: str) -> dict[str, Callable[[], object]]:
    """As many forward passes in a chain, which no solver in JAX can beat; nothing where more than those are taken."""
    if row.gradients:
        return {}
    times = jnp.linspace(1.0, 0.0, int(evaluations.split()[-1]))

    def forward(x: Array, t: Array) -> tuple[Array, None]:
        return jax.vmap(lambda x: case.network(t, x))(x), None

    chain, x = jax.jit(lambda x: jax.lax.scan(forward, x, times)[0]), jnp.asarray(case.x)
    return {"network in JAX": lambda: jax.block_until_ready(chain(x))}


HEADING = """\
# Against PyTorch peers

The same weights, noise, solver and times in a peer and in flowsolve, which is called through `fs.batched`. The peer has
what makes it fastest in each row, which stands behind its name: one thread or one a core, `torch.compile` or not.
"Difference" is the largest of the two outputs, relative to their root mean square; NFE the network evaluations, of the
peer and of flowsolve where an adaptive solve takes other steps. Milliseconds are medians of {rounds} interleaved
rounds, ratios those of the medians, above 1 where flowsolve is faster. "Network in JAX" is as many forward passes
alone, in one program: where a peer is faster than that its network is, and no solver in JAX could be faster.

    pip install torch diffusers torchcfm torchdiffeq flow_matching
    python tests/benchmarks/peers.py

{versions}.
"""

SUMMARY = """\
The geometric mean of the {count} ratios is {mean:.2f}; flowsolve is faster in {faster} of the {count} rows.
"""


def main() -> None:
    parser = page_options(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="measurements of each row, 11 by default")
    parser.add_argument("--networks", nargs="+", choices=["tiny", "medium", "image"])
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.smoke else 11)
    # A CPU against a CPU, also where JAX sees more.
    jax.config.update("jax_platforms", "cpu")
    warnings.simplefilter("ignore")
    check_convention()
    table, ratios = [], []
    for case in cases(options.smoke):
        if options.networks and case.name not in options.networks:
            continue
        torch.compiler.reset()  # what is compiled for one network counts against the next
        for rows in (diffusers_rows, torchcfm_rows, flow_matching_rows):
            for row in rows(case):
                line, found = measure(case, row, rounds, compiling=not options.smoke)
                print(*line, sep=" | ", flush=True)
                table.append(line)
                ratios.append(found)
    header = ["network", "peer", "method", "NFE", "difference", "peer ms", "flowsolve ms", "network in JAX ms", "ratio"]
    summary = SUMMARY.format(
        count=len(ratios), mean=np.exp(np.mean(np.log(ratios))), faster=sum(found > 1 for found in ratios)
    )
    versions = ", ".join(f"{name} {version(name)}" for name in (*PEERS, "diffrax", "equinox"))
    heading = HEADING.format(rounds=rounds, versions=versions)
    show("peers", heading, [summary, markdown(header, table)], options)


if __name__ == "__main__":
    main()
