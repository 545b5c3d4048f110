r"""Grids laid out in the time itself, $t_i = t_n + w_i (t_0 - t_n)$ with weights from 1 down to 0.

With the fraction $f_i = i/n$: $w_i = 1 - f_i$ is `Uniform`, $(1 - f_i)^p$ is `Power`, and `Beta` takes the
$(1 - f_i)$-quantile of a Beta distribution.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._numerics import as_scalar, increasing_root
from .._types import Scalar
from ..paths import AbstractPath
from .base import AbstractPathGrid, as_steps, check_positive, inner_fractions, inner_rests

__all__ = ["Beta", "Power", "Uniform"]


class Uniform(AbstractPathGrid):
    """Equal steps in t.

    **Arguments:** `steps`: the number of steps n.
    """

    steps: int = eqx.field(static=True, converter=as_steps)

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        del path
        fractions = inner_fractions(steps)
        return t_start * (1 - fractions) + t_end * fractions


class Power(AbstractPathGrid):
    """Steps that shrink toward the data: t_i = t_end + (1 - i/n)^p (t_start - t_end).

    **Arguments:** `steps`: the number of steps n; `power`: p > 0, 1 is uniform.
    """

    steps: int = eqx.field(static=True, converter=as_steps)
    power: Scalar = eqx.field(default=2.0, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "power")

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        del path
        weights = inner_rests(steps) ** self.power
        return t_start * weights + t_end * (1 - weights)


class Beta(AbstractPathGrid):
    """Small steps at both ends: t_i = t_end + Q(1 - i/n) (t_start - t_end), Q the quantiles of Beta(a, b).

    With a, b < 1 the times are dense at both ends, the data's (a) and the noise's (b); 1 and 1 is uniform, and
    `Beta(n, 1/p, 1)` is `Power(n, p)`.

    **Arguments:** `steps`: the number of steps n; `a`, `b`: the two exponents of the distribution, positive, up to
    about 1000. A new value does not retrace.

    Source: Lee et al. (2024), arXiv 2407.12173, for integer timesteps. Deviation: the times are not rounded, so that
    none is repeated.
    """

    steps: int = eqx.field(static=True, converter=as_steps)
    a: Scalar = eqx.field(default=0.6, converter=as_scalar)
    b: Scalar = eqx.field(default=0.6, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "a", "b")

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        del path
        # A quantile as its logit keeps its digits near 0 and near 1.
        logits = _beta_logit_quantiles(inner_rests(steps), self.a, self.b)
        return t_start * jax.nn.sigmoid(logits) + t_end * jax.nn.sigmoid(-logits)


@jax.jit  # compiled once, also where the grid is not called under jit
def _beta_logit_quantiles(us: Float[Array, " us"], a: Scalar, b: Scalar) -> Float[Array, " us"]:
    """ln(x/(1 - x)) of the quantiles x of Beta(a, b) at probabilities 0 < u < 1."""
    # Beyond e^-80 a quantile is 0 or 1 in float32, also after multiplication by a time.
    limit = jnp.asarray(80, a.dtype)
    log_beta = jax.scipy.special.betaln(a, b)

    def quantile(u: Scalar) -> Scalar:
        return increasing_root(lambda logit: _beta_cdf(logit, a, b, log_beta) - u, -limit, limit)

    return jax.vmap(quantile)(us)


def _beta_cdf(logit: Scalar, a: Scalar, b: Scalar, log_beta: Scalar) -> Scalar:
    """The probability of Beta(a, b) below x = sigmoid(logit), with log_beta = ln B(a, b).

    The regularised incomplete beta function by its continued fraction (DLMF 8.17.22), differentiable in a and b, which
    JAX's `betainc` is not. Cut after 64 terms, which in float64 leaves 1e-13 of it for a, b up to 100 and 1e-7 up to
    1000.
    """
    # The fraction converges fast below the mean, roughly; above it, the probability of 1 - x under Beta(b, a).
    above = jax.nn.sigmoid(logit) > (a + 1) / (a + b + 2)
    a, b = jnp.where(above, b, a), jnp.where(above, a, b)
    logit = jnp.where(above, -logit, logit)
    x = jax.nn.sigmoid(logit)
    m = jnp.asarray(np.arange(32), x.dtype)
    odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
    m = m + 1
    even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))

    def append(tail: Scalar, terms: tuple[Scalar, Scalar]) -> tuple[Scalar, None]:
        return 1 + terms[0] / (1 + terms[1] / tail), None

    fraction, _ = jax.lax.scan(append, jnp.ones_like(x), (odd, even), reverse=True)
    log_power = a * jax.nn.log_sigmoid(logit) + b * jax.nn.log_sigmoid(-logit)
    tail = jnp.exp(log_power - log_beta) / (a * fraction)
    return jnp.where(above, 1 - tail, tail)
