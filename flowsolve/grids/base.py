"""What a grid is: n + 1 strictly monotone times between two ends, which are exactly the times asked for."""

import abc

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import check
from .._numerics import as_scalar
from .._types import Scalar, ScalarLike
from ..paths import AbstractPath

__all__ = ["AbstractGrid", "AbstractPathGrid"]


class AbstractGrid(eqx.Module):
    """A rule for n + 1 times between two ends."""

    #: The number of steps n, static.
    steps: eqx.AbstractVar[int]

    @abc.abstractmethod
    def ends(
        self, path: AbstractPath, t_start: ScalarLike | None = None, t_end: ScalarLike | None = None
    ) -> tuple[Scalar, Scalar]:
        """(t_start, t_end), with the grid's own where the caller gives none; raise if it cannot have these."""

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
        start, end = self.ends(path, t_start, t_end)
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

    def ends(
        self, path: AbstractPath, t_start: ScalarLike | None = None, t_end: ScalarLike | None = None
    ) -> tuple[Scalar, Scalar]:
        """t_noise and t_data of the path."""
        return own_or_asked(path.t_noise, t_start), own_or_asked(path.t_data, t_end)


def own_or_asked(own: ScalarLike, asked: ScalarLike | None) -> Scalar:
    """The end that was asked for, or the grid's own."""
    return as_scalar(own if asked is None else asked)


def as_steps(steps: int | np.integer) -> int:
    # NumPy's integers too, so that np.arange can be swept over.
    if isinstance(steps, bool | np.bool_) or not isinstance(steps, int | np.integer):
        raise TypeError(f"A grid got steps = {steps!r}, but wants a plain int: the number of steps, at least 1.")
    if steps < 1:
        raise ValueError(f"A grid got steps = {steps}, but wants at least 1.")
    return int(steps)


def inner_fractions(steps: int) -> Float[Array, " {steps}-1"]:
    """i/n for i = 1..n-1."""
    return jnp.arange(1, steps, dtype=float) / steps


def inner_rests(steps: int) -> Float[Array, " {steps}-1"]:
    """1 - i/n for i = 1..n-1, each to the last bit."""
    return inner_fractions(steps)[::-1]
