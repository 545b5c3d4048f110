r"""Guidance scales that change along the path: callables (path, t) -> scale.

A number is a constant schedule. With $u = (t_\mathrm{noise} - t)/(t_\mathrm{noise} - t_\mathrm{data})$, from 0 at the
noise to 1 at the data,

| schedule | scale |
|---|---|
| `Linear` | $a + (b - a)\,u$ |
| `Cosine` | $a + (b - a)\,(1 - \cos \pi u)/2$ |
| `Interval` | another schedule inside of an interval, one number outside |
| `CFGPlusPlus` | $\lambda/(1 - \rho_i)$ over step i of a grid |

The numbers 0 and 1, where they are known before anything is traced, stay what they are: the flow that has no say is
then not evaluated. Any other number is an array, so that a new one does not retrace.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import check, check_callable, is_concrete, known
from .._numerics import as_scalar
from .._types import Scalar, ScalarLike
from ..paths import AbstractPath

__all__ = ["CFGPlusPlus", "Cosine", "Interval", "Linear", "noise_level", "time"]

Schedule: TypeAlias = Callable[[AbstractPath, Scalar], Scalar]


def as_scale(scale: ScalarLike | Schedule) -> Scalar | int | Schedule:
    """A schedule as it is, the numbers 0 and 1 as integers, which are static under a jit, any other as an array."""
    if callable(scale):
        return scale
    if not eqx.is_array_like(scale):
        raise TypeError(
            f"A guidance scale is a {type(scale).__name__}, but wants a number or a schedule (path, t) -> number such "
            "as fs.guidance.Linear(1.0, 4.0)."
        )
    if isinstance(scale, int | float | np.number) and scale in (0, 1):
        return int(scale)
    return as_scalar(scale)


def scale_at(scale: Scalar | int | Schedule, path: AbstractPath, t: Scalar) -> Scalar:
    """The scale at time t."""
    return as_scalar(scale(path, t) if callable(scale) else scale)


def is_known(scale: Scalar, value: int) -> bool:
    """Whether the scale is known to be `value`; what is traced is not."""
    return is_concrete(scale) and bool(known(scale) == value)


def time(path: AbstractPath, t: Scalar) -> Scalar:
    """The path's own time t, as the variable of an `Interval`."""
    del path
    return t


def noise_level(path: AbstractPath, t: Scalar) -> Scalar:
    """sigma/alpha, EDM's noise level, as the variable of an `Interval`; infinite where alpha = 0."""
    alpha, sigma = path.coefficients(t)
    return sigma / alpha


def _fraction(path: AbstractPath, t: Scalar) -> Scalar:
    """0 at the noise, 1 at the data."""
    data, noise = as_scalar(path.t_data), as_scalar(path.t_noise)
    return jnp.clip((noise - t) / (noise - data), 0, 1)


class Linear(eqx.Module):
    """A scale that is linear in t.

    **Arguments:** `at_noise`, `at_data`: its values at the two ends of the path.

    Source: Wang et al. (2024), arXiv 2404.13040, who recommend it from 0 to twice a constant scale.
    """

    at_noise: Scalar = eqx.field(converter=as_scalar)
    at_data: Scalar = eqx.field(converter=as_scalar)

    def __call__(self, path: AbstractPath, t: Scalar) -> Scalar:
        """The scale at time t."""
        return self.at_noise + (self.at_data - self.at_noise) * _fraction(path, t)


class Cosine(eqx.Module):
    """A scale that goes along half a cosine in t, flat at both ends.

    **Arguments:** `at_noise`, `at_data`: its values at the two ends of the path.

    Source: Wang et al. (2024), arXiv 2404.13040.
    """

    at_noise: Scalar = eqx.field(converter=as_scalar)
    at_data: Scalar = eqx.field(converter=as_scalar)

    def __call__(self, path: AbstractPath, t: Scalar) -> Scalar:
        """The scale at time t."""
        return self.at_noise + (self.at_data - self.at_noise) * 0.5 * (1 - jnp.cos(math.pi * _fraction(path, t)))


class Interval(eqx.Module):
    """A schedule inside of an interval; outside of it guidance is off.

    **Arguments:**

    - `inside`: the scale there, a number or a schedule;
    - `low`, `high`: the interval, low < high, its ends included;
    - `outside`: the scale elsewhere, 1 by default, which is the conditional prediction alone. 0 for `AddedScore`;
    - `variable`: in what the interval is stated: `time` by default, `noise_level`, or any (path, t) -> number.

    In a flow with `batched=False` no second network is evaluated outside, on a grid of times that all examples share.

    **Raises:** `ValueError` unless low < high.

    Source: Kynkaanniemi et al. (2024), arXiv 2404.07724, whose interval is one of noise levels.
    """

    inside: Scalar | int | Schedule
    low: Scalar
    high: Scalar
    outside: Scalar
    variable: Schedule

    def __init__(
        self,
        inside: ScalarLike | Schedule,
        low: ScalarLike,
        high: ScalarLike,
        *,
        outside: ScalarLike = 1.0,
        variable: Schedule = time,
    ):
        check_callable(variable, "Interval got a variable", "(path, t) -> number such as fs.guidance.noise_level.")
        self.inside = as_scale(inside)
        self.low, high = as_scalar(low), as_scalar(high)
        self.high = check(
            high,
            ~(known(self.low) < known(high)),
            "Interval got low = {} and high = {}, but wants low < high: data is at small t and at small noise levels.",
            self.low,
            high,
        )
        self.outside = as_scalar(outside)
        self.variable = variable

    def __call__(self, path: AbstractPath, t: Scalar) -> Scalar:
        """The scale at time t."""
        value = self.variable(path, t)
        inside = (self.low <= value) & (value <= self.high)
        return jnp.where(inside, scale_at(self.inside, path, t), self.outside)


class CFGPlusPlus(eqx.Module):
    r"""CFG++, which renoises by the unconditional noise, as the scale of `ClassifierFree` over the steps of a grid.

    Its step $x_s = \alpha_s \hat x_0^\lambda + \sigma_s \hat\epsilon^\mathrm{null}$ is DDIM's step at the scale

    $$\frac{\lambda}{1 - \rho}, \qquad \rho = \frac{\alpha_t \sigma_s}{\alpha_s \sigma_t} ,$$

    which grows without bound as steps shrink: a push of the same size at every step, however small. So it is no flow
    by itself, and its scale belongs to a grid. With `solvers.DDIM()` on that grid it is the paper's sampler exactly,
    with another solver guidance of the same strength.

    **Arguments:** `scale`: lambda, from 0 to 1; `times`: the points of the grid, `grid(path)`, from noise to data. The
    scale is constant over each step, its start included.

    **Raises:** `ValueError` unless `times` are two or more that decrease.

    Source: Chung et al. (2024), arXiv 2406.08070.
    """

    scale: Scalar
    times: Float[Array, " points"]

    def __init__(self, scale: ScalarLike, times: Float[Array | np.ndarray, " points"]):
        self.scale = as_scalar(scale)
        times = jnp.asarray(times).astype(float)
        if times.ndim != 1 or times.size < 2:
            raise ValueError(
                f"CFGPlusPlus got times of shape {times.shape}, but wants the points of a grid, two or more."
            )
        self.times = check(
            times,
            ~(known(times)[:-1] > known(times)[1:]),
            "CFGPlusPlus got times that do not decrease, but wants those of sampling, from noise to data: grid(path).",
        )

    def __call__(self, path: AbstractPath, t: Scalar) -> Scalar:
        """The scale at time t."""
        # A solver's time may have been rounded otherwise than the same point of the grid.
        starts = self.times[1:] + 1e-3 * (self.times[:-1] - self.times[1:])
        step = jnp.minimum(jnp.sum(starts >= t), self.times.size - 2)
        kept, fresh = path.noise_split(self.times[step + 1], self.times[step])
        # 1 - rho, which would cancel over a small step.
        return self.scale * (1 + kept) / fresh**2
