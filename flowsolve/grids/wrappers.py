"""Grids made from another grid: shifted in time, or with a last step onto the clean data."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_positive, check_type
from .._numerics import as_scalar
from .._types import Scalar, ScalarLike
from ..paths import AbstractPath
from ..times import shift_on_path
from .base import AbstractGrid, own_or_asked

__all__ = ["Shifted", "ThenClean"]


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
        check_type(self.grid, AbstractGrid, "Shifted's grid", "an instance such as grids.Uniform(8)")
        check_positive(self, "shift")

    @property
    def steps(self) -> int:
        """The steps of the grid inside."""
        return self.grid.steps

    def ends(
        self, path: AbstractPath, t_start: ScalarLike | None = None, t_end: ScalarLike | None = None
    ) -> tuple[Scalar, Scalar]:
        """Those of the grid inside."""
        return self.grid.ends(path, t_start, t_end)

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

    def __check_init__(self):
        check_type(self.grid, AbstractGrid, "ThenClean's grid", "an instance such as grids.Karras(8)")

    @property
    def steps(self) -> int:
        """The steps in total, as many as those of the grid inside."""
        return self.grid.steps

    def ends(
        self, path: AbstractPath, t_start: ScalarLike | None = None, t_end: ScalarLike | None = None
    ) -> tuple[Scalar, Scalar]:
        """The start of the grid inside, and `t_clean`."""
        return self.grid.ends(path, t_start)[0], own_or_asked(self.t_clean, t_end)

    def inner(self, path: AbstractPath, t_start: Scalar, t_end: Scalar, steps: int) -> Float[Array, " {steps}-1"]:
        del t_end
        t_data = as_scalar(path.t_data)
        if steps == 1:
            return jnp.zeros((0,), t_data.dtype)
        inner = self.grid.inner(path, t_start, t_data, steps - 1)
        return jnp.concatenate([inner, t_data[None]])
