"""What a law of training times is: a quantile function on a path, between bounds. And the shift of a time."""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check, check_count, check_key, known
from .._numerics import as_scalar
from .._types import PRNGKey, Scalar, ScalarLike
from ..paths import AbstractPath

__all__ = ["AbstractBoundedTimes", "AbstractTimes", "resolution_shift", "shift_on_path", "shift_time"]

AN_INSTANCE = "an instance such as times.Uniform()"


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
    return time_of(path, shift_time(place_of(path, as_scalar(t)), shift))


def resolution_shift(dim: int, base: int = 4096) -> float:
    """The shift k = sqrt(dim/base) for examples of `dim` elements, 1 at `base` elements.

    Source: Esser et al. (2024), arXiv 2403.03206.
    """
    if not (dim > 0 and base > 0):
        raise ValueError(f"resolution_shift got dim = {dim} and base = {base}, but wants both positive.")
    return math.sqrt(dim / base)


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
        return independent(key, num)

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


def independent(key: PRNGKey, num: int) -> Float[Array, " {num}"]:
    def draw(i: Array) -> Scalar:
        u = jax.random.uniform(jax.random.fold_in(key, i), dtype=float)
        # From the multiples of eps in [0, 1) to the midpoints between them: never 0, never 1.
        return u + 0.5 * jnp.finfo(u.dtype).eps

    return jax.vmap(draw)(jnp.arange(num))


def between(low: Scalar, high: Scalar, fraction: Scalar) -> Scalar:
    """From `low` at 0 to `high` at 1, exact at both."""
    return low * (1 - fraction) + high * fraction


def place_of(path: AbstractPath, t: Scalar) -> Scalar:
    t_data, t_noise = as_scalar(path.t_data), as_scalar(path.t_noise)
    return (t - t_data) / (t_noise - t_data)


def time_of(path: AbstractPath, place: Scalar) -> Scalar:
    return between(as_scalar(path.t_data), as_scalar(path.t_noise), place)


def as_probability(value: ScalarLike, what: str) -> Scalar:
    probability = as_scalar(value)
    chance = known(probability)
    bad = ~((chance >= 0) & (chance <= 1))
    return check(probability, bad, f"{what} = {{}}, but wants a probability from 0 to 1.", probability)
