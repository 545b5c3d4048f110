"""Arithmetic on pytrees: linear combinations, noise shaped like a state, sums over all elements."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ._types import Like, PRNGKey, Scalar, ScalarLike, State


def as_scalar(value: ScalarLike) -> Scalar:
    """`value` as a strongly typed scalar of JAX's default float: float32, float64 under x64.

    **Raises:** `ValueError` for anything but one number.
    """
    array = jnp.asarray(value)
    if array.ndim != 0:
        raise ValueError(
            f"A number was wanted, but an array of shape {array.shape} was given: everything here takes one example "
            "and one time, so batch with jax.vmap."
        )
    return array.astype(float)


def state_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype in which a state of this dtype is solved: float32 at least, float64 under x64, as time is."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.zeros(()).dtype)


def as_state(x: State) -> State:
    """Arrays as Diffrax solves them: of `state_dtype`, and without weak types, which would trace again."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, state_dtype(leaf.dtype)), x)


def state_like(like: Like) -> Like:
    """The shapes of one example with the dtypes of `as_state`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, state_dtype(leaf.dtype)), like)


def safe_sqrt(x: Scalar) -> Scalar:
    """sqrt(x) whose derivative at 0 is 0, not infinite: for coefficients that vanish there together with a factor."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def linear_combination(coefficients: Sequence[ScalarLike], trees: Sequence[State]) -> State:
    """sum_i coefficients[i] * trees[i], computed in each leaf's own dtype."""

    def combine(*leaves):
        total = None
        for coefficient, leaf in zip(coefficients, leaves, strict=True):
            scaled = jnp.asarray(coefficient).astype(leaf.dtype) * leaf
            total = scaled if total is None else total + scaled
        return total

    return jax.tree.map(combine, *trees)


def normal_like(key: PRNGKey, like: Like) -> State:
    """Independent standard normal noise with the structure, shapes and dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noise)


def normal_with(key: PRNGKey, like: Like, moments: tuple[Scalar, Scalar]) -> State:
    """Independent normal elements of one mean and standard deviation, `moments`, shaped like `like`."""
    mean, std = moments
    noise = linear_combination((std,), (normal_like(key, like),))
    return jax.tree.map(lambda leaf: leaf + mean.astype(leaf.dtype), noise)


def tree_size(tree: Like) -> int:
    """The number of elements of all leaves together: the dimension d of one example."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def tree_dot(a: State, b: State) -> Scalar:
    """The inner product of two states over all their elements."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return jax.tree.reduce(jnp.add, products)


def all_finite(tree: State) -> jax.Array:
    """Whether every element of every leaf is finite, a boolean scalar."""
    finite = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree)
    return jax.tree.reduce(jnp.logical_and, finite, jnp.asarray(True))
