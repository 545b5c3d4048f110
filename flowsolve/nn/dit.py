r"""The diffusion transformer: attention between patches, with adaptive norms that start as nothing.

With c the sum of the embeddings of time and label, LN a layer norm without parameters and
$\mathrm{AN}(h) = (1 + \mathrm{scale}(c)) \cdot \mathrm{LN}(h) + \mathrm{shift}(c)$, a block is

$$h \leftarrow h + \mathrm{gate}(c) \cdot \mathrm{Attention}(\mathrm{AN}(h)), \qquad
  h \leftarrow h + \mathrm{CrossAttention}(\mathrm{LN}(h), \mathrm{context}), \qquad
  h \leftarrow h + \mathrm{gate}(c) \cdot \mathrm{MLP}(\mathrm{AN}(h))$$

where the second step is there with a context alone. Each use has its own scale, shift and gate, linear in silu(c).
The output is a linear map of a last adaptive norm. Scales, shifts, gates, the output of the cross-attention and the
last map start at zero: at first each block is the identity and the output 0.

Source: Peebles & Xie (2022), arXiv 2212.09748 (DiT with adaLN-Zero); cross-attention that starts at zero, Chen et al.
(2023), arXiv 2310.00426.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from .._checks import check_count, check_key
from .._types import PRNGKey, Scalar, TimeLike
from ._layers import adaptive_norm, held, layer_norm, over_tokens, redrawn, scan_blocks, scan_keeping, stacked, zeroed
from .attention import Attention
from .conditions import Condition, as_condition, null_condition
from .embeddings import LabelEmbedding, SinusoidalEmbedding, as_times, null_label_of, time_mlp
from .patches import TransformerSize, check_image, check_size, from_patches, to_patches
from .positions import AbstractPositions, Rotation, SincosPositions

__all__ = ["DiT"]

_EPS = 1e-6  # of the layer norms, as in the published code
_XAVIER = jax.nn.initializers.xavier_uniform(in_axis=-1, out_axis=-2)
_NORMAL = jax.nn.initializers.normal(0.02)


class _Block(eqx.Module):
    """Attention, cross-attention if there is a context, and an MLP."""

    modulation: eqx.nn.Linear
    attention: Attention
    cross: Attention | None
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, size: TransformerSize, context_dim: int | None, qk_norm: bool, *, key: PRNGKey):
        key_attention, key_cross, key_first, key_second, key_modulation = jax.random.split(key, 5)
        width, heads = size.width, size.heads
        draw = jax.random.split(key_attention)
        self.attention = redrawn(Attention(width, heads, qk_norm=qk_norm, key=draw[0]), _XAVIER, key=draw[1])
        self.cross = None
        if context_dim is not None:
            draw = jax.random.split(key_cross)
            cross = Attention(width, heads, context_dim=context_dim, qk_norm=qk_norm, key=draw[0])
            cross = redrawn(cross, _XAVIER, key=draw[1])
            self.cross = eqx.tree_at(lambda c: c.out, cross, zeroed(cross.out))
        self.first = redrawn(eqx.nn.Linear(width, size.hidden, key=key_first), _XAVIER, key=key_first)
        self.second = redrawn(eqx.nn.Linear(size.hidden, width, key=key_second), _XAVIER, key=key_second)
        self.modulation = zeroed(eqx.nn.Linear(width, 6 * width, key=key_modulation))

    def __call__(
        self,
        h: Float[Array, "tokens width"],
        embedding: Float[Array, " width"],
        rotary: Rotation | None,
        context: Float[Array, "context context_dim"] | None,
        mask: Bool[Array, " context"] | None,
        dropout: float,
        *,
        key: PRNGKey | None,
    ) -> Float[Array, "tokens width"]:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(self.modulation(embedding)[None], 6, axis=-1)
        h = h + gate * self.attention(adaptive_norm(h, scale[0], shift[0], eps=_EPS), rotary=rotary)
        if self.cross is not None:
            h = h + self.cross(layer_norm(h, eps=_EPS), context, mask)
        hidden = jax.nn.gelu(over_tokens(self.first, adaptive_norm(h, mlp_scale[0], mlp_shift[0], eps=_EPS)))
        hidden = eqx.nn.Dropout(dropout, inference=key is None)(hidden, key=key)
        return h + mlp_gate * over_tokens(self.second, hidden)


class DiT(eqx.Module):
    """A diffusion transformer on images, (channels, height, width): `network(t, x, args, *, key=None)`.

    The blocks are one block with stacked parameters, run by `jax.lax.scan`: compile time does not grow with depth. It
    computes in the dtype of its parameters, embeds t in the dtype of t, and returns the dtype of x.

    **Arguments:**

    - `channels`: of an image, whose height and width may be any multiples of the patch;
    - `size`: a `TransformerSize`; the published ones are `DiT.SIZES["S/2"]`, with S, B, L, XL and patches of 2, 4, 8;
    - `num_classes`: number of labels, or None for a network without labels;
    - `context_dim`: width of the tokens of a context, or None for a network without one;
    - `out_channels`: of the output, `channels` by default; twice as many for `nn.SplitVariance`;
    - `positions`: how tokens are told where they are: `SincosPositions()` by default, or `RotaryPositions()`;
    - `time_embedding`: a callable from t to an array with one axis; `SinusoidalEmbedding(256)` by default, made for t
      in [0, 1] and for the log-ratios that a preconditioner passes;
    - `qk_norm`: whether queries and keys are normalised, see `Attention`;
    - `dropout`: the probability with which elements of an MLP's hidden layer are dropped when there is a key;
    - `remat`: whether the backward pass holds only the tokens between the blocks; if not, also the outputs of their
      linear maps. The rest it computes anew;
    - `key`: for the initial parameters.

    Called with `t`: a scalar; `x`: one image; `args`: None, an integer label, or a `Condition`; `key`: for dropout,
    which is off without one. Returns an image like x: zeros, until it is trained.

    **Raises:** `ValueError` for an image that the patches do not cover or with other channels, a label out of range, a
    context of another width, and for what the network was not built to take.

    Source: Peebles & Xie (2022), arXiv 2212.09748, also for the initial parameters: Xavier-uniform linear maps, N(0,
    0.02^2) for the embeddings of time and label, zeros as in the module's text. Deviations: the periods of the time's
    embedding are those of t in [0, 1]; dropout is their code's, which has it at 0.
    """

    first: eqx.nn.Linear
    positions: AbstractPositions
    time_embedding: Callable[[Scalar], Array]
    embed: eqx.nn.MLP
    label_embedding: LabelEmbedding | None
    blocks: _Block
    modulation: eqx.nn.Linear
    last: eqx.nn.Linear
    dropout: float
    size: TransformerSize = eqx.field(static=True)
    context_dim: int | None = eqx.field(static=True)
    channels: int = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    #: The published sizes by name, of which the number is the patch.
    SIZES: ClassVar[Mapping[str, TransformerSize]] = MappingProxyType(
        {
            f"{name}/{patch}": TransformerSize(patch, width, depth, heads)
            for name, width, depth, heads in (
                ("S", 384, 12, 6),
                ("B", 768, 12, 12),
                ("L", 1024, 24, 16),
                ("XL", 1152, 28, 16),
            )
            for patch in (2, 4, 8)
        }
    )

    def __init__(
        self,
        channels: int,
        size: TransformerSize,
        *,
        num_classes: int | None = None,
        context_dim: int | None = None,
        out_channels: int | None = None,
        positions: AbstractPositions = SincosPositions(),
        time_embedding: Callable[[Scalar], Array] = SinusoidalEmbedding(256),
        qk_norm: bool = False,
        dropout: float = 0.0,
        remat: bool = False,
        key: PRNGKey,
    ):
        check_size(size, "DiT")
        key = check_key(key, "DiT")
        out_channels = channels if out_channels is None else out_channels
        if min(channels, out_channels) < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"DiT got channels = {channels}, out_channels = {out_channels}, dropout = {dropout}, but wants "
                "channels >= 1 and 0 <= dropout < 1."
            )
        width, area = size.width, size.patch**2
        key_first, key_embed, key_label, key_blocks, key_last = jax.random.split(key, 5)
        self.first = redrawn(eqx.nn.Linear(channels * area, width, key=key_first), _XAVIER, key=key_first)
        self.positions = positions
        self.time_embedding = time_embedding
        embed = time_mlp(time_embedding, width, "DiT", key=key_embed)
        self.embed = redrawn(embed, _NORMAL, key=key_embed)
        self.label_embedding = None
        if num_classes is not None:
            labels = LabelEmbedding(num_classes, width, key=key_label)
            self.label_embedding = eqx.tree_at(lambda e: e.table, labels, 0.02 * labels.table)
        self.blocks = stacked(lambda k: _Block(size, context_dim, qk_norm, key=k), size.depth, key=key_blocks)
        self.modulation = zeroed(eqx.nn.Linear(width, 2 * width, key=key_last))
        self.last = zeroed(eqx.nn.Linear(width, out_channels * area, key=key_last))
        self.dropout = dropout
        self.size = size
        self.context_dim = context_dim
        self.channels = channels
        self.remat = remat

    @property
    def null_label(self) -> int:
        """The label that stands for no class, for `guidance.ClassifierFree`."""
        return null_label_of(self.label_embedding, "DiT")

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
        h, apply, finish = self._parts(t, x, args)
        h, _ = scan_blocks(apply, self.blocks, h, depth=self.size.depth, key=key, policy=held(self.remat))
        return finish(h)

    def hidden(
        self,
        t: TimeLike,
        x: Float[Array, "*channels_height_width"],
        args: ArrayLike | Condition | None = None,
        *,
        block: int,
        key: PRNGKey | None = None,
    ) -> tuple[Float[Array, "out_channels height width"], Float[Array, "tokens token_width"]]:
        """The output, and from the same evaluation the tokens after the first `block` blocks, from 1 to the depth.

        Tokens are in the dtype of the network. Made for an alignment loss: Yu et al. (2024), arXiv 2410.06940.
        """
        depth, policy = self.size.depth, held(self.remat)
        block = check_count(block, "block", most=depth)
        h, apply, finish = self._parts(t, x, args)
        h, kept = scan_keeping(apply, self.blocks, h, kept=block, depth=depth, key=key, policy=policy)
        return finish(h), kept

    def _parts(self, t: TimeLike, x: Array, args: object) -> tuple[Array, Callable[..., Any], Callable[..., Array]]:
        """The tokens before the first block, a block's step, and the way from the last tokens to the output."""
        size, dtype = self.size, self.first.weight.dtype
        rows, columns = check_image(x, self.channels, size.patch, "DiT")
        condition = as_condition(args, self.label_embedding, self.context_dim, "DiT")
        context = None if condition.context is None else condition.context.astype(dtype)
        embedding = self.embed(self.time_embedding(as_times(t)).astype(dtype))
        if self.label_embedding is not None:
            assert condition.label is not None
            embedding = embedding + self.label_embedding(condition.label)
        embedding = jax.nn.silu(embedding)
        rotary = self.positions.rotation(rows, columns, size.width // size.heads, dtype)
        tokens = over_tokens(self.first, to_patches(x.astype(dtype), size.patch))
        table = self.positions.added(rows, columns, size.width, dtype)

        def apply(block: _Block, h: Array, _: None, key: PRNGKey | None) -> tuple[Array, None]:
            return block(h, embedding, rotary, context, condition.mask, self.dropout, key=key), None

        def finish(h: Array) -> Array:
            shift, scale = jnp.split(self.modulation(embedding), 2)
            last = over_tokens(self.last, adaptive_norm(h, scale, shift, eps=_EPS))
            return from_patches(last, rows, columns, size.patch).astype(x.dtype)

        return tokens if table is None else tokens + table, apply, finish
