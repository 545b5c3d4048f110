"""What does `fs.sample` cost beyond the network? Run time, first call and memory, against a `lax.scan` by hand.

    python tests/benchmarks/overhead.py                          # all parts: half an hour on 2 CPU cores
    python tests/benchmarks/overhead.py --parts runtime --solvers DDIM "UniPC 3"
    python tests/benchmarks/overhead.py --smoke

`runtime`: programs that start from the same noise, interleaved, medians: the floor (as many chained forward passes in
one jit, without a solver), a scan of the same update by hand (see by_hand.py), `fs.sample` in a user's jit, and
`fs.sample` as it is, which checks its arguments in Python at every call. The outputs of the last three are compared
first. `first_call`: seconds of the first call, each in a fresh process: with compiling, without imports and the making
of the network; how often the network is traced; and seconds of compiling by the number of steps. `memory`: what XLA
reserves for temporaries, for samples and for gradients in the network's parameters.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from by_hand import METHODS, Method, Problem, Program, floor
from jaxtyping import Array, Key
from networks import Dit, Mlp
from pages import markdown, page_options, show
from timing import interleaved, ratio

TINY, MLP, WIDE, IMAGE = "MLP 32, B 1", "MLP 512, B 64", "state of 3072, B 32", "DiT, B 4"
PROBLEMS = {
    TINY: Problem(lambda key: Mlp(8, 32, 3, key=key), (8,), 1),
    MLP: Problem(lambda key: Mlp(64, 512, 3, key=key), (64,), 64),
    WIDE: Problem(lambda key: Mlp(3072, 128, 1, key=key), (3072,), 32),
    IMAGE: Problem(lambda key: Dit(16, 4, width=128, depth=4, heads=4, key=key), (16, 16, 4), 4),
}

HEADING = """\
# The cost of a solve beyond its network

What `fs.sample` takes beyond the forward passes of the network, and beyond a `lax.scan` of the same update by hand,
with its coefficients in tables. "In a jit" is `fs.sample` inside a user's `jax.jit`; "as it is" a plain call, which
checks its arguments in Python every time.

    python tests/benchmarks/overhead.py
"""

RUNTIME = """\
## Run time

Milliseconds of a solve of {evaluations} network evaluations, the medians of {rounds} interleaved rounds, and of these
and of the ratios the medians of {processes} processes; the floor is as many forward passes in a chain. "Python a call"
is "as it is" less "in a jit". Bold: more than wanted, which is over the floor 1.02 for Euler and DDIM, 1.05 for
multistep solvers and 1.15 for all of them on the wide state, and over the scan by hand 1.03, or 1.1 with noise.
"""

FIRST_CALL = """\
## The first call

MLP 512, B 64: seconds of the first call, each in a fresh process, medians of {repeats} interleaved runs; how often
`fs.sample` traces the network; seconds to trace and compile {few} and {many} steps. Bold: more than 0.4 s over the scan
by hand, more than one trace, or a ratio that is not within 10 %.
"""

MEMORY = """\
## Memory

MLP 512, B 64: MiB of temporaries by XLA's own account, for a number of steps. Samples: `fs.sample` in a jit. Gradient:
of the samples' mean square in the network's parameters, through `fs.sample` by the default adjoint, which keeps the
states of a few steps and computes the others again, and through the scan by hand, which keeps all. Bold: a ratio beyond
1.05.
"""


def judged(value: float, good: bool, digits: int = 3) -> str:
    """A number, in bold where it is not what is wanted."""
    return f"{value:.{digits}f}" if good else f"**{value:.{digits}f}**"


def check_samples(method: Method, problem: Problem, network: eqx.Module, key: Key[Array, ""], steps: int) -> None:
    """Raise unless the scan by hand gives the samples of the library, to rounding."""
    by_hand = jax.jit(method.by_hand(problem, steps))(network, key)
    for samples in (jax.jit(method.in_jit(problem, steps))(network, key), method.sample(network, problem, key, steps)):
        error = float(jnp.abs(samples - by_hand).max() / jnp.abs(by_hand).max())
        if not error < 1e-5:
            raise AssertionError(f"{method.solver} by hand and by fs.sample differ by {error:.1e} of the samples.")


def runtime(options: argparse.Namespace) -> str:
    rows = [_runtime_row(problem, solver, options) for problem in options.problems for solver in options.solvers]
    header = ["problem", "solver", *PROGRAMS, "Python a call"]
    header += ["by hand / floor", "in a jit / floor", "in a jit / by hand"]
    return RUNTIME.format(**vars(options)) + "\n" + markdown(header, rows)


PROGRAMS = ("floor", "by hand", "in a jit", "as it is")


def one_runtime(name: str, solver: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every program, interleaved, in this process."""
    problem, method = PROBLEMS[name], METHODS[solver]
    network, key = problem.network(jax.random.key(0)), jax.random.key(1)
    flow = method.flow(network)
    steps = options.evaluations // method.evaluations
    check_samples(method, problem, network, key, steps)

    def waiting(program: Program) -> Callable[[], object]:
        compiled = jax.jit(program)
        return lambda: jax.block_until_ready(compiled(network, key))

    calls = (
        waiting(floor(problem, options.evaluations)),
        waiting(method.by_hand(problem, steps)),
        waiting(method.in_jit(problem, steps)),
        lambda: jax.block_until_ready(method.sample(flow, problem, key, steps)),
    )
    return interleaved(dict(zip(PROGRAMS, calls, strict=True)), rounds=options.rounds)


def _runtime_row(name: str, solver: str, options: argparse.Namespace) -> list[str]:
    runs = [in_fresh_process("--one-runtime", name, solver, options=options) for _ in range(options.processes)]

    def median(of: Callable[[dict[str, list[float]]], float]) -> float:
        return statistics.median(of(times) for times in runs)

    milliseconds = [median(lambda times, one=program: 1e3 * statistics.median(times[one])) for program in PROGRAMS]
    hand_over_floor = median(lambda times: ratio(times, "by hand", "floor"))
    over_floor = median(lambda times: ratio(times, "in a jit", "floor"))
    over_hand = median(lambda times: ratio(times, "in a jit", "by hand"))
    method = METHODS[solver]
    judges = method.most_over_floor is not None and name != TINY
    most = 1.15 if name == WIDE else method.most_over_floor
    row = [
        name,
        solver,
        *(f"{value:.2f}" for value in milliseconds),
        f"{milliseconds[3] - milliseconds[2]:.2f}",
        f"{hand_over_floor:.3f}",
        judged(over_floor, not judges or over_floor <= most),
        judged(over_hand, over_hand <= (1.03 if method.dynamics is None else 1.1)),
    ]
    print(*row, sep=" | ", flush=True)
    return row


def in_fresh_process(*arguments: str, options: argparse.Namespace) -> dict:
    """What this script prints when it is started with these arguments."""
    numbers = ["--evaluations", str(options.evaluations), "--rounds", str(options.rounds)]
    command = [sys.executable, __file__, *numbers, *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])


#: One entry for each trace of a `Counted` network in this process.
traces: list[None] = []


class Counted(eqx.Module):
    """A network that counts its traces."""

    network: eqx.Module

    def __call__(self, t, x, args=None, *, key=None):
        traces.append(None)
        return self.network(t, x, args, key=key)


def one_call(solver: str, program: str, evaluations: int) -> dict[str, float]:
    """Seconds and traces of the first call in this process."""
    problem, method = PROBLEMS[MLP], METHODS[solver]
    network = jax.block_until_ready(Counted(problem.network(jax.random.key(0))))
    key, steps = jax.random.key(1), evaluations // method.evaluations
    start = time.perf_counter()
    if program == "by hand":
        samples = jax.jit(method.by_hand(problem, steps))(network, key)
    elif program == "in a jit":
        samples = jax.jit(method.in_jit(problem, steps))(network, key)
    else:
        samples = method.sample(network, problem, key, steps)
    jax.block_until_ready(samples)
    return {"seconds": time.perf_counter() - start, "traces": len(traces)}


def first_call(options: argparse.Namespace) -> str:
    programs = ("by hand", "in a jit", "as it is")
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(options.repeats):
        for solver in options.solvers:
            for program in programs:
                call = in_fresh_process("--one-call", solver, program, options=options)
                found.setdefault((solver, program), []).append(call)
    rows = []
    for solver in options.solvers:
        seconds = [statistics.median(call["seconds"] for call in found[solver, program]) for program in programs]
        traced = found[solver, "as it is"][-1]["traces"]
        by_hand, ours = (compile_seconds(make, options) for make in (METHODS[solver].by_hand, METHODS[solver].in_jit))
        growth = ours[-1] / ours[0]
        rows.append(
            [
                solver,
                *(f"{value:.2f}" for value in seconds),
                *(judged(value - seconds[0], value - seconds[0] <= 0.4, 2) for value in seconds[1:]),
                judged(traced, traced == 1, 0),
                *("/".join(f"{value:.2f}" for value in values) for values in (by_hand, ours)),
                judged(growth, abs(growth - 1) <= 0.1),
            ]
        )
        print(*rows[-1], sep=" | ", flush=True)
    header = ["solver", *programs, "in a jit - by hand", "as it is - by hand", "traces"]
    header += ["compile by hand", "compile in a jit", "ratio"]
    few, many = options.compiled
    return FIRST_CALL.format(repeats=options.repeats, few=few, many=many) + "\n" + markdown(header, rows)


def compile_seconds(make: Callable[[Problem, int], Program], options: argparse.Namespace) -> list[float]:
    """Median seconds to trace and compile, for each number of steps."""
    problem = PROBLEMS[MLP]
    network, key = problem.network(jax.random.key(0)), jax.random.key(1)
    spent: dict[int, list[float]] = {steps: [] for steps in options.compiled}
    for _ in range(options.repeats):
        for steps, seconds in spent.items():
            jax.clear_caches()
            start = time.perf_counter()
            jax.jit(make(problem, steps)).lower(network, key).compile()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in spent.values()]


def memory(options: argparse.Namespace) -> str:
    rows = [_memory(solver, options) for solver in options.solvers]
    few, *_, many = options.lengths
    header = ["solver", *(f"samples {steps}" for steps in options.lengths), f"{many} / {few}"]
    header += [f"{what} {steps}" for what in ("gradient", "by hand") for steps in options.lengths]
    return MEMORY + "\n" + markdown(header, rows)


def _memory(solver: str, options: argparse.Namespace) -> list[str]:
    problem, method = PROBLEMS[MLP], METHODS[solver]
    network, key = problem.network(jax.random.key(0)), jax.random.key(1)

    def gradient(program: Program) -> Program:
        return jax.grad(lambda network, key: jnp.mean(program(network, key) ** 2))

    def mebibytes(program: Program) -> float:
        return jax.jit(program).lower(network, key).compile().memory_analysis().temp_size_in_bytes / 2**20

    samples = [mebibytes(method.in_jit(problem, steps)) for steps in options.lengths]
    gradients = [mebibytes(gradient(method.in_jit(problem, steps))) for steps in options.lengths]
    by_hand = [mebibytes(gradient(method.by_hand(problem, steps))) for steps in options.lengths]
    growth = samples[-1] / samples[0]
    row = [solver, *(f"{value:.3f}" for value in samples), judged(growth, growth <= 1.05)]
    row += [f"{value:.1f}" for value in gradients + by_hand]
    print(*row, sep=" | ", flush=True)
    return row


PARTS: dict[str, Callable[[argparse.Namespace], str]] = {
    "runtime": runtime,
    "first_call": first_call,
    "memory": memory,
}


def main() -> None:
    parser = page_options(__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--solvers", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="of the run time")
    parser.add_argument("--evaluations", type=int, default=20, help="of the network, in a solve")
    parser.add_argument("--rounds", type=int, default=31, help="of the run time")
    parser.add_argument("--processes", type=int, default=3, help="of the run time, one after another")
    parser.add_argument("--repeats", type=int, default=5, help="of the first call")
    # What a fresh process is started with, which measures one row or one first call.
    parser.add_argument("--one-runtime", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--one-call", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_runtime is not None:
        print(json.dumps(one_runtime(*options.one_runtime, options)))
        return
    if options.one_call is not None:
        print(json.dumps(one_call(*options.one_call, options.evaluations)))
        return
    options.compiled, options.lengths = (10, 1000), (10, 100, 1000)
    if options.smoke:
        options.solvers, options.problems = ["DDIM"], [TINY]
        options.rounds, options.processes, options.repeats = 3, 1, 1
        options.compiled, options.lengths = (5, 10), (5, 10)
    show("overhead", HEADING, [PARTS[part](options) for part in options.parts], options)


if __name__ == "__main__":
    main()
