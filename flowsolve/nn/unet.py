r"""The UNet: residual convolutions at several resolutions, with attention at the coarse ones.

With R a residual block (`nn.convolution`) told of time and label, A attention between pixels, and $h_l$ the image at
level l, of half the height and width of level l - 1,

$$h \leftarrow A(R(h)) \ \text{down through the levels, then in the middle, then}\
  h \leftarrow A(R([h, \text{skip}])) \ \text{up again,}$$

where a skip is the output of a block or a downsampling on the way down, last in, first out. Attention is

$$h \leftarrow h + \mathrm{Attention}(\mathrm{GN}(h)), \qquad
  h \leftarrow h + \mathrm{CrossAttention}(\mathrm{GN}(h), \mathrm{context})$$

with the second step where there is a context. The second convolution of a block, the outputs of attention and the last
convolution start at zero: at first blocks and attention are (up to their skip's linear map) the identity and the output
is 0.

Source: Ho et al. (2020), arXiv 2006.11239; scale and shift by the embedding, Dhariwal & Nichol (2021), arXiv
2105.05233; cross-attention to a context, Rombach et al. (2021), arXiv 2112.10752.
"""

from collections.abc import Callable, Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from .._checks import check_key
from .._types import PRNGKey, Scalar, TimeLike
from ._layers import zeroed
from .attention import Attention
from .conditions import Condition, as_condition, null_condition
from .convolution import Convolution, GroupNorm, ResidualBlock, activated, upsampled
from .embeddings import LabelEmbedding, SinusoidalEmbedding, as_times, null_label_of, time_mlp
from .patches import check_image

__all__ = ["UNet"]


class _PixelAttention(eqx.Module):
    """Attention of the pixels to each other and, where there is one, to a context."""

    norm: GroupNorm
    attention: Attention
    cross_norm: GroupNorm | None
    cross: Attention | None

    def __init__(self, channels: int, heads: int, context_dim: int | None, *, key: PRNGKey):
        def starting_at_zero(attention: Attention) -> Attention:
            return eqx.tree_at(lambda a: a.out, attention, zeroed(attention.out))

        key_attention, key_cross = jax.random.split(key)
        self.norm = GroupNorm(channels)
        self.attention = starting_at_zero(Attention(channels, heads, key=key_attention))
        self.cross_norm = self.cross = None
        if context_dim is not None:
            self.cross_norm = GroupNorm(channels)
            self.cross = starting_at_zero(Attention(channels, heads, context_dim=context_dim, key=key_cross))

    def __call__(self, h: Array, context: Array | None, mask: Array | None) -> Array:
        tokens = (h.shape[0] * h.shape[1], h.shape[2])
        h = h + self.attention(self.norm(h).reshape(tokens)).reshape(h.shape)
        if self.cross is not None and self.cross_norm is not None:
            h = h + self.cross(self.cross_norm(h).reshape(tokens), context, mask).reshape(h.shape)
        return h


class _Stage(eqx.Module):
    """A residual block and, at some resolutions, attention."""

    residual: ResidualBlock
    attention: _PixelAttention | None

    def __call__(
        self,
        h: Float[Array, "height width inputs"],
        embedding: Float[Array, " embedding_dim"],
        context: Float[Array, "context context_dim"] | None,
        mask: Bool[Array, " context"] | None,
        dropout: float,
        key: PRNGKey | None,
    ) -> Float[Array, "height width outputs"]:
        h = self.residual(h, embedding, dropout, key=key)
        return h if self.attention is None else self.attention(h, context, mask)


class UNet(eqx.Module):
    """A UNet on images, (channels, height, width), of any size: `network(t, x, args, *, key=None)`.

    A height or width that is odd is halved upwards, and the way up crops to what the way down had. It computes in the
    dtype of its parameters, embeds t in the dtype of t, and returns the dtype of x.

    **Arguments:**

    - `channels`: of an image;
    - `width`: number of channels of the hidden image at full resolution;
    - `multipliers`: of the width at each level; each level but the first has half the resolution of the one before;
    - `blocks`: residual blocks of a level on the way down; on the way up there is one more;
    - `attention`: the levels with attention, 0 the full resolution and -1 the coarsest; the middle always has it;
    - `heads`: of attention, which divide the channels where there is attention;
    - `num_classes`: number of labels, or None for a network without labels;
    - `context_dim`: width of the tokens of a context, or None for a network without one;
    - `out_channels`: of the output, `channels` by default; twice as many for `nn.SplitVariance`;
    - `embedding_dim`: length of the embedding of time and label, 4 `width` by default;
    - `time_embedding`: a callable from t to an array with one axis; `SinusoidalEmbedding(64)` by default, made for t in
      [0, 1] and for the log-ratios that a preconditioner passes;
    - `dropout`: the probability with which elements before the second convolution of a block are dropped when there is
      a key;
    - `remat`: whether the backward pass computes every block anew, and holds only the images between them;
    - `key`: for the initial parameters.

    Called with `t`: a scalar; `x`: one image; `args`: None, an integer label, or a `Condition`; `key`: for dropout,
    which is off without one. Returns an image like x: zeros, until it is trained.

    **Raises:** `ValueError` for x of other channels or more than one example, a label out of range, a context of
    another width, and for what the network was not built to take.

    Source: as the module's. Deviations: the periods of the time's embedding are those of t in [0, 1]; the number of
    groups of a norm follows from the channels.
    """

    first: Convolution
    down: tuple[tuple[_Stage, ...], ...]
    downsample: tuple[Convolution, ...]
    middle: tuple[_Stage, _Stage]
    up: tuple[tuple[_Stage, ...], ...]
    upsample: tuple[Convolution, ...]
    last_norm: GroupNorm
    last: Convolution
    time_embedding: Callable[[Scalar], Array]
    embed: eqx.nn.MLP
    label_embedding: LabelEmbedding | None
    dropout: float
    channels: int = eqx.field(static=True)
    context_dim: int | None = eqx.field(static=True)
    remat: bool = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        *,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (-1,),
        heads: int = 4,
        num_classes: int | None = None,
        context_dim: int | None = None,
        out_channels: int | None = None,
        embedding_dim: int | None = None,
        time_embedding: Callable[[Scalar], Array] = SinusoidalEmbedding(64),
        dropout: float = 0.0,
        remat: bool = False,
        key: PRNGKey,
    ):
        out_channels = channels if out_channels is None else out_channels
        embedding_dim = 4 * width if embedding_dim is None else embedding_dim
        levels = len(multipliers)
        if min(channels, width, blocks, heads, out_channels, embedding_dim, levels, *multipliers) < 1:
            raise ValueError(
                f"UNet got channels = {channels}, width = {width}, multipliers = {tuple(multipliers)}, blocks = "
                f"{blocks}, heads = {heads}, out_channels = {out_channels}, embedding_dim = {embedding_dim}, but wants "
                "sizes >= 1 and at least one multiplier."
            )
        if not all(-levels <= level < levels for level in attention):
            raise ValueError(
                f"UNet got attention = {tuple(attention)}, but has {levels} levels: give some of 0 to {levels - 1}, or "
                "-1 for the coarsest."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"UNet got dropout = {dropout}, but wants 0 <= dropout < 1.")
        attending = {level % levels for level in attention}
        keys = _keys(check_key(key, "UNet"))

        def stage(inputs: int, outputs: int, attends: bool) -> _Stage:
            residual = ResidualBlock(inputs, outputs, embedding_dim, key=next(keys))
            attend = _PixelAttention(outputs, heads, context_dim, key=next(keys)) if attends else None
            return _Stage(residual, attend)

        widths = [width * multiplier for multiplier in multipliers]
        self.first = Convolution(channels, width, key=next(keys))
        skips = [width]
        down, downsample, up, upsample = [], [], [], []
        now = width
        for level, outputs in enumerate(widths):
            stages = []
            for _ in range(blocks):
                stages.append(stage(now, outputs, level in attending))
                now = outputs
                skips.append(now)
            down.append(tuple(stages))
            if level < levels - 1:
                downsample.append(Convolution(now, now, stride=2, key=next(keys)))
                skips.append(now)
        self.middle = stage(now, now, True), stage(now, now, False)
        for level, outputs in reversed(list(enumerate(widths))):
            stages = []
            for _ in range(blocks + 1):
                stages.append(stage(now + skips.pop(), outputs, level in attending))
                now = outputs
            up.append(tuple(stages))
            if level > 0:
                upsample.append(Convolution(now, now, key=next(keys)))
        self.down, self.downsample, self.up, self.upsample = map(tuple, (down, downsample, up, upsample))
        self.last_norm = GroupNorm(now)
        self.last = zeroed(Convolution(now, out_channels, key=next(keys)))
        self.time_embedding = time_embedding
        self.embed = time_mlp(time_embedding, embedding_dim, "UNet", key=next(keys))
        self.label_embedding = (
            None if num_classes is None else LabelEmbedding(num_classes, embedding_dim, key=next(keys))
        )
        self.dropout = dropout
        self.channels = channels
        self.context_dim = context_dim
        self.remat = remat

    @property
    def null_label(self) -> int:
        """The label that stands for no class, for `guidance.ClassifierFree`."""
        return null_label_of(self.label_embedding, "UNet")

    def null(self, args: ArrayLike | Condition) -> ArrayLike | Condition:
        """The condition like `args` that says nothing, for `guidance.ClassifierFree`."""
        return null_condition(args, self.label_embedding)

    def __call__(
        self,
        t: TimeLike,
        x: Float[Array, "channels height width"],
        args: ArrayLike | Condition | None = None,
        *,
        key: PRNGKey | None = None,
    ) -> Float[Array, "out_channels height width"]:
        """The output at (t, x), one example."""
        check_image(x, self.channels, 1, "UNet")
        dtype = self.first.weight.dtype
        condition = as_condition(args, self.label_embedding, self.context_dim, "UNet")
        context = None if condition.context is None else condition.context.astype(dtype)
        embedding = self.embed(self.time_embedding(as_times(t)).astype(dtype))
        if self.label_embedding is not None:
            assert condition.label is not None
            embedding = embedding + self.label_embedding(condition.label)
        embedding = jax.nn.silu(embedding)
        keys = None if key is None else _keys(key)

        def apply(stage: _Stage, h: Array) -> Array:
            run = eqx.filter_checkpoint(stage) if self.remat else stage
            return run(h, embedding, context, condition.mask, self.dropout, None if keys is None else next(keys))

        h = self.first(jnp.moveaxis(x.astype(dtype), 0, -1))
        skips = [h]
        for level, stages in enumerate(self.down):
            for stage in stages:
                h = apply(stage, h)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)
        for stage in self.middle:
            h = apply(stage, h)
        for level, stages in enumerate(self.up):
            for stage in stages:
                h = apply(stage, jnp.concatenate([h, skips.pop()], axis=-1))
            if level < len(self.upsample):
                height, width, _ = skips[-1].shape
                h = upsampled(self.upsample[level], h, (height, width))
        h = self.last(activated(self.last_norm, h))
        return jnp.moveaxis(h, -1, 0).astype(x.dtype)


def _keys(key: PRNGKey) -> Iterator[PRNGKey]:
    """Key after key, each of them new."""
    while True:
        key, one = jax.random.split(key)
        yield one
