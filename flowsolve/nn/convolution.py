r"""Convolutions and residual blocks of images, which UNet and VAE share.

For an image $h$, its group norm GN and the embedding $c$ of time and label, a residual block is

$$R(h) = S h + C_2\,\mathrm{silu}\big((1 + \mathrm{scale}(c)) \cdot \mathrm{GN}(C_1\,\mathrm{silu}(\mathrm{GN}(h)))
         + \mathrm{shift}(c)\big)$$

with 3 x 3 convolutions $C_1$ and $C_2$, of which the second starts at zero, and S the identity, or a linear map of
the channels where their number changes.

Images are channels last in here, (height, width, channels): on a CPU these convolutions and their gradients take less
time so, on an accelerator the compiler picks the layout. The networks take images channels first, and turn them once at
their ends.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import check_key, describe
from .._types import PRNGKey
from ._layers import over_tokens, zeroed

__all__ = ["Convolution"]


class Convolution(eqx.Module):
    r"""The convolution of an image, channels last, padded with zeros to the same size; with bias.

    $$y_{ijo} = b_o + \sum_{c,k,l} w_{ockl}\, x_{si+k-r,\, sj+l-r,\, c}, \qquad r = (\mathrm{size} - 1)/2$$

    **Arguments:** `inputs` and `outputs`: numbers of channels; `size`: height and width of the kernel, odd; `stride`:
    s; `key`: for the initial parameters, uniform in +-1/sqrt(inputs size^2).

    Called with an image of shape (height, width, inputs); returns (ceil(height/s), ceil(width/s), outputs).
    """

    weight: Float[Array, "outputs inputs size size"]
    bias: Float[Array, " outputs"]
    stride: int = eqx.field(static=True)

    def __init__(self, inputs: int, outputs: int, size: int = 3, *, stride: int = 1, key: PRNGKey):
        if min(inputs, outputs, size, stride) < 1 or size % 2 == 0:
            raise ValueError(
                f"Convolution got inputs = {inputs}, outputs = {outputs}, size = {size}, stride = {stride}, but wants "
                "all of them >= 1 and an odd size, which has a middle."
            )
        key_weight, key_bias = jax.random.split(check_key(key, "Convolution"))
        limit = (inputs * size**2) ** -0.5
        self.weight = jax.random.uniform(key_weight, (outputs, inputs, size, size), minval=-limit, maxval=limit)
        self.bias = jax.random.uniform(key_bias, (outputs,), minval=-limit, maxval=limit)
        self.stride = stride

    def __call__(self, x: Float[Array, "height width inputs"]) -> Float[Array, "rows columns outputs"]:
        """The convolved image."""
        _, inputs, size, _ = self.weight.shape
        if x.ndim != 3 or x.shape[-1] != inputs:
            raise ValueError(
                f"Convolution got {describe(x)}, but was built for ONE image of shape (height, width, {inputs}): batch "
                "with jax.vmap, and put the channels last."
            )
        edge = (size // 2, size // 2)
        return _convolved(x, self.weight, self.stride, (edge, edge)) + self.bias.reshape(1, 1, -1)


class GroupNorm(eqx.Module):
    """Mean 0 and variance 1 over all pixels of each group of channels, then a trained scale and shift of each channel.

    The number of groups is the largest divisor of the number of channels that is at most 32 and leaves at least 4
    channels a group, as far as there are divisors: 32 for 128 or 256 channels, 8 for 32. Statistics are computed in
    float32 at least.

    Source: Wu & He (2018), arXiv 1803.08494; 32 groups Ho et al. (2020), arXiv 2006.11239; at
    least 4 channels a group Karras et al. (2022), arXiv 2206.00364.
    """

    weight: Float[Array, " channels"]
    bias: Float[Array, " channels"]

    def __init__(self, channels: int):
        self.weight = jnp.ones(channels)
        self.bias = jnp.zeros(channels)

    def __call__(
        self,
        h: Float[Array, "height width channels"],
        modulation: tuple[Float[Array, " channels"], Float[Array, " channels"]] | None = None,
    ) -> Float[Array, "height width channels"]:
        """The normalised image; with a `modulation` (scale, shift), (1 + scale) times it + shift."""
        channels = h.shape[-1]
        groups = max(n for n in range(1, 33) if channels % n == 0 and (n == 1 or channels // n >= 4))
        with jax.numpy_dtype_promotion("standard"):
            wide = h.astype(jnp.promote_types(h.dtype, jnp.float32))

        # What a channel has from its group comes by a product with zeros and ones: XLA would fuse a broadcast within
        # groups into each loop over pixels, which then runs several times slower on a CPU.
        member = jnp.asarray(np.kron(np.eye(groups), np.ones(channels // groups)), wide.dtype)

        def group_mean(values: Array) -> Array:
            means = jnp.mean(jnp.mean(values, (0, 1)).reshape(groups, -1), 1)
            return jnp.matmul(means, member, precision=jax.lax.Precision.HIGHEST)

        mean = group_mean(wide)
        factor = jax.lax.rsqrt(group_mean(jnp.square(wide - mean.reshape(1, 1, -1))) + 1e-5)
        weight, bias = self.weight.astype(wide.dtype), self.bias.astype(wide.dtype)
        if modulation is not None:
            scale, shift = (part.astype(wide.dtype) for part in modulation)
            weight, bias = (1 + scale) * weight, (1 + scale) * bias + shift
        factor = factor * weight
        return (wide * factor.reshape(1, 1, -1) + (bias - mean * factor).reshape(1, 1, -1)).astype(h.dtype)


class ResidualBlock(eqx.Module):
    """The residual block of the module's text; without an `embedding_dim` there are no scale(c) and shift(c)."""

    norm: GroupNorm
    first: Convolution
    modulation: eqx.nn.Linear | None
    second_norm: GroupNorm
    second: Convolution
    skip: eqx.nn.Linear | None

    def __init__(self, inputs: int, outputs: int, embedding_dim: int | None = None, *, key: PRNGKey):
        key_first, key_modulation, key_second, key_skip = jax.random.split(key, 4)
        self.norm = GroupNorm(inputs)
        self.first = Convolution(inputs, outputs, key=key_first)
        self.modulation = None
        if embedding_dim is not None:
            self.modulation = eqx.nn.Linear(embedding_dim, 2 * outputs, key=key_modulation)
        self.second_norm = GroupNorm(outputs)
        self.second = zeroed(Convolution(outputs, outputs, key=key_second))
        self.skip = None if inputs == outputs else eqx.nn.Linear(inputs, outputs, key=key_skip)

    def __call__(
        self,
        h: Float[Array, "height width inputs"],
        embedding: Float[Array, " embedding_dim"] | None = None,
        dropout: float = 0.0,
        *,
        key: PRNGKey | None = None,
    ) -> Float[Array, "height width outputs"]:
        """The next image; the embedding is silu(c)."""
        modulation = None
        if self.modulation is not None:
            assert embedding is not None
            scale, shift = jnp.split(self.modulation(embedding), 2)
            modulation = scale, shift
        hidden = self.first(activated(self.norm, h))
        hidden = activated(self.second_norm, hidden, modulation)
        hidden = eqx.nn.Dropout(dropout, inference=key is None)(hidden, key=key)
        return self.second(hidden) + (h if self.skip is None else over_tokens(self.skip, h))


@jax.checkpoint
def activated(
    norm: GroupNorm,
    h: Float[Array, "height width channels"],
    modulation: tuple[Float[Array, " channels"], Float[Array, " channels"]] | None = None,
) -> Float[Array, "height width channels"]:
    """silu(norm(h)), which the backward pass computes anew: it costs less than to keep its parts in memory."""
    return jax.nn.silu(norm(h, modulation))


def upsampled(
    convolution: Convolution, h: Float[Array, "rows columns inputs"], shape: tuple[int, int]
) -> Float[Array, "height width outputs"]:
    """The 3 x 3 convolution of the image in which every pixel of h stands four times, cropped at the end to `shape`.

    The way back from (ceil(height/2), ceil(width/2)). Pixels of the same parity of row and column see 2 x 2 pixels of
    h, by sums of the kernel's weights: four small convolutions of h, with 4/9 of the multiplications.
    """

    def parities(kernel: Array, axis: int) -> zip:
        before, middle, after = jnp.split(kernel, 3, axis)
        kernels = (jnp.concatenate(pair, axis) for pair in ((before, middle + after), (before + middle, after)))
        return zip(kernels, ((1, 0), (0, 1)), strict=True)

    rows = []
    for kernel, row_padding in parities(convolution.weight, 2):
        columns = [_convolved(h, k, 1, (row_padding, padding)) for k, padding in parities(kernel, 3)]
        rows.append(jnp.stack(columns, axis=2))
    y = jnp.stack(rows, axis=1).reshape(2 * h.shape[0], 2 * h.shape[1], -1)
    return y[: shape[0], : shape[1]] + convolution.bias.reshape(1, 1, -1)


def _convolved(x: Array, kernel: Array, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]) -> Array:
    """The convolution of one image, channels last, with a kernel (outputs, inputs, height, width)."""
    axes = ("NHWC", "OIHW", "NHWC")
    return jax.lax.conv_general_dilated(x[None], kernel, (stride, stride), padding, dimension_numbers=axes)[0]
