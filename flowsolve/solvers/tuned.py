r"""A linear multistep whose numbers are arrays, one row a step: what `tuning.tune` learns.

Step i of its own grid goes from t_i to t_{i+1}, with $r = \sigma_{i+1}/\sigma_i$, $B = \alpha_{i+1} - \alpha_i r$ and
one network evaluation $D_0 = E[x_0|x]$, asked at a time $t'_i$ of its own:

$$x_{i+1} = r (1 + c_i)\, x_i + B \left[(1 + m_i) D_0 + \sum_{j \ge 1} w_{ij} (D_j - D_0)\right]$$

with $D_j$ the data of j steps ago. With $t'_i = t_i$ and all else zero this is `DDIM`, with weights from a formula any
multistep on the data. From alpha = 0 and onto sigma = 0 all is finite.
"""

from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._checks import check
from .._numerics import as_scalar, linear_combination
from .._types import Args, ScalarLike, State
from ..dynamics import unwrap
from ..predictions import Data
from .base import AbstractGridAwareSolver, AbstractProbabilityFlowSolver, evaluate
from .interpolation import StepInterpolation
from .nodes import mixture_of

__all__ = ["TunedMultistep"]


class TunedState(eqx.Module):
    """The data of earlier steps, newest first."""

    values: tuple[State, ...]
    valid: Bool[Array, " history"]


class TunedMultistep(AbstractProbabilityFlowSolver[TunedState], AbstractGridAwareSolver[TunedState]):
    """A multistep with a row of numbers for each step of its own grid.

    **Arguments:** `ts`: the grid's n + 1 times; `asked`: the n times at which the network is asked; `carry` c,
    `scale` m: n numbers each; `weights` w: an (n, history) array, the newest evaluation first.

    It steps through that grid alone, which `solve` and `sample` check, on the path it was tuned on. One network
    evaluation a step. Dense output is linear. Save it with `eqx.tree_serialise_leaves`.
    """

    ts: Float[Array, " points"]
    asked: Float[Array, " steps"]
    carry: Float[Array, " steps"]
    scale: Float[Array, " steps"]
    weights: Float[Array, "steps history"]
    evaluations_per_step: ClassVar[int] = 1
    evaluations_at_start: ClassVar[int] = 0
    interpolation_cls: ClassVar[type] = StepInterpolation

    def __check_init__(self):
        steps = len(self.ts) - 1
        if not len(self.asked) == len(self.carry) == len(self.scale) == len(self.weights) == steps:
            raise ValueError(
                f"TunedMultistep got {len(self.ts)} times with {len(self.asked)}, {len(self.carry)}, {len(self.scale)} "
                f"and {len(self.weights)} rows of numbers, but wants one row for each of {steps} steps."
            )

    def for_times(self, times: Float[Array, " points"]) -> "TunedMultistep":
        """This solver; raise unless the times are those of its own grid."""
        message = (
            f"TunedMultistep was tuned for its own grid of {len(self.ts) - 1} steps, but was given other times: "
            "pass grid=grids.Given(solver.ts), the grid that tuning returned with it."
        )
        if times.shape != self.ts.shape:
            raise ValueError(message)
        ts = check(self.ts, ~jnp.isclose(times, self.ts, rtol=1e-5, atol=0), message)
        return eqx.tree_at(lambda s: s.ts, self, ts)

    def order(self, terms: diffrax.AbstractTerm) -> None:
        """None: it is as accurate as it was tuned."""
        del terms

    def init(self, terms: diffrax.AbstractTerm, t0: ScalarLike, t1: ScalarLike, y0: State, args: Args) -> TunedState:
        """An empty history."""
        del t0, t1, args
        field, _, _ = unwrap(terms, "TunedMultistep")
        self.check_dynamics(field.dynamics)
        size = self.weights.shape[1]
        empty = jax.tree.map(jnp.zeros_like, y0)
        return TunedState((empty,) * size, jnp.zeros((size,), bool))

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ScalarLike,
        t1: ScalarLike,
        y0: State,
        args: Args,
        solver_state: TunedState,
        made_jump: Any,
    ) -> tuple[State, None, dict[str, Any], TunedState, diffrax.RESULTS]:
        """One step of the module's equation."""
        field, _, direction = unwrap(terms, "TunedMultistep")
        path = field.flow.path
        start, target = -direction * as_scalar(t0), -direction * as_scalar(t1)
        index = jnp.argmin(jnp.abs(jax.lax.stop_gradient(self.ts[:-1] - start)))
        t = self.asked[index]
        data = evaluate(field, t, y0, args).mixture(mixture_of(Data(), t))
        (alpha, sigma), (alpha_to, sigma_to) = path.coefficients(start), path.coefficients(target)
        ratio = sigma_to / sigma
        total = alpha_to - alpha * ratio
        valid = solver_state.valid & ~jnp.asarray(made_jump)
        weights = jnp.where(valid, self.weights[index], 0)
        newest = 1 + self.scale[index] - jnp.sum(weights)
        y1 = linear_combination(
            (ratio * (1 + self.carry[index]), total * newest, *(total * weights)), (y0, data, *solver_state.values)
        )
        size = len(valid)
        state = TunedState((data, *solver_state.values)[:size], jnp.append(jnp.ones((), bool), valid)[:size])
        return y1, None, {"y0": y0, "y1": y1, "formula": None}, state, diffrax.RESULTS.successful
