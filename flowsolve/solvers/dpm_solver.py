r"""DPM-Solver++: exponential multistep on the data in log-SNR, of the probability flow and of the reverse SDE.

With $h = \lambda_s - \lambda_t$, $r_0 = (\lambda_0 - \lambda_1)/h$, $r_1 = (\lambda_1 - \lambda_2)/h$,
$B = \alpha_s - \alpha_t k \sigma_s/\sigma_t$ the weight of constant data, $\phi_k$ the exponential functions
at -h, and differences $d_{10} = (D_0 - D_1)/r_0$, $d_{11} = (D_1 - D_2)/r_1$,

- 2M adds $B\, d_{10}/2$ to the base;
- 3M adds $\alpha_s h\, (\phi_2 e_1 + c\, \phi_3 e_2)$ with $e_1 = d_{10} + \frac{r_0}{r_0 + r_1} (d_{10} - d_{11})$,
  $e_2 = (d_{10} - d_{11})/(r_0 + r_1)$. The quadratic through the three evaluations has c = 2, and order 3; the
  published formula has c = 1, and order 2.

From alpha = 0 and onto sigma = 0, where h is infinite, the step is the base: onto sigma = 0 the denoised prediction.
"""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_count
from .._numerics import phis
from ..dynamics import AbstractDynamics, ReverseSDE
from ..predictions import Data
from .multistep import AbstractODEMultistep, AbstractSDEMultistep
from .nodes import Step

__all__ = ["DPMSolverPP", "SDEDPMSolverPP"]


class DPMSolverPP(AbstractODEMultistep):
    """DPM-Solver++ multistep: 2M, 3M, and 1, which is `DDIM`.

    **Arguments:** `order`: 1, 2 or 3; `as_published`: whether order 3 is the formula of the paper, which converges
    at order 2 but is often as good at 5 to 20 steps, or the one of order 3.

    The order is that from a full history; after an Euler step of ordinary length it is 2 at most. One network
    evaluation a step. Dense output has the order of the steps. Source: Lu et al. (2022), arXiv 2211.01095.
    """

    max_order: int = eqx.field(static=True)
    as_published: bool = eqx.field(static=True)
    extrapolated: ClassVar[Data] = Data()
    corrector: ClassVar[None] = None

    def __init__(self, order: int = 2, *, as_published: bool = False):
        self.max_order = check_count(order, "DPMSolverPP got order", most=3)
        if as_published and order != 3:
            raise ValueError(
                f"DPMSolverPP got as_published for order {order}, but it is a choice of order 3: leave it out."
            )
        self.as_published = as_published

    def predictor(self, step: Step) -> Float[Array, " history"]:
        """The weights of D_1 - D_0 and D_2 - D_0."""
        if self.max_order < 3:
            return _second_order(step)
        places, usable = step.places()
        h, _ = step.span()
        alpha, full = step.end.alpha, usable[1] & usable[2]
        r0 = jnp.where(full, -places[1], 1)
        r1 = jnp.where(full, places[1] - places[2], 1)
        _, phi_2, phi_3 = phis(3, -h)
        linear, quadratic = h * phi_2, h * phi_3 * (1 if self.as_published else 2)
        first = -linear * (1 / r0 + 1 / r1) - quadratic / (r0 * r1)
        second = (linear * r0 + quadratic) / (r1 * (r0 + r1))
        third_order = alpha * jnp.stack([first, second])
        return jnp.where(full, third_order, _second_order(step))


class SDEDPMSolverPP(AbstractSDEMultistep):
    """SDE-DPM-Solver++ multistep: the reverse SDE at any noise level, exactly linear in the noise.

    The noise level is that of the dynamics, `ReverseSDE(1.0)` if none is given; on `ProbabilityFlow` this is
    `DPMSolverPP(order)`. (The paper's and other libraries' eta is the square of this library's: their eta multiplies
    w, ours its root.)

    **Arguments:** `order`: 1 or 2.

    One network evaluation a step. Weak order 1 with noise, order `order` without. Dense output is linear where noise
    is drawn. Source: Lu et al. (2022), arXiv 2211.01095.
    """

    max_order: int = eqx.field(static=True)
    corrector: ClassVar[None] = None

    def __init__(self, order: int = 2):
        self.max_order = check_count(order, "SDEDPMSolverPP got order", most=2)

    @property
    def default_dynamics(self) -> AbstractDynamics:
        """The reverse SDE with eta = 1."""
        return ReverseSDE(1.0)

    def predictor(self, step: Step) -> Float[Array, " history"]:
        """The weight of D_1 - D_0."""
        return _second_order(step)


def _second_order(step: Step) -> Float[Array, " history"]:
    """-B/(2 r_0) for D_1 - D_0, 0 for the rest of the history."""
    places, usable = step.places()
    first = jnp.arange(1, len(places)) == 1
    return jnp.where(usable[1:] & first, step.data_weight() / (2 * places[1:]), 0)
