r"""Losses of flow maps: a network of the average velocity, trained from scratch, without a teacher.

The average velocity u of a flow (see `flowmaps`) obeys two identities, whose right-hand sides are the targets of two
losses, with a stop-gradient on them. By differentiating $(t - r)\, u = \int_r^t v$ in t along the flow,

$$u(t, r, x_t) = v(t, x_t) - (t - r)\, \frac{d}{dt} u(t, r, x_t), \qquad
  \frac{du}{dt} = v \cdot \partial_x u + \partial_t u \qquad \text{(`MeanFlow`)}$$

one forward derivative (jvp) of the network along (v, 1); and by cutting the interval at its middle m,

$$u(t, r, x_t) = \tfrac12 \big(u(t, m, x_t) + u(m, r, x_m)\big), \qquad x_m = x_t - (t - m)\, u(t, m, x_t)
  \qquad \text{(`Shortcut`)} .$$

In both the velocity of a pair, $\alpha' x_0 + \sigma' \epsilon$, stands for v: the targets are linear in it, so that
their mean given x_t is right. At r = t both are flow matching.
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Real

from .._checks import check_positive, check_type, is_concrete
from .._features import jvp, without_features
from .._numerics import as_scalar, frozen, is_zero, linear_combination, optional_scalar
from .._types import Args, PRNGKey, Scalar, ScalarLike, State
from ..couplings import AbstractCoupling, Independent
from ..flowmaps import FlowMap
from ..times import AbstractTimePairs, DyadicPairs, LogitNormal, TimePairs
from .batch import Aux, ConditionDropout, as_null, check_like_null, check_pairing, mean_of, over_batch
from .elementwise import squared
from .regression import check_source

__all__ = ["AbstractFlowMapLoss", "MeanFlow", "MeanFlowGuidance", "Shortcut"]


class AbstractFlowMapLoss(eqx.Module):
    """A regression of a flow map's average velocity on a target that the map itself gives."""

    times: eqx.AbstractVar[AbstractTimePairs]
    coupling: eqx.AbstractVar[AbstractCoupling]
    dropout: eqx.AbstractVar[ConditionDropout | None]

    @abc.abstractmethod
    def error(
        self,
        flow: FlowMap,
        x0: State,
        args: Args = None,
        *,
        t: ScalarLike,
        r: ScalarLike,
        noise: State,
        key: PRNGKey | None = None,
    ) -> tuple[State, State]:
        """(u, u - target) of one example, with a stop-gradient on the target: the equation.

        **Arguments:** `flow`; `x0`, `noise`: one example and its noise, alike; `args`, `key`: the network's; `t`, `r`:
        the times, r <= t.
        """

    @abc.abstractmethod
    def weight(self, mean_square: Scalar, count: Scalar) -> Scalar:
        """The weight of an example whose error has this mean square over `count` elements."""

    def target(
        self,
        flow: FlowMap,
        x0: State,
        args: Args = None,
        *,
        t: ScalarLike,
        r: ScalarLike,
        noise: State,
        key: PRNGKey | None = None,
    ) -> State:
        """What the average velocity of one example is regressed on; arguments as in `error`."""
        return linear_combination((1, -1), self.error(flow, x0, args, t=t, r=r, noise=noise, key=key))

    def one(
        self,
        flow: FlowMap,
        x0: State,
        args: Args = None,
        *,
        t: ScalarLike,
        r: ScalarLike,
        noise: State,
        key: PRNGKey | None = None,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> Scalar:
        """The loss of one example at given times and noise; `mask` as in `Regression.one`."""
        _, error = self.error(flow, x0, args, t=t, r=r, noise=noise, key=key)
        mean = mean_of(squared, jnp.ones_like(as_scalar(t)), error, mask)
        counted = jax.tree.map(jnp.size, error) if mask is None else jax.tree.map(jnp.sum, mask)
        count = as_scalar(sum(jax.tree.leaves(counted)))
        return jax.lax.stop_gradient(self.weight(mean, count)) * mean

    def __call__(
        self,
        flow: FlowMap,
        x0: State,
        args: Args = None,
        *,
        key: PRNGKey,
        example_weight: Real[Array, " batch"] | None = None,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> tuple[Scalar, Aux]:
        """The loss of a batch and the terms it is made of, as in `Regression`; `Aux.t` are the later times.

        **Raises:** as there; `TypeError` for a flow that is no `FlowMap`.
        """
        check_type(flow, FlowMap, "flow", "a fs.flowmaps.FlowMap(network, path)")

        def one(
            x0: State, noise: State, args: Args, times: tuple[Scalar, Scalar], key: PRNGKey, mask: PyTree | None
        ) -> Scalar:
            t, r = times
            return self.one(flow, x0, args, t=t, r=r, noise=noise, key=key, mask=mask)

        check_source(flow, x0, self.coupling)
        return over_batch(
            one,
            flow.path,
            self.times,
            self.coupling,
            flow.source.sample,
            x0,
            args,
            key=key,
            example_weight=example_weight,
            mask=mask,
            dropout=self.dropout,
        )


class MeanFlowGuidance(eqx.Module):
    r"""Guidance that a `MeanFlow` is trained with, so that a sample costs one evaluation a step with it, too.

    In place of the velocity v of a pair stands

    $$\hat v = \omega\, v + \kappa\, u(t, t, x_t | y) + (1 - \omega - \kappa)\, u(t, t, x_t | \mathrm{null})$$

    whose fixed point is the velocity guided at the scale $\omega/(1 - \kappa)$ (1 is conditional). An example whose
    condition is the null, by `ConditionDropout` for instance, keeps v.

    **Arguments:**

    - `null`: the `args` of ONE example that stand for no condition;
    - `omega`: the weight of the pair's velocity; `kappa`: that of the network's own conditional one, below 1: 0, the
      default, leaves that evaluation out;
    - `low`, `high`: the times between which there is guidance, the path's ends by default.

    **Raises:** `ValueError` for a null without arrays and for kappa >= 1.

    Source: Geng et al. (2025), arXiv 2505.13447.
    """

    null: Args
    omega: Scalar
    kappa: Scalar | int
    low: Scalar | None
    high: Scalar | None

    def __init__(
        self,
        null: Args,
        omega: ScalarLike,
        kappa: ScalarLike = 0,
        *,
        low: ScalarLike | None = None,
        high: ScalarLike | None = None,
    ):
        self.null = as_null(null, "MeanFlowGuidance")
        self.omega = as_scalar(omega)
        # The number 0 stays a number: then the conditional evaluation has no say.
        self.kappa = 0 if is_zero(kappa) else as_scalar(kappa)
        self.low, self.high = optional_scalar(low), optional_scalar(high)
        ends = [end for end in (self.low, self.high) if end is not None]
        if len(ends) == 2 and is_concrete(ends) and not float(ends[0]) < float(ends[1]):
            raise ValueError(
                f"MeanFlowGuidance got low = {float(ends[0]):g} and high = {float(ends[1]):g}, but wants low < high."
            )
        if is_concrete(self.kappa) and not float(self.kappa) < 1:
            raise ValueError(
                f"MeanFlowGuidance got kappa = {float(self.kappa):g}, but wants it below 1: the scale of guidance is "
                "omega/(1 - kappa)."
            )

    def velocity(
        self, flow: FlowMap, velocity: State, t: Scalar, x: State, args: Args, *, key: PRNGKey | None
    ) -> State:
        """v-hat from the velocity of a pair, one example."""
        check_like_null(args, self.null, "MeanFlowGuidance")
        weights: tuple[ScalarLike, ...] = (self.omega, 1 - self.omega - self.kappa)
        parts = (velocity, flow.velocity(t, x, self.null, key=key))
        if not isinstance(self.kappa, int):
            weights, parts = (*weights, self.kappa), (*parts, flow.velocity(t, x, args, key=key))
        guided = linear_combination(weights, parts)
        same = jax.tree.map(lambda own, null: jnp.all(own == null), args, self.null)
        off = jnp.all(jnp.stack(jax.tree.leaves(same)))
        off = off if self.low is None else off | (t < self.low)
        off = off if self.high is None else off | (t > self.high)
        return jax.tree.map(lambda plain, mixed: jnp.where(off, plain, mixed), velocity, guided)


class MeanFlow(AbstractFlowMapLoss):
    r"""MeanFlow: the average velocity by its derivative along the flow.

    With $\Delta = u - \mathrm{sg}\big(\hat v - (t - r)\, du/dt\big)$ the loss of an example is

    $$\mathrm{sg}\Big(\big(|\Delta|^2 + \mathrm{eps}\big)^{-\mathrm{power}}\Big)\; \mathrm{mean}_i\, \Delta_i^2$$

    with $|\Delta|^2$ the sum over all elements and $\hat v$ the velocity of the pair, or that of `guidance`.

    **Arguments:**

    - `times`: the law of (t, r); by default logit-normal(-0.4, 1) twice, with r = t in 3 of 4 examples;
    - `power`, `eps`: of the adaptive weight; power 0 is the plain square, and then r = t is `Regression`, to the last
      bit where the times are the same;
    - `guidance`: None, or `MeanFlowGuidance`;
    - `predicted_tangent`: whether du/dt is taken along the network's own velocity u(t, t, x_t) (Geng et al., 2025b) in
      place of that of the pair: less noise, for one evaluation more;
    - `coupling`, `dropout`: as in `Regression`.

    One step costs a forward and a backward pass and one forward derivative. A power above 0 favours pairs of small
    errors, so that the optimum is not the mean: over few elements a second jump then does not improve on the first, see
    `docs/benchmarks/few_steps.md`.

    Source: Geng et al. (2025), arXiv 2505.13447; Geng et al. (2025b), arXiv 2512.02012, for the predicted tangent.
    Deviation: the mean over elements, where the paper writes the sum: with d elements and power 1 the loss is about
    1/d.
    """

    times: AbstractTimePairs = eqx.field(default_factory=lambda: TimePairs(LogitNormal(-0.4, 1.0)))
    power: Scalar = eqx.field(default=1.0, converter=as_scalar)
    eps: Scalar = eqx.field(default=1e-3, converter=as_scalar)
    guidance: MeanFlowGuidance | None = None
    predicted_tangent: bool = eqx.field(default=False, static=True)
    coupling: AbstractCoupling = Independent()
    dropout: ConditionDropout | None = None

    def __check_init__(self):
        _check_fields(self)
        check_positive(self, "eps")
        if is_concrete(self.power) and not 0 <= float(self.power) < math.inf:
            raise ValueError(f"MeanFlow got power = {float(self.power):g}, but wants it >= 0 and finite.")
        if self.guidance is not None:
            check_type(self.guidance, MeanFlowGuidance, "guidance", "None or fs.losses.MeanFlowGuidance(null, 2.0)")

    def weight(self, mean_square: Scalar, count: Scalar) -> Scalar:
        return jnp.exp(-self.power * jnp.log(mean_square * count + self.eps))

    def error(
        self,
        flow: FlowMap,
        x0: State,
        args: Args = None,
        *,
        t: ScalarLike,
        r: ScalarLike,
        noise: State,
        key: PRNGKey | None = None,
    ) -> tuple[State, State]:
        t, r = as_scalar(t), as_scalar(r)
        x = flow.path.interpolate(t, x0, noise)
        a, b, _ = flow.prediction.coefficients(flow.path, t)
        velocity = tangent = linear_combination((a, b), (x0, noise))
        own = frozen(flow)
        if self.guidance is not None:
            guidance = self.guidance
            tangent = without_features(lambda: guidance.velocity(own, velocity, t, x, args, key=key))
        along = tangent
        if self.predicted_tangent:
            along = without_features(lambda: own.velocity(t, x, args, key=key))

        def average(t: Scalar, x: State) -> State:
            return flow.average_velocity(t, r, x, args, key=key)

        u, du = jvp(average, (t, x), (jnp.ones_like(t), along))
        # Not u - tangent: in this order it rounds as `Regression` does.
        error = linear_combination((1, -a, -b), (u, x0, noise))
        if self.guidance is not None:
            error = jax.tree.map(lambda e, v, guided: e + (v - guided), error, velocity, tangent)
        du = jax.tree.map(lambda leaf: jnp.where(t == r, 0, jax.lax.stop_gradient(leaf)), du)
        return u, linear_combination((1, t - r), (error, du))


class Shortcut(AbstractFlowMapLoss):
    """Shortcut models: one step over an interval as two over its halves.

    **Arguments:**

    - `times`: the law of (t, r); by default `times.DyadicPairs(128)`, intervals of 2/128, 4/128, ..., 1 of the path,
      and r = t in 3 of 4 examples, which are flow matching;
    - `finest`: halves of at most this part of the path are taken for no interval at all: their average velocity is the
      velocity, which nothing else ties to the intervals. None: 1/steps of `DyadicPairs(steps)`, 1/128 for other times;
    - `coupling`, `dropout`: as in `Regression`.

    One step costs a forward and a backward pass and two forward passes.

    Source: Frans et al. (2024), arXiv 2410.12557. Deviations: every example pays for both targets, of which it takes
    one; targets come from the network that is trained, not from its moving average.
    """

    times: AbstractTimePairs = eqx.field(default_factory=lambda: DyadicPairs(128))
    finest: Scalar | None = eqx.field(default=None, converter=optional_scalar)
    coupling: AbstractCoupling = Independent()
    dropout: ConditionDropout | None = None

    def __check_init__(self):
        _check_fields(self)
        finest = self._finest
        if not is_concrete(finest):
            return
        if not 0 <= float(finest) < 1:
            raise ValueError(f"Shortcut got finest = {float(finest):g}, but wants a part of the path, 0 to 1.")
        if isinstance(self.times, DyadicPairs) and float(finest) * self.times.steps < 0.999:
            raise ValueError(
                f"Shortcut got finest = {float(finest):g} with DyadicPairs({self.times.steps}), whose halves of "
                f"1/{self.times.steps} would be targets that nothing trains: leave finest out."
            )

    @property
    def _finest(self) -> Scalar:
        if self.finest is not None:
            return self.finest
        return as_scalar(1 / (self.times.steps if isinstance(self.times, DyadicPairs) else 128))

    def weight(self, mean_square: Scalar, count: Scalar) -> Scalar:
        del count
        return jnp.ones_like(mean_square)

    def error(
        self,
        flow: FlowMap,
        x0: State,
        args: Args = None,
        *,
        t: ScalarLike,
        r: ScalarLike,
        noise: State,
        key: PRNGKey | None = None,
    ) -> tuple[State, State]:
        t, r = as_scalar(t), as_scalar(r)
        path = flow.path
        x = path.interpolate(t, x0, noise)
        u = flow.average_velocity(t, r, x, args, key=key)
        own = frozen(flow)
        middle = 0.5 * (t + r)
        # Times are rounded: an interval is not exactly two of the finest.
        short = t - middle <= 1.001 * self._finest * (as_scalar(path.t_noise) - as_scalar(path.t_data))

        def halves_of() -> tuple[State, State]:
            first = own.average_velocity(t, jnp.where(short, t, middle), x, args, key=key)
            x_middle = linear_combination((1, middle - t), (x, first))
            return first, own.average_velocity(middle, jnp.where(short, middle, r), x_middle, args, key=key)

        first, second = without_features(halves_of)
        halves = linear_combination((0.5, 0.5), (first, second))
        a, b, _ = flow.prediction.coefficients(path, t)
        matching = linear_combination((1, -a, -b), (u, x0, noise))
        return u, jax.tree.map(lambda m, u, h: jnp.where(t == r, m, u - h), matching, u, halves)


def _check_fields(loss: AbstractFlowMapLoss) -> None:
    check_type(loss.times, AbstractTimePairs, "times", "a pair such as fs.times.TimePairs(fs.times.Uniform())")
    check_pairing(loss.coupling, loss.dropout)
