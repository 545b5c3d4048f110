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
from ..dynamics import AbstractDynamics, ProbabilityFlow, network_output, unwrap
from ..paths import AbstractPath
from ..predictions import AbstractPrediction, Data, combine
from .base import AbstractFlowSolver, refuse_noise
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
    term_structure: ClassVar[type] = diffrax.AbstractTerm
    #: The quantity P: `Data()`, `Noise()` or `Velocity()`.
    extrapolated: eqx.AbstractVar[AbstractPrediction]
    #: The number of earlier evaluations that are kept, static.
    history: eqx.AbstractVar[int]
    #: None for no corrector, or v as a function of the step just taken, for its nodes but the first: the last of
    #: them is the target of the step, those before it the history.
    corrector: eqx.AbstractVar[Callable[[Step], Float[Array, " history"]] | None]

    @property
    def interpolation_cls(self) -> Any:
        """Dense output by the scheme's own formula, of its own order; linear where noise is drawn."""
        return StepInterpolation

    @abc.abstractmethod
    def kept(self, step: Step) -> Scalar:
        """The share k of the noise that a step keeps."""

    @abc.abstractmethod
    def predictor(self, step: Step) -> Float[Array, " history"]:
        """w of the history, newest first; 0 for what is not valid."""

    def init(
        self, terms: diffrax.AbstractTerm, t0: ScalarLike, t1: ScalarLike, y0: State, args: Args
    ) -> MultistepState:
        """An empty history."""
        del t1, args
        name = type(self).__name__
        field, _, direction = unwrap(terms, name)
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
        flow, path = field.flow, field.flow.path
        start, target = -direction * as_scalar(t0), -direction * as_scalar(t1)
        output = network_output(flow, start, y0, args)
        value = combine(flow.mixture_weights(start, mixture_of(self.extrapolated, start)), y0, output)
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
        base = combine(flow.mixture_weights(start, (alpha, sigma * kept, jnp.ones_like(alpha))), y0, output)
        if change is not None:
            base = linear_combination((1.0, carry(path, start, sigma * kept)), (base, change))
        if noise is not None:
            fresh = sigma * safe_sqrt((1 - kept) * (1 + kept))
            base = linear_combination((1.0, fresh), (base, noise.normal(t0, t1)))
        y1 = with_differences(base, self.predictor(step), values)

        formula = None
        if noise is None:
            one, zero = jnp.ones_like(alpha), jnp.zeros_like(alpha)
            data, eps = (
                combine(flow.mixture_weights(start, triple), y0, output)
                for triple in ((one, zero, one), (zero, one, one))
            )
            frozen = freeze((self, path, field.dynamics))
            formula = MultistepFormula(frozen, direction, ts, valid, data, eps, change, values)
        dense_info = {"y0": y0, "y1": y1, "formula": formula}
        size = self.history
        state = MultistepState(values[:size], ts[:size], valid[:size], None if self.corrector is None else base)
        return y1, None, dense_info, state, diffrax.RESULTS.successful

    def func(self, terms: diffrax.AbstractTerm, t0: ScalarLike, y0: State, args: Args) -> Any:
        """The vector field of the terms, which Diffrax asks for to choose a first step."""
        return terms.vf(as_scalar(t0), y0, args)


def carry(path: AbstractPath, start: Scalar, noise_weight: Scalar) -> Scalar:
    """The factor of a change of the state: noise_weight/sigma."""
    sigma = path.coefficients(start)[1]
    return jnp.where(sigma == 0, 0, noise_weight / jnp.where(sigma == 0, 1, sigma))


def with_differences(base: State, weights: Float[Array, " history"], values: tuple[State, ...]) -> State:
    """base + sum_j weights_j (values_{j+1} - values_0), j from 0."""
    if len(values) == 1:
        return base
    return linear_combination((1.0, -jnp.sum(weights), *weights), (base, *values))


def error_scale(path: AbstractPath, start: Scalar, target: Scalar) -> Scalar:
    """The scale of the state at the start over that at the target, at least 1: a factor of error estimates.

    Diffrax measures an error against the larger of both states. Where a step shrinks the state, as on `EDM`, the error
    is of the size of the smaller one.
    """
    (alpha, sigma), (alpha_to, sigma_to) = path.coefficients(start), path.coefficients(target)
    return jnp.maximum(1, (alpha + sigma) / (alpha_to + sigma_to))


class Frozen(eqx.Module):
    """A pytree whose leaves are arrays, with all else static: what Diffrax can keep a history of."""

    arrays: Any
    rest: Any = eqx.field(static=True)

    def thaw(self) -> Any:
        """The pytree as it was."""
        return eqx.combine(self.arrays, self.rest)


def freeze(tree: Any) -> Frozen:
    """`tree` as a `Frozen`."""
    return Frozen(*eqx.partition(tree, eqx.is_array))


class MultistepFormula(eqx.Module):
    """A step of the probability flow as a function of its target."""

    frozen: Frozen
    direction: Scalar
    ts: Float[Array, " nodes"]
    valid: Bool[Array, " nodes"]
    data: State
    noise: State
    change: State | None
    values: tuple[State, ...]

    def __call__(self, s: Scalar) -> State:
        """The state at the solver's time s."""
        solver, path, dynamics = self.frozen.thaw()
        target = -self.direction * s
        alpha, sigma = path.coefficients(target)
        base = linear_combination((alpha, sigma), (self.data, self.noise))
        if self.change is not None:
            base = linear_combination((1.0, carry(path, self.ts[0], sigma)), (base, self.change))
        weights = solver.predictor(Step(path, dynamics, target, self.ts, self.valid))
        return with_differences(base, weights, self.values)


class StepInterpolation(diffrax.AbstractLocalInterpolation):
    """Dense output of one step: its formula, or a straight line where there is none."""

    t0: Any
    t1: Any
    y0: State
    y1: State
    formula: Any

    def evaluate(self, t0: ScalarLike, t1: ScalarLike | None = None, left: bool = True) -> State:
        """The state at t0, or its increment from t0 to t1."""
        del left
        if t1 is not None:
            return linear_combination((1.0, -1.0), (self.evaluate(t1), self.evaluate(t0)))
        s = as_scalar(t0)
        if self.formula is not None:
            return self.formula(s)
        place = (s - as_scalar(self.t0)) / (as_scalar(self.t1) - as_scalar(self.t0))
        return linear_combination((1 - place, place), (self.y0, self.y1))


class AbstractODEMultistep(AbstractMultistep):
    """A multistep solver of the probability flow."""

    #: The number of evaluations that a step combines, its order once the history is full.
    max_order: eqx.AbstractVar[int]

    @property
    def history(self) -> int:
        """All evaluations but the newest, and one more where a corrector looks back at the step before."""
        return self.max_order - (self.corrector is None)

    @property
    def default_dynamics(self) -> AbstractDynamics:
        """The probability flow."""
        return ProbabilityFlow()

    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Raise for a stochastic equation."""
        refuse_noise(self, dynamics)

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """The order of convergence, from a start that has it."""
        del terms
        return self.max_order

    def kept(self, step: Step) -> Scalar:
        """All of the noise: the probability flow draws none."""
        return step.kept()


class AbstractSDEMultistep(AbstractMultistep, diffrax.AbstractItoSolver[MultistepState]):
    """A multistep solver of the reverse SDE at any noise level, the probability flow included."""

    #: The number of evaluations that a step combines, its order on the probability flow once the history is full.
    max_order: eqx.AbstractVar[int]
    #: With noise only the data form is exact.
    extrapolated: ClassVar[Data] = Data()

    @property
    def history(self) -> int:
        """All evaluations but the newest, and one more where a corrector looks back at the step before."""
        return self.max_order - (self.corrector is None)

    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Every equation of `dynamics` will do."""
        del dynamics

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """The order of convergence on the probability flow, from a start that has it."""
        del terms
        return self.max_order

    def strong_order(self, terms: diffrax.AbstractTerm) -> float:
        """At least 1/2, as for any scheme that freezes the network over a step."""
        del terms
        return 0.5

    def kept(self, step: Step) -> Scalar:
        """The share of the noise that the equation itself keeps."""
        return step.kept()
