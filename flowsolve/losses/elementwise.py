r"""What a loss makes of the error of each element, before the mean over elements: $\ell(e)$ for an error e.

`PseudoHuberNorm` is of all elements together.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_positive
from .._numerics import as_scalar
from .._types import Scalar

__all__ = ["Huber", "PseudoHuber", "PseudoHuberNorm", "absolute", "squared"]


def squared(error: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The squared error e^2, whose optimum is the conditional mean."""
    return error**2


def absolute(error: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The absolute error |e|, whose optimum is the conditional median, element by element."""
    return jnp.abs(error)


class Huber(eqx.Module):
    """Huber's loss: e^2/2 up to |e| = delta, delta (|e| - delta/2) beyond.

    **Arguments:** `delta`: where it turns linear, in units of the target.
    """

    delta: Scalar = eqx.field(default=1.0, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "delta")

    def __call__(self, error: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The loss of each element."""
        delta = self.delta.astype(error.dtype)
        size = jnp.abs(error)
        near = jnp.minimum(size, delta)
        return near * (size - 0.5 * near)


class PseudoHuber(eqx.Module):
    """The pseudo-Huber loss c^2 (sqrt(1 + (e/c)^2) - 1): e^2/2 near 0, c |e| far away.

    **Arguments:** `c`: where it turns linear, in units of the target.
    """

    c: Scalar = eqx.field(default=1.0, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "c")

    def __call__(self, error: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The loss of each element, in the form that does not cancel near 0."""
        scaled = error / self.c.astype(error.dtype)
        return error**2 / (1 + jnp.sqrt(1 + scaled**2))


class PseudoHuberNorm(eqx.Module):
    r"""The pseudo-Huber loss of an example as a whole, $\sqrt{m + c^2} - c$ with m the mean square of its elements.

    For a loss that takes the elements together, `losses.Consistency`. Up to a factor it is the `PseudoHuber` of one
    element, but an example has one slope, not every element its own.

    **Arguments:** `c`: where it turns linear, in units of the target.

    Source: Song & Dhariwal (2023), arXiv 2310.14189, whose $\sqrt{|e|^2 + c_d^2} - c_d$ with $c_d = c \sqrt d$ for d
    elements is this times $\sqrt d$.
    """

    c: Scalar = eqx.field(default=0.00054, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "c")

    def __call__(self, mean_square: Scalar) -> Scalar:
        """The loss of one example from the mean square of its elements, in the form that does not cancel near 0."""
        return mean_square / (jnp.sqrt(mean_square + self.c**2) + self.c)
