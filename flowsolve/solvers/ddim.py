r"""DDIM: the first-order exponential step, deterministic or stochastic.

From t to s < t, with $\hat x_0 = E[x_0|x_t]$, $\hat\epsilon = E[\epsilon|x_t]$ from one network evaluation at x_t,

$$x_s = \alpha_s \hat x_0 + \sigma_s \left(\sqrt{1 - \eta^2 (1 - \rho^2)}\; \hat\epsilon
      + \eta \sqrt{1 - \rho^2}\; z\right), \qquad
  \rho = \frac{\alpha_t \sigma_s}{\alpha_s \sigma_t}, \quad z \sim N(0, I)$$

eta = 0 is DDIM, the exact step of the probability flow for a constant denoiser; eta = 1 is DDPM's ancestral step. The
step is finite from alpha = 0 and onto sigma = 0, where it gives exactly the denoised prediction.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from .._checks import check
from .._numerics import as_scalar, linear_combination, safe_sqrt
from .._types import Args, Scalar, ScalarLike, State
from ..dynamics import AbstractDynamics, ProbabilityFlow, ReverseSDE, unwrap
from .base import AbstractFlowSolver

__all__ = ["DDIM"]

_SolverState: TypeAlias = Scalar | None


class DDIM(AbstractFlowSolver[_SolverState], diffrax.AbstractItoSolver[_SolverState]):
    """The DDIM step with noise level eta: first order, one network evaluation a step, any path, any grid.

    **Arguments:** `eta`: the noise level, from 0 (deterministic, uses no key) to 1 (DDPM's ancestral sampling); None
    takes it from the dynamics: 0 for `ProbabilityFlow`, eta for `ReverseSDE(eta)`.

    **Raises:** `ValueError` for eta outside [0, 1], where the step has no real coefficients.

    Dense output is linear. Source: Song, Meng & Ermon (2020), arXiv 2010.02502.
    """

    eta: Scalar | None
    #: Whether `eta` asks for noise; None leaves it to the dynamics.
    stochastic: bool | None = eqx.field(static=True)
    term_structure: ClassVar[type] = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., diffrax.LocalLinearInterpolation]] = diffrax.LocalLinearInterpolation
    evaluations_per_step: ClassVar[int] = 1
    evaluations_at_start: ClassVar[int] = 0

    def __init__(self, eta: ScalarLike | None = None):
        # Told from what was given, as inside a user's jit the scalar made of it is traced.
        zero = not isinstance(eta, jax.core.Tracer) and eta is not None and np.size(eta) == 1 and bool(eta == 0)
        self.stochastic = None if eta is None else not zero
        self.eta = None if eta is None else _check_level(as_scalar(eta))

    @property
    def default_dynamics(self) -> AbstractDynamics | None:
        """The equation that this solver steps through where `eta` says it, else None."""
        if self.stochastic is None or self.eta is None:
            return None
        return ReverseSDE(self.eta) if self.stochastic else ProbabilityFlow()

    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Raise unless the noise level is one number in [0, 1]."""
        if dynamics.stochastic and self.eta is None:
            _level_of(dynamics)

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """The order of convergence on the probability flow: 1."""
        del terms
        return 1

    def strong_order(self, terms: diffrax.AbstractTerm) -> float:
        """1/2, as for any scheme that freezes the network over a step."""
        del terms
        return 0.5

    def init(self, terms: diffrax.AbstractTerm, t0: ScalarLike, t1: ScalarLike, y0: State, args: Args) -> _SolverState:
        """The noise level, one for the whole solve; None where no noise is drawn."""
        del t0, t1, y0, args
        field, noise, _ = unwrap(terms, "DDIM")
        if noise is None:
            if self.stochastic:
                raise ValueError(
                    "DDIM(eta) draws noise, but was given the terms of ProbabilityFlow: give it those of ReverseSDE."
                )
            return None
        if self.eta is not None:
            return self.eta
        return _level_of(field.dynamics)

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ScalarLike,
        t1: ScalarLike,
        y0: State,
        args: Args,
        solver_state: _SolverState,
        made_jump: Any,
    ) -> tuple[State, None, dict[str, State], _SolverState, diffrax.RESULTS]:
        """One step of the module's equation."""
        del made_jump
        field, noise, direction = unwrap(terms, "DDIM")
        path = field.flow.path
        t, s = -direction * as_scalar(t0), -direction * as_scalar(t1)
        alpha_s, sigma_s = path.coefficients(s)
        if noise is None or solver_state is None:
            y1 = field.mixture((alpha_s, sigma_s, jnp.ones_like(s)), t, y0, args)
        else:
            _, fresh = path.noise_split(s, t)
            fresh = fresh * solver_state
            kept = safe_sqrt((1 - fresh) * (1 + fresh))
            mean = field.mixture((alpha_s, sigma_s * kept, jnp.ones_like(s)), t, y0, args)
            increment = noise.contr(as_scalar(t0), as_scalar(t1))
            scale = sigma_s * fresh / jnp.sqrt(as_scalar(t1) - as_scalar(t0))
            y1 = linear_combination((1.0, scale), (mean, increment))
        return y1, None, {"y0": y0, "y1": y1}, solver_state, diffrax.RESULTS.successful

    def func(self, terms: diffrax.AbstractTerm, t0: ScalarLike, y0: State, args: Args) -> Any:
        """The vector field of the terms, which Diffrax asks for to choose a first step."""
        return terms.vf(as_scalar(t0), y0, args)


def _check_level(eta: Scalar) -> Scalar:
    return check(
        eta,
        (eta < 0) | (eta > 1),
        "DDIM got a noise level eta outside [0, 1], where its step has no real coefficients: take eta <= 1, or "
        "dynamics=ReverseSDE(eta) with a solver for any eta such as diffrax.Euler().",
    )


def _level_of(dynamics: AbstractDynamics) -> Scalar:
    """The one noise level of a stochastic dynamics."""
    if not isinstance(dynamics, ReverseSDE) or dynamics.eta is None:
        raise ValueError(
            "DDIM takes its noise level from ReverseSDE(eta), but was given a diffusion w(t): use ReverseSDE(eta), "
            "or a solver for any diffusion such as diffrax.Euler()."
        )
    return _check_level(dynamics.eta)
