r"""The divergence of a velocity field, exact or estimated.

$$\nabla \cdot v = \sum_i \frac{\partial v_i}{\partial x_i}
   = E_\xi\!\left[\xi^T \frac{\partial v}{\partial x}\, \xi\right], \qquad E[\xi \xi^T] = I$$

Both come from forward derivatives beside one evaluation of v; the state may have any shape or be any pytree.
"""

import abc
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, PyTree

from ._checks import check_count, check_key
from ._numerics import normal_like, tree_dot
from ._types import Like, PRNGKey, Scalar, State

__all__ = ["AbstractDivergence", "Exact", "Hutchinson", "gaussian", "rademacher"]


class AbstractDivergence(eqx.Module):
    """A way to compute the divergence of a field beside its value."""

    #: Whether `probes` draws random numbers.
    random: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def probes(self, like: Like, key: PRNGKey | None) -> PyTree:
        """Directions to differentiate in, drawn once for a whole solve: like one example with a leading axis."""

    @abc.abstractmethod
    def apply(self, field: Callable[[State], State], x: State, probes: PyTree) -> tuple[State, Scalar]:
        """(field(x), its divergence at x)."""


class Exact(AbstractDivergence):
    """The trace of the Jacobian: d forward derivatives beside one evaluation, d the number of elements.

    **Arguments:** `batch_size`: how many basis directions at once; None takes all d, which needs d times the memory of
    one evaluation.
    """

    batch_size: int | None = None
    random: ClassVar[bool] = False

    def __check_init__(self):
        if self.batch_size is not None:
            check_count(self.batch_size, "Exact got batch_size")

    def probes(self, like: Like, key: PRNGKey | None) -> PyTree:
        del like, key
        return None

    def apply(self, field: Callable[[State], State], x: State, probes: PyTree) -> tuple[State, Scalar]:
        del probes
        flat, unravel = ravel_pytree(x)
        indices = jnp.arange(flat.size)

        def direction(index: Int[Array, ""]) -> State:
            return unravel(jnp.zeros_like(flat).at[index].set(1))

        def element(derivative: State, index: Int[Array, ""]) -> Scalar:
            return ravel_pytree(derivative)[0][index]

        if self.batch_size is None:

            def along(index: Int[Array, ""]) -> tuple[State, Scalar]:
                value, derivative = jax.jvp(field, (x,), (direction(index),))
                return value, element(derivative, index)

            value, entries = _first_value(jax.vmap(along)(indices))
        else:
            # The batches share one linearisation, which keeps the activations of the network.
            value, linear = jax.linearize(field, x)
            entries = jax.lax.map(lambda i: element(linear(direction(i)), i), indices, batch_size=self.batch_size)
        return value, jnp.sum(entries)


def rademacher(key: PRNGKey, like: Like) -> State:
    """Independent signs: the probe of least variance among those with E[xi xi^T] = I and independent elements."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, signs)


def gaussian(key: PRNGKey, like: Like) -> State:
    """Independent standard normal elements, of larger variance than signs."""
    return normal_like(key, like)


class Hutchinson(AbstractDivergence):
    """The mean of xi^T (dv/dx) xi over k probes, drawn once and kept for the whole solve.

    **Arguments:** `num_probes`: k >= 1; `distribution`: `rademacher` or `gaussian`, a callable (key, like).

    Source: Hutchinson (1989); Grathwohl et al. (2018), arXiv 1810.01367.
    """

    num_probes: int = 1
    distribution: Callable[[PRNGKey, Like], State] = rademacher
    random: ClassVar[bool] = True

    def __check_init__(self):
        check_count(self.num_probes, "Hutchinson got num_probes")

    def probes(self, like: Like, key: PRNGKey | None) -> PyTree:
        key = check_key(key, "the Hutchinson divergence")
        return jax.vmap(lambda k: self.distribution(k, like))(jax.random.split(key, self.num_probes))

    def apply(self, field: Callable[[State], State], x: State, probes: PyTree) -> tuple[State, Scalar]:
        def along(probe: State) -> tuple[State, Scalar]:
            value, derivative = jax.jvp(field, (x,), (probe,))
            return value, tree_dot(probe, derivative)

        value, products = _first_value(jax.vmap(along)(probes))
        return value, jnp.mean(products)


def _first_value(values_and_products: tuple[State, Array]) -> tuple[State, Array]:
    """The value does not depend on the direction: computed once, if the network lets JAX see that."""
    values, products = values_and_products
    return jax.tree.map(lambda leaf: leaf[0], values), products
