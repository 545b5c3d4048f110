r"""The exponential multistep step: one network evaluation, extrapolated through the history.

From t to s < t, with D = E[x_0|x_t] and E = E[eps|x_t] of the new evaluation, P the quantity that the scheme
extrapolates (see `nodes`), k the share of the noise that the step keeps and z ~ N(0, I),

$$x_s = \underbrace{\alpha_s D_0 + \sigma_s \left(k E_0 + \sqrt{1 - k^2}\, z\right)}_{\text{base}}
        + \sum_{j \ge 1} w_j\, (P_j - P_0)$$

Every solver of this family is its function from the times of the history to the weights w. On the probability flow
k = 1. A scheme with a corrector has a second set of weights: once P at s is known, at the opening of the next
step, the state there is replaced by

$$x_s = \text{base} + \sum_j v_j\, (P_j - P_0) \quad \text{with } P_s \text{ among the } P_j$$

and the step goes on from it with that same evaluation: one a step, with the noise z of the base. The history begins
empty, so that the first steps are of lower order, and is dropped after a jump of the equation.

All that depends on the times alone is in `StepWeights`. On a grid these are a table made before the solve, whose steps
then only combine states.
"""

import abc
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._numerics import as_scalar, linear_combination, safe_sqrt
from .._types import Args, Scalar, ScalarLike, State
from ..dynamics import AbstractDynamics, unwrap
from ..paths import AbstractPath
from ..predictions import AbstractPrediction, Data, Triple, conversion_weights, is_singular, quotients
from .base import AbstractFlowSolver, AbstractProbabilityFlowSolver, AbstractStochasticSolver, evaluate
from .interpolation import StepInterpolation, carry, step_formula, with_differences
from .nodes import Levels, Step, levels, mixture_of, step_to

__all__ = ["AbstractMultistep", "AbstractODEMultistep", "AbstractSDEMultistep"]


class History(eqx.Module):
    """The evaluations of earlier steps, newest first, and what a corrector starts from."""

    values: tuple[State, ...]
    #: The base of the step just taken; None without a corrector.
    base: State | None


#: P at the nodes of a step, newest first, and what the corrector changed, or None.
Taken: TypeAlias = tuple[tuple[State, ...], State | None]


class MultistepState(eqx.Module):
    """The history and its times, of which those of steps that were taken are valid."""

    history: History
    ts: Float[Array, " history"]
    valid: Bool[Array, " history"]


class StepWeights(eqx.Module):
    """What the equation of one step multiplies states by."""

    #: The time of the evaluation.
    start: Scalar
    #: Of the state and the network's output: P, and the base.
    value: tuple[Scalar, Scalar]
    base: tuple[Scalar, Scalar]
    #: Of z.
    fresh: Scalar
    #: w, newest first.
    predictor: Float[Array, " history"]
    #: v, None without a corrector, and whether there is a step to correct.
    corrector: Float[Array, " nodes"] | None
    corrects: Bool[Array, ""]
    #: Of what the corrector changed.
    carried: Scalar


class AbstractMultistep(AbstractFlowSolver[MultistepState]):
    """An exponential multistep solver: what it extrapolates, over how much history, with which weights."""

    evaluations_per_step: ClassVar[int] = 1
    evaluations_at_start: ClassVar[int] = 0
    interpolation_cls: ClassVar[type] = StepInterpolation
    #: The quantity P: `Data()`, `Noise()` or `Velocity()`.
    extrapolated: eqx.AbstractVar[AbstractPrediction]
    #: The number of evaluations that a step combines, static.
    max_order: eqx.AbstractVar[int]
    #: None for no corrector, or v as a function of the step just taken, for its nodes but the first: the last of
    #: them is the target of the step, those before it the history.
    corrector: eqx.AbstractVar[Callable[[Step], Float[Array, " history"]] | None]

    @abc.abstractmethod
    def kept(self, step: Step) -> Scalar:
        """The share k of the noise that a step keeps."""

    @abc.abstractmethod
    def predictor(self, step: Step) -> Float[Array, " history"]:
        """w of the history, newest first; 0 for what is not valid."""

    @property
    def history(self) -> int:
        """How many earlier evaluations are kept: one more where a corrector looks back at the step before."""
        return self.max_order - (self.corrector is None)

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """The order on the probability flow, from a start that has it, where the weights are exact for polynomials."""
        del terms
        return self.max_order + (self.corrector is not None)

    def init(
        self, terms: diffrax.AbstractTerm, t0: ScalarLike, t1: ScalarLike, y0: State, args: Args
    ) -> MultistepState:
        """An empty history."""
        del t1, args
        field, _, direction = unwrap(terms, type(self).__name__)
        self.check_dynamics(field.dynamics)
        start = -direction * as_scalar(t0)
        ts, valid = jnp.full((self.history,), start), jnp.zeros((self.history,), bool)
        return MultistepState(self.begin(y0), ts, valid)

    def weights(self, prediction: AbstractPrediction, step: Step) -> StepWeights:
        """All weights of a step through a flow of this prediction."""
        path, start = step.path, step.start
        source = prediction.coefficients(path, start)
        kept = self.kept(step)
        alpha, sigma = step.end.alpha, step.end.sigma
        corrector, corrects = None, step.valid[min(1, self.history)]
        if self.corrector is not None:
            # The step just taken, seen from its own start: its node 0, its history, and its target last.
            order = np.roll(np.arange(len(step.ts)), -1)
            taken = step.begin, step.nodes[order], step.valid[order]
            # Before the first step there is none: that step itself in its place, so that derivatives stay finite.
            ends = jax.tree.map(partial(jnp.where, corrects), taken, (step.end, step.nodes, step.valid))
            corrector = self.corrector(Step(path, step.dynamics, *ends))
        return StepWeights(
            start=start,
            value=_divided(conversion_weights(path, start, source, mixture_of(self.extrapolated, start))),
            base=_divided(conversion_weights(path, start, source, (alpha, sigma * kept, jnp.ones_like(alpha)))),
            fresh=sigma * safe_sqrt((1 - kept) * (1 + kept)),
            predictor=self.predictor(step),
            corrector=corrector,
            corrects=corrects,
            carried=carry(path, start, sigma * kept),
        )

    def table(
        self,
        path: AbstractPath,
        prediction: AbstractPrediction,
        dynamics: AbstractDynamics,
        times: Float[Array, " points"],
    ) -> StepWeights:
        """The weights of all steps along these path times, stacked."""

        there = levels(path, times)
        # Row n: the start of step n and its history, newest first; a place before the first stands for none.
        places = np.arange(len(times) - 1)[:, None] - np.arange(1 + self.history)

        def row(end: Levels, nodes: Levels, valid: Bool[Array, " nodes"]) -> StepWeights:
            return self.weights(prediction, Step(path, dynamics, end, nodes, valid))

        return jax.vmap(row)(there[1:], there[np.maximum(places, 0)], jnp.asarray(places >= 0))

    def begin(self, x: State) -> History:
        """Nothing evaluated yet."""
        empty = jax.tree.map(jnp.zeros_like, x)
        return History((empty,) * self.history, None if self.corrector is None else empty)

    def advance(
        self, weights: StepWeights, x: State, output: State, noise: State | None, history: History
    ) -> tuple[State, History, Taken]:
        """The state at the target, from the network's output at the start; the new history; what went into the step."""
        values = (linear_combination(weights.value, (x, output)), *history.values)
        base, change = linear_combination(weights.base, (x, output)), None
        if weights.corrector is not None:
            moved = with_differences(history.base, weights.corrector, (*values[1:], values[0]))
            change = jax.tree.map(lambda new, old: jnp.where(weights.corrects, new - old, 0), moved, x)
            base = linear_combination((1.0, weights.carried), (base, change))
        if noise is not None:
            base = linear_combination((1.0, weights.fresh), (base, noise))
        kept = History(values[: self.history], None if weights.corrector is None else base)
        return with_differences(base, weights.predictor, values), kept, (values, change)

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ScalarLike,
        t1: ScalarLike,
        y0: State,
        args: Args,
        solver_state: MultistepState,
        made_jump: Any,
    ) -> tuple[State, None, dict[str, Any], MultistepState, diffrax.RESULTS]:
        """One step of the module's equation."""
        field, noise, direction = unwrap(terms, type(self).__name__)
        start, target = -direction * as_scalar(t0), -direction * as_scalar(t1)
        ts = jnp.concatenate([start[None], solver_state.ts])
        valid = jnp.concatenate([jnp.ones((1,), bool), solver_state.valid & ~jnp.asarray(made_jump)])
        step = step_to(field.flow.path, field.dynamics, target, ts, valid)
        weights = self.weights(field.flow.prediction, step)
        evaluation = evaluate(field, start, y0, args)
        normal = None if noise is None else noise.normal(t0, t1)
        y1, history, (values, change) = self.advance(weights, y0, evaluation.output, normal, solver_state.history)
        formula = None
        if noise is None:
            formula = step_formula(self, step, direction, evaluation.data_and_noise(), values, change)
        dense_info = {"y0": y0, "y1": y1, "formula": formula}
        state = MultistepState(history, ts[: self.history], valid[: self.history])
        return y1, None, dense_info, state, diffrax.RESULTS.successful


class AbstractODEMultistep(AbstractMultistep, AbstractProbabilityFlowSolver[MultistepState]):
    """A multistep solver of the probability flow: what it extrapolates, and its weights, are left to say."""

    def kept(self, step: Step) -> Scalar:
        """All of the noise: the probability flow draws none."""
        return step.kept()


class AbstractSDEMultistep(AbstractMultistep, AbstractStochasticSolver[MultistepState]):
    """A multistep solver of the reverse SDE at any noise level, the probability flow included."""

    #: With noise only the data form is exact.
    extrapolated: ClassVar[Data] = Data()

    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Every equation of `dynamics` will do."""
        del dynamics

    def kept(self, step: Step) -> Scalar:
        """The share of the noise that the equation itself keeps."""
        return step.kept()


def _divided(weights: Triple) -> tuple[Scalar, Scalar]:
    """The weights of a conversion over their denominator; infinite where it has no finite answer."""
    singular, (on_x, on_output) = is_singular(weights), quotients(weights)
    return jnp.where(singular, jnp.inf, on_x), jnp.where(singular, jnp.inf, on_output)
