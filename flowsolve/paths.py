r"""Gaussian probability paths from data to noise.

$$x_t = \alpha(t)\, x_0 + \sigma(t)\, \epsilon, \qquad \epsilon \sim N(0, I)$$

Data lives at small t, noise at large t; every path owns its ends `t_data` and `t_noise`. With a prime for d/dt,

- log_snr $= \ln(\alpha^2/\sigma^2)$, decreasing in t;
- the forward SDE is $dx = f x\,dt + g\,dW$ with $f = \alpha'/\alpha$ and $g^2 = 2\sigma(\sigma' - f\sigma)$;
- the velocity of a pair is $\alpha' x_0 + \sigma' \epsilon$.

A path states alpha, sigma and the time at which they stand in a given proportion; everything else follows,
derivatives by `jax.jvp`. Parameters are plain numbers: they are held static under `filter_jit` and are no
leaves of a flow, so that the gradient of a flow is the gradient of its network. Pass an array where a
parameter is to be traced or learned.

Ends. Where alpha' or sigma' would be infinite the default end stops short of it: VP, Cosine and SubVP begin
at t = 1e-4 (sigma about 0.003), OrnsteinUhlenbeck ends at 1 - 1e-5 (alpha about 0.004). alpha and sigma
themselves are defined on the whole of [0, 1], so a grid may still step onto the clean data at t = 0.
"""

import abc
import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from ._checks import check, known
from ._numerics import as_scalar, increasing_root, linear_combination
from ._types import Scalar, ScalarLike, State

__all__ = [
    "EDM",
    "VE",
    "VP",
    "AbstractPath",
    "Cosine",
    "Discrete",
    "Geometric",
    "Linear",
    "OrnsteinUhlenbeck",
    "Path",
    "Shifted",
    "SubVP",
    "Trigonometric",
]


class AbstractPath(eqx.Module):
    """A Gaussian path x_t = alpha(t) x_0 + sigma(t) eps, with its ends `t_data` < `t_noise`."""

    t_data: eqx.AbstractVar[ScalarLike]
    t_noise: eqx.AbstractVar[ScalarLike]

    @abc.abstractmethod
    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar]:
        """(alpha(t), sigma(t)) at one time, differentiable in t."""

    @abc.abstractmethod
    def time_at(self, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
        """The time t at which alpha(t) : sigma(t) = alpha : sigma; only the proportion matters.

        Finite where alpha or sigma is 0, which the inverse of log_snr alone would not be.
        """

    def alpha(self, t: ScalarLike) -> Scalar:
        """alpha(t), the scale of the data."""
        return self.coefficients(as_scalar(t))[0]

    def sigma(self, t: ScalarLike) -> Scalar:
        """sigma(t), the standard deviation of the noise."""
        return self.coefficients(as_scalar(t))[1]

    def derivatives(self, t: ScalarLike) -> tuple[Scalar, Scalar]:
        """(alpha'(t), sigma'(t)), by forward differentiation."""
        t = as_scalar(t)
        return jax.jvp(self.coefficients, (t,), (jnp.ones_like(t),))[1]

    def log_snr(self, t: ScalarLike) -> Scalar:
        """ln(alpha^2 / sigma^2): +inf where sigma = 0, -inf where alpha = 0."""
        alpha, sigma = self.coefficients(as_scalar(t))
        return 2 * (jnp.log(alpha) - jnp.log(sigma))

    def inverse_log_snr(self, log_snr: ScalarLike) -> Scalar:
        """The time t with log_snr(t) = log_snr, for any value that the path reaches, infinite ones too."""
        log_snr = as_scalar(log_snr)
        alpha = jnp.exp(0.5 * jax.nn.log_sigmoid(log_snr))
        sigma = jnp.exp(0.5 * jax.nn.log_sigmoid(-log_snr))
        return self.time_at(alpha, sigma)

    def f(self, t: ScalarLike) -> Scalar:
        """The forward SDE's linear drift f = alpha'/alpha; -inf where alpha = 0."""
        t = as_scalar(t)
        return self.derivatives(t)[0] / self.coefficients(t)[0]

    def g_squared(self, t: ScalarLike) -> Scalar:
        """The forward SDE's squared diffusion g^2 = 2 sigma (sigma' - f sigma); +inf where alpha = 0."""
        sigma = self.coefficients(as_scalar(t))[1]
        return 2 * sigma * self.g_squared_over_2_sigma(t)

    def g_squared_over_2_sigma(self, t: ScalarLike) -> Scalar:
        """g^2 / (2 sigma) = sigma' - f sigma, which is finite where sigma = 0.

        It is the weight of the noise prediction in the reverse SDE's score term, g^2 score / 2.
        """
        t = as_scalar(t)
        d_alpha, d_sigma = self.derivatives(t)
        alpha, sigma = self.coefficients(t)
        return d_sigma - d_alpha / alpha * sigma

    def interpolate(self, t: ScalarLike, data: State, noise: State) -> State:
        """x_t = alpha(t) data + sigma(t) noise, for one example."""
        return linear_combination(self.coefficients(as_scalar(t)), (data, noise))

    def posterior(self, s: ScalarLike, t: ScalarLike, x_t: State, data: State) -> tuple[State, Scalar]:
        r"""The law of x_s given x_t and x_0, for s < t: N(mean, variance I).

        $$\rho = \frac{\alpha_t \sigma_s}{\alpha_s \sigma_t}, \qquad
          \mathrm{mean} = \alpha_s x_0 + \rho\,\frac{\sigma_s}{\sigma_t} (x_t - \alpha_t x_0), \qquad
          \mathrm{variance} = \sigma_s^2 (1 - \rho^2)$$

        **Arguments:** `s` and `t`: two times, s < t; `x_t`, `data`: one example each.

        **Returns:** the mean, a state, and the variance of every element, a scalar.

        **Raises:** `ValueError` unless s < t.

        Source: Ho, Jain & Abbeel (2020), arXiv 2006.11239, for discrete steps; any two times here.
        """
        s, t = as_scalar(s), as_scalar(t)
        s = check(s, s >= t, "posterior(s, t, ...) got s >= t, but wants the law at an earlier s < t: swap them.")
        kept, fresh = self.noise_split(s, t)
        alpha_s, sigma_s = self.coefficients(s)
        alpha_t, sigma_t = self.coefficients(t)
        weight = kept * sigma_s / sigma_t
        mean = linear_combination((weight, alpha_s - weight * alpha_t), (x_t, data))
        return mean, (sigma_s * fresh) ** 2

    def noise_split(self, s: ScalarLike, t: ScalarLike) -> tuple[Scalar, Scalar]:
        r"""How the noise of x_s, s < t, splits given x_t: (rho, sqrt(1 - rho^2)), what is kept and what is fresh.

        $\rho = (\alpha_t \sigma_s)/(\alpha_s \sigma_t)$, the square root of SNR(t)/SNR(s): given x_t and x_0,
        x_s = alpha_s x_0 + sigma_s (rho eps_t + sqrt(1 - rho^2) z) with a new z ~ N(0, I).
        """
        alpha_s, sigma_s = self.coefficients(as_scalar(s))
        alpha_t, sigma_t = self.coefficients(as_scalar(t))
        product, cross = alpha_s * sigma_t, alpha_t * sigma_s
        rho = cross / product
        # 1 - rho^2 = (1 - rho)(1 + rho), the first factor without cancelling two rounded ratios. Between times a few
        # ulp apart rounding can make it negative, where it is 0.
        return rho, jnp.sqrt(jnp.maximum(product - cross, 0) / product * (1 + rho))

    def start(
        self,
        t: ScalarLike | None = None,
        *,
        data_mean: ScalarLike = 0.0,
        data_std: ScalarLike = 0.0,
    ) -> tuple[Scalar, Scalar]:
        """Mean and standard deviation of x_t: alpha m and sqrt(sigma^2 + alpha^2 s^2).

        **Arguments:** `t`: any time, `t_noise` by default; `data_mean` m and `data_std` s: the data's moments.
        With the default moments this is the path's own prior N(0, sigma(t_noise)^2).

        **Returns:** two scalars that hold for every element.
        """
        alpha, sigma = self.coefficients(as_scalar(self.t_noise if t is None else t))
        std = as_scalar(data_std)
        std = check(std, ~(known(std) >= 0), "data_std is {}, but wants a standard deviation, >= 0.", std)
        return alpha * as_scalar(data_mean), jnp.sqrt(sigma**2 + (alpha * std) ** 2)

    def contains(self, t: ScalarLike) -> Bool[Array, ""]:
        """Whether the time t lies between the path's ends or on its clean end below them, where sigma = 0."""
        t = as_scalar(t)
        inside = (t >= as_scalar(self.t_data)) & (t <= as_scalar(self.t_noise))
        return inside | (self.coefficients(t)[1] == 0)


def _check_ends(path: AbstractPath, lowest: float, highest: float) -> None:
    """Raise unless lowest <= t_data < t_noise <= highest, where the ends are known."""
    ends = (path.t_data, path.t_noise)
    if all(isinstance(end, float | int) for end in ends) and not lowest <= ends[0] < ends[1] <= highest:
        raise ValueError(
            f"{type(path).__name__} got t_data = {ends[0]} and t_noise = {ends[1]}, "
            f"but wants {lowest} <= t_data < t_noise <= {highest}."
        )


# Derivatives by jvp of the next two would cancel where they are small, at an end of a path.


@jax.custom_jvp
def _sine(angle: Scalar, complement: Scalar) -> Scalar:
    """sin(angle), with complement = pi/2 - angle computed without cancellation: the derivative is sin(complement)."""
    del complement
    return jnp.sin(angle)


@_sine.defjvp
def _sine_jvp(primals, tangents):
    angle, complement = primals
    return _sine(angle, complement), _sine(complement, angle) * tangents[0]


@jax.custom_jvp
def _one_minus_square(x: Scalar, value: Scalar) -> Scalar:
    """`value`, which is 1 - x^2 computed without cancellation: the derivative is -2 x dx."""
    del x
    return value


@_one_minus_square.defjvp
def _one_minus_square_jvp(primals, tangents):
    x, value = primals
    return _one_minus_square(x, value), -2 * x * tangents[0]


class Linear(AbstractPath):
    """The straight path: alpha = 1 - t, sigma = sigma_min + (1 - sigma_min) t.

    Rectified flow, conditional optimal transport and the stochastic interpolant of SiT.

    Source: Liu, Gong & Liu (2022), arXiv 2209.03003; Lipman et al. (2022), arXiv 2210.02747 (with time reversed).
    """

    sigma_min: ScalarLike = 0.0
    t_data: ScalarLike = 0.0
    t_noise: ScalarLike = 1.0

    def __check_init__(self):
        _check_ends(self, 0.0, 1.0)
        if isinstance(self.sigma_min, float | int) and not 0 <= self.sigma_min < 1:
            raise ValueError(f"Linear got sigma_min = {self.sigma_min}, but wants 0 <= sigma_min < 1.")

    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar]:
        sigma_min = as_scalar(self.sigma_min)
        return 1 - t, sigma_min + (1 - sigma_min) * t

    def time_at(self, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
        alpha, sigma = as_scalar(alpha), as_scalar(sigma)
        return (sigma - alpha * self.sigma_min) / (alpha * (1 - self.sigma_min) + sigma)


class Trigonometric(AbstractPath):
    """The arc: alpha = cos(pi t / 2), sigma = sin(pi t / 2); GVP, TrigFlow.

    Source: Albergo & Vanden-Eijnden (2022), arXiv 2209.15571; Lu & Song (2024), arXiv 2410.11081.
    """

    t_data: ScalarLike = 0.0
    t_noise: ScalarLike = 1.0

    def __check_init__(self):
        _check_ends(self, 0.0, 1.0)

    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar]:
        # cos(pi t/2) as a sine of the distance from t = 1: exactly 0 there, no cancellation near it.
        angle, complement = 0.5 * math.pi * t, 0.5 * math.pi * (1 - t)
        return _sine(complement, angle), _sine(angle, complement)

    def time_at(self, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
        return jnp.arctan2(as_scalar(sigma), as_scalar(alpha)) * (2 / math.pi)


class Cosine(AbstractPath):
    """The variance-preserving cosine schedule, u = (t + s)/(1 + s) pi/2.

    alpha = cos(u) / cos(u_0), sigma = sqrt(1 - alpha^2), with s = `offset`.

    Source: Nichol & Dhariwal (2021), arXiv 2102.09672.
    """

    offset: ScalarLike = 0.008
    t_data: ScalarLike = 1e-4
    t_noise: ScalarLike = 1.0

    def __check_init__(self):
        _check_ends(self, 0.0, 1.0)

    def _angles(self, t: Scalar) -> tuple[Scalar, Scalar]:
        """(u_0, u - u_0)."""
        scale = 0.5 * math.pi / (1 + self.offset)
        return as_scalar(self.offset * scale), t * scale

    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar]:
        u_0, step = self._angles(t)
        # cos u as a sine of the distance from pi/2, and cos^2 u_0 - cos^2 u = sin(u - u_0) sin(u + u_0).
        alpha = _sine((1 - t) * (0.5 * math.pi / (1 + self.offset)), u_0 + step) / jnp.cos(u_0)
        variance = jnp.sin(step) * jnp.sin(step + 2 * u_0) / jnp.cos(u_0) ** 2
        return alpha, jnp.sqrt(_one_minus_square(alpha, variance))

    def time_at(self, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
        alpha, sigma = as_scalar(alpha), as_scalar(sigma)
        u_0, _ = self._angles(alpha)
        cosine, sine = jnp.cos(u_0), jnp.sin(u_0)
        # (sin u, cos u) up to a common factor, then the sine and cosine of u - u_0 without cancellation.
        sin_u = jnp.sqrt(sigma**2 + (sine * alpha) ** 2)
        cos_u = cosine * alpha
        sin_step = (sigma * cosine) ** 2 / (sin_u * cosine + cos_u * sine)
        return jnp.arctan2(sin_step, cos_u * cosine + sin_u * sine) * ((1 + self.offset) * 2 / math.pi)


class OrnsteinUhlenbeck(AbstractPath):
    """The variance-preserving path that is linear in sigma: alpha = sqrt(1 - t^2), sigma = t."""

    t_data: ScalarLike = 0.0
    t_noise: ScalarLike = 1 - 1e-5

    def __check_init__(self):
        _check_ends(self, 0.0, 1.0)

    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar]:
        return jnp.sqrt(_one_minus_square(t, (1 - t) * (1 + t))), t

    def time_at(self, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
        alpha, sigma = as_scalar(alpha), as_scalar(sigma)
        return sigma / jnp.sqrt(alpha**2 + sigma**2)


def _linear_beta_log_alpha(beta_min: ScalarLike, beta_max: ScalarLike, t: Scalar) -> Scalar:
    """ln alpha = -t^2 (beta_max - beta_min)/4 - t beta_min/2."""
    return -(t**2) * ((beta_max - beta_min) / 4) - t * (beta_min / 2)


def _linear_beta_time(beta_min: ScalarLike, beta_max: ScalarLike, log_alpha: Scalar) -> Scalar:
    """The inverse of `_linear_beta_log_alpha`, in the form that does not cancel."""
    half, slope = beta_min / 2, beta_max - beta_min
    time = -2 * log_alpha / (half + jnp.sqrt(half**2 - slope * log_alpha))
    return jnp.where(jnp.isneginf(log_alpha), jnp.inf, time)


class VP(AbstractPath):
    """The variance-preserving diffusion with linear beta(t) = beta_min + t (beta_max - beta_min).

    ln alpha = -t^2 (beta_max - beta_min)/4 - t beta_min/2, sigma = sqrt(1 - alpha^2).

    Source: Song et al. (2020), arXiv 2011.13456; Ho, Jain & Abbeel (2020), arXiv 2006.11239.
    """

    beta_min: ScalarLike = 0.1
    beta_max: ScalarLike = 20.0
    t_data: ScalarLike = 1e-4
    t_noise: ScalarLike = 1.0

    def __check_init__(self):
        _check_ends(self, 0.0, math.inf)

    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar]:
        log_alpha = _linear_beta_log_alpha(self.beta_min, self.beta_max, t)
        alpha = jnp.exp(log_alpha)
        return alpha, jnp.sqrt(_one_minus_square(alpha, -jnp.expm1(2 * log_alpha)))

    def time_at(self, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
        log_alpha = -0.5 * jnp.log1p((as_scalar(sigma) / as_scalar(alpha)) ** 2)
        return _linear_beta_time(self.beta_min, self.beta_max, log_alpha)


class SubVP(AbstractPath):
    """The sub-variance-preserving diffusion: alpha as in `VP`, sigma = 1 - alpha^2.

    Source: Song et al. (2020), arXiv 2011.13456, whose standard deviation is 1 - exp(-int beta).
    """

    beta_min: ScalarLike = 0.1
    beta_max: ScalarLike = 20.0
    t_data: ScalarLike = 1e-4
    t_noise: ScalarLike = 1.0

    def __check_init__(self):
        _check_ends(self, 0.0, math.inf)

    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar]:
        log_alpha = _linear_beta_log_alpha(self.beta_min, self.beta_max, t)
        alpha = jnp.exp(log_alpha)
        return alpha, _one_minus_square(alpha, -jnp.expm1(2 * log_alpha))

    def time_at(self, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
        # sigma/alpha = 1/alpha - alpha = 2 sinh(-ln alpha).
        log_alpha = -jnp.arcsinh(0.5 * as_scalar(sigma) / as_scalar(alpha))
        return _linear_beta_time(self.beta_min, self.beta_max, log_alpha)


class Geometric(eqx.Module):
    """The geometric noise schedule sigma(t) = sigma_min (sigma_max/sigma_min)^t of `VE`."""

    sigma_min: ScalarLike = 0.01
    sigma_max: ScalarLike = 50.0

    def __check_init__(self):
        ends = (self.sigma_min, self.sigma_max)
        if all(isinstance(end, float | int) for end in ends) and not 0 < ends[0] < ends[1]:
            raise ValueError(f"Geometric got sigma_min, sigma_max = {ends}, but wants 0 < sigma_min < sigma_max.")

    def __call__(self, t: Scalar) -> Scalar:
        """sigma(t)."""
        return as_scalar(self.sigma_min) * jnp.exp(t * self._log_ratio())

    def inverse(self, sigma: Scalar) -> Scalar:
        """The time at which the schedule has the value `sigma`."""
        return jnp.log(sigma / self.sigma_min) / self._log_ratio()

    def _log_ratio(self) -> Scalar:
        return jnp.log(as_scalar(self.sigma_max)) - jnp.log(as_scalar(self.sigma_min))


class VE(AbstractPath):
    """The variance-exploding path: alpha = 1, sigma(t) any increasing schedule, geometric by default.

    **Arguments:** `schedule`: a callable t -> sigma(t); `inverse`: its inverse where one is known
    (`Geometric` brings its own), otherwise a bracketed root find between the ends.

    Source: Song et al. (2020), arXiv 2011.13456.
    """

    schedule: Callable[[Scalar], Scalar]
    inverse: Callable[[Scalar], Scalar] | None
    t_data: ScalarLike
    t_noise: ScalarLike

    def __init__(
        self,
        schedule: Callable[[Scalar], Scalar] = Geometric(),
        *,
        inverse: Callable[[Scalar], Scalar] | None = None,
        t_data: ScalarLike = 0.0,
        t_noise: ScalarLike = 1.0,
    ):
        self.schedule = schedule
        self.inverse = inverse
        self.t_data = t_data
        self.t_noise = t_noise

    def __check_init__(self):
        _check_ends(self, -math.inf, math.inf)

    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar]:
        return jnp.ones_like(t), self.schedule(t)

    def time_at(self, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
        # Geometric's own inverse is looked up, not stored, so that there is one copy of its parameters.
        inverse = self.inverse
        if inverse is None and isinstance(self.schedule, Geometric):
            inverse = self.schedule.inverse
        if inverse is None:
            return _time_by_root_find(self, alpha, sigma)
        return inverse(as_scalar(sigma) / as_scalar(alpha))


class EDM(AbstractPath):
    """The path whose time is the noise level: alpha = 1, sigma = t, from 0.002 to 80.

    Source: Karras et al. (2022), arXiv 2206.00364.
    """

    t_data: ScalarLike = 0.002
    t_noise: ScalarLike = 80.0

    def __check_init__(self):
        _check_ends(self, 0.0, math.inf)

    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar]:
        return jnp.ones_like(t), t

    def time_at(self, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
        return as_scalar(sigma) / as_scalar(alpha)


class Discrete(AbstractPath):
    """The path of a discrete diffusion with T steps of noise beta_k, k = 0..T-1.

    alpha at t = (k + 1)/T is sqrt(prod_{j <= k} (1 - beta_j)); ln alpha is interpolated between, from
    alpha(0) = 1; sigma = sqrt(1 - alpha^2). `timestep` and `time_of` map integer timesteps both ways.

    **Arguments:** `betas`: T >= 2 numbers in (0, 1).

    Source: Ho, Jain & Abbeel (2020), arXiv 2006.11239. Deviation: times between two steps are defined too.
    """

    betas: tuple[float, ...] = eqx.field(static=True)
    t_data: ScalarLike
    t_noise: ScalarLike

    def __init__(
        self,
        betas: Sequence[float] | np.ndarray | Array,
        *,
        t_data: ScalarLike | None = None,
        t_noise: ScalarLike = 1.0,
    ):
        self.betas = tuple(float(beta) for beta in np.asarray(betas))
        if len(self.betas) < 2 or not all(0 < beta < 1 for beta in self.betas):
            raise ValueError("Discrete got betas outside (0, 1) or fewer than two: give T >= 2 numbers in (0, 1).")
        self.t_data = 1 / len(self.betas) if t_data is None else t_data
        self.t_noise = t_noise

    def __check_init__(self):
        _check_ends(self, 0.0, 1.0)

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> "Discrete":
        """DDPM's schedule: betas equally spaced from `beta_start` to `beta_end`."""
        return cls(np.linspace(beta_start, beta_end, steps))

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, beta_limit: float = 0.999) -> "Discrete":
        """The cosine schedule of Nichol & Dhariwal (2021), arXiv 2102.09672, betas at most `beta_limit`."""
        alpha_bar = np.cos((np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2) ** 2
        return cls(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], beta_limit))

    def _table(self) -> tuple[Array, Array]:
        """-ln alpha at the times 0, 1/T, ..., 1, increasing, and its increments.

        The increments are a table of their own: differences of the first would lose log10(T) digits.
        """
        increments = -0.5 * np.log1p(-np.asarray(self.betas))
        table = np.concatenate([[0.0], np.cumsum(increments)])
        return jnp.asarray(table, float), jnp.asarray(increments, float)

    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar]:
        table, increments = self._table()
        position = t * len(self.betas)
        # A time within rounding of a step counts as the start of the interval that follows.
        k = jnp.floor(position * (1 + 4 * jnp.finfo(position.dtype).eps))
        k = jax.lax.stop_gradient(jnp.clip(k, 0, len(self.betas) - 1))
        index = k.astype(int)
        log_alpha = -(table[index] + (position - k) * increments[index])
        alpha = jnp.exp(log_alpha)
        return alpha, jnp.sqrt(_one_minus_square(alpha, -jnp.expm1(2 * log_alpha)))

    def time_at(self, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
        table, increments = self._table()
        value = 0.5 * jnp.log1p((as_scalar(sigma) / as_scalar(alpha)) ** 2)
        value = _check_reached(value, value > table[-1] * (1 + 1e-5), self)
        value = jnp.minimum(value, table[-1])
        index = jnp.clip(jnp.searchsorted(table, value, side="right") - 1, 0, len(self.betas) - 1)
        return (index.astype(value.dtype) + (value - table[index]) / increments[index]) / len(self.betas)

    def timestep(self, t: ScalarLike) -> Int[Array, ""]:
        """The integer timestep k nearest to time t: round(t T) - 1, for networks that were trained on it."""
        return jnp.round(as_scalar(t) * len(self.betas)).astype(int) - 1

    def time_of(self, timestep: int | Int[Array, ""]) -> Scalar:
        """The time (k + 1)/T of integer timestep k."""
        return (as_scalar(timestep) + 1) / len(self.betas)


class Path(AbstractPath):
    """A path from two callables t -> alpha(t), t -> sigma(t); derivatives by jvp, the inverse by root find.

    **Arguments:** `alpha`, `sigma`: scalar to scalar, in `jax.numpy`, alpha/sigma decreasing between the ends;
    `t_data` < `t_noise`: the ends.
    """

    alpha_function: Callable[[Scalar], Scalar]
    sigma_function: Callable[[Scalar], Scalar]
    t_data: ScalarLike
    t_noise: ScalarLike

    def __init__(
        self,
        alpha: Callable[[Scalar], Scalar],
        sigma: Callable[[Scalar], Scalar],
        *,
        t_data: ScalarLike = 0.0,
        t_noise: ScalarLike = 1.0,
    ):
        self.alpha_function = alpha
        self.sigma_function = sigma
        self.t_data = t_data
        self.t_noise = t_noise

    def __check_init__(self):
        _check_ends(self, -math.inf, math.inf)

    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar]:
        return as_scalar(self.alpha_function(t)), as_scalar(self.sigma_function(t))

    def time_at(self, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
        return _time_by_root_find(self, alpha, sigma)


class Shifted(AbstractPath):
    """A path seen at a shifted log-SNR: log_snr(t) = path.log_snr(t) + shift, on the same curve (alpha, sigma).

    Time t of this path is time tau of the base path, where sigma/alpha is exp(-shift/2) times what it is at t.
    A negative shift spends more time at high noise. On `Linear` it is the time shift t' = k t/(1 + (k - 1) t)
    with k = exp(-shift/2). Where the base path's log-SNR is bounded (VP, VE, EDM), the base is used beyond its
    own ends.

    Source: Hoogeboom, Heek & Salimans (2023), arXiv 2301.11093; Esser et al. (2024), arXiv 2403.03206.
    """

    path: AbstractPath
    shift: ScalarLike
    t_data: ScalarLike
    t_noise: ScalarLike

    def __init__(
        self,
        path: AbstractPath,
        shift: ScalarLike,
        *,
        t_data: ScalarLike | None = None,
        t_noise: ScalarLike | None = None,
    ):
        self.path = path
        self.shift = shift
        self.t_data = path.t_data if t_data is None else t_data
        self.t_noise = path.t_noise if t_noise is None else t_noise

    def _ratio(self) -> Scalar:
        return jnp.exp(-0.5 * as_scalar(self.shift))

    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar]:
        alpha, sigma = self.path.coefficients(t)
        sigma = self._ratio() * sigma
        # The base path at tau gives the scale alone: the proportion is known better than tau can hold it.
        base_alpha, base_sigma = self.path.coefficients(self.path.time_at(alpha, sigma))
        scale = jnp.sqrt((base_alpha**2 + base_sigma**2) / (alpha**2 + sigma**2))
        return scale * alpha, scale * sigma

    def time_at(self, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
        return self.path.time_at(self._ratio() * as_scalar(alpha), sigma)


def _check_reached(value: Scalar, bad: Array, path: AbstractPath) -> Scalar:
    return check(
        value,
        bad,
        f"{type(path).__name__} was asked for the time of a log-SNR that it does not reach between its ends: "
        "ask for one between log_snr(t_noise) and log_snr(t_data), or widen the path.",
    )


def _time_by_root_find(path: AbstractPath, alpha: ScalarLike, sigma: ScalarLike) -> Scalar:
    """The root in t of alpha sigma(t) - sigma alpha(t), bracketed by the path's ends."""
    alpha, sigma = as_scalar(alpha), as_scalar(sigma)

    def mismatch(t: Scalar) -> Scalar:
        alpha_t, sigma_t = path.coefficients(t)
        return alpha * sigma_t - sigma * alpha_t

    def slack(t: Scalar) -> Scalar:
        alpha_t, sigma_t = path.coefficients(t)
        return 1e-5 * (jnp.abs(alpha * sigma_t) + jnp.abs(sigma * alpha_t))

    lower, upper = as_scalar(path.t_data), as_scalar(path.t_noise)
    bad = (mismatch(lower) > slack(lower)) | (mismatch(upper) < -slack(upper))
    lower = _check_reached(lower, bad, path)
    # Derivatives in alpha, sigma and the path's parameters; the second ones are the derivative in t of a velocity.
    return increasing_root(mismatch, lower, upper)
