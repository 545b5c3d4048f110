"""Arithmetic on pytrees: linear combinations, noise shaped like a state, sums over all elements."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ._types import Like, PRNGKey, Scalar, ScalarLike, State


def as_scalar(value: ScalarLike) -> Scalar:
    """`value` as a strongly typed scalar of JAX's default float: float32, float64 under x64."""
    return jnp.asarray(value).astype(float)


def strong(x: State) -> State:
    """The same arrays without weak types, with which a second call would trace again."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), x)


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
