"""Batches as the rows of matrices, and functions of all pairs of rows, a block of rows at a time."""

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Real

from .._checks import check, describe

Batch: TypeAlias = PyTree[Real[Array | np.ndarray, "..."]]
Rows: TypeAlias = Float[Array, "_ dim"]

_T = TypeVar("_T")


def as_rows(batch: Batch, who: str, *, least: int = 1) -> Rows:
    """A batch of at least so many examples as the rows of a matrix, of JAX's default float."""
    leaves = jax.tree.leaves(batch)
    wanted = "wants arrays of real numbers with one leading axis, one entry an example"
    for leaf in leaves:
        if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")) or not _is_real(leaf.dtype):
            raise TypeError(f"{who} got {describe(batch)}, but {wanted}.")
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves}
    if len(lengths) != 1 or not sum(int(np.prod(leaf.shape[1:])) for leaf in leaves):
        raise ValueError(f"{who} got {describe(batch)}, but {wanted}.")
    (num,) = lengths
    if num < least:
        raise ValueError(f"{who} got {num} examples, but wants at least {least}: take a larger batch.")
    rows = jnp.concatenate([jnp.asarray(leaf).reshape(num, -1).astype(float) for leaf in leaves], axis=1)
    finite = jnp.all(jnp.isfinite(rows))
    return check(rows, ~finite, f"{who} got numbers that are NaN or infinite, but wants finite ones: look for them.")


def _is_real(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def rows_of(a: Batch, b: Batch, who: str, *, least: int = 1) -> tuple[Rows, Rows]:
    """`as_rows` of both batches; raise if their examples differ in structure or shapes."""
    rows = as_rows(a, who, least=least), as_rows(b, who, least=least)
    shapes = [[leaf.shape[1:] for leaf in jax.tree.leaves(batch)] for batch in (a, b)]
    if jax.tree.structure(a) != jax.tree.structure(b) or shapes[0] != shapes[1]:
        raise ValueError(
            f"{who} got batches {describe(a)} and {describe(b)}, but wants examples of the same structure and shapes."
        )
    return rows


def over_rows(function: Callable[..., _T], rows: PyTree, block: int) -> _T:
    """function of each entry along the leading axes, `block` of them at a time."""
    num = jax.tree.leaves(rows)[0].shape[0]
    # A gradient computes each block again: else it would keep what belongs to every pair.
    return jax.lax.map(jax.checkpoint(function), rows, batch_size=min(block, num))
