r"""Training-time distributions: which times t a loss is evaluated at.

Data lives at small t, noise at large t. A distribution is its quantile function on a path,

$$t = Q(u), \qquad u \sim U(0, 1)$$

increasing in u, so that independent times and stratified ones ($u_i = (i + U_i)/B$, permuted) are
the same mechanism with other numbers u. Two coordinates are used:

- the place $s = (t - t_\mathrm{data})/(t_\mathrm{noise} - t_\mathrm{data})$ between the path's
  ends;
- the noise level $\ln(\sigma/\alpha)$, which is minus half the log-SNR.

`t_min` and `t_max` bound a distribution: it is conditioned on $t \in [t_\mathrm{min},
t_\mathrm{max}]$ (its quantile function is cut by its CDF). None means the path's own end.

The time shift $s' = k s/(1 + (k - 1) s)$ is written once, here, for training times (`Shifted`) and
for inference grids (`flowsolve.grids.Shifted`). All parameters are arrays: a new value does not
retrace.
"""

import abc
import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._checks import check, check_count, check_key, check_positive, check_type, is_concrete, known
from ._numerics import as_scalar, beta_cdf, beta_logit_quantile, increasing_root, optional_scalar, safe_power
from ._types import PRNGKey, Scalar, ScalarLike
from .paths import AbstractPath

__all__ = [
    "AbstractBoundedTimes",
    "AbstractTimePairs",
    "AbstractTimes",
    "Beta",
    "DyadicPairs",
    "Given",
    "LogNormal",
    "LogSNRUniform",
    "LogitNormal",
    "Mode",
    "Polynomial",
    "Shifted",
    "Stratified",
    "TimePairs",
    "UShaped",
    "Uniform",
    "resolution_shift",
    "shift_on_path",
    "shift_time",
]


def shift_time(s: ScalarLike, shift: ScalarLike) -> Scalar:
    """The time shift k s/(1 + (k - 1) s) on [0, 1]; k > 1 moves times toward the noise.

    On `Linear` it multiplies sigma/alpha by k. It keeps 0 and 1, and `shift_time(., 1/k)` undoes
    it.

    **Arguments:** `s`: the place between data (0) and noise (1); `shift`: k > 0.

    **Returns:** the shifted place, a scalar.

    Source: Esser et al. (2024), arXiv 2403.03206.
    """
    s, shift = as_scalar(s), as_scalar(shift)
    # 1 + (k - 1) s in the form that is exact at s = 1 and does not cancel for k < 1.
    return shift * s / ((1 - s) + shift * s)


def shift_on_path(path: AbstractPath, t: ScalarLike, shift: ScalarLike) -> Scalar:
    """`shift_time` of a time of `path`, whose ends stand for 0 and 1."""
    return _time_of(path, shift_time(_place_of(path, as_scalar(t)), shift))


def resolution_shift(dim: int, base: int = 4096) -> float:
    """The shift k = sqrt(dim/base) for examples of `dim` elements, 1 at `base` elements.

    Source: Esser et al. (2024), arXiv 2403.03206.
    """
    if not (dim > 0 and base > 0):
        raise ValueError(f"resolution_shift got dim = {dim} and base = {base}, but wants both positive.")
    return math.sqrt(dim / base)


_AN_INSTANCE = "an instance such as times.Uniform()"


class AbstractTimes(eqx.Module):
    """A distribution of training times, given by its quantile function."""

    @abc.abstractmethod
    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        """The time with probability u below it: increasing in u, finite on the closed [0, 1]."""

    @abc.abstractmethod
    def levels(self, key: PRNGKey, num: int) -> Float[Array, " {num}"]:
        """The numbers u in (0, 1) of a batch, each uniform; how they depend on each other is the point."""

    def sample(self, path: AbstractPath, key: PRNGKey, num: int) -> Float[Array, " {num}"]:
        """The times of a batch of `num` examples, float32 (float64 under x64).

        **Arguments:** `path`: the path; `key`: one typed key; `num`: the size of the batch, static.

        **Raises:** `ValueError` or `TypeError` for a missing or wrong key, a size below 1, and for bounds outside
        the path.
        """
        key = check_key(key, "a draw of training times")
        num = check_count(num, "sample of training times got num")
        return jax.vmap(lambda u: self.quantile(path, u))(self.levels(key, num))


class AbstractBoundedTimes(AbstractTimes):
    """Times drawn independently, between bounds: time i of a batch depends on key and i alone."""

    t_min: eqx.AbstractVar[Scalar | None]
    t_max: eqx.AbstractVar[Scalar | None]

    def levels(self, key: PRNGKey, num: int) -> Float[Array, " {num}"]:
        """Independent uniform numbers; the first m of num are those of a batch of m."""
        return _independent(key, num)

    def bounds(self, path: AbstractPath) -> tuple[Scalar, Scalar]:
        """(t_min, t_max), with the path's ends where they are None."""
        low = as_scalar(path.t_data if self.t_min is None else self.t_min)
        high = as_scalar(path.t_noise if self.t_max is None else self.t_max)
        if self.t_min is None and self.t_max is None:
            return low, high
        ordered = (as_scalar(path.t_data) <= low) & (low < high) & (high <= as_scalar(path.t_noise))
        return check(
            (low, high),
            ~ordered,
            f"{type(self).__name__} got bounds that are not t_data <= t_min < t_max <= t_noise on "
            f"{type(path).__name__}: choose them between the path's ends.",
        )


class AbstractTimePairs(eqx.Module):
    """A law of two times of each example, t >= r, for losses of flow maps and consistency."""

    @abc.abstractmethod
    def sample(
        self, path: AbstractPath, key: PRNGKey, num: int
    ) -> tuple[Float[Array, " {num}"], Float[Array, " {num}"]]:
        """(t, r) of a batch of `num` examples; arguments and errors as in `AbstractTimes.sample`."""


class TimePairs(AbstractTimePairs):
    """Two times of each example, t >= r: the larger and the smaller of one draw from each of two distributions.

    **Arguments:**

    - `first`, `second`: the distributions; `second` is the first again by default;
    - `equal`: the probability of r = t, from 0 to 1. 0.75 by default, as in MeanFlow.

    Each example is drawn for by itself, so that pair i depends on the key and i alone, unless a distribution is
    stratified.

    **Raises:** `TypeError` for what is no distribution, `ValueError` for a probability outside of [0, 1].

    Source: Geng et al. (2025), arXiv 2505.13447. Deviation: where r = t, it is the first draw, not the larger of both.
    """

    first: AbstractTimes
    second: AbstractTimes
    equal: Scalar

    def __init__(self, first: AbstractTimes, second: AbstractTimes | None = None, *, equal: ScalarLike = 0.75):
        check_type(first, AbstractTimes, "first", _AN_INSTANCE)
        self.first = first
        self.second = first if second is None else second
        check_type(self.second, AbstractTimes, "second", _AN_INSTANCE)
        self.equal = _as_probability(equal, "TimePairs got equal")

    def sample(
        self, path: AbstractPath, key: PRNGKey, num: int
    ) -> tuple[Float[Array, " {num}"], Float[Array, " {num}"]]:
        key = check_key(key, "a draw of training times")
        # The first distribution's own key: its times are those that a loss of one time draws.
        one = self.first.sample(path, key, num)
        other = self.second.sample(path, jax.random.fold_in(key, 1), num)
        key_equal = jax.random.fold_in(key, 2)
        same = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key_equal, i), self.equal))(jnp.arange(num))
        # Where they are equal, both are the first: its own law, not that of the larger of two.
        return jnp.where(same, one, jnp.maximum(one, other)), jnp.where(same, one, jnp.minimum(one, other))


class DyadicPairs(AbstractTimePairs):
    r"""Intervals [r, t] of 2/steps, 4/steps, ..., 1 of the path, each on the grid of its own length.

    The length is $2^{-k}$ with k uniform from 0 to log2(steps) - 1, and the interval one of the $2^k$ that make up the
    path, each as likely as another. With the probability `equal`, r = t instead, drawn from `times`.

    **Arguments:** `steps`: a power of 2, static, 128 by default; `times`: the distribution of t where r = t; `equal`:
    the probability of that, 0.75 by default.

    **Raises:** `ValueError` for a number of steps that is no power of 2 above 1, a probability outside of [0, 1].

    Source: Frans et al. (2024), arXiv 2410.12557.
    """

    steps: int = eqx.field(static=True)
    times: AbstractTimes
    equal: Scalar

    def __init__(self, steps: int = 128, times: AbstractTimes | None = None, *, equal: ScalarLike = 0.75):
        self.steps = check_count(steps, "DyadicPairs got steps", least=2)
        if self.steps & (self.steps - 1):
            raise ValueError(f"DyadicPairs got steps = {steps}, but wants a power of 2 such as 128.")
        self.times = Uniform() if times is None else times
        check_type(self.times, AbstractTimes, "times", _AN_INSTANCE)
        self.equal = _as_probability(equal, "DyadicPairs got equal")

    def sample(
        self, path: AbstractPath, key: PRNGKey, num: int
    ) -> tuple[Float[Array, " {num}"], Float[Array, " {num}"]]:
        key = check_key(key, "a draw of training times")
        velocity_times = self.times.sample(path, key, num)

        def pair(i: Array, t: Scalar) -> tuple[Scalar, Scalar]:
            key_same, key_length, key_place = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), i), 3)
            same = jax.random.bernoulli(key_same, self.equal)
            count = 2 ** jax.random.randint(key_length, (), 0, self.steps.bit_length() - 1)
            place = jax.random.randint(key_place, (), 0, count).astype(t.dtype)
            low, high = (_time_of(path, end / count.astype(t.dtype)) for end in (place, place + 1))
            return jnp.where(same, t, high), jnp.where(same, t, low)

        return jax.vmap(pair)(jnp.arange(num), velocity_times)


def _as_probability(value: ScalarLike, what: str) -> Scalar:
    probability = as_scalar(value)
    chance = known(probability)
    bad = ~((chance >= 0) & (chance <= 1))
    return check(probability, bad, f"{what} = {{}}, but wants a probability from 0 to 1.", probability)


def _independent(key: PRNGKey, num: int) -> Float[Array, " {num}"]:
    def draw(i: Array) -> Scalar:
        u = jax.random.uniform(jax.random.fold_in(key, i), dtype=float)
        # From the multiples of eps in [0, 1) to the midpoints between them: never 0, never 1.
        return u + 0.5 * jnp.finfo(u.dtype).eps

    return jax.vmap(draw)(jnp.arange(num))


def _between(low: Scalar, high: Scalar, fraction: Scalar) -> Scalar:
    """From `low` at 0 to `high` at 1, exact at both."""
    return low * (1 - fraction) + high * fraction


def _place_of(path: AbstractPath, t: Scalar) -> Scalar:
    t_data, t_noise = as_scalar(path.t_data), as_scalar(path.t_noise)
    return (t - t_data) / (t_noise - t_data)


def _time_of(path: AbstractPath, place: Scalar) -> Scalar:
    return _between(as_scalar(path.t_data), as_scalar(path.t_noise), place)


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
    z = jax.scipy.special.ndtri(_between(below, above, jnp.where(mirrored, 1 - u, u)))
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
        return _between(*self.bounds(path), as_scalar(u))


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
        logit_low, logit_high = (jax.scipy.special.logit(_place_of(path, t)) for t in (low, high))
        logit = _normal_quantile(as_scalar(u), self.mean, self.std, logit_low, logit_high)
        return jnp.clip(_time_of(path, jax.nn.sigmoid(logit)), low, high)


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
        angle_low, angle_high = (jnp.arcsin(jnp.sqrt(_place_of(path, t))) for t in (low, high))
        place = jnp.sin(_between(angle_low, angle_high, as_scalar(u))) ** 2
        return jnp.clip(_time_of(path, place), low, high)


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
        return jnp.clip(path.inverse_log_snr(_between(at_low, at_high, as_scalar(u))), low, high)


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
        below, above = (self._level(_place_of(path, t)) for t in (low, high))
        return jnp.clip(_time_of(path, self._place(_between(below, above, as_scalar(u)))), low, high)

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
        below, above = (self._level(_place_of(path, t)) for t in (low, high))
        logit = beta_logit_quantile(_between(below, above, as_scalar(u)), self.a, self.b)
        return jnp.clip(_time_of(path, jax.nn.sigmoid(logit)), low, high)

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
        ratio = _between(*roots, as_scalar(u)) ** self.rho
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
        return _independent(key, num)


class Shifted(AbstractTimes):
    """Another distribution, its times shifted by s' = k s/(1 + (k - 1) s) between the path's ends.

    Bounds belong to the distribution inside and are shifted with it.

    **Arguments:** `times`: the distribution; `shift`: k > 0, for instance `resolution_shift(dim)`.

    Source: Esser et al. (2024), arXiv 2403.03206.
    """

    times: AbstractTimes
    shift: Scalar = eqx.field(converter=as_scalar)

    def __check_init__(self):
        check_type(self.times, AbstractTimes, "times", _AN_INSTANCE)
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
        check_type(self.times, AbstractTimes, "times", _AN_INSTANCE)

    def quantile(self, path: AbstractPath, u: ScalarLike) -> Scalar:
        return self.times.quantile(path, u)

    def levels(self, key: PRNGKey, num: int) -> Float[Array, " {num}"]:
        key_order, key_within = jax.random.split(key)
        within = _independent(key_within, num)
        order = jax.random.permutation(key_order, num).astype(within.dtype)
        # The last stratum must not round up to 1.
        return jnp.minimum((order + within) / num, 1 - 0.5 * jnp.finfo(within.dtype).eps)
