r"""Variational autoencoders, for flows in the space of their latents.

An encoder gives the mean m(x) and the log of the standard deviation s(x) of a normal distribution of latents, a decoder
the mean of the data given a latent:

$$q(z \mid x) = N\!\big(m(x),\ \mathrm{diag}\, e^{2 s(x)}\big), \qquad p(x \mid z) = N\!\big(d(z),\ \tau^2 I\big)$$

Both are functions of ONE example; batch them with `jax.vmap`. They are trained by the evidence lower bound, which is
not in here: tau, the weight of its terms and the scale of the latents belong to whoever trains.

Source: Kingma & Welling (2013), arXiv 1312.6114; the convolutional one after Rombach et al. (2021), arXiv 2112.10752.
"""

import abc
import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from .._checks import check_key, check_state, describe
from .._numerics import tree_size
from .._types import Like, PRNGKey, State
from .convolution import Convolution, GroupNorm, ResidualBlock, activated, upsampled

__all__ = ["MLPVAE", "AbstractVAE", "ConvolutionalVAE"]


class AbstractVAE(eqx.Module):
    """An encoder and a decoder of one example. `latent` is the shape and dtype of one latent."""

    latent: eqx.AbstractVar[jax.ShapeDtypeStruct]

    @abc.abstractmethod
    def encode(self, x: State) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(mean, log of the standard deviation) of the latents of x, each of the shape of `latent`."""

    @abc.abstractmethod
    def decode(self, z: Float[Array, "..."]) -> State:
        """The mean of the data given the latent z."""


class MLPVAE(AbstractVAE):
    """A VAE of two multilayer perceptrons, for a vector or any other pytree, flattened. Latents are vectors.

    **Arguments:**

    - `like`: the shape of one example: an array, a `jax.ShapeDtypeStruct`, or a pytree of these;
    - `latent_dim`: length of a latent;
    - `width` and `depth`: of the hidden layers of encoder and decoder; with depth 0 both are linear;
    - `key`: for the initial parameters.

    **Raises:** `ValueError` for an example or a latent of another size, `TypeError` for one that is not floating point.
    """

    encoder: eqx.nn.MLP
    decoder: eqx.nn.MLP
    latent: jax.ShapeDtypeStruct = eqx.field(static=True)
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    structure: Any = eqx.field(static=True)

    def __init__(self, like: Like, *, latent_dim: int, width: int = 256, depth: int = 2, key: PRNGKey):
        check_state(like, "like")
        key = check_key(key, "MLPVAE")
        if min(latent_dim, width) < 1 or depth < 0:
            raise ValueError(
                f"MLPVAE got latent_dim = {latent_dim}, width = {width}, depth = {depth}, but wants sizes >= 1 and "
                "depth >= 0."
            )
        key_encoder, key_decoder = jax.random.split(key)
        leaves, self.structure = jax.tree.flatten(like)
        self.shapes = tuple(leaf.shape for leaf in leaves)
        size = tree_size(like)
        self.encoder = eqx.nn.MLP(size, 2 * latent_dim, width, depth, activation=jax.nn.silu, key=key_encoder)
        self.decoder = eqx.nn.MLP(latent_dim, size, width, depth, activation=jax.nn.silu, key=key_decoder)
        self.latent = jax.ShapeDtypeStruct((latent_dim,), leaves[0].dtype)

    def encode(self, x: State) -> tuple[Float[Array, " latent_dim"], Float[Array, " latent_dim"]]:
        """(mean, log of the standard deviation) of the latents of x."""
        check_state(x, "x")
        flat, _ = ravel_pytree(x)
        if flat.size != self.encoder.in_size:
            raise ValueError(
                f"MLPVAE got x of {describe(x)}, {flat.size} elements, but was built for ONE example of "
                f"{self.encoder.in_size}: batch with jax.vmap."
            )
        encoded = self.encoder(flat.astype(_dtype(self.encoder))).astype(flat.dtype)
        mean, log_std = jnp.split(encoded, 2)
        return mean, log_std

    def decode(self, z: Float[Array, "..."]) -> State:
        """The mean of the data given the latent z, of the dtype of z."""
        _check_latent(z, self.latent, "MLPVAE")
        flat = self.decoder(z.astype(_dtype(self.decoder))).astype(z.dtype)
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        leaves = [leaf.reshape(shape) for leaf, shape in zip(jnp.split(flat, ends[:-1]), self.shapes, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)


class ConvolutionalVAE(AbstractVAE):
    """A VAE of residual convolutions, for images (channels, height, width). Latents are small images, channels first.

    Each level but the first has half the resolution of the one before, an odd height or width halved upwards; latents
    have the resolution of the last. The decoder goes back through the same sizes, by blocks like the encoder's.

    **Arguments:**

    - `like`: the shape of one image: an array or a `jax.ShapeDtypeStruct`;
    - `latent_channels`: of a latent;
    - `width`: number of channels of the hidden image at full resolution; `multipliers`: of the width at each level;
    - `blocks`: residual blocks of a level, in the encoder and in the decoder;
    - `key`: for the initial parameters.

    **Raises:** `ValueError` for an image or a latent of another shape, `TypeError` for one that is not floating point.

    Source: Rombach et al. (2021), arXiv 2112.10752. Deviations: no attention, as many blocks on the way up as on the
    way down, and no adversarial loss anywhere.
    """

    encoder: "_Encoder"
    decoder: "_Decoder"
    shape: tuple[int, int, int] = eqx.field(static=True)
    latent: jax.ShapeDtypeStruct = eqx.field(static=True)

    def __init__(
        self,
        like: Like,
        *,
        latent_channels: int = 4,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        key: PRNGKey,
    ):
        check_state(like, "like")
        key_encoder, key_decoder = jax.random.split(check_key(key, "ConvolutionalVAE"))
        if len(like.shape) != 3 or min(latent_channels, width, blocks, len(multipliers), *multipliers) < 1:
            raise ValueError(
                f"ConvolutionalVAE got like of {describe(like)}, latent_channels = {latent_channels}, width = "
                f"{width}, multipliers = {tuple(multipliers)}, blocks = {blocks}, but wants ONE image (channels, "
                "height, width), sizes >= 1 and at least one multiplier."
            )
        channels, height, width_of_image = like.shape
        self.shape = (channels, height, width_of_image)
        widths = [width * multiplier for multiplier in multipliers]
        self.encoder = _Encoder(channels, 2 * latent_channels, widths, blocks, key=key_encoder)
        self.decoder = _Decoder(latent_channels, channels, widths[::-1], blocks, key=key_decoder)
        self.latent = jax.ShapeDtypeStruct((latent_channels, *self._sizes()[-1]), like.dtype)

    def _sizes(self) -> list[tuple[int, int]]:
        """Height and width at each level."""
        _, height, width = self.shape
        return [(-(-height // 2**level), -(-width // 2**level)) for level in range(len(self.encoder.levels))]

    def encode(self, x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(mean, log of the standard deviation) of the latents of x."""
        check_state(x, "x")
        if x.shape != self.shape:
            raise ValueError(
                f"ConvolutionalVAE got x of {describe(x)}, but was built for ONE image of shape {self.shape}: batch "
                "with jax.vmap, and put the channels first."
            )
        encoded = self.encoder(jnp.moveaxis(x.astype(_dtype(self.encoder)), 0, -1))
        mean, log_std = jnp.split(jnp.moveaxis(encoded, -1, 0).astype(x.dtype), 2)
        return mean, log_std

    def decode(self, z: Float[Array, "..."]) -> Float[Array, "channels height width"]:
        """The mean of the images given the latent z, of the dtype of z."""
        _check_latent(z, self.latent, "ConvolutionalVAE")
        decoded = self.decoder(jnp.moveaxis(z.astype(_dtype(self.decoder)), 0, -1), self._sizes()[-2::-1])
        return jnp.moveaxis(decoded, -1, 0).astype(z.dtype)


class _Encoder(eqx.Module):
    """Residual blocks, and a convolution with stride 2 from level to level."""

    first: Convolution
    levels: tuple[tuple[ResidualBlock, ...], ...]
    downsample: tuple[Convolution, ...]
    last_norm: GroupNorm
    last: Convolution

    def __init__(self, inputs: int, outputs: int, widths: Sequence[int], blocks: int, *, key: PRNGKey):
        key_first, key_levels, key_last = jax.random.split(key, 3)
        self.first = Convolution(inputs, widths[0], key=key_first)
        self.levels, self.downsample = _levels(widths, blocks, 2, key=key_levels)
        self.last_norm = GroupNorm(widths[-1])
        self.last = Convolution(widths[-1], outputs, key=key_last)

    def __call__(self, h: Array) -> Array:
        h = self.first(h)
        for level, residuals in enumerate(self.levels):
            h = self.downsample[level - 1](h) if level else h
            for residual in residuals:
                h = residual(h)
        return self.last(activated(self.last_norm, h))


class _Decoder(eqx.Module):
    """Residual blocks, and a convolution of the upsampled image from level to level."""

    first: Convolution
    levels: tuple[tuple[ResidualBlock, ...], ...]
    upsample: tuple[Convolution, ...]
    last_norm: GroupNorm
    last: Convolution

    def __init__(self, inputs: int, outputs: int, widths: Sequence[int], blocks: int, *, key: PRNGKey):
        key_first, key_levels, key_last = jax.random.split(key, 3)
        self.first = Convolution(inputs, widths[0], key=key_first)
        self.levels, self.upsample = _levels(widths, blocks, 1, key=key_levels)
        self.last_norm = GroupNorm(widths[-1])
        self.last = Convolution(widths[-1], outputs, key=key_last)

    def __call__(self, h: Array, sizes: Sequence[tuple[int, int]]) -> Array:
        """`sizes`: height and width of each level but the first."""
        h = self.first(h)
        for level, residuals in enumerate(self.levels):
            h = upsampled(self.upsample[level - 1], h, sizes[level - 1]) if level else h
            for residual in residuals:
                h = residual(h)
        return self.last(activated(self.last_norm, h))


def _levels(
    widths: Sequence[int], blocks: int, stride: int, *, key: PRNGKey
) -> tuple[tuple[tuple[ResidualBlock, ...], ...], tuple[Convolution, ...]]:
    """The residual blocks of each level, and the convolutions between levels, which keep the number of channels."""
    keys = iter(jax.random.split(key, len(widths) * (blocks + 1)))
    levels = []
    for before, now in zip((widths[0], *widths), widths, strict=False):
        inputs = [before, *[now] * (blocks - 1)]
        levels.append(tuple(ResidualBlock(width, now, key=next(keys)) for width in inputs))
    between = tuple(Convolution(width, width, stride=stride, key=next(keys)) for width in widths[:-1])
    return tuple(levels), between


def _dtype(module: eqx.Module) -> jnp.dtype:
    """The dtype of a module's parameters."""
    return jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array))[0].dtype


def _check_latent(z: Float[Array, "..."], latent: jax.ShapeDtypeStruct, owner: str) -> None:
    check_state(z, "z")
    if z.shape != latent.shape:
        raise ValueError(
            f"{owner} got a latent of {describe(z)}, but was built for ONE of shape {latent.shape}: batch with "
            "jax.vmap."
        )
