r"""Steps of models that reach far in one evaluation: jumps of a flow map, and consistency sampling.

From t to s < t, with u the average velocity of a flow map and f(t, x) a consistency function, which predicts the data,

| solver | step |
|---|---|
| `Jump` | $x_s = x_t - (t - s)\, u(t, s, x_t)$ |
| `ConsistencySampling` | $x_s = \rho f(t, x_t) + \sqrt{\sigma_s^2 - \rho^2 \sigma_d^2}\; z$ |

with new $z \sim N(0, I)$ and $\rho = \alpha_s/\alpha_d$. $\alpha_d, \sigma_d$ are those of `t_data`, at which f ends,
and z is the noise that x_s has beyond it. Where $\sigma_d = 0$, $\alpha_d = 1$ this is $\alpha_s f + \sigma_s z$.
"""

from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check
from .._numerics import as_scalar, linear_combination, safe_sqrt
from .._types import Args, Scalar, ScalarLike, State
from ..dynamics import AbstractDynamics, AddedNoise, unwrap
from ..flow import AbstractFlow
from ..flowmaps import FlowMap
from .base import (
    AbstractGridAwareSolver,
    AbstractMemorylessSolver,
    AbstractProbabilityFlowSolver,
    AbstractStochasticSolver,
)
from .interpolation import StepInterpolation

__all__ = ["ConsistencySampling", "Jump"]


class Jump(AbstractMemorylessSolver, AbstractProbabilityFlowSolver[None], AbstractGridAwareSolver[None]):
    """The jumps of a `flowmaps.FlowMap` from each time of a grid to the next, one network evaluation each.

    With the exact average velocity any grid is exact, one step included. Any other flow has no average velocity.

    **Raises:** `TypeError` for a flow that is no `FlowMap` (a wrapper such as guidance makes one a plain flow);
    `ValueError` on the way from data to noise, which flow maps are not trained for.

    Dense output is linear. Source: Geng et al. (2025), arXiv 2505.13447.
    """

    evaluations_per_step: ClassVar[int] = 1
    interpolation_cls: ClassVar[type] = StepInterpolation

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """1, that of a map which knows no more than the velocity."""
        del terms
        return 1

    def for_times(self, times: Float[Array, " points"]) -> "Jump":
        """The solver itself, whose times must fall."""
        check(
            times,
            times[0] < times[-1],
            "Jump got times that rise, from data to noise, but a flow map goes from noise to data: encode with "
            "diffrax.Heun(), by its velocity.",
        )
        return self

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ScalarLike,
        t1: ScalarLike,
        y0: State,
        args: Args,
        solver_state: None,
        made_jump: Any,
    ) -> tuple[State, None, dict[str, Any], None, diffrax.RESULTS]:
        """One step of the module's equation."""
        del solver_state, made_jump
        field, _, direction = unwrap(terms, "Jump")
        y1 = _jump(field.flow, -direction * as_scalar(t0), -direction * as_scalar(t1), y0, args)
        return y1, None, {"y0": y0, "y1": y1, "formula": None}, None, diffrax.RESULTS.successful


@eqx.filter_jit
def _jump(flow: AbstractFlow, t: Scalar, s: Scalar, x: State, args: Args) -> State:
    """Behind its own jit for the same reason as `network_output`."""
    if not isinstance(flow, FlowMap):
        raise TypeError(
            f"Jump got a {type(flow).__name__}, which has no average velocity: give it a fs.flowmaps.FlowMap, or take "
            "another solver such as fs.solvers.DDIM()."
        )
    return flow.jump(t, s, x, args)


class ConsistencySampling(AbstractMemorylessSolver, AbstractStochasticSolver[None]):
    """Multistep consistency sampling: predict the data, put new noise on them, and again.

    For a flow that predicts examples of the data, not their mean: a consistency model, `flowmaps.OntoData` of a flow
    map, or the student of a distillation. One evaluation a step, any path and grid. The step onto `t_data` is the
    prediction itself: one step draws no noise. Dense output is linear.

    Source: Song et al. (2023), arXiv 2303.01469, algorithm 1, where alpha = 1.
    """

    evaluations_per_step: ClassVar[int] = 1
    interpolation_cls: ClassVar[type] = StepInterpolation

    @property
    def default_dynamics(self) -> AbstractDynamics:
        """Noise that the solver adds itself."""
        return AddedNoise()

    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Raise for any other equation."""
        if not isinstance(dynamics, AddedNoise):
            raise ValueError(
                f"ConsistencySampling draws its own noise, but was given {type(dynamics).__name__}: leave dynamics out."
            )

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """1, nominally: more steps are not nearer to anything but the law of the data."""
        del terms
        return 1

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ScalarLike,
        t1: ScalarLike,
        y0: State,
        args: Args,
        solver_state: None,
        made_jump: Any,
    ) -> tuple[State, None, dict[str, Any], None, diffrax.RESULTS]:
        """One step of the module's equation."""
        del solver_state, made_jump
        field, noise, direction = unwrap(terms, "ConsistencySampling")
        assert noise is not None
        path = field.flow.path
        start, target = -direction * as_scalar(t0), -direction * as_scalar(t1)
        one, zero = jnp.ones_like(start), jnp.zeros_like(start)
        data = field.mixture((one, zero, one), start, y0, args)
        (alpha, sigma), (alpha_data, sigma_data) = path.coefficients(target), path.coefficients(as_scalar(path.t_data))
        rho = alpha / alpha_data
        # At t_data itself, and on the clean end below, nothing is added.
        above = jnp.where(target <= as_scalar(path.t_data), 0, sigma - rho * sigma_data)
        fresh = safe_sqrt(above * (sigma + rho * sigma_data))
        y1 = linear_combination((rho, fresh), (data, noise.normal(t0, t1)))
        return y1, None, {"y0": y0, "y1": y1, "formula": None}, None, diffrax.RESULTS.successful
