"""Are the networks of `fs.nn` as fast as the same networks in PyTorch, and do they compile in a time flat in depth?

    pip install torch                                    # the CPU build will do
    python tests/benchmarks/networks_peers.py            # a quarter of an hour on 2 CPU cores
    python tests/benchmarks/networks_peers.py --smoke    # a small DiT and a small UNet

`speed`: both get the same weights and the same batch of images, times and labels. First their outputs and the gradients
in the images are compared: the largest difference, relative to the root mean square, must be at most 1e-4, or the
script raises. Then the forward pass, and the forward pass with the gradient in all parameters, are timed in turn (see
timing.py). PyTorch runs with its own attention and its fused layer norm, on one thread and on as many as there are
cores, of which the faster counts; with `--compile` also under `torch.compile`. `compile`: seconds to trace and compile
DiT-B/4 with its gradient, for 12 and 24 blocks.
"""

import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from pages import markdown, page_options, show
from timing import interleaved

import flowsolve as fs

try:
    import torch
    import torch.nn.functional as F
    from peers_networks import linear, tensor
except ModuleNotFoundError as error:
    raise SystemExit(f"No module named {error.name}: the peer is needed, pip install torch.") from error

TOLERANCE = 1e-4  # of the outputs of both
CLASSES = 10


class Case(NamedTuple):
    """A network with labels, its twin in PyTorch, called as `twin(t, x, labels)`, and the shape of a batch."""

    network: Callable[[Array], eqx.Module]
    twin: Callable[[Any], torch.nn.Module]
    shape: tuple[int, int, int, int]


# --- DiT --------------------------------------------------------------------------------------------------------------


class TorchTimeAndLabel(torch.nn.Module):
    """silu of the sum of the embeddings of time and label, of a network with a sinusoidal embedding."""

    def __init__(self, network):
        super().__init__()
        self.embed = torch.nn.ModuleList(map(linear, network.embed.layers))
        self.table = torch.nn.Parameter(tensor(network.label_embedding.table))
        embedding = network.time_embedding
        periods = np.geomspace(embedding.max_period, embedding.min_period, embedding.dim // 2)
        self.register_buffer("frequencies", torch.from_numpy((2 * np.pi / periods).astype(np.float32)))

    def forward(self, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        phases = t[:, None] * self.frequencies
        c = self.embed[0](torch.cat([phases.cos(), phases.sin()], 1))
        return F.silu(self.embed[1](F.silu(c)) + self.table[labels])


def modulated(h: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift[:, None], F.layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale[:, None])


class TorchDiTBlock(torch.nn.Module):
    """The index-th block of a DiT without a context."""

    def __init__(self, blocks, index: int):
        super().__init__()
        self.modulation, self.first, self.second = (
            linear(part, index) for part in (blocks.modulation, blocks.first, blocks.second)
        )
        self.qkv, self.out = linear(blocks.attention.query_key_value, index), linear(blocks.attention.out, index)
        self.heads = blocks.attention.heads

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        parts = self.modulation(c).chunk(6, 1)
        batch, tokens, _ = h.shape
        qkv = self.qkv(modulated(h, parts[0], parts[1]))
        query, key, value = qkv.reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(h.shape)
        h = torch.addcmul(h, parts[2][:, None], self.out(attended))
        hidden = F.gelu(self.first(modulated(h, parts[3], parts[4])), approximate="tanh")
        return torch.addcmul(h, parts[5][:, None], self.second(hidden))


class TorchDiT(torch.nn.Module):
    """`fs.nn.DiT` on images of one size, with labels and positions that are added."""

    def __init__(self, network: fs.nn.DiT, side: int):
        super().__init__()
        size = network.size
        self.condition = TorchTimeAndLabel(network)
        self.first, self.modulation, self.last = map(linear, (network.first, network.modulation, network.last))
        self.blocks = torch.nn.ModuleList(TorchDiTBlock(network.blocks, i) for i in range(size.depth))
        self.patch, self.grid = size.patch, side // size.patch
        self.register_buffer("position", tensor(network.positions.added(self.grid, self.grid, size.width, jnp.float32)))

    def forward(self, t: torch.Tensor, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        batch, channels = x.shape[:2]
        grid, patch = self.grid, self.patch
        tokens = x.reshape(batch, channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        c = self.condition(t, labels)
        h = self.first(tokens.reshape(batch, grid * grid, -1)) + self.position
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.modulation(c).chunk(2, 1)
        out = self.last(modulated(h, shift, scale)).reshape(batch, grid, grid, channels, patch, patch)
        return out.permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def dit(name: str, batch: int, channels: int = 3, side: int = 32) -> Case:
    """A published size on images of 3 x 32 x 32."""
    size = fs.nn.DiT.SIZES[name]
    return Case(
        lambda key: fs.nn.DiT(channels, size, num_classes=CLASSES, key=key),
        lambda network: TorchDiT(network, side),
        (batch, channels, side, side),
    )


# --- UNet -------------------------------------------------------------------------------------------------------------


def convolution(source, stride: int = 1) -> torch.nn.Conv2d:
    """A padded convolution with its bias."""
    outputs, inputs, size, _ = source.weight.shape
    made = torch.nn.Conv2d(inputs, outputs, size, stride, padding=size // 2)
    made.weight, made.bias = torch.nn.Parameter(tensor(source.weight)), torch.nn.Parameter(tensor(source.bias))
    return made


def group_norm(source) -> torch.nn.GroupNorm:
    """Of the largest number of groups, at most 32, of at least 4 channels each."""
    channels = len(source.weight)
    groups = max(n for n in range(1, 33) if channels % n == 0 and channels // n >= 4)
    made = torch.nn.GroupNorm(groups, channels)
    made.weight, made.bias = torch.nn.Parameter(tensor(source.weight)), torch.nn.Parameter(tensor(source.bias))
    return made


class TorchStage(torch.nn.Module):
    """A residual block and, where there is one, the attention of the pixels."""

    def __init__(self, stage):
        super().__init__()
        block, attention = stage.residual, stage.attention
        self.norm, self.second_norm = group_norm(block.norm), group_norm(block.second_norm)
        self.first, self.second = convolution(block.first), convolution(block.second)
        self.modulation = linear(block.modulation)
        self.skip = torch.nn.Identity()
        if block.skip is not None:
            self.skip = torch.nn.Conv2d(block.skip.in_features, block.skip.out_features, 1)
            self.skip.weight = torch.nn.Parameter(tensor(block.skip.weight[:, :, None, None]))
            self.skip.bias = torch.nn.Parameter(tensor(block.skip.bias))
        self.heads = None
        if attention is not None:
            self.heads = attention.attention.heads
            self.attention_norm = group_norm(attention.norm)
            self.qkv, self.out = linear(attention.attention.query_key_value), linear(attention.attention.out)

    def forward(self, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, 1)
        hidden = self.second_norm(self.first(F.silu(self.norm(h))))
        h = self.skip(h) + self.second(F.silu(torch.addcmul(shift, hidden, 1 + scale)))
        if self.heads is None:
            return h
        tokens = self.attention_norm(h).flatten(2).transpose(1, 2)
        qkv = self.qkv(tokens).reshape(*tokens.shape[:2], 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(tokens.shape)
        return h + self.out(attended).transpose(1, 2).reshape(h.shape)


class TorchUNet(torch.nn.Module):
    """`fs.nn.UNet` with labels, on images whose sides its levels halve."""

    def __init__(self, network: fs.nn.UNet):
        super().__init__()

        def stages(levels) -> torch.nn.ModuleList:
            return torch.nn.ModuleList(torch.nn.ModuleList(map(TorchStage, level)) for level in levels)

        self.condition = TorchTimeAndLabel(network)
        self.first, self.last = convolution(network.first), convolution(network.last)
        self.down, self.up = stages(network.down), stages(network.up)
        (self.middle,) = stages([network.middle])
        self.downsample = torch.nn.ModuleList(convolution(part, stride=2) for part in network.downsample)
        self.upsample = torch.nn.ModuleList(map(convolution, network.upsample))
        self.last_norm = group_norm(network.last_norm)

    def forward(self, t: torch.Tensor, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        c = self.condition(t, labels)
        h = self.first(x)
        skips = [h]
        for level, stages in enumerate(self.down):
            for stage in stages:
                h = stage(h, c)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, c)
        for level, stages in enumerate(self.up):
            for stage in stages:
                h = stage(torch.cat([h, skips.pop()], 1), c)
            if level < len(self.upsample):
                h = self.upsample[level](F.interpolate(h, scale_factor=2, mode="nearest"))
        return self.last(F.silu(self.last_norm(h)))


def unet(batch: int, width: int = 32, blocks: int = 2) -> Case:
    """A UNet for images of digits, 1 x 8 x 8, with attention between the 4 x 4 pixels of its second level."""
    return Case(
        lambda key: fs.nn.UNet(1, width=width, blocks=blocks, num_classes=CLASSES, key=key),
        TorchUNet,
        (batch, 1, 8, 8),
    )


# --- the cases --------------------------------------------------------------------------------------------------------

SMOKE: dict[str, Case] = {"DiT-S/8, batch 2": dit("S/8", 2), "UNet, batch 2": unet(2, width=8, blocks=1)}
CASES: dict[str, Case] = {
    "DiT-S/4, batch 8": dit("S/4", 8),
    "DiT-S/4, batch 32": dit("S/4", 32),
    "UNet of the digits, batch 64": unet(64),
    "UNet of the digits, batch 256": unet(256),
}


# --- one measurement --------------------------------------------------------------------------------------------------


def shaken(network: eqx.Module) -> eqx.Module:
    """With random numbers in every array, of the size that keeps activations: zeros of the start hide most of it."""
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if not eqx.is_inexact_array(leaf):
            return leaf
        fan_in = max(1, leaf[0].size if leaf.ndim > 1 else 1)
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(max(fan_in, leaf.shape[-1])), jnp.float32)

    return jax.tree.map(draw, network)


def forward(network, t, x, labels):
    return jax.vmap(network)(t, x, labels)


def loss(network, t, x, labels):
    return jnp.mean(jnp.square(forward(network, t, x, labels)))


def check_equal(what: str, theirs: torch.Tensor, ours: Array) -> float:
    """The largest difference relative to the root mean square; raise if it is too large."""
    want = theirs.detach().numpy()
    difference = float(np.max(np.abs(want - np.asarray(ours))) / np.sqrt(np.mean(np.square(want))))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{what} of PyTorch differs by {difference:.1e} of its size: what is compared is not equal.")
    return difference


def measure(name: str, case: Case, rounds: int, compiling: bool) -> list[list[str]]:
    """The lines of one network: its forward pass, and that with the gradient in all parameters."""
    network = shaken(eqx.filter_jit(case.network)(jax.random.key(0)))
    model = case.twin(network)
    rng = np.random.default_rng(1)
    batch = case.shape[0]
    numbers = (rng.uniform(size=batch), rng.normal(size=case.shape), rng.integers(0, CLASSES, batch))
    t, x, labels = (np.asarray(n, kind) for n, kind in zip(numbers, (np.float32, np.float32, np.int32), strict=True))
    given = tuple(map(torch.from_numpy, (t, x, labels.astype(np.int64))))
    arrays = tuple(map(jnp.asarray, (t, x, labels)))

    seen = given[1].clone().requires_grad_()
    output = model(given[0], seen, given[2])
    output.square().mean().backward()
    in_x = eqx.filter_jit(lambda network, t, x, labels: jax.grad(loss, 2)(network, t, x, labels))
    pairs = {
        "output": (output, eqx.filter_jit(forward)(network, *arrays)),
        "gradient": (seen.grad, in_x(network, *arrays)),
    }
    differences = [check_equal(f"The {what} of {name}", *pair) for what, pair in pairs.items()]

    def torch_forward(model: Callable[..., torch.Tensor]) -> None:
        with torch.inference_mode():
            model(*given)

    def torch_gradient(run: Callable[..., torch.Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        run(*given).square().mean().backward()

    lines = []
    passes = (
        ("forward", eqx.filter_jit(forward), torch_forward),
        ("forward and backward", eqx.filter_jit(eqx.filter_value_and_grad(loss)), torch_gradient),
    )
    for (what, ours, theirs), difference in zip(passes, differences, strict=True):
        compiled = ours.lower(network, *arrays).compile()
        competitors: dict[str, Callable[[], object]] = {
            "flowsolve": lambda run=compiled: jax.block_until_ready(run(network, *arrays))
        }
        runs = {"": model, **({", compiled": torch.compile(model)} if compiling else {})}
        for kind, run in runs.items():
            for threads in sorted({1, len(os.sched_getaffinity(0))}):

                def call(theirs=theirs, run=run, threads=threads) -> None:
                    torch.set_num_threads(threads)
                    theirs(run)

                competitors[f"{threads} thread{'s' if threads > 1 else ''}{kind}"] = call
        times = {name: statistics.median(t) for name, t in interleaved(competitors, rounds=rounds).items()}
        mine = times.pop("flowsolve")
        best = min(times, key=lambda name: times[name])
        milliseconds = [
            np.format_float_positional(1e3 * value, precision=3, fractional=False, trim="-")
            for value in (times[best], mine)
        ]
        lines.append([name, what, best, f"{difference:.0e}", *milliseconds, f"{times[best] / mine:.2f}"])
        print(*lines[-1], sep=" | ", flush=True)
    return lines


def compile_seconds(depth: int) -> float:
    """To trace and compile DiT-B/4 of that depth with its gradient; nothing is made or run."""
    size = fs.nn.DiT.SIZES["B/4"]._replace(depth=depth)
    network = eqx.filter_eval_shape(lambda: fs.nn.DiT(3, size, num_classes=CLASSES, key=jax.random.key(0)))
    shapes = [
        jax.ShapeDtypeStruct(s, d) for s, d in (((2,), jnp.float32), ((2, 3, 32, 32), jnp.float32), ((2,), jnp.int32))
    ]
    parameters, static = eqx.partition(network, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(jax.grad(lambda parameters, *batch: loss(eqx.combine(parameters, static), *batch))).lower(
        parameters, *shapes
    ).compile()
    return time.perf_counter() - start


HEADING = """\
# Networks against PyTorch

The networks of `fs.nn` and the same ones written in PyTorch with its fused attention and layer norm, with the same
weights and batch. "Difference" is the largest of the outputs, or of the gradients in the images, relative to their root
mean square. Milliseconds are medians of {rounds} interleaved rounds, the ratio is above 1 where flowsolve is faster.

    pip install torch
    python tests/benchmarks/networks_peers.py

torch {torch}, equinox {equinox}.
"""


def main() -> None:
    parser = page_options(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="measurements of each row, 11 by default")
    parser.add_argument("--cases", nargs="+", help="names or their beginnings, e.g. DiT")
    parser.add_argument("--parts", nargs="+", choices=["speed", "compile"], default=["speed", "compile"])
    parser.add_argument("--compile", action="store_true", help="PyTorch compiled as well")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.smoke else 11)
    jax.config.update("jax_platforms", "cpu")
    sections = []
    if "speed" in options.parts:
        table = []
        for name, case in (SMOKE if options.smoke else CASES).items():
            if not options.cases or name.startswith(tuple(options.cases)):
                table += measure(name, case, rounds, options.compile)
        header = ["network", "pass", "PyTorch with", "difference", "PyTorch ms", "flowsolve ms", "ratio"]
        sections.append(markdown(header, table))
    if "compile" in options.parts:
        depths = (2, 4) if options.smoke else (12, 24)
        seconds = {depth: statistics.median(compile_seconds(depth) for _ in range(3)) for depth in depths}
        text = ", ".join(f"{value:.1f} s for {depth} blocks" for depth, value in seconds.items())
        ratio = seconds[depths[1]] / seconds[depths[0]]
        sections.append(f"DiT-B/4 with its gradient compiles in {text}: a ratio of {ratio:.2f}.\n")
    heading = HEADING.format(rounds=rounds, torch=version("torch"), equinox=version("equinox"))
    show("networks", heading, sections, options)


if __name__ == "__main__":
    main()
