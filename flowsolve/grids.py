r"""Inference grids: the times $t_0, \dots, t_n$ at which a solver steps.

A grid of n steps has n + 1 points, strictly monotone, whose ends are exactly the times asked for.
Data lives at small t, so sampling descends from `t_start` to `t_end`; with `t_start` < `t_end`
(encoding) the same points come in ascending order. With the fraction $f_i = i/n$, $i = 0..n$:

| grid | points |
|---|---|
| Uniform | $t_i = t_0 + f_i (t_n - t_0)$ |
| Power | $t_i = t_n + (1 - f_i)^p (t_0 - t_n)$ |
| Karras | $\sqrt[\rho]{r_i}$ equally spaced, $r = \sigma/\alpha$ |
| LogSNR | $\ln r_i$ equally spaced: uniform in log-SNR |
| Shifted | another grid under the time shift of `flowsolve.times.shift_time` |
| ThenClean | another grid to `t_data`, then one step onto the clean data |
| Given | the user's |

Infinite ends of `Karras` and `LogSNR`. Where $r$ is infinite at the start (`Linear` at t = 1) the
first point is `t_start` itself and stands for $r_0$ = `sigma_max`. Where $r = 0$ at the end, as on
`Linear` at t = 0 and on `EDM` at t = 0, the first n points go down to $r_{n-1}$ = `sigma_min` and
the last step goes from there onto the end, as EDM's sampler does. Ends of finite, positive $r$ are
used as they are, and the two fields are not.
"""

import abc
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ._checks import check, is_concrete
from ._numerics import as_scalar
from ._types import Scalar, ScalarLike
from .paths import AbstractPath
from .times import shift_on_path

__all__ = [
    "AbstractGrid",
    "AbstractPathGrid",
    "Given",
    "Karras",
    "LogSNR",
    "Power",
    "Shifted",
    "ThenClean",
    "Uniform",
]


class AbstractGrid(eqx.Module):
    """A rule for n + 1 times between two ends."""

    #: The number of steps n, static.
    steps: eqx.AbstractVar[int]

    @abc.abstractmethod
    def ends(self, path: AbstractPath) -> tuple[ScalarLike, ScalarLike]:
        """(t_start, t_end) where the caller gives none."""

    @abc.abstractmethod
    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        """The points strictly between t_start > t_end of a grid of this kind with `steps` steps, descending."""

    def __call__(
        self, path: AbstractPath, t_start: ScalarLike | None = None, t_end: ScalarLike | None = None
    ) -> Float[Array, " {self.steps}+1"]:
        """The points from t_start to t_end, both included and exactly those.

        **Arguments:** `path`: the path; `t_start`, `t_end`: the ends, by default the path's
        `t_noise` and `t_data`; in either order, and traced or not.

        **Returns:** `steps + 1` times, strictly monotone.

        **Raises:** `ValueError` if the points are not strictly monotone: equal or NaN ends,
        parameters out of range, or more steps than float32 can tell apart.
        """
        default_start, default_end = self.ends(path)
        start = as_scalar(default_start if t_start is None else t_start)
        end = as_scalar(default_end if t_end is None else t_end)
        high, low = jnp.maximum(start, end), jnp.minimum(start, end)
        inner = self.inner(path, high, low, self.steps)
        points = jnp.concatenate([high[None], inner, low[None]])
        points = check(
            points,
            ~jnp.all(points[:-1] > points[1:]),
            f"{type(self).__name__} of {self.steps} steps has points that are not strictly monotone "
            f"on {type(path).__name__}: give t_start and t_end that differ, parameters inside their "
            "range, and no more steps than the float type can tell apart.",
        )
        return jnp.where(start > end, points, points[::-1])


class AbstractPathGrid(AbstractGrid):
    """A grid from the path's noise to its data, unless the caller gives other ends."""

    def ends(self, path: AbstractPath) -> tuple[ScalarLike, ScalarLike]:
        """(t_noise, t_data) of the path."""
        return path.t_noise, path.t_data


def _as_steps(steps: int | np.integer) -> int:
    # NumPy's integers too, so that np.arange can be swept over.
    if isinstance(steps, bool | np.bool_) or not isinstance(steps, int | np.integer):
        raise TypeError(f"A grid got steps = {steps!r}, but wants a plain int: the number of steps, at least 1.")
    if steps < 1:
        raise ValueError(f"A grid got steps = {steps}, but wants at least 1.")
    return int(steps)


def _check_positive(owner: AbstractGrid, name: str, value: Scalar) -> None:
    if is_concrete(value) and not (value > 0 and jnp.isfinite(value)):
        raise ValueError(f"{type(owner).__name__} got {name} = {float(value):g}, but wants it positive and finite.")


def _inner_fractions(steps: int) -> Float[Array, " {steps}-1"]:
    """i/n for i = 1..n-1."""
    return jnp.arange(1, steps, dtype=float) / steps


class Uniform(AbstractPathGrid):
    """Equal steps in t.

    **Arguments:** `steps`: the number of steps n.
    """

    steps: int = eqx.field(static=True, converter=_as_steps)

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        del path
        fractions = _inner_fractions(steps)
        return t_start * (1 - fractions) + t_end * fractions


class Power(AbstractPathGrid):
    """Steps that shrink toward the data: t_i = t_end + (1 - i/n)^p (t_start - t_end).

    **Arguments:** `steps`: the number of steps n; `power`: p > 0, 1 is uniform.
    """

    steps: int = eqx.field(static=True, converter=_as_steps)
    power: Scalar = eqx.field(default=2.0, converter=as_scalar)

    def __check_init__(self):
        _check_positive(self, "power", self.power)

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        del path
        weights = (1 - _inner_fractions(steps)) ** self.power
        return t_start * weights + t_end * (1 - weights)


def _log_ratio(path: AbstractPath, t: Scalar, singular: Bool[Array, ""], instead: Scalar) -> Scalar:
    """ln(sigma/alpha) at t, or `instead` where `singular`; its derivatives are finite there too."""
    middle = 0.5 * (as_scalar(path.t_data) + as_scalar(path.t_noise))
    return jnp.where(singular, instead, -0.5 * path.log_snr(jnp.where(singular, middle, t)))


def _inner_levels(
    path: AbstractPath,
    t_start: Scalar,
    t_end: Scalar,
    steps: int,
    sigma_min: Scalar,
    sigma_max: Scalar,
    place_between: Callable[[Scalar, Scalar, Array], Array],
) -> Float[Array, " {steps}-1"]:
    """The times whose ln(sigma/alpha) is `place_between` those of the ends, with infinite ends replaced."""
    from_noise = path.coefficients(t_start)[0] == 0
    onto_data = path.coefficients(t_end)[1] == 0
    first = _log_ratio(path, t_start, from_noise, jnp.log(sigma_max))
    last = _log_ratio(path, t_end, onto_data, jnp.log(sigma_min))
    # Onto clean data `last` is already reached one step before the end.
    reached = jnp.where(onto_data, max(steps - 1, 1), steps).astype(first.dtype)
    levels = place_between(first, last, jnp.arange(1, steps, dtype=float) / reached)
    return jax.vmap(lambda level: path.inverse_log_snr(-2 * level))(levels)


class Karras(AbstractPathGrid):
    """EDM's grid: (sigma/alpha)^(1/rho) in equal steps; a larger rho takes smaller steps at low noise.

    r_i = [r_0^(1/rho) + i/n (r_n^(1/rho) - r_0^(1/rho))]^rho, r = sigma/alpha.

    **Arguments:** `steps`: the number of steps n; `rho`; `sigma_min`, `sigma_max`: the levels
    sigma/alpha that stand for ends of ratio 0 and infinity, see the top of this module; not used
    where the ratio is finite.

    Source: Karras et al. (2022), arXiv 2206.00364, where alpha = 1. Its sampler of n steps, with
    the last one onto sigma = 0, is `Karras(n)` with t_end = 0, or `ThenClean(Karras(n))`.
    """

    steps: int = eqx.field(static=True, converter=_as_steps)
    rho: Scalar = eqx.field(default=7.0, converter=as_scalar)
    sigma_min: Scalar = eqx.field(default=0.002, converter=as_scalar)
    sigma_max: Scalar = eqx.field(default=80.0, converter=as_scalar)

    def __check_init__(self):
        _check_positive(self, "rho", self.rho)
        _check_positive(self, "sigma_min", self.sigma_min)
        _check_positive(self, "sigma_max", self.sigma_max)

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        def place_between(first: Scalar, last: Scalar, fraction: Array) -> Array:
            root_first, root_last = jnp.exp(first / self.rho), jnp.exp(last / self.rho)
            return self.rho * jnp.log(root_first * (1 - fraction) + root_last * fraction)

        return _inner_levels(path, t_start, t_end, steps, self.sigma_min, self.sigma_max, place_between)


class LogSNR(AbstractPathGrid):
    """Equal steps in log-SNR, the grid of DPM-Solver; the limit of `Karras` at large rho.

    **Arguments:** `steps`: the number of steps n; `sigma_min`, `sigma_max`: the levels sigma/alpha
    that stand for ends of ratio 0 and infinity, see the top of this module; not used where the
    ratio is finite.

    Source: Lu et al. (2022), arXiv 2211.01095.
    """

    steps: int = eqx.field(static=True, converter=_as_steps)
    sigma_min: Scalar = eqx.field(default=0.002, converter=as_scalar)
    sigma_max: Scalar = eqx.field(default=80.0, converter=as_scalar)

    def __check_init__(self):
        _check_positive(self, "sigma_min", self.sigma_min)
        _check_positive(self, "sigma_max", self.sigma_max)

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        def place_between(first: Scalar, last: Scalar, fraction: Array) -> Array:
            return first * (1 - fraction) + last * fraction

        return _inner_levels(path, t_start, t_end, steps, self.sigma_min, self.sigma_max, place_between)


class Shifted(AbstractGrid):
    """Another grid under the time shift s' = k s/(1 + (k - 1) s), s the place between the path's ends.

    The grid inside runs between the unshifted ends, so that the shift is applied once and the ends
    stay exact.

    **Arguments:** `grid`: the grid; `shift`: k > 0, larger than 1 for more steps at high noise, for
    instance `flowsolve.times.resolution_shift(dim)`.

    Source: Esser et al. (2024), arXiv 2403.03206.
    """

    grid: AbstractGrid
    shift: Scalar = eqx.field(converter=as_scalar)

    def __check_init__(self):
        _check_positive(self, "shift", self.shift)

    @property
    def steps(self) -> int:
        """The steps of the grid inside."""
        return self.grid.steps

    def ends(self, path: AbstractPath) -> tuple[ScalarLike, ScalarLike]:
        return self.grid.ends(path)

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        unshift = 1 / self.shift
        start, end = shift_on_path(path, t_start, unshift), shift_on_path(path, t_end, unshift)
        inner = self.grid.inner(path, start, end, steps)
        return jax.vmap(lambda t: shift_on_path(path, t, self.shift))(inner)


class ThenClean(AbstractGrid):
    """Another grid down to the path's `t_data`, then one last step onto the clean data.

    The n steps of the grid are n steps in total: n - 1 of its kind down to `t_data` and the last
    one. Where `t_data` is the clean data already (`Linear`), it is not needed and raises.

    **Arguments:** `grid`: the grid; `t_clean`: the time of the clean data below `t_data`, the
    default `t_end`.

    Source: Karras et al. (2022), arXiv 2206.00364, whose last step goes from sigma = 0.002 onto 0.
    """

    grid: AbstractGrid
    t_clean: Scalar = eqx.field(default=0.0, converter=as_scalar)

    @property
    def steps(self) -> int:
        """The steps in total, as many as those of the grid inside."""
        return self.grid.steps

    def ends(self, path: AbstractPath) -> tuple[ScalarLike, ScalarLike]:
        return self.grid.ends(path)[0], self.t_clean

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        del t_end
        t_data = as_scalar(path.t_data)
        if steps == 1:
            return jnp.zeros((0,), t_data.dtype)
        inner = self.grid.inner(path, t_start, t_data, steps - 1)
        return jnp.concatenate([inner, t_data[None]])


class Given(AbstractGrid):
    """The user's own points.

    They lie between the path's ends; only the lowest may be the clean data, sigma = 0, below
    `t_data`. The caller's `t_start` and `t_end` must be None or these ends, in either order.

    **Arguments:** `ts`: two or more times, strictly monotone, descending or ascending.

    **Raises:** `ValueError` for too few, unsorted or NaN points, points outside the path, or other
    ends.
    """

    ts: Float[Array, " points"]

    def __init__(self, ts: Sequence[ScalarLike] | np.ndarray | Array):
        points = jnp.asarray(ts).astype(float)
        if points.ndim != 1 or len(points) < 2:
            raise ValueError(
                f"Given got times of shape {list(points.shape)}, but wants a vector of two or more: "
                "one more than steps."
            )
        differences = points[1:] - points[:-1]
        self.ts = check(
            points,
            ~(jnp.all(differences > 0) | jnp.all(differences < 0)),
            "Given got times that are not strictly monotone (repeated, unsorted or NaN): sort them "
            "and leave repeats out.",
        )

    @property
    def steps(self) -> int:
        """One less than the points."""
        return len(self.ts) - 1

    def ends(self, path: AbstractPath) -> tuple[ScalarLike, ScalarLike]:
        del path
        return self.ts[0], self.ts[-1]

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        if steps != self.steps:
            raise ValueError(
                f"Given has {self.steps} steps and cannot take {steps}: put the clean time into ts "
                "instead of wrapping it in ThenClean."
            )
        points = jnp.where(self.ts[0] > self.ts[-1], self.ts, self.ts[::-1])
        t_data, t_noise = as_scalar(path.t_data), as_scalar(path.t_noise)
        clean = path.coefficients(points[-1])[1] == 0
        outside = (points[0] > t_noise) | (points[-2] < t_data) | ((points[-1] < t_data) & ~clean)
        points = check(
            points,
            outside,
            f"Given has times outside {type(path).__name__}'s ends t_data and t_noise: keep them "
            "inside; only the lowest may lie below, at sigma = 0.",
        )
        points = check(
            points,
            (points[0] != t_start) | (points[-1] != t_end),
            "Given was asked for other ends than its own: leave t_start and t_end out, or give the "
            "first and last of its times.",
        )
        return points[1:-1]
