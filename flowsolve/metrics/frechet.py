r"""The Frechet distance between the Gaussians that have the means and covariances of two sets of features.

$$d^2 = \lvert m_a - m_b\rvert^2 + \mathrm{tr}\,(C_a + C_b - 2 (C_a C_b)^{1/2})$$

With factors $C_a = A^\top A$, $C_b = B^\top B$ the trace is $\min_Q \lvert A - Q B\rvert^2$ over orthogonal Q
(Frobenius norm), whose minimiser is $Q = V U^\top$ of the singular value decomposition $B A^\top = U S V^\top$. In
this form nothing cancels, and no square root of a singular matrix is taken.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .._checks import check, check_type
from .._types import Scalar
from ._rows import Batch, Rows, as_rows

__all__ = ["Moments", "frechet_distance"]


class Moments(eqx.Module):
    r"""Number, mean and scatter of examples, of which batch after batch can be taken in.

        moments = fs.metrics.Moments.of(features(first))
        for batch in others:
            moments = moments.update(features(batch))

    The scatter is kept as a square factor, $F^\top F = \sum_i (x_i - m)(x_i - m)^\top$: squaring numbers halves the
    digits that are left of small variances, and of a covariance in float32 the roots of those that vanish would be
    3e-4 of the largest, hundreds of times over. Batches join by

    $$F^\top F = F_a^\top F_a + F_b^\top F_b + \frac{n_a n_b}{n_a + n_b} (m_a - m_b)(m_a - m_b)^\top.$$

    **Fields:** `count`: n, an int32 scalar; `mean`: m; `factor`: F, up to an orthogonal factor on its left.

    Source: Chan, Golub & LeVeque (1983), Am. Stat. 37, 242-247 (the joining).
    """

    count: Int[Array, ""]
    mean: Float[Array, " dim"]
    factor: Float[Array, "dim dim"]

    @classmethod
    def of(cls, batch: Batch) -> "Moments":
        """Those of one batch, of any number of examples.

        **Raises:** `ValueError` for numbers that are not finite.
        """
        return _moments(as_rows(batch, "Moments"))

    def merge(self, other: "Moments") -> "Moments":
        """Those of the examples of both together.

        **Raises:** `ValueError` for another number of features.
        """
        check_type(other, Moments, "other", "metrics.Moments: Moments.of(features)")
        _check_same_size("merge", self.mean.size, other.mean.size)
        return _joined(self, other.count, other.mean, other.factor)

    def update(self, batch: Batch) -> "Moments":
        """Those with the examples of a batch added.

        That takes (n + d) d^2 operations for n examples of d numbers: take in d or more at a time.

        **Raises:** `ValueError` for another number of features, or numbers that are not finite.
        """
        rows = as_rows(batch, "Moments")
        _check_same_size("update", self.mean.size, rows.shape[1])
        return _updated(self, rows)

    @property
    def covariance(self) -> Float[Array, "dim dim"]:
        """The unbiased covariance, F^T F/(n - 1)."""
        root = _root(self)
        return _product(root.T, root)


def frechet_distance(a: Moments, b: Moments) -> Scalar:
    """The squared Frechet distance: FID, for features of Inception.

        frechet_distance(Moments.of(features_a), Moments.of(features_b))

    It grows as the examples become fewer, by about 1/n: compare values at the same number of examples only.

    **Arguments:** `a`, `b`: moments of at least two examples each.

    **Returns:** a scalar >= 0, in squared units of the features. Its first derivatives in the features are right,
    higher ones are not.

    **Raises:** `ValueError` for features of different sizes, or a single example; `TypeError` for what are no moments.

    Source: Dowson & Landau (1982), J. Multivar. Anal. 12, 450-455; Heusel et al. (2017), arXiv 1706.08500; Bhatia, Jain
    & Lim (2019), arXiv 1712.01504 (the minimum over rotations).
    """
    for moments in (a, b):
        check_type(moments, Moments, "An argument", "metrics.Moments: Moments.of(features)")
    _check_same_size("frechet_distance", a.mean.size, b.mean.size)
    few = (a.count < 2) | (b.count < 2)
    a = check(a, few, "frechet_distance got moments of a single example, which has no covariance: take in more.")
    return _distance(a, b)


def _check_same_size(who: str, size_a: int, size_b: int) -> None:
    if size_a != size_b:
        raise ValueError(f"{who} got {size_a} and {size_b} features, but wants as many of both.")


@jax.jit
def _moments(rows: Rows) -> Moments:
    count, mean, centred = _centred(rows)
    return Moments(count, mean, _compressed(centred))


@jax.jit
def _updated(moments: Moments, rows: Rows) -> Moments:
    return _joined(moments, *_centred(rows))


def _centred(rows: Rows) -> tuple[Int[Array, ""], Float[Array, " dim"], Rows]:
    """The number of rows, their mean, and the rows about it."""
    mean = jnp.mean(rows, axis=0)
    centred = rows - mean[None]
    # What rounding left in the mean of many rows.
    rest = jnp.mean(centred, axis=0)
    return jnp.asarray(rows.shape[0], jnp.int32), mean + rest, centred - rest[None]


@jax.jit
def _joined(moments: Moments, count: Int[Array, ""], mean: Float[Array, " dim"], centred: Rows) -> Moments:
    """With others, whose rows about their mean, or the factor of whose scatter, are `centred`."""
    before, more = moments.count.astype(mean.dtype), count.astype(mean.dtype)
    share = more / (before + more)
    apart = mean - moments.mean
    rows = jnp.concatenate([moments.factor, centred, (jnp.sqrt(before * share) * apart)[None]])
    return Moments(moments.count + count, moments.mean + share * apart, _compressed(rows))


def _compressed(rows: Rows) -> Float[Array, "dim dim"]:
    """F with F^T F = X^T X."""
    num, dim = rows.shape
    if num > dim:
        # X = Q R with R = Q^T X. Of X^T X the derivative is right with Q held fixed, also where R is singular, and then
        # that of a QR decomposition does not exist.
        q, _ = jnp.linalg.qr(jax.lax.stop_gradient(rows))
        return _product(q.T, rows)
    return jnp.concatenate([rows, jnp.zeros((dim - num, dim), rows.dtype)])


@jax.jit
def _distance(a: Moments, b: Moments) -> Scalar:
    root_a, root_b = _root(a), _root(b)
    # At a minimum its derivative in Q vanishes.
    u, _, v_transposed = jnp.linalg.svd(jax.lax.stop_gradient(_product(root_b, root_a.T)))
    turned = _product(_product(v_transposed.T, u.T), root_b)
    return jnp.sum((a.mean - b.mean) ** 2) + jnp.sum((root_a - turned) ** 2)


def _root(moments: Moments) -> Float[Array, "dim dim"]:
    """A with A^T A the covariance."""
    return moments.factor / jnp.sqrt((moments.count - 1).astype(moments.factor.dtype))


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
