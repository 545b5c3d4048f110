"""How does the cost of `fs.sample` grow: with devices, with the batch, with the dimension, with the steps?

    python tests/benchmarks/scaling.py [--write]                 # ten minutes on 2 CPU cores
    python tests/benchmarks/scaling.py --smoke

On 1, 2, 4 and 8 virtual CPU devices, which share the same cores: whether the samples are the same to the last bit, also
in chunks; how many collectives the compiled program has; time per sample, which cannot fall here but should not rise.
Then on one device, log-log: milliseconds of a solve against the batch, the dimension of the state and the number of
steps, beside as many forward passes alone and a scan by hand (see overhead.py), interleaved, medians.
"""

import argparse
import re
import statistics
from collections.abc import Callable
from typing import NamedTuple

import jax

# Before anything else asks for a device.
jax.config.update("jax_num_cpu_devices", 8)

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
from by_hand import METHODS, Method, Problem, Program, floor  # noqa: E402
from networks import Mlp  # noqa: E402
from pages import markdown, page_options, show  # noqa: E402
from timing import interleaved  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SOLVER = "DPMSolverPP 2"
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\(")
STYLES = {
    "forward passes alone": {"color": "#999999", "marker": "o", "lw": 4, "ms": 9},
    "scan by hand": {"color": "#E69F00", "marker": "s", "lw": 2, "ms": 7},
    "fs.sample in a jit": {"color": "#0072B2", "marker": "^", "lw": 1.5, "ms": 6},
    "fs.sample as it is": {"color": "#D55E00", "marker": "D", "lw": 1, "ms": 4},
}

HEADING = """\
# Scaling

How the cost of `fs.sample` grows with devices, with the batch, with the dimension of the state and with the number of
steps. The network is an MLP with three hidden layers, the solver `DPMSolverPP(2)`.

    python tests/benchmarks/scaling.py
"""

DEVICES = """\
## Devices

{num} samples in 64 dimensions, {steps} steps, over virtual devices of one CPU, which share its cores: the time cannot
fall, but shows what spreading costs. "Equal": to the last bit, to one device that takes all samples together; else the
largest difference over the largest sample. `fs.sample` is in a jit, which ends with the check that all is finite.
"""

PICTURE = """\
## Batch, dimension, steps

![Milliseconds of a solve against the batch, the dimension and the steps](scaling.png)

Medians of {rounds} interleaved rounds on one device, in milliseconds. What is not varied is a batch of {num}, {dim}
dimensions and {steps} steps.
"""


class Size(NamedTuple):
    """What is varied, with what it is where something else is."""

    num: int = 64
    dim: int = 64
    steps: int = 20

    def problem(self, width: int) -> Problem:
        return Problem(lambda key: Mlp(self.dim, width, 3, key=key), (self.dim,), self.num)


def devices(options: argparse.Namespace) -> str:
    size = Size(num=options.samples, steps=options.steps)
    problem, method = size.problem(options.width), METHODS[SOLVER]
    network, key = problem.network(jax.random.key(0)), jax.random.key(1)
    alone = np.asarray(jax.jit(method.in_jit(problem, size.steps))(network, key))
    competitors, found = {}, {}
    for count in options.devices:
        mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
        for chunk in (None, options.chunk):
            compiled = spread_over(method, problem, size.steps, mesh, chunk).lower(network, key).compile()
            placed = [jax.device_put(*pair) for pair in zip((network, key), compiled.input_shardings[0], strict=True)]
            samples = np.asarray(compiled(*placed))
            difference = np.abs(samples - alone).max() / np.abs(alone).max()
            found[count, chunk] = (*collectives(compiled.as_text()), difference)
            competitors[count, chunk] = lambda compiled=compiled, placed=placed: jax.block_until_ready(
                compiled(*placed)
            )
    times = interleaved(competitors, rounds=options.rounds)
    rows = [
        [
            str(count),
            "-" if chunk is None else str(chunk),
            f"**{in_loops}**" if in_loops else "0",
            str(in_all),
            f"**no, {difference:.0e}**" if difference else "yes",
            f"{1e6 * statistics.median(times[count, chunk]) / problem.num:.1f}",
        ]
        for (count, chunk), (in_loops, in_all, difference) in found.items()
    ]
    header = ["devices", "chunk", "collectives in loops", "in all", "equal", "microseconds a sample"]
    return DEVICES.format(num=problem.num, steps=size.steps) + "\n" + markdown(header, rows)


def collectives(compiled: str) -> tuple[int, int]:
    """How many collectives a compiled program has inside its loops, and in all."""
    bodies = {}
    for line in compiled.splitlines():
        if line.endswith("{") and (header := re.match(r"(?:ENTRY )?%?([\w.-]+) ", line)):
            name = header[1]
            bodies[name] = ""
        elif bodies:
            bodies[name] += line + "\n"
    inside: set[str] = set()
    todo = [name for body in bodies.values() for name in re.findall(r"(?:body|condition)=%?([\w.-]+)", body)]
    while todo:
        if (name := todo.pop()) not in inside:
            inside.add(name)
            todo += [other for other in re.findall(r"%([\w.-]+)", bodies[name]) if other in bodies]
    counts = {name: len(COLLECTIVE.findall(body)) for name, body in bodies.items()}
    return sum(counts[name] for name in inside), sum(counts.values())


def spread_over(method: Method, problem: Problem, steps: int, mesh: jax.sharding.Mesh, chunk: int | None) -> Callable:
    return jax.jit(lambda network, key: method.sample(network, problem, key, steps, mesh=mesh, chunk=chunk))


def milliseconds(size: Size, options: argparse.Namespace) -> list[float]:
    """Of a solve by each of the programs of the picture."""
    problem, method = size.problem(options.width), METHODS[SOLVER]
    network, key = problem.network(jax.random.key(0)), jax.random.key(1)
    flow = method.flow(network)

    def waiting(program: Program) -> Callable[[], object]:
        compiled = jax.jit(program)
        return lambda: jax.block_until_ready(compiled(network, key))

    programs = (
        waiting(floor(problem, size.steps)),
        waiting(method.by_hand(problem, size.steps)),
        waiting(method.in_jit(problem, size.steps)),
        lambda: jax.block_until_ready(method.sample(flow, problem, key, size.steps)),
    )
    times = interleaved(dict(zip(STYLES, programs, strict=True)), rounds=options.rounds, least=0.02)
    return [1e3 * statistics.median(seconds) for seconds in times.values()]


def picture(options: argparse.Namespace) -> str:
    default = Size()
    panels = {
        "samples in the batch": [default._replace(num=num) for num in options.nums],
        "dimension of the state": [default._replace(dim=dim) for dim in options.dims],
        "steps": [default._replace(steps=steps) for steps in options.numbers_of_steps],
    }
    varied = dict(zip(panels, Size._fields, strict=True))
    sections = [PICTURE.format(rounds=options.rounds, **default._asdict())]
    known: dict[Size, list[float]] = {}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.8), sharey=True)
    for axis, (label, sizes) in zip(axes, panels.items(), strict=True):
        values = [getattr(size, varied[label]) for size in sizes]
        for size in sizes:
            if size not in known:
                known[size] = milliseconds(size, options)
        measured = [known[size] for size in sizes]
        for (name, style), times in zip(STYLES.items(), zip(*measured, strict=True), strict=True):
            axis.loglog(values, times, label=name, **style)
        axis.set_xlabel(label)
        axis.set_xticks(values, [f"{value:,}" for value in values], rotation=40)
        axis.minorticks_off()
        axis.grid(color="0.9")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        rows = [[str(value), *(f"{time:.3g}" for time in row)] for value, row in zip(values, measured, strict=True)]
        sections.append(markdown([label, *STYLES], rows))
    axes[0].set_ylabel("milliseconds of a solve")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    if options.write:
        options.docs.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.docs / "scaling.png", dpi=130)
    plt.close(figure)
    return "\n".join(sections)


def main() -> None:
    parser = page_options(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--samples", type=int, default=1000, help="over devices")
    parser.add_argument("--chunk", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=256, help="of the network")
    options = parser.parse_args()
    options.nums, options.dims = [1, 4, 16, 64, 256, 1024, 4096], [4, 16, 64, 256, 1024, 4096, 16384]
    options.numbers_of_steps, options.devices = [1, 3, 10, 30, 100, 300, 1000], (1, 2, 4, 8)
    if options.smoke:
        options.rounds, options.samples, options.chunk, options.steps, options.width = 3, 100, 7, 4, 32
        options.nums, options.dims, options.numbers_of_steps, options.devices = [1, 64], [64], [20], (1, 8)
    show("scaling", HEADING, [devices(options), picture(options)], options)


if __name__ == "__main__":
    main()
