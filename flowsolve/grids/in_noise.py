r"""Grids laid out in the noise level $r = \sigma/\alpha$, so that they take the same levels on every path.

Where r is 0 or infinite at an end, a finite level stands for it: see the top of `flowsolve.grids`.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._checks import check_positive, is_concrete, known
from .._numerics import as_scalar
from .._types import Scalar
from ..paths import VP, AbstractPath
from .base import AbstractPathGrid, as_steps, inner_rests

__all__ = ["Karras", "LogSNR", "PolyExponential", "VPPower"]


def _log_ratio(path: AbstractPath, t: Scalar, singular: Bool[Array, ""], instead: Scalar) -> Scalar:
    """ln(sigma/alpha) at t, or `instead` where `singular`; its derivatives are finite there too."""
    middle = 0.5 * (as_scalar(path.t_data) + as_scalar(path.t_noise))
    return jnp.where(singular, instead, -0.5 * path.log_snr(jnp.where(singular, middle, t)))


def _end_levels(
    path: AbstractPath, t_start: Scalar, t_end: Scalar, sigma_min: Scalar, sigma_max: Scalar
) -> tuple[Scalar, Scalar, Bool[Array, ""]]:
    """ln(sigma/alpha) at both ends with infinite ones replaced, and whether the last one was, on clean data."""
    from_noise = path.coefficients(t_start)[0] == 0
    onto_data = path.coefficients(t_end)[1] == 0
    first = _log_ratio(path, t_start, from_noise, jnp.log(sigma_max))
    return first, _log_ratio(path, t_end, onto_data, jnp.log(sigma_min)), onto_data


class _AbstractLevels(AbstractPathGrid):
    """A rule for ln(sigma/alpha) between the two ends, of which infinite ones are replaced."""

    sigma_min: eqx.AbstractVar[Scalar]
    sigma_max: eqx.AbstractVar[Scalar]

    @abc.abstractmethod
    def between(self, first: Scalar, last: Scalar, rests: Array) -> Array:
        """ln(sigma/alpha) between those of the ends, where `rests` of the way are left, below 1 and down to 0."""

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        first, last, onto_data = _end_levels(path, t_start, t_end, self.sigma_min, self.sigma_max)
        # Onto clean data `last` is already reached one step before the end.
        reached = jnp.where(onto_data, max(steps - 1, 1), steps).astype(first.dtype)
        # What is left of the way: exactly 0 where `last` is reached.
        rests = (reached - jnp.arange(1, steps, dtype=float)) / reached
        levels = self.between(first, last, rests)
        return jax.vmap(lambda level: path.inverse_log_snr(-2 * level))(levels)


class Karras(_AbstractLevels):
    """EDM's grid: (sigma/alpha)^(1/rho) in equal steps; a larger rho takes smaller steps at low noise.

    r_i = [r_0^(1/rho) + i/n (r_n^(1/rho) - r_0^(1/rho))]^rho, r = sigma/alpha.

    **Arguments:** `steps`: the number of steps n; `rho`; `sigma_min`, `sigma_max`: the levels
    sigma/alpha that stand for ends of ratio 0 and infinity, see the top of `flowsolve.grids`; not used
    where the ratio is finite.

    Source: Karras et al. (2022), arXiv 2206.00364, where alpha = 1. Its sampler of n steps, with
    the last one onto sigma = 0, is `Karras(n)` with t_end = 0, or `ThenClean(Karras(n))`.
    """

    steps: int = eqx.field(static=True, converter=as_steps)
    rho: Scalar = eqx.field(default=7.0, converter=as_scalar)
    sigma_min: Scalar = eqx.field(default=0.002, converter=as_scalar)
    sigma_max: Scalar = eqx.field(default=80.0, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "rho", "sigma_min", "sigma_max")

    def between(self, first: Scalar, last: Scalar, rests: Array) -> Array:
        root_first, root_last = jnp.exp(first / self.rho), jnp.exp(last / self.rho)
        return self.rho * jnp.log(root_first * rests + root_last * (1 - rests))


class LogSNR(_AbstractLevels):
    """Equal steps in log-SNR, the grid of DPM-Solver and k-diffusion's "exponential" one.

    It is the limit of `Karras` at large rho, and `PolyExponential` at rho = 1.

    **Arguments:** `steps`: the number of steps n; `sigma_min`, `sigma_max`: the levels sigma/alpha
    that stand for ends of ratio 0 and infinity, see the top of `flowsolve.grids`; not used where the
    ratio is finite.

    Source: Lu et al. (2022), arXiv 2211.01095.
    """

    steps: int = eqx.field(static=True, converter=as_steps)
    sigma_min: Scalar = eqx.field(default=0.002, converter=as_scalar)
    sigma_max: Scalar = eqx.field(default=80.0, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "sigma_min", "sigma_max")

    def between(self, first: Scalar, last: Scalar, rests: Array) -> Array:
        return first * rests + last * (1 - rests)


class PolyExponential(_AbstractLevels):
    """A power in log-SNR: ln r_i = ln r_n + (1 - i/n)^rho (ln r_0 - ln r_n), r = sigma/alpha.

    A rho above 1 takes smaller steps at low noise; 1 is `LogSNR`.

    **Arguments:** `steps`: the number of steps n; `rho`; `sigma_min`, `sigma_max`: the levels
    sigma/alpha that stand for ends of ratio 0 and infinity, see the top of `flowsolve.grids`; not used
    where the ratio is finite.

    Source: k-diffusion's "polyexponential" schedule (Crowson, 2022, software).
    """

    steps: int = eqx.field(static=True, converter=as_steps)
    rho: Scalar = eqx.field(default=1.0, converter=as_scalar)
    sigma_min: Scalar = eqx.field(default=0.002, converter=as_scalar)
    sigma_max: Scalar = eqx.field(default=80.0, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "rho", "sigma_min", "sigma_max")

    def between(self, first: Scalar, last: Scalar, rests: Array) -> Array:
        weight = rests**self.rho
        return first * weight + last * (1 - weight)


class VPPower(AbstractPathGrid):
    r"""A power in the time tau at which `paths.VP` has the same sigma/alpha, whatever the path.

    tau_i = tau_n + (1 - i/n)^p (tau_0 - tau_n), where ln(1 + (sigma/alpha)^2) = tau beta_min +
    tau^2 (beta_max - beta_min)/2.

    tau = 0 on clean data, so that no level stands for sigma = 0; power 2 is the quadratic grid of the VP diffusion,
    power 1 its uniform one. On `VP` itself it is `Power`. Where sigma = 0, the grid does not depend on t_end to
    first order on most paths, and its derivative is taken as 0 on all.

    **Arguments:** `steps`: the number of steps n; `power`: p > 0; `beta_min`, `beta_max`: the noise schedule of that
    `VP`, 0 < beta_min <= beta_max; `sigma_max`: the level sigma/alpha that stands for a start of alpha = 0; not used
    where the ratio is finite.

    Source: Song et al. (2020), arXiv 2011.13456, for the time; Zhang & Chen (2022), arXiv 2204.13902, for powers of
    it (theirs interpolate tau^(1/p); the two agree where tau_n = 0).
    """

    steps: int = eqx.field(static=True, converter=as_steps)
    power: Scalar = eqx.field(default=2.0, converter=as_scalar)
    beta_min: Scalar = eqx.field(default=0.1, converter=as_scalar)
    beta_max: Scalar = eqx.field(default=20.0, converter=as_scalar)
    sigma_max: Scalar = eqx.field(default=80.0, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "power", "beta_min", "beta_max", "sigma_max")
        if is_concrete((self.beta_min, self.beta_max)) and known(self.beta_min) > known(self.beta_max):
            raise ValueError(
                f"VPPower got beta_min = {float(self.beta_min):g} above beta_max = {float(self.beta_max):g}, but "
                "wants a noise schedule that does not fall: swap them."
            )

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        vp = VP(self.beta_min, self.beta_max)
        # What stands for sigma = 0 here is any finite level: its time is 0 below.
        first, last, onto_data = _end_levels(path, t_start, t_end, self.sigma_max, self.sigma_max)
        tau_first = vp.inverse_log_snr(-2 * first)
        tau_last = jnp.where(onto_data, 0, vp.inverse_log_snr(-2 * last))
        weights = inner_rests(steps) ** self.power
        taus = tau_first * weights + tau_last * (1 - weights)
        return jax.vmap(lambda tau: path.inverse_log_snr(vp.log_snr(tau)))(taus)
