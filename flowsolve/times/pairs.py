r"""Pairs of training times $t \ge r$, for losses of flow maps and of consistency.

| pairs | r | trains |
|---|---|---|
| `TimePairs` | another draw | `losses.MeanFlow`, `losses.InductiveMomentMatching` |
| `DyadicPairs` | a power of 2 below | `losses.Shortcut` |
| `GridNeighbours` | the next point of a grid | `losses.Consistency` |
| `Tightening` | a part of t, ever closer | `losses.Consistency` |
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check, check_count, check_key, check_positive, check_type, is_concrete, known
from .._numerics import as_scalar
from .._types import PRNGKey, Scalar, ScalarLike
from ..paths import AbstractPath
from .base import AN_INSTANCE, AbstractTimes, as_probability, between, time_of
from .distributions import LogNormal, Uniform

__all__ = ["AbstractTimePairs", "DyadicPairs", "GridNeighbours", "Tightening", "TimePairs", "doubling_points"]


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
        check_type(first, AbstractTimes, "first", AN_INSTANCE)
        self.first = first
        self.second = first if second is None else second
        check_type(self.second, AbstractTimes, "second", AN_INSTANCE)
        self.equal = as_probability(equal, "TimePairs got equal")

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
        check_type(self.times, AbstractTimes, "times", AN_INSTANCE)
        self.equal = as_probability(equal, "DyadicPairs got equal")

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
            low, high = (time_of(path, end / count.astype(t.dtype)) for end in (place, place + 1))
            return jnp.where(same, t, high), jnp.where(same, t, low)

        return jax.vmap(pair)(jnp.arange(num), velocity_times)


class GridNeighbours(AbstractTimePairs):
    r"""Two neighbouring points t > r of a grid of N: of the interval that a draw from a distribution of times falls in.

    The points are equally spaced in $n^{1/\rho}$, $n = \sigma/\alpha$, from `t_data` to `t_noise`, which are themselves
    points. The probability of an interval is that of the distribution between its ends; for a `LogNormal`, up to a
    factor, $\mathrm{erf}\frac{\ln n_{i+1} - m}{\sqrt2 s} - \mathrm{erf}\frac{\ln n_i - m}{\sqrt2 s}$.

    **Arguments:**

    - `points`: N >= 2, an array: a new number does not retrace. See `doubling_points`;
    - `times`: the distribution, `LogNormal(-1.1, 2.0)` by default;
    - `rho`: a larger one makes smaller steps at low noise;
    - `sigma_min`, `sigma_max`: the levels sigma/alpha that stand for ends of ratio 0 and infinity in the spacing; not
      used where the ratio is finite.

    Each example is drawn for by itself, unless the distribution is stratified.

    **Raises:** `TypeError` for what is no distribution; `ValueError` for fewer than two points, and for a rho or a
    level that is not positive.

    Source: Song & Dhariwal (2023), arXiv 2310.14189; Karras et al. (2022), arXiv 2206.00364, for the grid. Deviation:
    any path and distribution; no table of N probabilities is made.
    """

    points: Scalar = eqx.field(converter=as_scalar)
    times: AbstractTimes = eqx.field(default_factory=lambda: LogNormal(-1.1, 2.0))
    rho: Scalar = eqx.field(default=7.0, converter=as_scalar)
    sigma_min: Scalar = eqx.field(default=0.002, converter=as_scalar)
    sigma_max: Scalar = eqx.field(default=80.0, converter=as_scalar)

    def __check_init__(self):
        check_type(self.times, AbstractTimes, "times", AN_INSTANCE)
        check_positive(self, "rho", "sigma_min", "sigma_max")
        if is_concrete(self.points) and not (float(self.points) >= 2 and float(self.points).is_integer()):
            raise ValueError(f"GridNeighbours got points = {float(self.points):g}, but wants an integer of at least 2.")

    def sample(
        self, path: AbstractPath, key: PRNGKey, num: int
    ) -> tuple[Float[Array, " {num}"], Float[Array, " {num}"]]:
        low, high = self._root(path, as_scalar(path.t_data)), self._root(path, as_scalar(path.t_noise))
        steps = self.points - 1

        def point(index: Scalar) -> Scalar:
            root = between(low, high, index / steps)
            inner = path.time_at(jnp.ones_like(root), root**self.rho)
            outer = jnp.where(index == 0, as_scalar(path.t_data), as_scalar(path.t_noise))
            return jnp.where((index == 0) | (index == steps), outer, inner)

        def neighbours(t: Scalar) -> tuple[Scalar, Scalar]:
            place = steps * (self._root(path, t) - low) / (high - low)
            index = jnp.clip(jnp.floor(place), 0, steps - 1)
            return point(index + 1), point(index)

        return jax.vmap(neighbours)(self.times.sample(path, key, num))

    def _root(self, path: AbstractPath, t: Scalar) -> Scalar:
        """(sigma/alpha)^(1/rho), with the levels that stand for 0 and infinity."""
        alpha, sigma = path.coefficients(t)
        ratio = jnp.where(alpha == 0, self.sigma_max, sigma / jnp.where(alpha == 0, 1, alpha))
        return jnp.where(sigma == 0, self.sigma_min, ratio) ** (1 / self.rho)


def doubling_points(fraction: ScalarLike, *, first: int = 10, last: int = 1280) -> Scalar:
    r"""The points N of `GridNeighbours` at a fraction of the training, of a curriculum that doubles its intervals.

    $$N = \min(s_0 2^{\lfloor p\,(\lfloor\log_2 s_1/s_0\rfloor + 1)\rfloor}, s_1) + 1$$

    **Arguments:** `fraction`: p, steps done over steps in all, from 0 to 1; `first`, `last`: s_0 <= s_1, the intervals
    at the beginning and at the end.

    **Returns:** a scalar.

    **Raises:** `ValueError` for a fraction outside of [0, 1], or intervals that are not 1 <= s_0 <= s_1.

    Source: Song & Dhariwal (2023), arXiv 2310.14189.
    """
    if not 1 <= first <= last:
        raise ValueError(f"doubling_points got first = {first} and last = {last}, but wants 1 <= first <= last.")
    stages = (last // first).bit_length()
    fraction = as_scalar(fraction)
    shown = known(fraction)
    fraction = check(
        fraction,
        ~((shown >= 0) & (shown <= 1)),
        "doubling_points got fraction = {}, but wants the part of the training that is done, from 0 to 1.",
        fraction,
    )
    # A fraction k/K is rounded: at the first step of a stage it must not fall short of it.
    stage = jnp.floor(fraction * stages * (1 + 2 * jnp.finfo(fraction.dtype).eps))
    return jnp.minimum(first * 2.0**stage, last) + 1


class Tightening(AbstractTimePairs):
    r"""A time t and an earlier r that draws near to it from stage to stage.

    In the noise level $n = \sigma/\alpha$,

    $$n_r = n_t \max\big(1 - q^{-a} (1 + k\,\mathrm{sigmoid}(-b\, n_t)),\; 0\big)$$

    but at least that of `t_data`: in stage a = 0 every r is the end itself, where the target is the data. At alpha = 0
    both are one.

    **Arguments:**

    - `stage`: a >= 0, an array: a new number does not retrace;
    - `times`: the distribution of t, `LogNormal(-1.1, 2.0)` by default;
    - `q`: > 1, by what the distance falls in a stage; `k`, `b`: by how much it is larger at low noise, and how low.

    Each example is drawn for by itself, unless the distribution is stratified.

    **Raises:** `TypeError` for what is no distribution; `ValueError` for numbers out of range.

    Source: Geng et al. (2024), arXiv 2406.14548, where alpha = 1.
    """

    stage: Scalar = eqx.field(converter=as_scalar)
    times: AbstractTimes = eqx.field(default_factory=lambda: LogNormal(-1.1, 2.0))
    q: Scalar = eqx.field(default=2.0, converter=as_scalar)
    k: Scalar = eqx.field(default=8.0, converter=as_scalar)
    b: Scalar = eqx.field(default=1.0, converter=as_scalar)

    def __check_init__(self):
        check_type(self.times, AbstractTimes, "times", AN_INSTANCE)
        check_positive(self, "b")
        for name, value in (("stage", self.stage), ("k", self.k)):
            if is_concrete(value) and not 0 <= float(value) < math.inf:
                raise ValueError(f"Tightening got {name} = {float(value):g}, but wants it >= 0 and finite.")
        if is_concrete(self.q) and not 1 < float(self.q) < math.inf:
            raise ValueError(f"Tightening got q = {float(self.q):g}, but wants it > 1 and finite.")

    def sample(
        self, path: AbstractPath, key: PRNGKey, num: int
    ) -> tuple[Float[Array, " {num}"], Float[Array, " {num}"]]:
        t = self.times.sample(path, key, num)
        return t, jax.vmap(lambda t: self._earlier(path, t))(t)

    def _earlier(self, path: AbstractPath, t: Scalar) -> Scalar:
        alpha, sigma = path.coefficients(t)
        step = self.q**-self.stage * (1 + self.k * jax.nn.sigmoid(-self.b * sigma / alpha))
        alpha_data, sigma_data = path.coefficients(as_scalar(path.t_data))
        wanted, end = (1 - step) * sigma, alpha * sigma_data / alpha_data
        # Below its own end a path has no times.
        r = path.time_at(alpha, jnp.maximum(wanted, end))
        return jnp.where(wanted > end, jnp.clip(r, as_scalar(path.t_data), t), as_scalar(path.t_data))
