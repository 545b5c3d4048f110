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
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._numerics import as_scalar, linear_combination, safe_sqrt
from .._types import Args, Scalar, ScalarLike, State
from ..dynamics import AbstractDynamics, unwrap
from ..predictions import AbstractPrediction, Data
from .base import AbstractFlowSolver, AbstractProbabilityFlowSolver, AbstractStochasticSolver, evaluate
from .interpolation import StepInterpolation, carry, step_formula, with_differences
from .nodes import Step, mixture_of

__all__ = ["AbstractMultistep"]


class MultistepState(eqx.Module):
    """The evaluations of earlier steps, newest first, and what a corrector starts from."""

    values: tuple[State, ...]
    ts: Float[Array, " history"]
    valid: Bool[Array, " history"]
    #: The base of the step just taken; None without a corrector.
    base: State | None


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
        empty = jax.tree.map(jnp.zeros_like, y0)
        start = -direction * as_scalar(t0)
        return MultistepState(
            (empty,) * self.history,
            jnp.full((self.history,), start),
            jnp.zeros((self.history,), bool),
            None if self.corrector is None else empty,
        )

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
        path = field.flow.path
        start, target = -direction * as_scalar(t0), -direction * as_scalar(t1)
        evaluation = evaluate(field, start, y0, args)
        value = evaluation.mixture(mixture_of(self.extrapolated, start))
        values = (value, *solver_state.values)
        ts = jnp.concatenate([start[None], solver_state.ts])
        valid = jnp.concatenate([jnp.ones((1,), bool), solver_state.valid & ~jnp.asarray(made_jump)])

        change = None
        if self.corrector is not None:
            # The step just taken, seen from its own start: its node 0, its history, and its target last.
            order = jnp.roll(jnp.arange(len(values)), -1)
            corrected = self.corrector(Step(path, field.dynamics, start, ts[order], valid[order]))
            moved = with_differences(solver_state.base, corrected, (*values[1:], value))
            change = jax.tree.map(lambda new, old: jnp.where(valid[1], new - old, 0), moved, y0)

        step = Step(path, field.dynamics, target, ts, valid)
        kept = self.kept(step)
        alpha, sigma = path.coefficients(target)
        base = evaluation.mixture((alpha, sigma * kept, jnp.ones_like(alpha)))
        if change is not None:
            base = linear_combination((1.0, carry(path, start, sigma * kept)), (base, change))
        if noise is not None:
            fresh = sigma * safe_sqrt((1 - kept) * (1 + kept))
            base = linear_combination((1.0, fresh), (base, noise.normal(t0, t1)))
        y1 = with_differences(base, self.predictor(step), values)

        formula = None
        if noise is None:
            formula = step_formula(self, step, direction, evaluation.data_and_noise(), values, change)
        dense_info = {"y0": y0, "y1": y1, "formula": formula}
        size = self.history
        state = MultistepState(values[:size], ts[:size], valid[:size], None if self.corrector is None else base)
        return y1, None, dense_info, state, diffrax.RESULTS.successful


class AbstractODEMultistep(AbstractMultistep, AbstractProbabilityFlowSolver[MultistepState]):
    """A multistep solver of the probability flow."""

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
