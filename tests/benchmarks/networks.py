"""Networks to measure with: an MLP of any width and a transformer on images, with random weights that matter.

Nothing starts at zero here: an output of zeros would make all solvers equal.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def dense(inputs: int, outputs: int, key: Key[Array, ""]) -> Float[Array, "outputs inputs"]:
    """A weight matrix of unit gain."""
    return jax.random.normal(key, (outputs, inputs)) / math.sqrt(inputs)


class Mlp(eqx.Module):
    """x and t in, `depth` hidden layers of silu, x out."""

    weights: list[Float[Array, "outputs inputs"]]

    def __init__(self, dim: int, width: int, depth: int, *, key: Key[Array, ""]):
        sizes = [dim + 1, *[width] * depth, dim]
        keys = jax.random.split(key, depth + 1)
        self.weights = [dense(*pair, k) for *pair, k in zip(sizes[:-1], sizes[1:], keys, strict=True)]

    def __call__(self, t, x, args=None, *, key=None):
        h = jnp.concatenate([x.ravel(), jnp.asarray(t, x.dtype)[None]])
        for weight in self.weights[:-1]:
            h = jax.nn.silu(h @ weight.T)
        return (h @ self.weights[-1].T).reshape(x.shape)


class Block(eqx.Module):
    """Attention and a two-layer network, both behind a norm that the time shifts and scales."""

    modulation: Float[Array, "six_width width"]
    qkv: Float[Array, "three_width width"]
    out: Float[Array, "width width"]
    up: Float[Array, "four_width width"]
    down: Float[Array, "width four_width"]
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, *, key: Key[Array, ""]):
        keys = jax.random.split(key, 5)
        self.modulation = dense(width, 6 * width, keys[0])
        self.qkv = dense(width, 3 * width, keys[1])
        self.out = dense(width, width, keys[2])
        self.up = dense(width, 4 * width, keys[3])
        self.down = dense(4 * width, width, keys[4])
        self.heads = heads

    def __call__(self, h: Float[Array, "tokens width"], embedding: Float[Array, " width"]):
        parts = jnp.split(embedding @ self.modulation.T, 6)
        query, key, value = jnp.split(modulated(h, parts[0], parts[1]) @ self.qkv.T, 3, axis=-1)
        heads = [part.reshape(len(h), self.heads, -1) for part in (query, key, value)]
        attended = jax.nn.dot_product_attention(*heads).reshape(h.shape)
        h = h + parts[2] * (attended @ self.out.T)
        return h + parts[5] * (jax.nn.gelu(modulated(h, parts[3], parts[4]) @ self.up.T) @ self.down.T)


def modulated(h, shift, scale):
    """(1 + scale) LN(h) + shift."""
    h = h - h.mean(-1, keepdims=True)
    return (1 + scale) * h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6) + shift


class Dit(eqx.Module):
    """A diffusion transformer on square images of shape (size, size, channels)."""

    first: Float[Array, "width patch"]
    position: Float[Array, "tokens width"]
    time: Float[Array, "width frequencies"]
    blocks: Block
    last: Float[Array, "patch width"]
    patch: int = eqx.field(static=True)

    def __init__(
        self, size: int, channels: int, *, width: int, depth: int, heads: int, patch: int = 2, key: Key[Array, ""]
    ):
        keys = jax.random.split(key, 5)
        elements = patch * patch * channels
        self.first = dense(elements, width, keys[0])
        self.position = 0.02 * jax.random.normal(keys[1], ((size // patch) ** 2, width))
        self.time = dense(256, width, keys[2])
        self.blocks = eqx.filter_vmap(lambda k: Block(width, heads, key=k))(jax.random.split(keys[3], depth))
        self.last = dense(width, elements, keys[4])
        self.patch = patch

    def __call__(self, t, x, args=None, *, key=None):
        size, _, channels = x.shape
        grid, patch = size // self.patch, self.patch
        tokens = x.reshape(grid, patch, grid, patch, channels).transpose(0, 2, 1, 3, 4).reshape(grid * grid, -1)
        # Phases in the precision of t, whatever that of x.
        phases = t * jnp.exp(jnp.linspace(0.0, math.log(1000.0), 128))
        waves = jnp.concatenate([jnp.sin(phases), jnp.cos(phases)]).astype(x.dtype)
        embedding = jax.nn.silu(waves @ self.time.T)
        parameters, static = eqx.partition(self.blocks, eqx.is_array)
        h, _ = jax.lax.scan(
            lambda h, block: (eqx.combine(block, static)(h, embedding), None),
            tokens @ self.first.T + self.position,
            parameters,
        )
        out = modulated(h, 0, 0) @ self.last.T
        return out.reshape(grid, grid, patch, patch, channels).transpose(0, 2, 1, 3, 4).reshape(x.shape)
