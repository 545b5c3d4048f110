"""Which solver on which grid has the smallest error for a number of network evaluations (NFE)? Measured.

    python tests/benchmarks/work_precision.py                         # all parts: half an hour on 2 CPU cores
    python tests/benchmarks/work_precision.py --parts Linear --seeds 0 --evaluations 8 --solvers DDIM "UniPC 2"

Parts: on the paths `Linear` and `EDM`, Gaussian mixtures of known flow (see mixtures.py), where every solver and grid
carries the same noise to data; `stochastic`, solvers of the reverse SDE there, by the distribution of their samples;
`digits`, the trained flow of examples/digits.py. The figures are kept in --figures, so that parts can be measured one
by one, also at the same time; the page and its pictures are then written from all that is there. Most of the time is
compiling, one program for each solver and path.
"""

import argparse
import importlib.util
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from mixtures import DIM, oracle, start_noise
from tqdm import tqdm
from work_precision_page import Figures, write_page

import flowsolve as fs
from flowsolve.solvers import LogSNR, Time, VPTime

ROOT = Path(__file__).resolve().parents[2]
Data, Noise, Velocity = fs.predictions.Data, fs.predictions.Noise, fs.predictions.Velocity
PATHS = {"Linear": fs.paths.Linear(), "EDM": fs.paths.EDM()}


class Method(NamedTuple):
    """A solver as a row of the table."""

    solver: diffrax.AbstractSolver
    stages: int = 1  # network evaluations a step
    dynamics: fs.dynamics.AbstractDynamics | None = None


def adams_bashforth(order: int, prediction: Any, variable: Any) -> Method:
    """A short name for many rows."""
    return Method(fs.solvers.AdamsBashforth(order, prediction=prediction, variable=variable))


SOLVERS = {
    "DDIM": Method(fs.solvers.DDIM()),
    "DPMSolverPP 2": Method(fs.solvers.DPMSolverPP(2)),
    "DPMSolverPP 3": Method(fs.solvers.DPMSolverPP(3)),
    "DPMSolverPP 3, as published": Method(fs.solvers.DPMSolverPP(3, as_published=True)),
    "DPMSolverPPSinglestep 2": Method(fs.solvers.DPMSolverPPSinglestep(2), stages=2),
    "DPMSolverPPSinglestep 3": Method(fs.solvers.DPMSolverPPSinglestep(3), stages=3),
    "UniPC 1": Method(fs.solvers.UniPC(1)),
    "UniPC 2": Method(fs.solvers.UniPC(2)),
    "UniPC 3": Method(fs.solvers.UniPC(3)),
    "UniPC 1, bh1": Method(fs.solvers.UniPC(1, bh=1)),
    "UniPC 2, bh1": Method(fs.solvers.UniPC(2, bh=1)),
    "UniPC 3, bh1": Method(fs.solvers.UniPC(3, bh=1)),
    "UniPC 2, order kept": Method(fs.solvers.UniPC(2, lower_order_final=False)),
    "UniPC 3, order kept": Method(fs.solvers.UniPC(3, lower_order_final=False)),
    "UniPC 2, no corrector": Method(fs.solvers.UniPC(2, corrector=False)),
    "DEIS 2": Method(fs.solvers.DEIS(2)),
    "DEIS 3": Method(fs.solvers.DEIS(3)),
    "DEIS 4": Method(fs.solvers.DEIS(4)),
    "AdamsBashforth 2, data, Time": adams_bashforth(2, Data(), Time()),
    "AdamsBashforth 3, data, Time": adams_bashforth(3, Data(), Time()),
    "AdamsBashforth 2, data, LogSNR": adams_bashforth(2, Data(), LogSNR()),
    "AdamsBashforth 3, data, LogSNR": adams_bashforth(3, Data(), LogSNR()),
    "AdamsBashforth 2, data, VPTime": adams_bashforth(2, Data(), VPTime()),
    "AdamsBashforth 3, data, VPTime": adams_bashforth(3, Data(), VPTime()),
    "AdamsBashforth 2, noise, Time": adams_bashforth(2, Noise(), Time()),
    "AdamsBashforth 3, noise, Time": adams_bashforth(3, Noise(), Time()),
    "AdamsBashforth 2, velocity, Time": adams_bashforth(2, Velocity(), Time()),
    "AdamsBashforth 3, velocity, Time": adams_bashforth(3, Velocity(), Time()),
    "AdamsBashforth 4, velocity, Time": adams_bashforth(4, Velocity(), Time()),
    "LMS 4": Method(fs.solvers.LMS(4)),
    "IPNDM 2": Method(fs.solvers.IPNDM(2)),
    "IPNDM 3": Method(fs.solvers.IPNDM(3)),
    "IPNDM 4": Method(fs.solvers.IPNDM(4)),
    "EDMHeun": Method(fs.solvers.EDMHeun(), stages=2),
    "diffrax Euler": Method(diffrax.Euler()),
    "diffrax Heun": Method(diffrax.Heun(), stages=2),
    "diffrax Ralston": Method(diffrax.Ralston(), stages=2),
}
GRIDS: dict[str, Callable[[int], fs.grids.AbstractGrid]] = {
    "Uniform": fs.grids.Uniform,
    "Power(2)": lambda n: fs.grids.Power(n, 2.0),
    "Karras": fs.grids.Karras,
    "LogSNR": fs.grids.LogSNR,
    "VPPower(2)": lambda n: fs.grids.VPPower(n, 2.0),
    "VPPower(1.5)": lambda n: fs.grids.VPPower(n, 1.5),
    "PolyExponential(0.7)": lambda n: fs.grids.PolyExponential(n, 0.7),
    "Beta(0.6, 0.6)": lambda n: fs.grids.Beta(n, 0.6, 0.6),
}

# By the distribution of their samples; the last four draw no noise.
SDE_SOLVERS = {
    "DDIM(1)": Method(fs.solvers.DDIM(1.0)),
    "Ancestral, large variance": Method(fs.solvers.Ancestral(fs.solvers.LargeVariance())),
    "SDEDPMSolverPP 2": Method(fs.solvers.SDEDPMSolverPP(2)),
    "SDEDPMSolverPP 2, eta 0.5": Method(fs.solvers.SDEDPMSolverPP(2), dynamics=fs.dynamics.ReverseSDE(0.5)),
    "SASolver 3": Method(fs.solvers.SASolver(3)),
    "SASolver 3, eta 0.5": Method(fs.solvers.SASolver(3), dynamics=fs.dynamics.ReverseSDE(0.5)),
    "ERSDE 3": Method(fs.solvers.ERSDE(3)),
    "SEEDS2": Method(fs.solvers.SEEDS2(), stages=2),
    "Churn(EDMHeun, 0.1)": Method(fs.solvers.Churn(fs.solvers.EDMHeun(), 0.1), stages=2),
    "DDIM": Method(fs.solvers.DDIM()),
    "DPMSolverPP 2": Method(fs.solvers.DPMSolverPP(2)),
    "IPNDM 3": Method(fs.solvers.IPNDM(3)),
    "EDMHeun": Method(fs.solvers.EDMHeun(), stages=2),
}
SDE_GRIDS = {"Linear": ("Uniform", "LogSNR", "VPPower(2)"), "EDM": ("Karras", "LogSNR", "VPPower(2)")}
SDE_EVALUATIONS, SDE_SAMPLES, EXACT_SETS, DIRECTIONS = (10, 20, 40), 16_384, 16, 256

# Learnt for each flow and NFE.
TUNED, TUNING_NOISES, TUNING_UPDATES = "Tuned", 4096, 2500

DIGITS_GRIDS = ("Uniform", "Power(2)", "LogSNR", "VPPower(2)")
DIGITS_NOISES, DIGITS_TUNING_NOISES, DIGITS_TUNING_UPDATES = 250, 1000, 600
FRECHET_EVALUATIONS, TUNED_FRECHET = (5, 6, 8, 10, 12, 20), (5, 6, 8, 10)
FRECHET_PAIRS = (
    ("DDIM", "Uniform"),
    ("DPMSolverPP 2", "Uniform"),
    ("DPMSolverPP 2", "LogSNR"),
    ("UniPC 2", "Uniform"),
    ("DEIS 3", "VPPower(2)"),
    ("AdamsBashforth 2, data, Time", "Power(2)"),
    ("AdamsBashforth 3, velocity, Time", "VPPower(2)"),
    ("IPNDM 3", "VPPower(2)"),
    ("diffrax Heun", "Uniform"),
)


# --- one measurement ------------------------------------------------------------------------------


# Grids are filled up to this many points, so that they have one shape.
POINTS = 41


@eqx.filter_jit
def carried(
    flow: fs.AbstractFlow,
    x_start: Float[Array, "batch ..."],
    args: PyTree,
    solver: diffrax.AbstractSolver,
    ts: Float[Array, " points"],
    steps: Int[Array, ""],
) -> Float[Array, "batch ..."]:
    """The steps that `fs.solve` takes, in a loop of any length: one program for all flows, grids and numbers of steps.

    Of `ts` the first steps + 1 are the grid.
    """
    terms = fs.dynamics.ProbabilityFlow().terms(flow)

    def one(x: Array, args: PyTree) -> Array:
        def step(number: Array, now: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
            x, state = now
            x, _, _, state, _ = solver.step(terms, -ts[number], -ts[number + 1], x, args, state, False)
            return x, state

        state = solver.init(terms, -ts[0], -ts[1], x, args)
        return jax.lax.fori_loop(0, steps, step, (x, state))[0]

    return jax.vmap(one)(x_start, args)


@eqx.filter_jit
def accurate(flow: fs.AbstractFlow, x_start: Float[Array, "batch ..."], args: PyTree, tolerance: float) -> Array:
    """By an adaptive solve of high order, in the type of `x_start`."""
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)

    def one(x: Array, args: PyTree) -> Array:
        return fs.solve(flow, x, args, solver=diffrax.Dopri8(), controller=controller).ys[-1]

    return jax.vmap(one)(x_start, args)


def errors(x: Array, exact: Array) -> tuple[float, float]:
    """(RMS over the samples, median over the samples) of a sample's root mean square over its elements."""
    squares = np.mean((np.asarray(x, np.float64) - exact).reshape(len(exact), -1) ** 2, axis=1)
    return float(np.sqrt(np.mean(squares))), float(np.median(np.sqrt(squares)))


class Problem(NamedTuple):
    """A flow, a start, and where the flow carries it."""

    flow: fs.AbstractFlow
    x_start: Float[Array, "batch ..."]
    args: PyTree
    exact: Float[np.ndarray, "batch ..."]


def mixture_problem(path: fs.paths.AbstractPath, seed: int, noises: int) -> Problem:
    """The mixture of a seed, and its samples to 1e-7 by a solve in float64."""
    start = np.float32(path.start()[1]) * start_noise(seed, noises).astype(np.float32)
    with jax.enable_x64(True):
        exact = accurate(oracle(seed).flow(path, Velocity()), jnp.asarray(start, float), None, 1e-9)
    return Problem(oracle(seed).flow(path, Velocity()), jnp.asarray(start), None, np.asarray(exact))


def solve(
    flow: fs.AbstractFlow,
    x_start: Float[Array, "batch ..."],
    args: PyTree,
    solver: diffrax.AbstractSolver,
    grid: fs.grids.AbstractGrid,
) -> Float[Array, "batch ..."]:
    """The samples of one row."""
    ts = grid(flow.path)
    if isinstance(solver, fs.solvers.UniPC):
        solver = solver.for_times(ts)
    filled = jnp.concatenate([ts, jnp.broadcast_to(ts[-1:], (max(POINTS - len(ts), 0),))])
    return carried(flow, x_start, args, solver, filled, jnp.asarray(grid.steps))


class Pair(NamedTuple):
    """A solver on a grid, at a number of network evaluations; for each problem, as a tuned one is another for each."""

    solver_name: str
    grid_name: str
    nfe: int
    on: Callable[[Problem], tuple[diffrax.AbstractSolver, fs.grids.AbstractGrid]]


def fixed_pairs(evaluations: Iterable[int], grids: Iterable[str], chosen: Iterable[str]) -> Iterator[Pair]:
    """All solvers on all grids, at the NFE that the stages of a solver divide."""
    for name, method in SOLVERS.items():
        for nfe in evaluations:
            if name not in chosen or nfe % method.stages:
                continue
            for grid in grids:
                pair = method.solver, GRIDS[grid](nfe // method.stages)
                yield Pair(name, grid, nfe, lambda problem, pair=pair: pair)


class Tuning(NamedTuple):
    """How a tuned pair is learnt."""

    noises: int = TUNING_NOISES
    updates: int = TUNING_UPDATES


def tune(problem: Problem, nfe: int, tuning: Tuning) -> tuple[diffrax.AbstractSolver, fs.grids.AbstractGrid]:
    """The pair that is learnt for the problem's flow, from noises of its own."""
    like = jax.ShapeDtypeStruct(problem.x_start.shape[1:], problem.x_start.dtype)
    args = jax.tree.map(lambda leaf: jnp.resize(leaf, (tuning.noises, *leaf.shape[1:])), problem.args)
    tuned = fs.tuning.tune(
        problem.flow,
        like,
        steps=nfe,
        key=jax.random.key(0),
        args=args,
        num=tuning.noises,
        updates=tuning.updates,
        progress=False,
    )
    return jax.block_until_ready((tuned.solver, tuned.grid))


def tuned_pairs(evaluations: Iterable[int], chosen: Iterable[str], tuning: Tuning) -> Iterator[Pair]:
    """One more row, another pair for each problem and NFE."""
    for nfe in evaluations if TUNED in chosen else ():
        yield Pair(TUNED, "tuned", nfe, lambda problem, nfe=nfe: tune(problem, nfe, tuning))


def measure_table(problems: list[Problem], pairs: Iterable[Pair], name: str) -> Figures:
    """Of each pair on each problem [RMS, median, seconds that the pair took to make]."""
    table: Figures = {}
    for pair in tqdm(list(pairs), desc=name, mininterval=5):
        figures = []
        for problem in problems:
            start = time.perf_counter()
            solver, grid = pair.on(problem)
            seconds = time.perf_counter() - start
            x = solve(problem.flow, problem.x_start, problem.args, solver, grid)
            figures.append([*errors(x, problem.exact), seconds])
        table.setdefault(f"{pair.solver_name} | {pair.grid_name}", {})[str(pair.nfe)] = figures
    return table


# --- the parts ------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What the command line says."""

    seeds: list[int]
    noises: int
    evaluations: list[int]
    tuned: list[int]
    solvers: list[str]
    checkpoint: Path | None


def measure_path(name: str, options: Options) -> dict:
    """The errors on the mixtures, on one path."""
    problems = [mixture_problem(PATHS[name], seed, options.noises) for seed in options.seeds]
    fixed = fixed_pairs(options.evaluations, GRIDS, options.solvers)
    tuned = tuned_pairs(options.tuned, options.solvers, Tuning())
    return {"errors": measure_table(problems, [*fixed, *tuned], name)}


def sliced_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"], directions: np.ndarray) -> float:
    """The sliced Wasserstein-2 distance: over directions, of the sorted projections."""
    return float(np.sqrt(np.mean((np.sort(a @ directions, axis=0) - np.sort(b @ directions, axis=0)) ** 2)))


def measure_stochastic(options: Options) -> dict:
    """The distance of samples to exact ones of the mixture, and that of two exact sets; the mean over seeds."""
    directions = np.random.default_rng(0).standard_normal((DIM, DIRECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    draw = eqx.filter_jit(lambda mixture, keys: jax.vmap(mixture.sample)(keys))
    exact, floors = [], []
    for seed in options.seeds:
        keys = jax.random.split(jax.random.key(seed), EXACT_SETS * SDE_SAMPLES)
        sets = np.split(np.asarray(draw(oracle(seed), keys)), EXACT_SETS)
        exact.append(sets[0])
        floors.append([sliced_distance(*two, directions) for two in zip(sets[::2], sets[1::2], strict=True)])
    # Of each pair of sets the mean over the seeds, as for the rows.
    floor = np.mean(floors, axis=0)
    like = jax.ShapeDtypeStruct((DIM,), jnp.float32)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    cases = [(path, name, nfe) for path in PATHS for name in SDE_SOLVERS for nfe in SDE_EVALUATIONS]
    for path, name, nfe in tqdm(cases, desc="stochastic", mininterval=5):
        solver, stages, dynamics = SDE_SOLVERS[name]
        for grid in SDE_GRIDS[path]:
            points = fs.grids.Given(GRIDS[grid](nfe // stages)(PATHS[path]))
            distances = []
            for seed, wanted in zip(options.seeds, exact, strict=True):
                flow = oracle(seed).flow(PATHS[path], Velocity())
                x = fs.sample(
                    flow,
                    like,
                    num=SDE_SAMPLES,
                    key=jax.random.key(1000 + seed),
                    solver=solver,
                    grid=points,
                    dynamics=dynamics,
                    throw=False,
                )
                distances.append(sliced_distance(np.asarray(x), wanted, directions))
            rows.setdefault(path, {}).setdefault(f"{name} | {grid}", {})[str(nfe)] = float(np.mean(distances))
    return {"distances": rows, "floor": float(floor.mean()), "spread": float(floor.std(ddof=1))}


def load_digits_example() -> ModuleType:
    """examples/digits.py as a module."""
    spec = importlib.util.spec_from_file_location("digits_example", ROOT / "examples" / "digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits_problem(flow: fs.AbstractFlow, noises: int, shape: tuple[int, ...], classes: int) -> Problem:
    """Noises and labels, and the images to which the flow carries them, by a solve in float64."""
    start = np.random.default_rng(0).standard_normal((noises, *shape)).astype(np.float32)
    labels = np.arange(noises, dtype=np.int32) % classes
    with jax.enable_x64(True):
        in_double = jax.tree.map(lambda leaf: leaf.astype(float) if eqx.is_inexact_array(leaf) else leaf, flow)
        exact = accurate(in_double, jnp.asarray(start, float), jnp.asarray(labels), 1e-7)
    return Problem(flow, jnp.asarray(start), jnp.asarray(labels), np.asarray(exact))


def measure_digits(options: Options) -> dict:
    """The errors on the trained flow of the example, and the Frechet distances of what is drawn from it."""
    digits = load_digits_example()
    size = digits.FULL
    # The keys of the example: the same flow, judge and samples.
    model_key, train_key, classifier_key, sample_key, _ = jax.random.split(jax.random.key(0), 5)
    train, held_out = digits.load()
    flow = digits.make_flow(size, model_key)
    if options.checkpoint is None:
        with tempfile.TemporaryDirectory() as folder:
            flow = digits.train_flow(flow, train, size, train_key, Path(folder) / "flow.eqx")
    else:
        flow = eqx.tree_deserialise_leaves(options.checkpoint, flow)
    problem = digits_problem(flow, DIGITS_NOISES, digits.LIKE.shape, digits.CLASSES)
    fixed = fixed_pairs(options.evaluations, DIGITS_GRIDS, options.solvers)
    # Learnt once, for the errors and for the Frechet distances.
    evaluations = sorted({*options.tuned, *TUNED_FRECHET})
    tuning = Tuning(DIGITS_TUNING_NOISES, DIGITS_TUNING_UPDATES)
    tuned = [
        pair._replace(on=lambda problem, learnt=pair.on(problem): learnt)
        for pair in tuned_pairs(evaluations, options.solvers, tuning)
    ]
    table = measure_table([problem], [*fixed, *(pair for pair in tuned if pair.nfe in options.tuned)], "digits")

    classifier = digits.train_classifier(train, size.classifier_steps, classifier_key)
    features = eqx.filter_jit(lambda classifier, images: jax.vmap(classifier.features)(images))
    real = features(classifier, held_out.images)
    labels = jnp.arange(size.samples) % digits.CLASSES
    keys = [jax.random.fold_in(sample_key, seed) for seed in options.seeds]
    starts = [jax.random.normal(key, (size.samples, *digits.LIKE.shape)) for key in keys]

    def distance(samples: Callable[[Array], Array]) -> float:
        drawn = [features(classifier, digits.quantise(samples(x_start))) for x_start in starts]
        return float(np.mean([digits.frechet_distance(some, real) for some in drawn]))

    frechet: dict[str, dict[str, float]] = {}
    pairs = [
        pair for pair in fixed_pairs(FRECHET_EVALUATIONS, DIGITS_GRIDS, options.solvers) if pair[:2] in FRECHET_PAIRS
    ]
    pairs += [pair for pair in tuned if pair.nfe in TUNED_FRECHET]
    for pair in tqdm(pairs, desc="Frechet distances", mininterval=5):
        solver, grid = pair.on(problem)
        value = distance(lambda x_start, solver=solver, grid=grid: solve(flow, x_start, labels, solver, grid))
        frechet.setdefault(f"{pair.solver_name} | {pair.grid_name}", {})[str(pair.nfe)] = value
    exact = distance(lambda x_start: accurate(flow, x_start, labels, 1e-5))
    return {
        "counts": {"samples": DIGITS_NOISES, **tuning._asdict()},
        "errors": table,
        "frechet": frechet,
        "accurate": exact,
        "real": digits.frechet_distance(features(classifier, train.images), real),
    }


PARTS: dict[str, Callable[[Options], dict]] = {
    "Linear": lambda options: measure_path("Linear", options),
    "EDM": lambda options: measure_path("EDM", options),
    "stochastic": measure_stochastic,
    "digits": measure_digits,
}


def keep(file: Path, settings: dict, figures: dict) -> None:
    """Write the figures of a part, next to those kept before with the same settings."""
    if file.exists():
        kept = json.loads(file.read_text())
        if kept.pop("settings") == settings:
            figures = _joined(kept, figures)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"settings": settings, **figures}, indent=1))


def _joined(old: Any, new: Any) -> Any:
    """`old` with what is in `new`, key by key."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {key: _joined(old.get(key), new[key]) if key in new else old[key] for key in {**old, **new}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="none: write the page alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="mixtures, each with its own noise")
    parser.add_argument("--noises", type=int, default=512, help="samples of a mixture")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 8, 10, 15, 20, 40])
    parser.add_argument("--tuned", type=int, nargs="+", default=[5, 8, 10], help="NFE of the tuned rows")
    rows = [*SOLVERS, TUNED]
    parser.add_argument("--solvers", nargs="+", choices=rows, default=rows, help="rows, of all but stochastic")
    parser.add_argument("--checkpoint", type=Path, help="the flow that examples/digits.py saved: skip its training")
    parser.add_argument("--figures", type=Path, default=ROOT / "outputs" / "work_precision")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the page")
    given = parser.parse_args()
    options = Options(given.seeds, given.noises, given.evaluations, given.tuned, given.solvers, given.checkpoint)
    # A row that overflows is a row of the table.
    warnings.simplefilter("ignore")
    for part in given.parts:
        settings = {"seeds": options.seeds, "noises": options.noises}
        keep(given.figures / f"{part}.json", settings, PARTS[part](options))
    write_page(given.figures, given.out)


if __name__ == "__main__":
    main()
