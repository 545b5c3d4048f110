r"""UniPC: a predictor and a corrector of any order on the data in log-SNR.

With $h = \lambda_s - \lambda_t$, nodes $r_k = (\lambda_k - \lambda_t)/h$ (1 at the target), $\phi_k$ the exponential
functions at -h and $B(h) = h$ (bh1) or $1 - e^{-h}$ (bh2), a step adds to the base

$$\alpha_s B(h) \sum_k \frac{\rho_k}{r_k} (D_k - D_0), \qquad
  \sum_k \rho_k r_k^{i-1} = \frac{h\, i!\, \phi_{i+1}}{B(h)}, \quad i = 1, 2, \dots$$

The predictor of order p uses p - 1 earlier evaluations, the corrector also that at the target; with a single one rho is
1/2. One step from alpha = 0 is corrected by the trapezoid in alpha.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._checks import check_count
from .._numerics import as_scalar, linear_combination, phis
from .._types import Args, Scalar, ScalarLike, State
from ..dynamics import FlowField, unwrap
from ..predictions import Data
from .base import AbstractGridAwareSolver, AbstractProbabilityFlowSolver, error_scale, evaluate
from .interpolation import StepInterpolation, carry, step_formula, with_differences
from .multistep import AbstractODEMultistep, MultistepState
from .nodes import Step, basis_to_clean, step_to, trapezoid_from_noise, vandermonde_weights

__all__ = ["AdaptiveUniPC", "UniPC"]


class UniPC(AbstractODEMultistep, AbstractGridAwareSolver[MultistepState]):
    """UniPC with one evaluation a step: the evaluation that opens a step corrects the step before.

    **Arguments:** `order`: p from 1 to 3; `corrector`: whether steps are corrected, which raises the order, from a full
    history, from p to p + 1 (the last step is not corrected, as that would take one evaluation more); `bh`: 1 or 2, the
    paper's B_1(h) = h or B_2(h) = e^h - 1; `lower_order_final`: whether the last step is of order 1, the one before of
    order 2, and so on, as published: better at few steps, of order 2 in all.

    Where the grid ends is known inside `solve` and `sample`; in a plain `diffeqsolve` tell it by `for_times`, or no
    order is lowered. Onto sigma = 0 the step is the denoised prediction. For adaptive steps see `AdaptiveUniPC`. Dense
    output has the order p of the predictor. Source: Zhao et al. (2023), arXiv 2302.04867.
    """

    max_order: int = eqx.field(static=True)
    bh: int = eqx.field(static=True)
    corrects: bool = eqx.field(static=True)
    lower_order_final: bool = eqx.field(static=True)
    #: The last times of the grid from which a step starts, latest first; None where the grid is not known.
    last_times: Float[Array, " last"] | None
    extrapolated: ClassVar[Data] = Data()

    def __init__(self, order: int = 3, *, corrector: bool = True, bh: int = 2, lower_order_final: bool = True):
        self.max_order = check_count(order, "UniPC got order", most=3)
        self.bh = _check_bh(bh, "UniPC")
        self.corrects = corrector
        self.lower_order_final = lower_order_final
        self.last_times = None

    def for_times(self, times: Float[Array, " points"]) -> "UniPC":
        """This solver, with the order lowered toward the last of the times if that was asked for."""
        if not self.lower_order_final or self.max_order == 1:
            return self
        last = times[:-1][::-1][: self.max_order - 1]
        return eqx.tree_at(lambda s: s.last_times, self, last, is_leaf=lambda leaf: leaf is None)

    def _evaluations(self, step: Step) -> Any:
        """How many evaluations, the newest included, the predictor of a step may use."""
        if self.last_times is None:
            return self.max_order
        # The k-th of the last times, from 0, starts a step of order k + 1.
        started = jnp.abs(self.last_times - step.start) <= 1e-6 * jnp.abs(step.start)
        orders = jnp.arange(1, len(started) + 1)
        return jnp.min(jnp.where(started, orders, self.max_order))

    @property
    def corrector(self) -> Callable[[Step], Float[Array, " history"]] | None:
        """The weights of the corrector, or None."""
        return self._correct if self.corrects else None

    def predictor(self, step: Step) -> Float[Array, " history"]:
        """alpha_s B(h) rho_k/r_k of the p - 1 latest evaluations."""
        return _weights(step.latest(self._evaluations(step)), self.bh)

    def _correct(self, step: Step) -> Float[Array, " history"]:
        # A lowered step is corrected at its own order: its target stays among the nodes, which is the last.
        kept = jnp.arange(len(step.ts)) < self._evaluations(step)
        kept = kept.at[-1].set(True)
        step = eqx.tree_at(lambda s: s.valid, step, step.valid & kept)
        return jnp.where(step.span()[1], _weights(step, self.bh), trapezoid_from_noise(step))


def _check_bh(bh: int, name: str) -> int:
    if bh not in (1, 2):
        raise ValueError(f"{name} got bh = {bh!r}, but wants 1 or 2, for B(h) = h or e^h - 1.")
    return bh


def _weights(step: Step, bh: int) -> Float[Array, " history"]:
    """alpha_s B(h) rho_k/r_k of the nodes but the first."""
    places, usable = (rows[1:] for rows in step.places())
    h, _ = step.span()
    b = h if bh == 1 else -jnp.expm1(-h)
    if not len(places):
        return places
    factorials = jnp.asarray([math.factorial(i) for i in range(1, len(places) + 1)], h.dtype)
    moments = factorials * phis(len(places) + 1, -h)[1:] * (h / b)
    rho = vandermonde_weights(places, usable, moments)
    rho = jnp.where(jnp.sum(usable) == 1, 0.5, rho)
    return jnp.where(usable, step.end.alpha * b * rho / places, 0)


class AdaptiveState(eqx.Module):
    """The evaluation that opens the next step, what the corrector changed since, and the history of data."""

    data: State
    noise: State
    change: State
    values: tuple[State, ...]
    ts: Float[Array, " history"]
    valid: Bool[Array, " history"]


class AdaptiveUniPC(AbstractProbabilityFlowSolver[AdaptiveState], diffrax.AbstractAdaptiveSolver[AdaptiveState]):
    """UniPC for `diffrax.PIDController`: every step is corrected at once, and the correction is the error estimate.

    The evaluation at the end of a step, at the predicted state, opens the next one: one a step, rejected ones
    included, and one at the start. After a long step, e^-h small, that evaluation would agree with any prediction (on
    clean data E[x_0|x] = x); so the estimate is the sum of the correction and of what one more evaluation of the
    history would change, and before there is a history of the length of the step itself.

    **Arguments:** `order`: p from 1 to 3; `bh`: 1 or 2, the paper's B_1(h) = h or B_2(h) = e^h - 1.

    Of order p + 1; the estimate is that of the predictor, of order p. Dense output has the order of the steps. Source:
    Zhao et al. (2023), arXiv 2302.04867; the step control is ours.
    """

    max_order: int = eqx.field(static=True)
    bh: int = eqx.field(static=True)
    evaluations_per_step: ClassVar[int] = 1
    evaluations_at_start: ClassVar[int] = 1
    interpolation_cls: ClassVar[type] = StepInterpolation

    def __init__(self, order: int = 3, *, bh: int = 2):
        self.max_order = check_count(order, "AdaptiveUniPC got order", most=3)
        self.bh = _check_bh(bh, "AdaptiveUniPC")

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """One more than the predictor's."""
        del terms
        return self.max_order + 1

    def init(self, terms: diffrax.AbstractTerm, t0: ScalarLike, t1: ScalarLike, y0: State, args: Args) -> AdaptiveState:
        """The first evaluation and an empty history."""
        del t1
        field, _, direction = unwrap(terms, "AdaptiveUniPC")
        self.check_dynamics(field.dynamics)
        start = -direction * as_scalar(t0)
        empty = jax.tree.map(jnp.zeros_like, y0)
        size = self.max_order
        data, noise = evaluate(field, start, y0, args).data_and_noise()
        return AdaptiveState(data, noise, empty, (empty,) * size, jnp.full((size,), start), jnp.zeros((size,), bool))

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ScalarLike,
        t1: ScalarLike,
        y0: State,
        args: Args,
        solver_state: AdaptiveState,
        made_jump: Any,
    ) -> tuple[State, State, dict[str, Any], AdaptiveState, diffrax.RESULTS]:
        """Predict, evaluate, correct."""
        field, _, direction = unwrap(terms, "AdaptiveUniPC")
        path = field.flow.path
        start, target = -direction * as_scalar(t0), -direction * as_scalar(t1)
        state = _after_jump(field, start, y0, args, solver_state, made_jump)
        ts = jnp.concatenate([start[None], state.ts])
        valid = jnp.concatenate([jnp.ones((1,), bool), state.valid])
        values = (state.data, *state.values)
        predicting = step_to(path, field.dynamics, target, ts, valid)
        alpha, sigma = predicting.end.alpha, predicting.end.sigma
        base = linear_combination((alpha, sigma, carry(path, start, sigma)), (state.data, state.noise, state.change))
        usual, longer = _weights(predicting.latest(self.max_order), self.bh), _weights(predicting, self.bh)
        predicted = with_differences(base, usual, values)
        data, noise = evaluate(field, target, predicted, args).data_and_noise()
        h, proper = predicting.span()
        # The history reaches one evaluation further back than the scheme does.
        correcting = _with_target(predicting.latest(self.max_order))
        corrector = jnp.where(proper, _weights(correcting, self.bh), trapezoid_from_noise(correcting))
        y1 = with_differences(base, corrector, (*values, data))
        change = linear_combination((1.0, -1.0), (y1, predicted))

        # Onto sigma = 0, where h is infinite, the change is that of the line through two evaluations in sigma/alpha.
        line = basis_to_clean(predicting.latest(2))[1:]
        known = jnp.where(proper, jnp.sum(predicting.places()[1]) > self.max_order, valid[1])
        zero = jax.tree.map(jnp.zeros_like, y0)
        by_history = with_differences(zero, jnp.where(proper, longer - usual, alpha * line), values)
        distrust = jnp.where(proper, -jnp.expm1(-jnp.abs(h)), 1) ** 8
        by_length = linear_combination((distrust, -distrust), (base, y0))
        rest = jax.tree.map(lambda a, b: jnp.where(known, jnp.abs(a), jnp.abs(b)), by_history, by_length)
        scale = error_scale(path, start, target)
        error = jax.tree.map(lambda a, b: scale.astype(a.dtype) * (jnp.abs(a) + b), change, rest)

        size = self.max_order
        formula = step_formula(
            _Corrected(self.bh), correcting, direction, (state.data, state.noise), (*values, data), state.change
        )
        new_state = AdaptiveState(data, noise, change, values[:size], ts[:size], valid[:size])
        return y1, error, {"y0": y0, "y1": y1, "formula": formula}, new_state, diffrax.RESULTS.successful


def _with_target(step: Step) -> Step:
    """The same step with its target as the last node."""
    nodes = jax.tree.map(lambda nodes, end: jnp.append(nodes, end), step.nodes, step.end)
    return Step(step.path, step.dynamics, step.end, nodes, jnp.append(step.valid, True))


class _Corrected(eqx.Module):
    """The corrector's weights as a function of the target, for dense output."""

    bh: int = eqx.field(static=True)

    def predictor(self, step: Step) -> Float[Array, " history"]:
        return jnp.where(step.span()[1], _weights(step, self.bh), trapezoid_from_noise(step))


def _after_jump(
    field: FlowField, start: Scalar, y0: State, args: Args, state: AdaptiveState, made_jump: Any
) -> AdaptiveState:
    """The state, anew where the equation has just jumped."""
    if made_jump is False:
        return state

    def renewed() -> AdaptiveState:
        data, noise = evaluate(field, start, y0, args).data_and_noise()
        change = jax.tree.map(jnp.zeros_like, y0)
        return AdaptiveState(data, noise, change, state.values, state.ts, jnp.zeros_like(state.valid))

    return jax.lax.cond(made_jump, renewed, lambda: state)
