r"""Grids laid out in the time itself, $t_i = t_n + w_i (t_0 - t_n)$ with weights from 1 down to 0.

With the fraction $f_i = i/n$: $w_i = 1 - f_i$ is `Uniform`, $(1 - f_i)^p$ is `Power`, and `Beta` takes the
$(1 - f_i)$-quantile of a Beta distribution.
"""

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .._checks import check_positive
from .._numerics import as_scalar, beta_logit_quantile
from .._types import Scalar
from ..paths import AbstractPath
from .base import AbstractPathGrid, as_steps, inner_fractions, inner_rests

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
        logits = _logit_quantiles(inner_rests(steps), self.a, self.b)
        return t_start * jax.nn.sigmoid(logits) + t_end * jax.nn.sigmoid(-logits)


@jax.jit  # compiled once, also where the grid is not called under jit
def _logit_quantiles(us: Float[Array, " us"], a: Scalar, b: Scalar) -> Float[Array, " us"]:
    return jax.vmap(lambda u: beta_logit_quantile(u, a, b))(us)
