r"""Distances that are means over pairs: the maximum mean discrepancy of a kernel, and the energy distance.

$$\mathrm{MMD}^2 = \frac{\sum_{i \ne j} k(x_i, x_j)}{n (n-1)} + \frac{\sum_{i \ne j} k(y_i, y_j)}{m (m-1)}
  - \frac{2 \sum_{i, j} k(x_i, y_j)}{n m}$$

The energy distance is that of $k(x, y) = -\lvert x - y\rvert$.
"""

import abc
import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from .._checks import check_count, check_type, is_concrete
from .._numerics import safe_sqrt, squared_distances
from .._types import Scalar
from ._rows import Batch, Rows, over_rows, rows_of

__all__ = ["AbstractKernel", "Gaussian", "Polynomial", "energy_distance", "kernel_mmd", "median_distance"]


class AbstractKernel(eqx.Module):
    """A positive definite function of two feature vectors."""

    @abc.abstractmethod
    def row(self, x: Float[Array, " dim"], others: Float[Array, "num dim"]) -> Float[Array, " num"]:
        """k(x, y) for every row y of `others`."""


def _as_bandwidths(value: ArrayLike | Sequence[float]) -> Float[Array, "..."]:
    return jnp.asarray(value, float)


class Gaussian(AbstractKernel):
    r"""$k(x, y) = \sum_h \exp(-\lvert x - y\rvert^2/(2 h^2))$.

    **Arguments:** `bandwidth`: h > 0, in units of the features, e.g. `median_distance(a, b)`; or several, of which the
    kernels are summed.

    Source: Gretton et al. (2012), JMLR 13, 723-773; Li, Swersky & Zemel (2015), arXiv 1502.02761 (the sum).
    """

    bandwidth: Float[Array, ""] | Float[Array, " kinds"] = eqx.field(converter=_as_bandwidths)

    def __check_init__(self):
        given = self.bandwidth
        if given.ndim > 1 or not given.size:
            raise ValueError(f"Gaussian got bandwidth of shape {given.shape}, but wants a number or a list of them.")
        if is_concrete(given) and not np.all((np.asarray(given) > 0) & np.isfinite(given)):
            raise ValueError(f"Gaussian got bandwidth = {np.asarray(given)}, but wants it positive and finite.")

    def row(self, x: Float[Array, " dim"], others: Float[Array, "num dim"]) -> Float[Array, " num"]:
        squares = squared_distances(x, others)
        precisions = jnp.atleast_1d(self.bandwidth.astype(squares.dtype)) ** -2
        return jnp.sum(jnp.exp(-squares[None, :] * precisions[:, None] / 2), axis=0)


class Polynomial(AbstractKernel):
    r"""$k(x, y) = (x \cdot y/d + 1)^p$ for features of d numbers.

    With the degree p = 3 on Inception features its MMD is the kernel Inception distance (KID).

    **Arguments:** `degree`: p, at least 1.

    Source: Binkowski et al. (2018), arXiv 1801.01401.
    """

    degree: int = eqx.field(static=True, default=3)

    def __check_init__(self):
        check_count(self.degree, "Polynomial got degree")

    def row(self, x: Float[Array, " dim"], others: Float[Array, "num dim"]) -> Float[Array, " num"]:
        product = jnp.matmul(others, x, precision=jax.lax.Precision.HIGHEST)
        return (product / x.size + 1) ** self.degree


class _MinusDistance(AbstractKernel):
    def row(self, x: Float[Array, " dim"], others: Float[Array, "num dim"]) -> Float[Array, " num"]:
        return -jax.vmap(safe_sqrt)(squared_distances(x, others))


def kernel_mmd(a: Batch, b: Batch, *, kernel: AbstractKernel, block: int = 512) -> Scalar:
    """The squared maximum mean discrepancy of a kernel, without bias; see the top of this module.

    **Arguments:** `a`, `b`: batches of at least two examples each; `kernel`: `Gaussian(median_distance(a, b))`,
    `Polynomial()` or one's own; `block`: rows at a time, of either batch, against all others.

    **Returns:** a scalar, negative as often as not where both laws are one.

    **Raises:** `ValueError` for batches that do not go together or numbers that are not finite; `TypeError` for what is
    no kernel.

    Source: Gretton et al. (2012), JMLR 13, 723-773, lemma 6. Deviation: KID is published as a mean over subsets of 1000
    examples, to the same expectation with more variance; here all pairs are taken.
    """
    check_type(kernel, AbstractKernel, "kernel", "an instance, such as metrics.Polynomial()")
    block = check_count(block, "kernel_mmd got block")
    return _discrepancy(kernel, *rows_of(a, b, "kernel_mmd", least=2), block)


def energy_distance(a: Batch, b: Batch, *, block: int = 512) -> Scalar:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, without bias; |.| is the Euclidean norm.

    **Arguments:** `a`, `b`: batches of at least two examples each; `block`: rows at a time, of either batch.

    **Returns:** a scalar in units of the features, negative as often as not where both laws are one. (SciPy's, in one
    dimension, is the root of the biased one.)

    **Raises:** `ValueError` for batches that do not go together or numbers that are not finite.

    Source: Szekely & Rizzo (2013), J. Stat. Plan. Inference 143, 1249-1272.
    """
    block = check_count(block, "energy_distance got block")
    return _discrepancy(_MinusDistance(), *rows_of(a, b, "energy_distance", least=2), block)


@eqx.filter_jit
def _discrepancy(kernel: AbstractKernel, a: Rows, b: Rows, block: int) -> Scalar:
    between = jnp.mean(over_rows(lambda x: jnp.mean(kernel.row(x, b)), a, block))
    return _within(kernel, a, block) + _within(kernel, b, block) - 2 * between


def _within(kernel: AbstractKernel, rows: Rows, block: int) -> Scalar:
    """The mean of the kernel over pairs of different rows."""
    num = rows.shape[0]
    places = jnp.arange(num)

    def one(row: tuple[Array, Array]) -> Scalar:
        place, x = row
        return jnp.sum(jnp.where(places == place, 0, kernel.row(x, rows))) / (num - 1)

    return jnp.mean(over_rows(one, (places, rows), block))


def median_distance(a: Batch, b: Batch, *, examples: int = 1000) -> Scalar:
    """The median of the distances between the examples of both batches together, a bandwidth for `Gaussian`.

    **Arguments:** `a`, `b`: batches; `examples`: of more than so many, only so many are taken from each, at equal
    spacing.

    **Returns:** a scalar in units of the features.

    **Raises:** `ValueError` for batches that do not go together or numbers that are not finite.

    Source: Gretton et al. (2012), JMLR 13, 723-773.
    """
    examples = check_count(examples, "median_distance got examples")
    rows = rows_of(a, b, "median_distance")
    return _median(jnp.concatenate([some[:: math.ceil(some.shape[0] / examples)] for some in rows]))


@eqx.filter_jit
def _median(rows: Rows) -> Scalar:
    num = rows.shape[0]
    squares = over_rows(lambda x: squared_distances(x, rows), rows, num)
    return jnp.median(
        jnp.sqrt(squares[jnp.asarray(np.triu_indices(num, 1)[0]), jnp.asarray(np.triu_indices(num, 1)[1])])
    )
