r"""Exponential one-step methods with several evaluations a step: no history, an error estimate.

From t to s < t the state is carried to stages inside the step and there evaluated again,

$$x_i = \alpha_i D_0 + \sigma_i E_0 + \sum_{0 < j < i} a_{ij} (P_j - P_0), \qquad
  x_s = \alpha_s D_0 + \sigma_s E_0 + \sum_{j > 0} b_j (P_j - P_0)$$

The stages of `DPMSolverPPSinglestep` and `SEEDS2` lie at fractions r of the step in $\lambda$, that of `EDMHeun` at its
end. With $B = \alpha_s - \alpha_t k \sigma_s/\sigma_t$ the weight of constant data, $h = \lambda_s - \lambda_t$ and
$\phi_2$ the exponential function at -h:

| solver | P | stages | a | b | order |
|---|---|---|---|---|---|
| 2S, SEEDS-2 | data | r = 1/2 | | B/(2r) | 2 |
| 3S | data | 1/3, 2/3 | $2 \alpha_2 \frac{2h}{3} \phi_2(-\frac{2h}{3})$ | $0, \frac32 \alpha_s h \phi_2$ | 3 |
| Heun | noise | 1 | | $(\sigma_s - \sigma_t \alpha_s/\alpha_t)/2$ | 2 |

From alpha = 0 fractions are those of alpha/sigma, of which the data are a smooth function there. Onto sigma = 0 the
step is the base, the denoised prediction; then its stages serve the error estimate alone.
"""

import abc
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check, check_count, known
from .._numerics import as_scalar, linear_combination, safe_sqrt
from .._types import Args, Scalar, ScalarLike, State
from ..dynamics import AbstractDynamics, ReverseSDE, unwrap
from ..predictions import AbstractPrediction, Data, Noise
from .base import (
    AbstractMemorylessSolver,
    AbstractProbabilityFlowSolver,
    AbstractStochasticSolver,
    Evaluation,
    error_scale,
    evaluate,
)
from .interpolation import StepInterpolation, step_formula, with_differences
from .nodes import (
    AbstractVariable,
    LogSNR,
    NoiseRatio,
    Step,
    constant_weight,
    intermediate_time,
    lagrange_weights,
    mixture_of,
    step_to,
)

__all__ = ["SEEDS2", "DPMSolverPPSinglestep", "EDMHeun"]


class AbstractSinglestep(AbstractMemorylessSolver):
    """An exponential one-step method: what it holds constant, its stages and their weights.

    Dense output is P interpolated from the start to the last stage, of order 2; linear where noise is drawn.
    """

    interpolation_cls: ClassVar[type] = StepInterpolation
    #: The quantity P and, for dense output, the variable in which it is interpolated.
    extrapolated: eqx.AbstractClassVar[AbstractPrediction]
    variable: eqx.AbstractClassVar[AbstractVariable]

    @abc.abstractmethod
    def stage_times(self, step: Step) -> tuple[Scalar, ...]:
        """The times of the stages."""

    @abc.abstractmethod
    def stage_weights(self, stage: Step, number: int) -> tuple[Scalar, ...]:
        """a of stage `number` (0 is the first) for the earlier stages; `stage` is the step from the start to it."""

    @abc.abstractmethod
    def weights(self, step: Step) -> tuple[tuple[Scalar, ...], tuple[Scalar, ...] | None]:
        """b, and what the error estimate is made of in the same way; None for no estimate."""

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ScalarLike,
        t1: ScalarLike,
        y0: State,
        args: Args,
        solver_state: None,
        made_jump: Any,
    ) -> tuple[State, State | None, dict[str, Any], None, diffrax.RESULTS]:
        """One step of the module's equation."""
        del solver_state, made_jump
        field, noise, direction = unwrap(terms, type(self).__name__)
        path, dynamics = field.flow.path, field.dynamics
        start, target = -direction * as_scalar(t0), -direction * as_scalar(t1)

        def single(to: Scalar) -> Step:
            return step_to(path, dynamics, to, start[None], jnp.ones((1,), bool))

        def value(evaluation: Evaluation) -> State:
            return evaluation.mixture(mixture_of(self.extrapolated, evaluation.t))

        evaluation = evaluate(field, start, y0, args)
        values, times = [value(evaluation)], [start]
        # The noise drawn so far, carried along the step from stage to stage.
        drawn = None

        def carried(t: Scalar, weights: tuple[Scalar, ...]) -> State:
            nonlocal drawn
            alpha, sigma = path.coefficients(t)
            x = evaluation.mixture((alpha, sigma * single(t).kept(), jnp.ones_like(alpha)))
            if noise is not None:
                drawn = _more_noise(dynamics, path, noise, drawn, times[-1], t)
                x = linear_combination((1.0, 1.0), (x, drawn))
            return x if not weights else with_differences(x, jnp.stack(weights), tuple(values[: len(weights) + 1]))

        step = single(target)
        for number, t in enumerate(self.stage_times(step)):
            x = carried(t, self.stage_weights(single(t), number))
            values.append(value(evaluate(field, t, x, args)))
            times.append(t)
        weights, estimate = self.weights(step)
        y1 = carried(target, weights)
        error = None
        if estimate is not None:
            scaled = error_scale(path, start, target) * jnp.stack(estimate)
            error = with_differences(jax.tree.map(jnp.zeros_like, y0), scaled, tuple(values))

        formula = None
        if noise is None:
            ends = step_to(path, dynamics, target, jnp.stack([start, times[-1]]), jnp.ones((2,), bool))
            scheme = _Interpolant(self.extrapolated, self.variable)
            formula = step_formula(scheme, ends, direction, evaluation.data_and_noise(), (values[0], values[-1]))
        return y1, error, {"y0": y0, "y1": y1, "formula": formula}, None, diffrax.RESULTS.successful


class _Interpolant(eqx.Module):
    """The weights of a straight line through two evaluations."""

    prediction: AbstractPrediction
    variable: AbstractVariable

    def predictor(self, step: Step) -> Float[Array, " history"]:
        return lagrange_weights(self.prediction, self.variable, step)[1:]


def _more_noise(dynamics, path, noise, drawn, t_from, t_to) -> State:
    """The noise drawn up to `t_from`, carried to `t_to` and joined by what is drawn between."""
    kept = dynamics.kept(path, t_from, t_to)
    sigma_from, sigma_to = path.coefficients(t_from)[1], path.coefficients(t_to)[1]
    fresh = linear_combination((sigma_to * safe_sqrt((1 - kept) * (1 + kept)),), (noise.normal(-t_from, -t_to),))
    if drawn is None:
        return fresh
    return linear_combination((kept * sigma_to / sigma_from, 1.0), (drawn, fresh))


def _onto_clean(step: Step) -> Any:
    return step.end.sigma == 0


class DPMSolverPPSinglestep(
    AbstractSinglestep, AbstractProbabilityFlowSolver[None], diffrax.AbstractAdaptiveSolver[None]
):
    """DPM-Solver++ singlestep: 2S and 3S, with an error estimate for adaptive steps.

    **Arguments:** `order`: 2 or 3, also the number of network evaluations a step; `r`: of order 2, the place of its
    stage, up to 1/2, the default: beyond, after a long step, the stage would agree with any prediction and the error
    estimate vanish.

    The estimate of 2S is its difference from DDIM, that of 3S its difference from 2S with r = 1/3: the pair of
    DPM-adaptive. Dense output has order 2. Source: Lu et al. (2022), arXiv 2211.01095, and arXiv 2206.00927.
    """

    max_order: int = eqx.field(static=True)
    r: Scalar
    extrapolated: ClassVar[Data] = Data()
    variable: ClassVar[LogSNR] = LogSNR()

    def __init__(self, order: int = 2, *, r: ScalarLike | None = None):
        if order not in (2, 3):
            raise ValueError(
                f"DPMSolverPPSinglestep got order = {order!r}, but wants 2 or 3: order 1 is solvers.DDIM()."
            )
        self.max_order = check_count(order, "DPMSolverPPSinglestep got order", most=3)
        if order == 3 and r is not None:
            raise ValueError(
                f"DPMSolverPPSinglestep got r = {r} for order 3, whose stages lie at 1/3 and 2/3: leave it out."
            )
        self.r = _check_place(0.5 if r is None else r, 0.5, "DPMSolverPPSinglestep")

    @property
    def evaluations_per_step(self) -> int:
        """As many as the order."""
        return self.max_order

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """`order`."""
        del terms
        return self.max_order

    def stage_times(self, step: Step) -> tuple[Scalar, ...]:
        """At r, or at 1/3 and 2/3 of the step."""
        fractions = (self.r,) if self.max_order == 2 else (1 / 3, 2 / 3)
        return tuple(intermediate_time(step.path, step.start, step.target, r) for r in fractions)

    def stage_weights(self, stage: Step, number: int) -> tuple[Scalar, ...]:
        """The second stage of 3S is of order 2: the first lies in the middle of the step to it."""
        return () if number == 0 else (2 * stage.linear_weight(),)

    def weights(self, step: Step) -> tuple[tuple[Scalar, ...], tuple[Scalar, ...] | None]:
        """b of the module's table and the difference from the lower order."""
        clean = _onto_clean(step)
        if self.max_order == 2:
            second = step.data_weight() / (2 * self.r)
            return (jnp.where(clean, 0, second),), (second,)
        third = jnp.where(clean, 0, 1.5 * step.linear_weight())
        return (jnp.zeros_like(third), third), (-1.5 * step.data_weight(), third)


class SEEDS2(AbstractSinglestep, AbstractStochasticSolver[None]):
    """SEEDS-2: DPM-Solver++ 2S for the reverse SDE, with noise at the stage and at the end.

    The noise level is that of the dynamics, `ReverseSDE(1.0)` if none is given. Without noise it is
    `DPMSolverPPSinglestep(2)`.

    **Arguments:** `r`: the place of the stage, up to 1, 1/2 by default.

    Two network evaluations a step. Dense output is linear where noise is drawn. Source: Gonzalez et al. (2023),
    arXiv 2305.14267, in the data form and with any noise level.
    """

    r: Scalar
    extrapolated: ClassVar[Data] = Data()
    variable: ClassVar[LogSNR] = LogSNR()
    evaluations_per_step: ClassVar[int] = 2

    def __init__(self, r: ScalarLike = 0.5):
        self.r = _check_place(r, 1.0, "SEEDS2")

    @property
    def default_dynamics(self) -> AbstractDynamics:
        """The reverse SDE with eta = 1."""
        return ReverseSDE(1.0)

    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Every equation of `dynamics` will do."""
        del dynamics

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """2 on the probability flow."""
        del terms
        return 2

    def stage_times(self, step: Step) -> tuple[Scalar, ...]:
        """At r of the step."""
        return (intermediate_time(step.path, step.start, step.target, self.r),)

    def stage_weights(self, stage: Step, number: int) -> tuple[Scalar, ...]:
        """The stage is of order 1."""
        del stage, number
        return ()

    def weights(self, step: Step) -> tuple[tuple[Scalar, ...], tuple[Scalar, ...] | None]:
        """b of the module's table."""
        return (jnp.where(_onto_clean(step), 0, step.data_weight() / (2 * self.r)),), None


class EDMHeun(AbstractSinglestep, AbstractProbabilityFlowSolver[None], diffrax.AbstractAdaptiveSolver[None]):
    """Heun's method on the noise in sigma/alpha: EDM's deterministic sampler, on any path.

    With churn, EDM's stochastic sampler, it is `Churn(EDMHeun(), ...)`. The error estimate is the difference from
    Euler's step, which is DDIM's. Two network evaluations a step, that of the last one onto sigma = 0 included, where
    EDM's sampler saves it. Dense output has order 2. Source: Karras et al. (2022), arXiv 2206.00364.
    """

    extrapolated: ClassVar[Noise] = Noise()
    variable: ClassVar[NoiseRatio] = NoiseRatio()
    evaluations_per_step: ClassVar[int] = 2

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """2."""
        del terms
        return 2

    def stage_times(self, step: Step) -> tuple[Scalar, ...]:
        """At the end of the step; half way where that is sigma = 0."""
        halfway = intermediate_time(step.path, step.start, step.target, 0.5)
        return (jnp.where(_onto_clean(step), halfway, step.target),)

    def stage_weights(self, stage: Step, number: int) -> tuple[Scalar, ...]:
        """The stage is Euler's step."""
        del stage, number
        return ()

    def weights(self, step: Step) -> tuple[tuple[Scalar, ...], tuple[Scalar, ...] | None]:
        """The trapezoid; from alpha = 0, where sigma/alpha is infinite, Euler's step."""
        half = constant_weight(Noise(), step) / 2
        # There the change of the noise itself tells how far off Euler is.
        estimate = jnp.where(half == 0, step.end.sigma, half)
        return (jnp.where(_onto_clean(step), 0, half),), (estimate,)


def _check_place(r: ScalarLike, most: float, name: str) -> Scalar:
    place = as_scalar(r)
    return check(
        place,
        ~((known(place) > 0) & (known(place) <= most)),
        f"{name} got r = {r}, but wants a place above 0, up to {most}.",
    )
