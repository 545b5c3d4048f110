r"""Loss weights over time, each stated once, on the data loss: $w(t)\, |D - x_0|^2$.

With $\mathrm{SNR} = \alpha^2/\sigma^2$:

| weight | w on the data loss | on the noise loss, w/SNR |
|---|---|---|
| `Uniform` | 1 | 1/SNR |
| `SNR` | SNR | 1 |
| `TruncatedSNR` | max(SNR, 1) | max(1, 1/SNR) |
| `MinSNR` | min(SNR, gamma) | min(1, gamma/SNR) |
| `Sigmoid` | SNR/(1 + e^-bias SNR) | sigmoid(bias - ln SNR) |
| `P2` | SNR/(k + SNR)^gamma | 1/(k + SNR)^gamma |
| `EDM` | SNR + 1/data_std^2 | 1 + 1/(data_std^2 SNR) |
| `Weight` | the user's | w/SNR |

A loss in another prediction converts the weight, so that it is the same number whatever the network predicts: in
[v](predictions.md) for instance w becomes w/(SNR + 1), where $\alpha^2 + \sigma^2 = 1$.

A weight is given by the combination $(a x_0 + b \epsilon)/c$ whose plain squared error is the weighted data loss,

$$w = \left(\frac{a\sigma - b\alpha}{c\,\sigma}\right)^2 ,$$

because a, b and c are finite at both ends of a path, where w itself often is not.
"""

import abc
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp

from ._checks import check_positive
from ._numerics import as_scalar, safe_power
from ._types import Scalar, ScalarLike
from .paths import AbstractPath
from .predictions import Triple, error_scale

__all__ = ["EDM", "P2", "SNR", "AbstractWeight", "MinSNR", "Sigmoid", "TruncatedSNR", "Uniform", "Weight"]


class AbstractWeight(eqx.Module):
    """A weight w(t) of a loss over time, stated on the loss of the data."""

    @abc.abstractmethod
    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        """(a, b, c) at time t of the combination whose plain squared error is the weighted data loss."""

    def __call__(self, path: AbstractPath, t: ScalarLike) -> Scalar:
        """w(t) on the data loss, a scalar; infinite where it is."""
        t = as_scalar(t)
        return error_scale(path, t, (jnp.ones_like(t), jnp.zeros_like(t)), self.coefficients(path, t)) ** 2


class Weight(AbstractWeight):
    """The user's weight on the data loss.

    **Arguments:** `function`: (path, t) -> w, a scalar >= 0. Where it is negative the loss is NaN.
    """

    function: Callable[[AbstractPath, Scalar], Scalar]

    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        root = jnp.sqrt(as_scalar(self.function(path, t)))
        return root, jnp.zeros_like(t), jnp.ones_like(t)


class Uniform(AbstractWeight):
    """w = 1: the plain loss of the data at every time."""

    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        del path
        return jnp.ones_like(t), jnp.zeros_like(t), jnp.ones_like(t)


class SNR(AbstractWeight):
    """w = SNR: the plain loss of the noise, and the score loss weighted by sigma^2.

    Source: Song et al. (2020), arXiv 2011.13456; Ho, Jain & Abbeel (2020), arXiv 2006.11239.
    """

    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        del path
        return jnp.zeros_like(t), jnp.ones_like(t), jnp.ones_like(t)


class TruncatedSNR(AbstractWeight):
    """w = max(SNR, 1): the larger of the data's and the noise's plain losses.

    Source: Salimans & Ho (2022), arXiv 2202.00512.
    """

    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        alpha, sigma = path.coefficients(t)
        noise = (alpha > sigma).astype(t.dtype)
        return 1 - noise, noise, jnp.ones_like(t)


class MinSNR(AbstractWeight):
    """w = min(SNR, gamma): the plain loss of the noise, but bounded on the data near it.

    **Arguments:** `gamma`: > 0.

    Source: Hang et al. (2023), arXiv 2303.09556: on the noise loss min(SNR, gamma)/SNR, on that of v
    min(SNR, gamma)/(SNR + 1).
    """

    gamma: Scalar = eqx.field(default=5.0, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "gamma")

    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        alpha, sigma = path.coefficients(t)
        root = jnp.sqrt(self.gamma)
        noise = (alpha <= root * sigma).astype(t.dtype)
        return (1 - noise) * root, noise, jnp.ones_like(t)


class Sigmoid(AbstractWeight):
    """w = SNR/(1 + e^-bias SNR): on the noise loss sigmoid(bias - log-SNR).

    Soft-min-SNR, a smooth bound like `MinSNR`, is the same weight with bias = ln gamma: w = gamma SNR/(gamma + SNR).

    **Arguments:** `bias`: the log-SNR at which the weight on the noise loss is 1/2.

    Source: Kingma & Gao (2023), arXiv 2303.00848; Crowson et al. (2024), arXiv 2401.11605 (soft-min-SNR).
    """

    bias: Scalar = eqx.field(default=2.0, converter=as_scalar)

    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        alpha, sigma = path.coefficients(t)
        norm = jnp.sqrt(sigma**2 + jnp.exp(-self.bias) * alpha**2)
        # Of the two forms of the same number the one that is finite at its end.
        noise = alpha <= sigma
        return jnp.where(noise, 0, alpha), jnp.where(noise, sigma, 0), norm


class P2(AbstractWeight):
    """w = SNR/(k + SNR)^gamma: the plain loss of the noise, damped where little noise is.

    **Arguments:** `k`, `gamma`: both > 0.

    Source: Choi et al. (2022), arXiv 2204.00227, where k = 1 and gamma is 0.5 or 1.
    """

    k: Scalar = eqx.field(default=1.0, converter=as_scalar)
    gamma: Scalar = eqx.field(default=1.0, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "k", "gamma")

    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        alpha, sigma = path.coefficients(t)
        variance = self.k * sigma**2 + alpha**2
        # On the noise (sigma^2/variance)^gamma, on the data alpha^2 sigma^(2 gamma - 2)/variance^gamma: at sigma = 0
        # this is infinite for gamma < 1, where the form for the noise, not quite 0 there, says so.
        on_noise = jnp.maximum(safe_power(sigma**2 / variance, self.gamma / 2), jnp.finfo(t.dtype).tiny)
        on_data = alpha * safe_power(sigma, jnp.maximum(self.gamma - 1, 0)) / safe_power(variance, self.gamma / 2)
        data = (alpha > sigma) & (self.gamma >= 1)
        return jnp.where(data, on_data, 0), jnp.where(data, 0, on_noise), jnp.ones_like(t)


class EDM(AbstractWeight):
    r"""EDM's weight on any path: w = (r^2 + s^2)/(r s)^2 with r = sigma/alpha and s = `data_std`.

    It is 1/c_out^2 of `EDMPreconditioner` at the same s, so that the network's own loss is
    unweighted and its target $(\sigma x_0 - \alpha s^2 \epsilon)/(s \sqrt{\sigma^2 + \alpha^2
    s^2})$ has unit variance at every t.

    **Arguments:** `data_std`: standard deviation of the data's elements, the preconditioner's.

    Source: Karras et al. (2022), arXiv 2206.00364, where alpha = 1.
    """

    data_std: Scalar = eqx.field(default=0.5, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "data_std")

    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        alpha, sigma = path.coefficients(t)
        norm = self.data_std * jnp.sqrt(sigma**2 + (alpha * self.data_std) ** 2)
        return sigma, -alpha * self.data_std**2, norm
