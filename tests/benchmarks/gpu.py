"""How near does `fs.sample` come to what a GPU can do? A DiT-B-sized network on latent images.

    python tests/benchmarks/gpu.py [--batches 64 256] [--write]
    python tests/benchmarks/gpu.py --smoke                               # tiny, on anything, half a minute

A transformer of width 768, depth 12, 12 heads and patches of 2 x 2 on 32 x 32 x 4 latents, in bfloat16 behind
`fs.nn.Precision`, with the state and the coefficients in float32. First the device's own rate: the best of several
products of large square matrices in the network's dtype, jitted. Then, interleaved, the medians of: one forward pass of
the whole batch in a jit; as many chained forward passes in one jit as a solve has evaluations, from the same noise; and
`fs.sample` as it is. The work is counted by hand, from the shapes of all products of matrices.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from by_hand import METHODS, Problem, floor
from networks import Dit
from pages import markdown, page_options, show
from timing import interleaved

import flowsolve as fs

SOLVERS = ("Euler", "DDIM", "DPMSolverPP 2")

HEADING = """\
# On a GPU

A transformer of the size of DiT-B (width 768, depth 12, 12 heads, patches of 2 x 2) with random weights on 32 x 32 x 4
latents, in bfloat16, with the state and the solver in float32: the time of a solve against that of its forward passes,
and the work done per second against what the device reaches on products of large matrices.

    python tests/benchmarks/gpu.py
"""

RATE = """\
The device reaches {rate:.3g} TFLOP/s on products of {size} x {size} matrices in {dtype}. One forward pass of one
example is {work:.3g} GFLOP. Each solve has {steps} steps; medians of {rounds} interleaved rounds.
"""


def matmul_rate(size: int, dtype: jnp.dtype, repeats: int = 10) -> float:
    """FLOP/s of a square product, the best of several chains of products."""
    chain = 10
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    b = (jax.random.normal(jax.random.key(1), (size, size)) / size**0.5).astype(dtype)

    @jax.jit
    def product(a, b):
        return jax.lax.fori_loop(0, chain, lambda _, a: a @ b, a)

    jax.block_until_ready(product(a, b))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(a, b))
        best = min(best, time.perf_counter() - start)
    return chain * 2 * size**3 / best


def forward_work(network: Dit) -> float:
    """FLOPs of one example's forward pass: two for each entry of a weight and token, and attention's products."""
    tokens, width = network.position.shape
    depth = network.blocks.qkv.shape[0]
    entries = sum(
        weight[0].size for weight in (network.blocks.qkv, network.blocks.out, network.blocks.up, network.blocks.down)
    )
    per_block = 2 * tokens * entries + 2 * network.blocks.modulation[0].size + 4 * tokens**2 * width
    ends = 2 * tokens * (network.first.size + network.last.size) + 2 * network.time.size
    return depth * per_block + ends


def measure(batch: int, options: argparse.Namespace, rate: float) -> list[list[str]]:
    problem = Problem(options.network, (options.size, options.size, 4), batch)
    dit, key = problem.network(jax.random.key(0)), jax.random.key(1)
    network = fs.nn.Precision(dit, options.dtype)
    work = forward_work(dit) * batch
    x = jax.random.normal(jax.random.key(2), (batch, *problem.shape))

    def waiting(program: Callable, *arguments: object) -> Callable[[], object]:
        compiled = eqx.filter_jit(program)
        return lambda: jax.block_until_ready(compiled(*arguments))

    def forward(network: eqx.Module, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: network(jnp.float32(0.5), x))(x)

    competitors = {
        "forward": waiting(forward, network, x),
        "chain": waiting(floor(problem, options.steps), network, key),
    }
    for name in SOLVERS:
        method = METHODS[name]
        flow = method.flow(network)
        competitors[name] = lambda method=method, flow=flow: jax.block_until_ready(
            method.sample(flow, problem, key, options.steps)
        )
    times = interleaved(competitors, rounds=options.rounds)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    passes = options.steps * seconds["forward"]
    rows = []
    for name in ("chain", *SOLVERS):
        reached = options.steps * work / seconds[name]
        rows.append(
            [
                str(batch),
                "no solver: passes in a chain" if name == "chain" else name,
                f"{1e3 * seconds[name]:.1f}",
                f"{1e3 * seconds['forward']:.2f}",
                f"{seconds[name] / passes:.3f}",
                f"{seconds[name] / seconds['chain']:.3f}",
                f"{reached / 1e12:.3g}",
                f"{100 * reached / rate:.0f} %",
            ]
        )
    return rows


def main() -> None:
    parser = page_options(__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    options.size, options.product, options.dtype = 32, 8192, jnp.bfloat16
    shape = {"width": 768, "depth": 12, "heads": 12}
    if options.smoke:
        options.batches, options.steps, options.rounds, options.size, options.product = [2], 3, 2, 8, 256
        shape = {"width": 32, "depth": 2, "heads": 2}
    options.network = lambda key: Dit(options.size, 4, **shape, key=key)
    rate = matmul_rate(options.product, options.dtype)
    rows = [row for batch in options.batches for row in measure(batch, options, rate)]
    header = ["batch", "solver", "milliseconds", "one forward pass", "over steps x forward", "over the chain"]
    header += ["TFLOP/s", "of the device"]
    work = forward_work(options.network(jax.random.key(0)))
    numbers = RATE.format(
        rate=rate / 1e12,
        size=options.product,
        dtype=jnp.dtype(options.dtype).name,
        work=work / 1e9,
        steps=options.steps,
        rounds=options.rounds,
    )
    show("gpu", HEADING, [numbers, markdown(header, rows)], options)


if __name__ == "__main__":
    main()
