r"""Distributions of one training time, each by its quantile function $t = Q(u)$, increasing in u."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import check, check_positive, check_type, is_concrete, known
from .._numerics import as_scalar, beta_cdf, beta_logit_quantile, increasing_root, optional_scalar, safe_power
from .._types import PRNGKey, Scalar, ScalarLike
from ..paths import AbstractPath
from .base import (
    AN_INSTANCE,
    AbstractBoundedTimes,
    AbstractTimes,
    between,
    independent,
    place_of,
    shift_on_path,
    time_of,
)

__all__ = [
    "Beta",
    "Given",
    "LogNormal",
    "LogSNRUniform",
    "LogitNormal",
    "Mode",
    "Polynomial",
    "Shifted",
    "Stratified",
    "UShaped",
    "Uniform",
]


def _standardised(bound: Scalar, mean: Scalar, std: Scalar) -> Scalar:
    # An infinite bound stays as it is, without a derivative of inf * 0.
    infinite = jnp.isinf(bound)
    return jnp.where(infinite, bound, (jnp.where(infinite, 0, bound) - mean) / std)


def _check_mean(owner: AbstractTimes, mean: Scalar) -> None:
    if is_concrete(mean) and not math.isfinite(mean):
        raise ValueError(f"{type(owner).__name__} got mean = {float(mean):g}, but wants it finite.")


def _normal_quantile(u: Scalar, mean: Scalar, std: Scalar, lower: Scalar, upper: Scalar) -> Scalar:
    """The u-quantile of N(mean, std^2) conditioned on [lower, upper], either of them infinite."""
    lower, upper = _standardised(lower, mean, std), _standardised(upper, mean, std)
    # Mirrored into the tail where the CDF is small: there float32 keeps its relative precision.
    mirrored = upper > -lower
    low, high = jnp.where(mirrored, -upper, lower), jnp.where(mirrored, -lower, upper)
    below, above = jax.scipy.stats.norm.cdf(low), jax.scipy.stats.norm.cdf(high)
    z = jax.scipy.special.ndtri(between(below, above, jnp.where(mirrored, 1 - u, u)))
    # Bounds so far out that no mass is left in float32: all of it is at the nearer one.
    z = jnp.where(above > below, jnp.clip(z, low, high), high)
    return mean + std * jnp.where(mirrored, -z, z)


class Uniform(AbstractBoundedTimes):
    """Uniform in t between the bounds.

    **Arguments:** `t_min`, `t_max`: bounds, None for the path's ends.
    """

    t_min: Scalar | None = eqx.field(default=None, converter=optional_scalar)
    t_max: Scalar | None = eqx.field(default=None, converter=optional_scalar)

    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        return between(*self.bounds(path), as_scalar(u))


class LogitNormal(AbstractBoundedTimes):
    """Logit-normal: the place s between the path's ends is sigmoid(mean + std n), n ~ N(0, 1).

    s is mapped to t affinely from [0, 1] to [t_data, t_noise], on any path. A positive mean favours
    noise. With the opposite convention of time the same law has mean -mean.

    **Arguments:** `mean`, `std`: of logit(s); `t_min`, `t_max`: bounds, None for the path's ends.

    Source: Esser et al. (2024), arXiv 2403.03206.
    """

    mean: Scalar = eqx.field(default=0.0, converter=as_scalar)
    std: Scalar = eqx.field(default=1.0, converter=as_scalar)
    t_min: Scalar | None = eqx.field(default=None, converter=optional_scalar)
    t_max: Scalar | None = eqx.field(default=None, converter=optional_scalar)

    def __check_init__(self):
        check_positive(self, "std")
        _check_mean(self, self.mean)

    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        low, high = self.bounds(path)
        logit_low, logit_high = (jax.scipy.special.logit(place_of(path, t)) for t in (low, high))
        logit = _normal_quantile(as_scalar(u), self.mean, self.std, logit_low, logit_high)
        return jnp.clip(time_of(path, jax.nn.sigmoid(logit)), low, high)


class LogNormal(AbstractBoundedTimes):
    """EDM's distribution: ln(sigma/alpha) ~ N(mean, std^2), on any path.

    It is cut by its CDF at the bounds, or at the path's ends: on `EDM` those hold 1 - 2e-5 of it.

    **Arguments:** `mean`, `std`: of ln(sigma/alpha); `t_min`, `t_max`: bounds, None for the path's
    ends.

    Source: Karras et al. (2022), arXiv 2206.00364, which does not cut.
    """

    mean: Scalar = eqx.field(default=-1.2, converter=as_scalar)
    std: Scalar = eqx.field(default=1.2, converter=as_scalar)
    t_min: Scalar | None = eqx.field(default=None, converter=optional_scalar)
    t_max: Scalar | None = eqx.field(default=None, converter=optional_scalar)

    def __check_init__(self):
        check_positive(self, "std")
        _check_mean(self, self.mean)

    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        low, high = self.bounds(path)
        noise_low, noise_high = (-0.5 * path.log_snr(t) for t in (low, high))
        noise_level = _normal_quantile(as_scalar(u), self.mean, self.std, noise_low, noise_high)
        return jnp.clip(path.inverse_log_snr(-2 * noise_level), low, high)


class UShaped(AbstractBoundedTimes):
    """U-shaped: the place between the path's ends is s = sin^2(pi u/2), of density 1/(pi sqrt(s(1 - s))).

    **Arguments:** `t_min`, `t_max`: bounds, None for the path's ends.
    """

    t_min: Scalar | None = eqx.field(default=None, converter=optional_scalar)
    t_max: Scalar | None = eqx.field(default=None, converter=optional_scalar)

    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        low, high = self.bounds(path)
        angle_low, angle_high = (jnp.arcsin(jnp.sqrt(place_of(path, t))) for t in (low, high))
        place = jnp.sin(between(angle_low, angle_high, as_scalar(u))) ** 2
        return jnp.clip(time_of(path, place), low, high)


class LogSNRUniform(AbstractBoundedTimes):
    """Uniform in log-SNR between the bounds.

    **Arguments:** `t_min`, `t_max`: bounds, None for the path's ends; the log-SNR must be finite at
    both, so on `Linear` and `Trigonometric` both are needed.

    **Raises:** `ValueError` where the log-SNR is infinite at a bound.
    """

    t_min: Scalar | None = eqx.field(default=None, converter=optional_scalar)
    t_max: Scalar | None = eqx.field(default=None, converter=optional_scalar)

    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        low, high = self.bounds(path)
        at_low, at_high = path.log_snr(low), path.log_snr(high)
        at_low = check(
            at_low,
            ~(jnp.isfinite(at_low) & jnp.isfinite(at_high)),
            f"LogSNRUniform got an infinite log-SNR at an end of {type(path).__name__}: "
            "pass t_min and t_max inside the path, e.g. LogSNRUniform(t_min=1e-3, t_max=0.999).",
        )
        return jnp.clip(path.inverse_log_snr(between(at_low, at_high, as_scalar(u))), low, high)


class Mode(AbstractBoundedTimes):
    r"""Heavy tails with a mode: the place between the path's ends is $s = u - c\,(\sin^2(\pi u/2) - u)$.

    A positive `scale` c favours the middle, a negative one both ends, 0 is uniform.

    **Arguments:** `scale`: from -1 to 2/(pi - 2) = 1.75, between which s increases with u; `t_min`, `t_max`: bounds,
    None for the path's ends.

    Source: Esser et al. (2024), arXiv 2403.03206, whose u is 1 - u here.
    """

    scale: Scalar = eqx.field(default=1.29, converter=as_scalar)
    t_min: Scalar | None = eqx.field(default=None, converter=optional_scalar)
    t_max: Scalar | None = eqx.field(default=None, converter=optional_scalar)

    def __check_init__(self):
        # A traced value is taken as it is: there is no result here that a run-time check could guard.
        if is_concrete(self.scale) and not -1 <= float(self.scale) <= 2 / (math.pi - 2):
            raise ValueError(f"Mode got scale = {float(self.scale):g}, but wants -1 <= scale <= 2/(pi - 2) = 1.7519.")

    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        low, high = self.bounds(path)
        below, above = (self._level(place_of(path, t)) for t in (low, high))
        return jnp.clip(time_of(path, self._place(between(below, above, as_scalar(u)))), low, high)

    def _place(self, u: Scalar) -> Scalar:
        return u - self.scale * (jnp.sin(0.5 * math.pi * u) ** 2 - u)

    def _level(self, place: Scalar) -> Scalar:
        """The u with this place."""
        return increasing_root(lambda u: self._place(u) - place, jnp.zeros_like(place), jnp.ones_like(place))


class Beta(AbstractBoundedTimes):
    """The place between the path's ends is Beta(a, b).

    a < 1 favours the data's end, b < 1 the noise's; 1 and 1 is uniform.

    **Arguments:** `a`, `b`: the two exponents, positive, up to about 1000; `t_min`, `t_max`: bounds, None for the
    path's ends.
    """

    a: Scalar = eqx.field(default=1.0, converter=as_scalar)
    b: Scalar = eqx.field(default=1.5, converter=as_scalar)
    t_min: Scalar | None = eqx.field(default=None, converter=optional_scalar)
    t_max: Scalar | None = eqx.field(default=None, converter=optional_scalar)

    def __check_init__(self):
        check_positive(self, "a", "b")

    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        low, high = self.bounds(path)
        below, above = (self._level(place_of(path, t)) for t in (low, high))
        logit = beta_logit_quantile(between(below, above, as_scalar(u)), self.a, self.b)
        return jnp.clip(time_of(path, jax.nn.sigmoid(logit)), low, high)

    def _level(self, place: Scalar) -> Scalar:
        """The probability below a place."""
        # At an infinite logit there is no derivative in a and b, and short of it, for small ones, not all of the law.
        logit = jnp.clip(jax.scipy.special.logit(place), -80, 80)
        inside = beta_cdf(logit, self.a, self.b)
        return jnp.where(place <= 0, 0, jnp.where(place >= 1, 1, inside))


class Polynomial(AbstractBoundedTimes):
    """(sigma/alpha)^(1/rho) uniform between the bounds: the law of a point of the grid `grids.Karras`.

    **Arguments:** `rho`: > 0, larger ones favour the data; `t_min`, `t_max`: bounds, None for the path's ends;
    sigma/alpha must be finite at both, so on `Linear` and `Trigonometric` t_max is needed.

    **Raises:** `ValueError` where sigma/alpha is infinite at a bound.

    Source: Karras et al. (2022), arXiv 2206.00364, for the grid; Song et al. (2023), arXiv 2303.01469, for training on
    its points, of which `Given` takes a finite number.
    """

    rho: Scalar = eqx.field(default=7.0, converter=as_scalar)
    t_min: Scalar | None = eqx.field(default=None, converter=optional_scalar)
    t_max: Scalar | None = eqx.field(default=None, converter=optional_scalar)

    def __check_init__(self):
        check_positive(self, "rho")

    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        low, high = self.bounds(path)
        (alpha_low, sigma_low), (alpha_high, sigma_high) = path.coefficients(low), path.coefficients(high)
        sigma_high = check(
            sigma_high,
            ~(alpha_high > 0),
            f"Polynomial got an infinite sigma/alpha at an end of {type(path).__name__}: pass t_max inside the path, "
            "e.g. Polynomial(t_max=0.99).",
        )
        roots = safe_power(sigma_low / alpha_low, 1 / self.rho), safe_power(sigma_high / alpha_high, 1 / self.rho)
        ratio = between(*roots, as_scalar(u)) ** self.rho
        return jnp.clip(path.time_at(jnp.ones_like(ratio), ratio), low, high)


class Given(AbstractTimes):
    """The points of a list but its last, each as likely as another.

    The last is the clean end, where nothing is left to predict: what a grid steps onto. So the points of a grid are
    `Given(grids.Karras(18)(path))`.

    **Arguments:** `ts`: two or more times, from the noise down to the data.

    **Raises:** `ValueError` for too few times, or times that do not fall.
    """

    ts: Float[Array, " points"]

    def __init__(self, ts: Sequence[ScalarLike] | np.ndarray | Array):
        points = jnp.asarray(ts).astype(float)
        if points.ndim != 1 or len(points) < 2:
            raise ValueError(
                f"Given got times of shape {list(points.shape)}, but wants a vector of two or more, of which the last "
                "is the clean end."
            )
        shown = known(points)
        self.ts = check(
            points,
            ~(shown[1:] < shown[:-1]).all(),
            "Given got times that do not fall: order them from noise to data, without repeats.",
        )

    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        points = self.ts[-2::-1]
        inside = (points[0] >= as_scalar(path.t_data)) & (points[-1] <= as_scalar(path.t_noise))
        points = check(
            points, ~inside, f"Given has times outside {type(path).__name__}'s ends t_data and t_noise: leave them out."
        )
        index = jnp.floor(as_scalar(u) * len(points)).astype(int)
        return points[jnp.minimum(index, len(points) - 1)]

    def levels(self, key: PRNGKey, num: int) -> Float[Array, " {num}"]:
        """Independent uniform numbers; the first m of num are those of a batch of m."""
        return independent(key, num)


class Shifted(AbstractTimes):
    """Another distribution, its times shifted by s' = k s/(1 + (k - 1) s) between the path's ends.

    Bounds belong to the distribution inside and are shifted with it.

    **Arguments:** `times`: the distribution; `shift`: k > 0, for instance `resolution_shift(dim)`.

    Source: Esser et al. (2024), arXiv 2403.03206.
    """

    times: AbstractTimes
    shift: Scalar = eqx.field(converter=as_scalar)

    def __check_init__(self):
        check_type(self.times, AbstractTimes, "times", AN_INSTANCE)
        check_positive(self, "shift")

    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        return shift_on_path(path, self.times.quantile(path, u), self.shift)

    def levels(self, key: PRNGKey, num: int) -> Float[Array, " {num}"]:
        return self.times.levels(key, num)


class Stratified(AbstractTimes):
    """Another distribution, one time in each of the batch's num strata of equal probability, permuted.

    u_i = (pi(i) + U_i)/num with a random permutation pi: each time has the distribution inside, and
    the mean over a batch varies less. Stratification belongs to a batch: here time i depends on the
    batch's size.

    **Arguments:** `times`: the distribution.
    """

    times: AbstractTimes

    def __check_init__(self):
        check_type(self.times, AbstractTimes, "times", AN_INSTANCE)

    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        return self.times.quantile(path, u)

    def levels(self, key: PRNGKey, num: int) -> Float[Array, " {num}"]:
        key_order, key_within = jax.random.split(key)
        within = independent(key_within, num)
        order = jax.random.permutation(key_order, num).astype(within.dtype)
        # The last stratum must not round up to 1.
        return jnp.minimum((order + within) / num, 1 - 0.5 * jnp.finfo(within.dtype).eps)
