r"""Dense output: a step of the probability flow as a function of its target, or a straight line.

From t to any s inside the step

$$x_s = \alpha_s D_0 + \sigma_s E_0 + \frac{\sigma_s}{\sigma_t}\, c + \sum_{j \ge 1} w_j(s)\, (P_j - P_0)$$

with the data $D_0$ and the noise $E_0$ at t, c what a corrector changed there, and the weights w of the scheme (see
`multistep`).
"""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._numerics import as_scalar, linear_combination
from .._types import Scalar, ScalarLike, State
from ..paths import AbstractPath
from .nodes import Step, step_to

__all__: list[str] = []


def carry(path: AbstractPath, start: Scalar, noise_weight: Scalar) -> Scalar:
    """The factor of a change of the state: noise_weight/sigma."""
    sigma = path.coefficients(start)[1]
    return jnp.where(sigma == 0, 0, noise_weight / jnp.where(sigma == 0, 1, sigma))


def with_differences(base: State, weights: Float[Array, " history"], values: tuple[State, ...]) -> State:
    """base + sum_j weights_j (values_{j+1} - values_0), j from 0."""
    if len(values) == 1:
        return base
    return linear_combination((1.0, -jnp.sum(weights), *weights), (base, *values))


class _Frozen(eqx.Module):
    """A pytree whose leaves are arrays, with all else static: what Diffrax can keep a history of."""

    arrays: Any
    rest: Any = eqx.field(static=True)


class StepFormula(eqx.Module):
    """The module's equation for one step."""

    #: The scheme, whose method `predictor` gives the weights, and the step, of which its own target is not used.
    frozen: _Frozen
    direction: Scalar
    ts: Float[Array, " nodes"]
    valid: Bool[Array, " nodes"]
    data: State
    noise: State
    change: State | None
    values: tuple[State, ...]

    def __call__(self, s: Scalar) -> State:
        """The state at the solver's time s."""
        scheme, path, dynamics = eqx.combine(self.frozen.arrays, self.frozen.rest)
        target = -self.direction * s
        alpha, sigma = path.coefficients(target)
        base = linear_combination((alpha, sigma), (self.data, self.noise))
        if self.change is not None:
            base = linear_combination((1.0, carry(path, self.ts[0], sigma)), (base, self.change))
        weights = scheme.predictor(step_to(path, dynamics, target, self.ts, self.valid))
        return with_differences(base, weights, self.values)


def step_formula(
    scheme: Any,
    step: Step,
    direction: Scalar,
    data_and_noise: tuple[State, State],
    values: tuple[State, ...],
    change: State | None = None,
) -> StepFormula:
    """The formula of a step, with the evaluations at its nodes."""
    frozen = _Frozen(*eqx.partition((scheme, step.path, step.dynamics), eqx.is_array))
    return StepFormula(frozen, direction, step.ts, step.valid, *data_and_noise, change, values)


class StepInterpolation(diffrax.AbstractLocalInterpolation):
    """Dense output of one step: its formula, or a straight line where there is none."""

    t0: Any
    t1: Any
    y0: State
    y1: State
    formula: StepFormula | None

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
