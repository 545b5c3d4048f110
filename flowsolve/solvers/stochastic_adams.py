r"""Stochastic Adams methods: the reverse SDE's data extrapolated through the history, its noise exact.

$$x_s = \alpha_s D_0 + \sigma_s \left(k E_0 + \sqrt{1 - k^2}\, z\right) + \sum_{j \ge 1} w_j (D_j - D_0), \qquad
  w_j = \sigma_s \int L_j(\tau)\, d\!\left(\frac{\alpha}{\sigma} k\right)$$

with k inside the integral the share of the noise kept from there to the end of the step. SA-Solver has
$\tau = \lambda$ and a corrector, ER-SDE $\tau = \sigma/\alpha$ and its own k. Without noise both are
`AdamsBashforth` on the data.
"""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_count
from ..dynamics import AbstractDynamics, ExtendedReverseSDE, ReverseSDE
from ..predictions import Data
from .multistep import AbstractSDEMultistep
from .nodes import LogSNR, NoiseRatio, Step, lagrange_weights, trapezoid_from_noise

__all__ = ["ERSDE", "SASolver"]


class SASolver(AbstractSDEMultistep):
    """SA-Solver: stochastic Adams predictor and corrector in log-SNR.

    The noise level, the paper's tau, is that of the dynamics: `ReverseSDE(tau)`, or `ReverseSDE(tau, interval=...)` for
    noise between two times alone; `ReverseSDE(1.0)` if none is given. The corrector uses the evaluation that opens
    the next step and the noise that the predictor drew.

    **Arguments:** `order`: 1 to 4, the evaluations that the predictor combines; the corrector adds the one at the
    target; `corrector`: whether steps are corrected. The last step is not.

    One network evaluation a step. Without noise of order `order`, with the corrector one more. Onto sigma = 0 the
    step is the denoised prediction. Dense output is linear where noise is drawn. Source: Xue et al. (2023),
    arXiv 2309.05019; the integrals by Gauss-Legendre quadrature.
    """

    max_order: int = eqx.field(static=True)
    corrects: bool = eqx.field(static=True)

    def __init__(self, order: int = 3, *, corrector: bool = True):
        self.max_order = check_count(order, "SASolver got order", most=4)
        self.corrects = corrector

    @property
    def default_dynamics(self) -> AbstractDynamics:
        """The reverse SDE with tau = 1."""
        return ReverseSDE(1.0)

    @property
    def corrector(self) -> Callable[[Step], Float[Array, " history"]] | None:
        """The weights of the corrector, or None."""
        return self._correct if self.corrects else None

    def predictor(self, step: Step) -> Float[Array, " history"]:
        """The integrals of the Lagrange polynomials of the latest evaluations."""
        return lagrange_weights(Data(), LogSNR(), step.latest(self.max_order))[1:]

    def _correct(self, step: Step) -> Float[Array, " history"]:
        return jnp.where(step.span()[1], lagrange_weights(Data(), LogSNR(), step)[1:], trapezoid_from_noise(step))


class ERSDE(AbstractSDEMultistep):
    """ER-SDE: the extended reverse SDE, the data extrapolated in sigma/alpha.

    The noise is that of the dynamics, `ExtendedReverseSDE()` if none is given; `ProbabilityFlow()` is its ODE limit.

    **Arguments:** `order`: 1 to 3, the number of evaluations in a step.

    One network evaluation a step. Without noise of order `order`: the published third order leaves out the divided
    difference of the linear term, and with it is of order 2; here the quadratic is whole. Onto sigma = 0 the step is
    the denoised prediction. Dense output is linear where noise is drawn. Source: Cui et al. (2023), arXiv 2309.06169.
    """

    max_order: int = eqx.field(static=True)
    corrector: ClassVar[None] = None

    def __init__(self, order: int = 3):
        self.max_order = check_count(order, "ERSDE got order", most=3)

    @property
    def default_dynamics(self) -> AbstractDynamics:
        """The extended reverse SDE with the paper's noise scale function."""
        return ExtendedReverseSDE()

    def predictor(self, step: Step) -> Float[Array, " history"]:
        """The integrals of the Lagrange polynomials in sigma/alpha."""
        weights = lagrange_weights(Data(), NoiseRatio(), step)[1:]
        return jnp.where(step.end.sigma == 0, 0, weights)
