r"""DDIM: the first-order exponential step, deterministic or stochastic.

From t to s < t, with $\hat x_0 = E[x_0|x_t]$, $\hat\epsilon = E[\epsilon|x_t]$ from one network evaluation at x_t,

$$x_s = \alpha_s \hat x_0 + \sigma_s \left(\sqrt{1 - \eta^2 (1 - \rho^2)}\; \hat\epsilon
      + \eta \sqrt{1 - \rho^2}\; z\right), \qquad
  \rho = \frac{\alpha_t \sigma_s}{\alpha_s \sigma_t}, \quad z \sim N(0, I)$$

eta = 0 is DDIM, the exact step of the probability flow for a constant denoiser; eta = 1 is DDPM's ancestral step. The
step is finite from alpha = 0 and onto sigma = 0, where it gives exactly the denoised prediction.
"""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check, known
from .._numerics import as_scalar, is_zero, safe_sqrt
from .._types import Scalar, ScalarLike
from ..dynamics import AbstractDynamics, ProbabilityFlow, ReverseSDE
from ..predictions import Data
from .base import AbstractStochasticSolver
from .multistep import AbstractMultistep, MultistepState
from .nodes import Step

__all__ = ["DDIM"]


class DDIM(AbstractMultistep, AbstractStochasticSolver[MultistepState]):
    """The DDIM step with noise level eta: first order, one network evaluation a step, any path, any grid.

    **Arguments:** `eta`: the noise level, from 0 (deterministic, uses no key) to 1 (DDPM's ancestral sampling); None
    takes it from the dynamics: 0 for `ProbabilityFlow`, eta for `ReverseSDE(eta)`.

    **Raises:** `ValueError` for eta outside [0, 1], where the step has no real coefficients.

    On `paths.EDM` this is the Euler-ancestral sampler of k-diffusion with the same eta, and its Euler sampler at eta
    = 0. Dense output has the step's own order, and is linear where noise is drawn. Source: Song, Meng & Ermon (2020),
    arXiv 2010.02502.
    """

    eta: Scalar | None
    #: Whether `eta` asks for noise; None leaves it to the dynamics.
    stochastic: bool | None = eqx.field(static=True)
    extrapolated: ClassVar[Data] = Data()
    max_order: ClassVar[int] = 1
    corrector: ClassVar[None] = None

    def __init__(self, eta: ScalarLike | None = None):
        # Told from what was given, as inside a user's jit the scalar made of it is traced.
        self.stochastic = None if eta is None else not is_zero(eta)
        self.eta = None if eta is None else _check_level(as_scalar(eta))

    @property
    def default_dynamics(self) -> AbstractDynamics:
        """The equation of the noise level `eta`, the probability flow where it is None."""
        if self.eta is None or not self.stochastic:
            return ProbabilityFlow()
        return ReverseSDE(self.eta)

    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Raise unless the noise level is one number in [0, 1] and noise is at hand where it asks for some."""
        if self.eta is None and dynamics.stochastic:
            _level_of(dynamics)
        elif self.stochastic and not dynamics.stochastic:
            raise ValueError(
                "DDIM(eta) draws noise, but was given ProbabilityFlow: give it ReverseSDE, or leave eta out."
            )

    def kept(self, step: Step) -> Scalar:
        """sqrt(1 - eta^2 (1 - rho^2))."""
        if not step.dynamics.stochastic:
            return jnp.ones_like(step.target)
        level = _level_of(step.dynamics) if self.eta is None else self.eta
        fresh = step.path.noise_split(step.target, step.start)[1] * level
        return safe_sqrt((1 - fresh) * (1 + fresh))

    def predictor(self, step: Step) -> Float[Array, " history"]:
        """No history, no weights."""
        return jnp.zeros((0,), step.target.dtype)


def _check_level(eta: Scalar) -> Scalar:
    level = known(eta)
    return check(
        eta,
        ~((level >= 0) & (level <= 1)),
        "DDIM got a noise level eta outside [0, 1], where its step has no real coefficients: take eta <= 1, or "
        "dynamics=ReverseSDE(eta) with a solver for any eta such as SDEDPMSolverPP().",
    )


def _level_of(dynamics: AbstractDynamics) -> Scalar:
    """The one noise level of a stochastic dynamics."""
    if not isinstance(dynamics, ReverseSDE) or dynamics.eta is None or dynamics.interval is not None:
        raise ValueError(
            "DDIM takes its noise level from ReverseSDE(eta), the same at all times, but was given another "
            f"{type(dynamics).__name__}: use ReverseSDE(eta), or a solver for any equation such as SDEDPMSolverPP()."
        )
    return _check_level(dynamics.eta)
