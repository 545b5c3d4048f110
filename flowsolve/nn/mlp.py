r"""A residual multilayer perceptron, for states of any shape and up to some thousand elements.

With c the sum of the embeddings of time and label, LN a layer norm without parameters and k = 1, ..., depth,

$$h_0 = W_\mathrm{in} x, \qquad
  h_k = h_{k-1} + \mathrm{gate}_k(c) \cdot \mathrm{MLP}_k((1 + \mathrm{scale}_k(c)) \cdot \mathrm{LN}(h_{k-1})
        + \mathrm{shift}_k(c))$$

and the output is a linear map of a last adaptive norm of $h_\mathrm{depth}$. Every scale, shift and gate is linear in
silu(c) and starts at zero, as does the last map: at first each block is the identity and the output 0.

Source: Peebles & Xie (2022), arXiv 2212.09748 (adaLN-Zero); without attention as in Li et al. (2024), arXiv 2406.11838.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float

from .._checks import check_count, check_key, check_state, describe
from .._numerics import tree_size
from .._types import Like, PRNGKey, Scalar, State, TimeLike
from ._layers import adaptive_norm, scan_blocks, scan_keeping, stacked, zeroed
from .embeddings import LabelEmbedding, SinusoidalEmbedding, as_times, null_label_of, time_mlp

__all__ = ["ResidualMLP"]


class _Block(eqx.Module):
    """One residual block with an adaptive norm."""

    modulation: eqx.nn.Linear
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __init__(self, width: int, hidden: int, embedding_dim: int, *, key: PRNGKey):
        key_modulation, key_first, key_second = jax.random.split(key, 3)
        self.modulation = zeroed(eqx.nn.Linear(embedding_dim, 3 * width, key=key_modulation))
        self.first = eqx.nn.Linear(width, hidden, key=key_first)
        self.second = eqx.nn.Linear(hidden, width, key=key_second)

    def __call__(self, h: Array, embedding: Array, dropout: float, *, key: PRNGKey | None) -> Array:
        scale, shift, gate = jnp.split(self.modulation(embedding), 3)
        hidden = jax.nn.silu(self.first(adaptive_norm(h, scale, shift)))
        hidden = eqx.nn.Dropout(dropout, inference=key is None)(hidden, key=key)
        return h + gate * self.second(hidden)


class ResidualMLP(eqx.Module):
    """A residual network of `depth` blocks with adaptive norm: `network(t, x, args, *, key=None)`.

    The blocks are one block with stacked parameters, run by `jax.lax.scan`: compile time does not grow with depth.
    It computes in the dtype of its parameters, embeds t in the dtype of t, and returns the dtypes of x.

    **Arguments:**

    - `like`: the shape of one example: an array, a `jax.ShapeDtypeStruct`, or a pytree of these;
    - `width`: length of the hidden state; `depth`: number of blocks;
    - `hidden`: length of the middle layer of a block, `width` by default;
    - `num_classes`: number of labels, or None for a network without labels;
    - `embedding_dim`: length of the embedding of time and label;
    - `time_embedding`: a callable from t to an array with one axis; `SinusoidalEmbedding(64)` by default,
      made for t in [0, 1] and for the log-ratios that a preconditioner passes;
    - `dropout`: the probability with which the elements of a middle layer are dropped when there is a key;
    - `key`: for the initial parameters.

    Called with `t`: a scalar; `x`: one example like `like`; `args`: an integer label, `null_label` among them, or None
    for no label; `key`: for dropout, which is off without one. Returns a state like x: zeros, until it is trained.

    **Raises:** `ValueError` if x has another number of elements than `like`, or a label is given to a network without;
    `TypeError` if x is not floating point.
    """

    time_embedding: Callable[[Scalar], Array]
    label_embedding: LabelEmbedding | None
    embed: eqx.nn.MLP
    first: eqx.nn.Linear
    blocks: _Block
    modulation: eqx.nn.Linear
    last: eqx.nn.Linear
    dropout: float
    depth: int = eqx.field(static=True)

    def __init__(
        self,
        like: Like,
        *,
        width: int = 512,
        depth: int = 4,
        hidden: int | None = None,
        num_classes: int | None = None,
        embedding_dim: int = 128,
        time_embedding: Callable[[Scalar], Array] = SinusoidalEmbedding(64),
        dropout: float = 0.0,
        key: PRNGKey,
    ):
        check_state(like, "like")
        key = check_key(key, "ResidualMLP")
        hidden = width if hidden is None else hidden
        if min(width, depth, hidden, embedding_dim) < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"ResidualMLP got width = {width}, depth = {depth}, hidden = {hidden}, "
                f"embedding_dim = {embedding_dim}, dropout = {dropout}, but wants sizes >= 1 and 0 <= dropout < 1."
            )
        key_embed, key_label, key_first, key_blocks, key_modulation, key_last = jax.random.split(key, 6)
        size = tree_size(like)
        self.time_embedding = time_embedding
        self.label_embedding = (
            None if num_classes is None else LabelEmbedding(num_classes, embedding_dim, key=key_label)
        )
        self.embed = time_mlp(time_embedding, embedding_dim, "ResidualMLP", key=key_embed)
        self.first = eqx.nn.Linear(size, width, key=key_first)
        self.blocks = stacked(lambda k: _Block(width, hidden, embedding_dim, key=k), depth, key=key_blocks)
        self.modulation = zeroed(eqx.nn.Linear(embedding_dim, 2 * width, key=key_modulation))
        self.last = zeroed(eqx.nn.Linear(width, size, key=key_last))
        self.dropout = dropout
        self.depth = depth

    @property
    def null_label(self) -> int:
        """The label that stands for no class, for `guidance.ClassifierFree`."""
        return null_label_of(self.label_embedding, "ResidualMLP")

    def embedding(self, t: TimeLike, args: ArrayLike | None = None) -> Float[Array, " dim"]:
        """silu(c), the embedding of time and label that every block is modulated by."""
        embedding = self.embed(self.time_embedding(as_times(t)).astype(self.first.weight.dtype))
        if self.label_embedding is not None:
            embedding = embedding + self.label_embedding(self.null_label if args is None else args)
        elif args is not None:
            raise ValueError(
                f"This ResidualMLP has no labels, but got args of {describe(args)}: build it with num_classes, or "
                "pass no args."
            )
        return jax.nn.silu(embedding)

    def __call__(
        self,
        t: TimeLike,
        x: State,
        args: ArrayLike | None = None,
        *,
        key: PRNGKey | None = None,
    ) -> State:
        """The output at (t, x), one example."""
        h, apply, finish = self._parts(t, x, args)
        h, _ = scan_blocks(apply, self.blocks, h, depth=self.depth, key=key)
        return finish(h)

    def hidden(
        self,
        t: TimeLike,
        x: State,
        args: ArrayLike | None = None,
        *,
        block: int,
        key: PRNGKey | None = None,
    ) -> tuple[State, Float[Array, " width"]]:
        """The output, and from the same evaluation $h_k$ after the first `block` blocks, from 1 to the depth.

        It is in the dtype of the network.
        """
        block = check_count(block, "block", most=self.depth)
        h, apply, finish = self._parts(t, x, args)
        h, kept = scan_keeping(apply, self.blocks, h, kept=block, depth=self.depth, key=key)
        return finish(h), kept

    def _parts(
        self, t: TimeLike, x: State, args: ArrayLike | None
    ) -> tuple[Array, Callable[..., Any], Callable[..., State]]:
        """h before the first block, a block's step, and the way from the last h to the output."""
        check_state(x, "x")
        flat, unravel = ravel_pytree(x)
        if flat.size != self.first.in_features:
            raise ValueError(
                f"ResidualMLP got x of {describe(x)}, {flat.size} elements, but was built for ONE example of "
                f"{self.first.in_features}: batch with jax.vmap."
            )
        embedding = self.embedding(t, args)

        def apply(block: _Block, h: Array, _: None, key: PRNGKey | None) -> tuple[Array, None]:
            return block(h, embedding, self.dropout, key=key), None

        def finish(h: Array) -> State:
            scale, shift = jnp.split(self.modulation(embedding), 2)
            return unravel(self.last(adaptive_norm(h, scale, shift)).astype(flat.dtype))

        return self.first(flat.astype(embedding.dtype)), apply, finish
