r"""Attention of a sequence of tokens to itself, or to another sequence.

For tokens $h_i$, attended tokens $c_j$ (of a context, or the $h_j$ themselves) and each head,

$$q_i = W_q h_i, \quad k_j = W_k c_j, \quad v_j = W_v c_j, \qquad
  a_i = \sum_j \mathrm{softmax}_j\!\left(q_i^\top k_j / \sqrt{d}\right) v_j$$

with d the width of a head. The output is a linear map of the heads' $a_i$, one after the other.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._checks import check_key, describe
from .._types import PRNGKey
from ._layers import over_tokens
from .positions import Rotation, rotate

__all__ = ["Attention"]


class Attention(eqx.Module):
    """Attention with several heads; self-attention without a `context_dim`, cross-attention with one.

    **Arguments:**

    - `dim`: width of the tokens; `heads`: number of heads, which divide `dim`;
    - `context_dim`: width of the tokens of the context, None for self-attention;
    - `qk_norm`: whether each head's queries and keys are divided by their root mean square and scaled by a trained
      weight, which keeps the softmax from saturating;
    - `qkv_bias`: whether queries, keys and values have a bias;
    - `key`: for the initial parameters.

    Called with `tokens`, of shape (tokens, dim); `context`, of shape (context tokens, context_dim), in cross-attention
    alone; `mask`, of shape (attended tokens,): which of them exist, all by default; `rotary`: a rotation of queries and
    keys by their positions, from `RotaryPositions`, in self-attention alone. Returns an array like `tokens`. Where the
    mask is all False nothing is attended to, and a is zero.

    **Raises:** `ValueError` for a context or a mask of the wrong shape, or one that is missing or not wanted.

    Source: Vaswani et al. (2017), arXiv 1706.03762; `qk_norm` Dehghani et al. (2023), arXiv 2302.05442, here with
    RMSNorm. The softmax is computed in float32, by `jax.nn.dot_product_attention`.
    """

    query_key_value: eqx.nn.Linear | None
    query: eqx.nn.Linear | None
    key_value: eqx.nn.Linear | None
    query_norm: eqx.nn.RMSNorm | None
    key_norm: eqx.nn.RMSNorm | None
    out: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        context_dim: int | None = None,
        qk_norm: bool = False,
        qkv_bias: bool = True,
        key: PRNGKey,
    ):
        key = check_key(key, "Attention")
        if min(dim, heads) < 1 or dim % heads or (context_dim is not None and context_dim < 1):
            raise ValueError(
                f"Attention got dim = {dim}, heads = {heads}, context_dim = {context_dim}, but wants sizes >= 1 and a "
                "number of heads that divides dim."
            )
        key_query, key_value, key_out = jax.random.split(key, 3)
        self.query_key_value = self.query = self.key_value = None
        if context_dim is None:
            self.query_key_value = eqx.nn.Linear(dim, 3 * dim, use_bias=qkv_bias, key=key_query)
        else:
            self.query = eqx.nn.Linear(dim, dim, use_bias=qkv_bias, key=key_query)
            self.key_value = eqx.nn.Linear(context_dim, 2 * dim, use_bias=qkv_bias, key=key_value)
        self.query_norm = eqx.nn.RMSNorm(dim // heads, use_bias=False) if qk_norm else None
        self.key_norm = eqx.nn.RMSNorm(dim // heads, use_bias=False) if qk_norm else None
        self.out = eqx.nn.Linear(dim, dim, key=key_out)
        self.heads = heads

    @property
    def context_dim(self) -> int | None:
        """Width of the tokens of the context, None in self-attention."""
        return None if self.key_value is None else int(self.key_value.in_features)

    def __call__(
        self,
        tokens: Float[Array, "tokens dim"],
        context: Float[Array, "context context_dim"] | None = None,
        mask: Bool[Array, " attended"] | None = None,
        rotary: Rotation | None = None,
    ) -> Float[Array, "tokens dim"]:
        """The attended tokens, mapped."""
        query, key, value = self._heads(tokens, context)
        if mask is not None and mask.shape != key.shape[:1]:
            raise ValueError(
                f"Attention got a mask of {describe(mask)} for {len(key)} attended tokens, but wants one bool for each."
            )
        if self.query_norm is not None and self.key_norm is not None:
            query = jax.vmap(jax.vmap(self.query_norm))(query)
            key = jax.vmap(jax.vmap(self.key_norm))(key)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        with jax.numpy_dtype_promotion("standard"):  # it raises half precision to float32 for the softmax
            attended = jax.nn.dot_product_attention(query, key, value, mask=None if mask is None else mask[None, None])
        if mask is not None:
            # A softmax over nothing is uniform, over what does not exist.
            attended = jnp.where(jnp.any(mask), attended, 0)
        return over_tokens(self.out, attended.reshape(tokens.shape))

    def _heads(self, tokens: Array, context: Array | None) -> tuple[Array, Array, Array]:
        """Queries, keys and values, of shape (tokens, heads, width of a head)."""

        def split(mapped: Array, parts: int) -> list[Array]:
            return [part.reshape(len(part), self.heads, -1) for part in jnp.split(mapped, parts, axis=-1)]

        if self.query_key_value is not None:
            if context is not None:
                raise ValueError(
                    f"This Attention is self-attention, but got a context of {describe(context)}: build it with "
                    "context_dim, or pass none."
                )
            query, key, value = split(over_tokens(self.query_key_value, tokens), 3)
            return query, key, value
        assert self.query is not None and self.key_value is not None
        if context is None or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"Attention got a context of {describe(context)}, but was built for (tokens, {self.context_dim}): pass "
                "one of that width, or build it with another context_dim."
            )
        key, value = split(over_tokens(self.key_value, context), 2)
        return split(over_tokens(self.query, tokens), 1)[0], key, value
