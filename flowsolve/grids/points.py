r"""Grids of fixed points: the user's own, and the integer timesteps of a discrete diffusion.

A `Discrete` path of T timesteps has its timestep $k = 0..T-1$ at the time $t = (k + 1)/T$. A grid of n of them is n
evaluations of the network, at the times of $k_1 > \dots > k_n$, and a last step onto the clean data at t = 0: n steps,
n + 1 points. With $j = n - 1, \dots, 0$:

| grid | k |
|---|---|
| Leading | $j \lfloor T/n \rfloor$ |
| Trailing | $\mathrm{round}((j + 1)\, T/n) - 1$ |
| Linspace | $\mathrm{round}(1 + j\, (T - 1)/(n - 1)) - 1$ |
| Quadratic | $\lfloor c\, T\, j^2/(n - 1)^2 \rfloor$, c = 0.8 |
"""

import abc
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._checks import check, known
from .._numerics import as_scalar
from .._types import Scalar, ScalarLike
from ..paths import AbstractPath, Discrete
from .base import AbstractGrid, as_steps, own_or_asked

__all__ = ["AbstractTimesteps", "Given", "Leading", "Linspace", "Quadratic", "Trailing"]


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
        shown = known(points)
        differences = shown[1:] - shown[:-1]
        self.ts = check(
            points,
            ~((differences > 0).all() | (differences < 0).all()),
            "Given got times that are not strictly monotone (repeated, unsorted or NaN): sort them "
            "and leave repeats out.",
        )

    @property
    def steps(self) -> int:
        """One less than the points."""
        return len(self.ts) - 1

    def ends(
        self, path: AbstractPath, t_start: ScalarLike | None = None, t_end: ScalarLike | None = None
    ) -> tuple[Scalar, Scalar]:
        """The first and the last of the times."""
        start, end = own_or_asked(self.ts[0], t_start), own_or_asked(self.ts[-1], t_end)
        return self._checked(start, path, jnp.maximum(start, end), jnp.minimum(start, end)), end

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        if steps != self.steps:
            raise ValueError(
                f"Given has {self.steps} steps and cannot take {steps}: put the clean time into ts "
                "instead of wrapping it in ThenClean."
            )
        return self._checked(self._descending(), path, t_start, t_end)[1:-1]

    def _descending(self) -> Float[Array, " points"]:
        return jnp.where(self.ts[0] > self.ts[-1], self.ts, self.ts[::-1])

    def _checked(self, value: Array, path: AbstractPath, high: Scalar, low: Scalar) -> Array:
        """`value`; raise unless the times lie on the path and their ends are those asked for."""
        points = self._descending()
        t_data, t_noise = as_scalar(path.t_data), as_scalar(path.t_noise)
        clean = path.coefficients(points[-1])[1] == 0
        value = check(
            value,
            (points[0] > t_noise) | (points[-2] < t_data) | ((points[-1] < t_data) & ~clean),
            f"Given has times outside {type(path).__name__}'s ends t_data and t_noise: keep them "
            "inside; only the lowest may lie below, at sigma = 0.",
        )
        return check(
            value,
            (points[0] != high) | (points[-1] != low),
            "Given was asked for other ends than its own: leave t_start and t_end out, or give the "
            "first and last of its times.",
        )


class AbstractTimesteps(AbstractGrid):
    """n integer timesteps of a `Discrete` path, and a last step from the smallest of them onto the clean data.

    The ends are those of the grid, from the time of its largest timestep to t = 0; the caller's `t_start` and `t_end`
    must be None or these, in either order.

    **Raises:** `TypeError` on a path that is not `Discrete`; `ValueError` for more steps than timesteps, timesteps
    outside the path's ends, or other ends.
    """

    @abc.abstractmethod
    def table(self, total: int) -> Int[np.ndarray, " {self.steps}"]:
        """The timesteps k of a diffusion of `total` timesteps, descending, for steps <= total."""

    def timesteps(self, path: AbstractPath) -> Int[np.ndarray, " {self.steps}"]:
        """The integer timesteps k at which the network is evaluated on `path`, descending."""
        return self.table(self._total(path))

    def ends(
        self, path: AbstractPath, t_start: ScalarLike | None = None, t_end: ScalarLike | None = None
    ) -> tuple[Scalar, Scalar]:
        """The time of the largest timestep, and 0."""
        start, end = own_or_asked(self._times(path)[0], t_start), own_or_asked(0.0, t_end)
        return self._checked(start, path, jnp.maximum(start, end), jnp.minimum(start, end)), end

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        if steps != self.steps:
            raise ValueError(
                f"{type(self).__name__} has {self.steps} steps and cannot take {steps}: its last step goes onto the "
                "clean data already, so leave ThenClean out."
            )
        return self._checked(self._times(path), path, t_start, t_end)[1:]

    def _checked(self, value: Array, path: AbstractPath, high: Scalar, low: Scalar) -> Array:
        """`value`; raise unless the timesteps lie on the path and the ends asked for are the grid's."""
        name = type(self).__name__
        times = self._times(path)
        value = check(
            value,
            (times[0] > as_scalar(path.t_noise)) | (times[-1] < as_scalar(path.t_data)),
            f"{name} has timesteps outside the path's ends t_data and t_noise: leave Discrete's own, 1/T and 1, or "
            "take a grid in time, e.g. Uniform.",
        )
        return check(
            value,
            (high != times[0]) | (low != 0),
            f"{name} was asked for other ends than its own, the time of timestep {self.timesteps(path)[0]} and t = 0: "
            "leave t_start and t_end out, or give these two.",
        )

    def _total(self, path: AbstractPath) -> int:
        name = type(self).__name__
        if not isinstance(path, Discrete):
            raise TypeError(
                f"{name} got the path {type(path).__name__}, but places integer timesteps, which only Discrete has: "
                "give the flow a Discrete path, or take a grid in time, e.g. Uniform."
            )
        total = len(path.betas)
        if self.steps > total:
            raise ValueError(
                f"{name} got steps = {self.steps} on a Discrete path of {total} timesteps, but visits each at most "
                f"once: ask for {total} steps or fewer."
            )
        return total

    def _times(self, path: AbstractPath) -> Float[Array, " {self.steps}"]:
        return jnp.asarray((self.timesteps(path) + 1) / self._total(path), float)


def _descending(steps: int) -> Float[np.ndarray, " {steps}"]:
    """n - 1, ..., 0 as exact floats; for a single step the last of a range, 1 out of 0..1."""
    return np.linspace(max(steps - 1, 1), 0, steps)


class Leading(AbstractTimesteps):
    """Timesteps floor(T/n) apart from k = 0 up: the "uniform" spacing of DDIM's and PNDM's code.

    The largest is below T - 1, so that sampling starts short of the path's noise end; a single step starts at k = 0.

    **Arguments:** `steps`: the number of steps n, at most T.

    Source: Song, Meng & Ermon (2020), arXiv 2010.02502; Lin et al. (2023), arXiv 2305.08891, table 2. Deviation: the
    first n of their timesteps, which are more than n where n does not divide T.
    """

    steps: int = eqx.field(static=True, converter=as_steps)

    def table(self, total: int) -> Int[np.ndarray, " {self.steps}"]:
        return np.arange(self.steps)[::-1] * (total // self.steps)


class Trailing(AbstractTimesteps):
    """Timesteps T/n apart from k = T - 1 down: round(j T/n) - 1, j = n..1, halves to even.

    **Arguments:** `steps`: the number of steps n, at most T.

    Source: Lin et al. (2023), arXiv 2305.08891, table 2.
    """

    steps: int = eqx.field(static=True, converter=as_steps)

    def table(self, total: int) -> Int[np.ndarray, " {self.steps}"]:
        return np.round(total * np.arange(self.steps, 0, -1) / self.steps).astype(int) - 1


class Linspace(AbstractTimesteps):
    """Equally spaced timesteps from k = T - 1 to k = 0: round(1 + j (T - 1)/(n - 1)) - 1, j = n - 1..0, halves to even.

    A single step starts at T - 1.

    **Arguments:** `steps`: the number of steps n, at most T.

    Source: Nichol & Dhariwal (2021), arXiv 2102.09672; Lin et al. (2023), arXiv 2305.08891, table 2.
    """

    steps: int = eqx.field(static=True, converter=as_steps)

    def table(self, total: int) -> Int[np.ndarray, " {self.steps}"]:
        place = _descending(self.steps)
        return np.round(1 + (total - 1) * place / place[0]).astype(int) - 1


def _as_share(scale: float | int | np.number) -> float:
    if not isinstance(scale, float | int | np.number) or not 0 < scale < 1:
        raise ValueError(
            f"Quadratic got scale = {scale!r}, but wants a plain number above 0 and below 1: the largest "
            "timestep over T."
        )
    return float(scale)


class Quadratic(AbstractTimesteps):
    """Timesteps that grow as a square, dense near the data: floor(scale T j^2/(n - 1)^2), j = n - 1..0.

    A single step starts at floor(scale T).

    **Arguments:** `steps`: the number of steps n, at most T; `scale`: the largest timestep over T, above 0 and below
    1, a plain number.

    Source: Song, Meng & Ermon (2020), arXiv 2010.02502, with the 0.8 of its code. Deviation: where many steps would
    repeat a small timestep, the j-th smallest is at least j, so that n steps are n evaluations.
    """

    steps: int = eqx.field(static=True, converter=as_steps)
    scale: float = eqx.field(default=0.8, static=True, converter=_as_share)

    def table(self, total: int) -> Int[np.ndarray, " {self.steps}"]:
        place = _descending(self.steps)
        squares = np.floor(self.scale * total * place**2 / place[0] ** 2).astype(int)
        return np.maximum(squares, np.arange(self.steps)[::-1])
