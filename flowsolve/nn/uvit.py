r"""The U-ViT: a transformer that treats everything as a token, with long skips between its halves.

The sequence is one token for the time, one for the label, those of a context, and one for each patch of the image, plus
trained positions. With LN a layer norm, a block is

$$h \leftarrow h + \mathrm{Attention}(\mathrm{LN}(h)), \qquad h \leftarrow h + \mathrm{MLP}(\mathrm{LN}(h))$$

and with n blocks in each half and one between them, the k-th of the second half begins with

$$h \leftarrow W\,[h, h_{n + 1 - k}] + b$$

where $h_j$ is what the j-th of the first half gave. The patches of the last tokens go through a linear map, and their
image through a 3 x 3 convolution.

Source: Bao et al. (2022), arXiv 2209.12152.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from .._checks import check_count, check_key, check_state, describe
from .._numerics import as_scalar
from .._types import PRNGKey, Scalar, TimeLike
from ._layers import held, over_tokens, redrawn, scan_blocks, scan_keeping, stacked
from .attention import Attention
from .conditions import Condition, as_condition, null_condition
from .embeddings import LabelEmbedding, SinusoidalEmbedding, as_times, null_label_of
from .patches import TransformerSize, check_image, check_size, from_patches, to_patches

__all__ = ["UViT"]

_NORMAL = jax.nn.initializers.normal(0.02)


class _Block(eqx.Module):
    """A long skip if there is one, attention, an MLP."""

    skip: eqx.nn.Linear | None
    attention_norm: eqx.nn.LayerNorm
    attention: Attention
    norm: eqx.nn.LayerNorm
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, size: TransformerSize, has_skip: bool, *, key: PRNGKey):
        key_skip, key_attention, key_first, key_second = jax.random.split(key, 4)
        width = size.width
        self.skip = eqx.nn.Linear(2 * width, width, key=key_skip) if has_skip else None
        self.attention_norm = eqx.nn.LayerNorm(width)
        self.attention = Attention(width, size.heads, qkv_bias=False, key=key_attention)
        self.norm = eqx.nn.LayerNorm(width)
        self.first = eqx.nn.Linear(width, size.hidden, key=key_first)
        self.second = eqx.nn.Linear(size.hidden, width, key=key_second)

    def __call__(
        self,
        h: Float[Array, "tokens width"],
        skipped: Float[Array, "tokens width"] | None,
        mask: Bool[Array, " tokens"] | None,
    ) -> Float[Array, "tokens width"]:
        if self.skip is not None and skipped is not None:
            h = over_tokens(self.skip, jnp.concatenate([h, skipped], axis=-1))
        h = h + self.attention(jax.vmap(self.attention_norm)(h), mask=mask)
        hidden = jax.nn.gelu(over_tokens(self.first, jax.vmap(self.norm)(h)), approximate=False)
        return h + over_tokens(self.second, hidden)


class UViT(eqx.Module):
    """A U-ViT on images of one size, (channels, height, width): `network(t, x, args, *, key=None)`.

    The blocks of each half are one block with stacked parameters, run by `jax.lax.scan`: compile time does not grow
    with depth. It computes in the dtype of its parameters, embeds t in the dtype of t, and returns the dtype of x.

    **Arguments:**

    - `shape`: (channels, height, width) of an image, height and width multiples of the patch;
    - `size`: a `TransformerSize` of odd depth; the published ones are `UViT.SIZES["S/2"]`, with S, S-Deep, M, L, H and
      patches of 2, 4;
    - `num_classes`: number of labels, or None for a network without labels;
    - `context_shape`: (tokens, width) of a context, or None for a network without one;
    - `out_channels`: of the output, those of x by default; twice as many for `nn.SplitVariance`;
    - `time_embedding`: a callable from t to an array of shape (width of a token,); a `SinusoidalEmbedding` by default,
      made for t in [0, 1] and for the log-ratios that a preconditioner passes;
    - `qk_norm`: whether queries and keys are normalised, see `Attention`;
    - `remat`: whether the backward pass holds only the tokens between the blocks; if not, also the outputs of their
      linear maps. The rest it computes anew;
    - `key`: for the initial parameters.

    Called with `t`: a scalar; `x`: one image; `args`: None, an integer label, or a `Condition`; `key` is not used:
    nothing here is random. Returns an image like x.

    **Raises:** `ValueError` for an image or a context of another shape, a label out of range, and for what the network
    was not built to take.

    Source: Bao et al. (2022), arXiv 2209.12152, also for the initial parameters: N(0, 0.02^2) in linear maps and
    positions. Deviations: the periods of the time's embedding are those of t in [0, 1]; no context is one that nothing
    attends to, where theirs is an empty text.
    """

    first: eqx.nn.Linear
    position: Float[Array, "tokens width"]
    time_embedding: Callable[[Scalar], Array]
    label_embedding: LabelEmbedding | None
    context: eqx.nn.Linear | None
    down: _Block
    middle: _Block
    up: _Block
    norm: eqx.nn.LayerNorm
    last: eqx.nn.Linear
    convolution: eqx.nn.Conv2d
    shape: tuple[int, int, int] = eqx.field(static=True)
    size: TransformerSize = eqx.field(static=True)
    context_shape: tuple[int, int] | None = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    #: The published sizes by name, of which the number is the patch.
    SIZES: ClassVar[Mapping[str, TransformerSize]] = MappingProxyType(
        {
            f"{name}/{patch}": TransformerSize(patch, width, depth, heads)
            for name, width, depth, heads in (
                ("S", 512, 13, 8),
                ("S-Deep", 512, 17, 8),
                ("M", 768, 17, 12),
                ("L", 1024, 21, 16),
                ("H", 1152, 29, 16),
            )
            for patch in (2, 4)
        }
    )

    def __init__(
        self,
        shape: tuple[int, int, int],
        size: TransformerSize,
        *,
        num_classes: int | None = None,
        context_shape: tuple[int, int] | None = None,
        out_channels: int | None = None,
        time_embedding: Callable[[Scalar], Array] | None = None,
        qk_norm: bool = False,
        remat: bool = False,
        key: PRNGKey,
    ):
        check_size(size, "UViT")
        key = check_key(key, "UViT")
        if size.depth < 3 or size.depth % 2 == 0:
            raise ValueError(
                f"UViT got a depth of {size.depth}, but wants two halves and one between: odd, at least 3."
            )
        channels = shape[0]
        out_channels = channels if out_channels is None else out_channels
        if np.shape(context_shape or (1, 1)) != (2,) or min(*shape, out_channels, *(context_shape or (1, 1))) < 1:
            raise ValueError(
                f"UViT got shape = {shape}, out_channels = {out_channels}, context_shape = {context_shape}, but wants "
                "sizes >= 1, and (tokens, width) for a context."
            )
        rows, columns = check_image(jax.ShapeDtypeStruct(shape, float), channels, size.patch, "UViT")
        width, area, half = size.width, size.patch**2, (size.depth - 1) // 2
        keys = jax.random.split(key, 8)
        time_embedding = SinusoidalEmbedding(width) if time_embedding is None else time_embedding
        time_shape = jax.eval_shape(time_embedding, as_scalar(0.0)).shape
        if time_shape != (width,):
            raise ValueError(
                f"UViT got a time_embedding of shape {time_shape}, but wants a token of width {width}: choose its "
                "length, or put a linear map behind it."
            )
        self.time_embedding = time_embedding
        self.first = redrawn(eqx.nn.Linear(channels * area, width, key=keys[0]), _NORMAL, key=keys[0])
        self.label_embedding = None if num_classes is None else LabelEmbedding(num_classes, width, key=keys[1])
        self.context = None
        if context_shape is not None:
            self.context = redrawn(eqx.nn.Linear(context_shape[1], width, key=keys[2]), _NORMAL, key=keys[2])
        extra = 1 + (num_classes is not None) + (0 if context_shape is None else context_shape[0])
        self.position = _NORMAL(keys[3], (extra + rows * columns, width))

        def block(has_skip: bool, key: PRNGKey) -> _Block:
            return redrawn(_Block(size, has_skip, key=key), _NORMAL, key=key)

        self.down = stacked(lambda k: block(False, k), half, key=keys[4])
        self.middle = block(False, keys[5])
        self.up = stacked(lambda k: block(True, k), half, key=keys[6])
        self.norm = eqx.nn.LayerNorm(width)
        self.last = redrawn(eqx.nn.Linear(width, out_channels * area, key=keys[7]), _NORMAL, key=keys[7])
        self.convolution = eqx.nn.Conv2d(out_channels, out_channels, 3, padding=1, key=keys[7])
        self.shape = shape
        self.size = size
        self.context_shape = context_shape
        self.remat = remat

    @property
    def null_label(self) -> int:
        """The label that stands for no class, for `guidance.ClassifierFree`."""
        return null_label_of(self.label_embedding, "UViT")

    def null(self, args: ArrayLike | Condition) -> ArrayLike | Condition:
        """The condition like `args` that says nothing, for `guidance.ClassifierFree`."""
        return null_condition(args, self.label_embedding)

    def __call__(
        self,
        t: TimeLike,
        x: Float[Array, "*channels_height_width"],
        args: ArrayLike | Condition | None = None,
        *,
        key: PRNGKey | None = None,
    ) -> Float[Array, "out_channels height width"]:
        """The output at (t, x), one example."""
        del key
        h, skips, up = self._down(t, x, args)
        h, _ = scan_blocks(up, self.up, h, skips[::-1], depth=len(skips), key=None, policy=held(self.remat))
        return self._finish(h).astype(x.dtype)

    def hidden(
        self,
        t: TimeLike,
        x: Float[Array, "*channels_height_width"],
        args: ArrayLike | Condition | None = None,
        *,
        block: int,
        key: PRNGKey | None = None,
    ) -> tuple[Float[Array, "out_channels height width"], Float[Array, "patches token_width"]]:
        """The output, and from the same evaluation the tokens of the patches after `block` blocks, from 1 to the depth.

        The blocks are counted through both halves; the tokens of time, label and context are left out. Tokens are in
        the dtype of the network.
        """
        del key
        block = check_count(block, "block", most=self.size.depth)
        h, skips, up = self._down(t, x, args)
        half = len(skips)
        # The skips are what each block of the first half gave, and the middle one gave h.
        kept = skips[block - 1] if block <= half else h
        if block <= half + 1:
            h, _ = scan_blocks(up, self.up, h, skips[::-1], depth=half, key=None, policy=held(self.remat))
        else:
            after, policy = block - half - 1, held(self.remat)
            h, kept = scan_keeping(up, self.up, h, skips[::-1], kept=after, depth=half, key=None, policy=policy)
        return self._finish(h).astype(x.dtype), kept[-self._patches :]

    @property
    def _patches(self) -> int:
        _, height, width = self.shape
        return (height // self.size.patch) * (width // self.size.patch)

    def _down(self, t: TimeLike, x: Array, args: object) -> tuple[Array, Array, Callable[..., Any]]:
        """All tokens after the middle block, those after each block of the first half, and a step of the second."""
        check_state(x, "x")
        if x.shape != self.shape:
            raise ValueError(
                f"UViT got x of {describe(x)}, but was built for ONE image of shape {self.shape}: batch with jax.vmap, "
                "or build it for this shape."
            )
        h, mask = self._tokens(t, x, args)

        def down(block: _Block, h: Array, _: None, key: PRNGKey | None) -> tuple[Array, Array]:
            del key
            h = block(h, None, mask)
            return h, h

        def up(block: _Block, h: Array, skipped: Array, key: PRNGKey | None) -> tuple[Array, None]:
            del key
            return block(h, skipped, mask), None

        half = (self.size.depth - 1) // 2
        h, skips = scan_blocks(down, self.down, h, depth=half, key=None, policy=held(self.remat))
        return self.middle(h, None, mask), skips, up

    def _finish(self, h: Array) -> Array:
        """From the last tokens to the output."""
        _, height, width = self.shape
        patch = self.size.patch
        last = over_tokens(self.last, jax.vmap(self.norm)(h[-self._patches :]))
        return self.convolution(from_patches(last, height // patch, width // patch, patch))

    def _tokens(self, t: TimeLike, x: Array, args: object) -> tuple[Array, Array | None]:
        """All tokens before the first block, and which of them exist where some may not."""
        dtype = self.first.weight.dtype
        context_dim = None if self.context_shape is None else self.context_shape[1]
        condition = as_condition(args, self.label_embedding, context_dim, "UViT", "context_shape")
        parts = [self.time_embedding(as_times(t)).astype(dtype)[None]]
        if self.label_embedding is not None:
            assert condition.label is not None
            parts.append(self.label_embedding(condition.label)[None])
        patches = over_tokens(self.first, to_patches(x.astype(dtype), self.size.patch))
        if self.context is None or self.context_shape is None:
            return jnp.concatenate([*parts, patches]) + self.position, None
        context, exists = condition.context, condition.mask
        assert context is not None and exists is not None
        if not isinstance(args, Condition) or args.context is None:
            context, exists = jnp.zeros(self.context_shape), jnp.zeros(self.context_shape[0], bool)
        elif context.shape != self.context_shape:
            raise ValueError(
                f"UViT got a context of {describe(context)}, but was built for {self.context_shape}: pad it to as many "
                "tokens, with a mask that is False for them."
            )
        mask = jnp.concatenate([jnp.ones(len(parts), bool), exists, jnp.ones(len(patches), bool)])
        parts += [over_tokens(self.context, context.astype(dtype)), patches]
        return jnp.concatenate(parts) + self.position, mask
