"""The networks of `networks.py` in PyTorch, with the same weights: `model(t, x)`, a batch x at one time t.

And `fs.nn.ResidualMLP` with labels, `model(t, x, labels)`, which like the MLP takes a time for each example too.
"""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Array
from networks import Dit, Mlp

import flowsolve as fs


def tensor(array: Array) -> torch.Tensor:
    """A copy."""
    return torch.from_numpy(np.array(array))


def parameters(module: torch.nn.Module, source: object, names: str, index: int | slice = slice(None)) -> None:
    """Copy arrays of a network by name, or the index-th of arrays that are stacked."""
    for name in names.split():
        setattr(module, name, torch.nn.Parameter(tensor(getattr(source, name)[index])))


class TorchMlp(torch.nn.Module):
    """`networks.Mlp` on vectors."""

    def __init__(self, network: Mlp):
        super().__init__()
        self.weights = torch.nn.ParameterList([tensor(weight) for weight in network.weights])

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        h = torch.cat([x, t.reshape(-1, 1).expand(len(x), 1)], 1)
        for weight in self.weights[:-1]:
            h = F.silu(F.linear(h, weight))
        return F.linear(h, self.weights[-1])


def modulated(h: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=1e-6), 1 + scale)


class TorchBlock(torch.nn.Module):
    """`networks.Block`, the index-th of a stack."""

    def __init__(self, blocks, index: int):
        super().__init__()
        parameters(self, blocks, "modulation qkv out up down", index)
        self.heads = blocks.heads

    def forward(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        parts = F.linear(embedding, self.modulation).chunk(6)
        batch, tokens, _ = h.shape
        qkv = F.linear(modulated(h, parts[0], parts[1]), self.qkv)
        query, key, value = qkv.reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(h.shape)
        h = h + parts[2] * F.linear(attended, self.out)
        hidden = F.gelu(F.linear(modulated(h, parts[3], parts[4]), self.up), approximate="tanh")
        return h + parts[5] * F.linear(hidden, self.down)


class TorchDit(torch.nn.Module):
    """`networks.Dit`. The time is the same for the whole batch, so that its embedding is computed once."""

    def __init__(self, network: Dit):
        super().__init__()
        parameters(self, network, "first position time last")
        self.blocks = torch.nn.ModuleList(TorchBlock(network.blocks, i) for i in range(len(network.blocks.qkv)))
        # By the same function: at phases of up to a thousand the last bit of a frequency is seen.
        self.register_buffer("frequencies", tensor(jnp.exp(jnp.linspace(0.0, math.log(1000.0), 128))))
        self.patch = network.patch

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        batch, size, _, channels = x.shape
        grid, patch = size // self.patch, self.patch
        tokens = x.reshape(batch, grid, patch, grid, patch, channels).transpose(2, 3).reshape(batch, grid * grid, -1)
        phases = t * self.frequencies
        embedding = F.silu(F.linear(torch.cat([phases.sin(), phases.cos()]), self.time))
        h = F.linear(tokens, self.first) + self.position
        for block in self.blocks:
            h = block(h, embedding)
        out = F.linear(F.layer_norm(h, h.shape[-1:], eps=1e-6), self.last)
        return out.reshape(batch, grid, grid, patch, patch, channels).transpose(2, 3).reshape(x.shape)


def linear(source: eqx.nn.Linear, index: int | slice = slice(None)) -> torch.nn.Linear:
    """A linear map, the index-th of a stack if there is one."""
    weight, bias = tensor(source.weight[index]), tensor(source.bias[index])
    made = torch.nn.Linear(weight.shape[1], weight.shape[0])
    made.weight, made.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    return made


class TorchResidual(torch.nn.Module):
    """`fs.nn.ResidualMLP` with labels."""

    def __init__(self, network: fs.nn.ResidualMLP):
        super().__init__()
        self.embed = torch.nn.ModuleList(map(linear, network.embed.layers))
        self.table = torch.nn.Parameter(tensor(network.label_embedding.table))
        self.first, self.modulation, self.last = map(linear, (network.first, network.modulation, network.last))
        blocks = network.blocks
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleList([linear(part, i) for part in (blocks.modulation, blocks.first, blocks.second)])
            for i in range(network.depth)
        )
        embedding = network.time_embedding
        periods = np.geomspace(embedding.max_period, embedding.min_period, embedding.dim // 2)
        self.register_buffer("frequencies", torch.from_numpy((2 * np.pi / periods).astype(np.float32)))

    def forward(self, t: torch.Tensor, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        phases = t[:, None] * self.frequencies
        c = torch.cat([phases.cos(), phases.sin()], 1)
        c = self.embed[1](F.silu(self.embed[0](c))) + self.table[labels]
        c = F.silu(c)
        h = self.first(x.flatten(1))
        for modulation, first, second in self.blocks:
            scale, shift, gate = modulation(c).chunk(3, 1)
            normed = torch.addcmul(shift, F.layer_norm(h, h.shape[-1:]), 1 + scale)
            h = h + gate * second(F.silu(first(normed)))
        scale, shift = self.modulation(c).chunk(2, 1)
        return self.last(torch.addcmul(shift, F.layer_norm(h, h.shape[-1:]), 1 + scale)).reshape(x.shape)


def twin(network: Mlp | Dit | fs.nn.ResidualMLP) -> torch.nn.Module:
    """The network in PyTorch."""
    kinds = {Mlp: TorchMlp, Dit: TorchDit, fs.nn.ResidualMLP: TorchResidual}
    return kinds[type(network)](network).eval().requires_grad_(False)
