r"""Adams-Bashforth multistep: P extrapolated by the polynomial through the history.

$$x_s = \alpha_s D_0 + \sigma_s E_0 + \sum_{j \ge 1} w_j\, (P_j - P_0), \qquad w_j = c_s \int L_j(\tau)\, dy$$

with c, y and P from the table in `nodes`. The members differ in what is extrapolated and in which variable:

| solver | P | tau |
|---|---|---|
| `AdamsBashforth` | any of the three | any |
| `DEIS` | noise | the time of `paths.VP` at equal signal-to-noise |
| `LMS` | noise | sigma/alpha |
| `IPNDM` | any of the three | the number of the step: constant coefficients |

All have order p from a start that has it. The first steps have as many evaluations as there are, from one up; an Euler
start over a first step of ordinary length leaves the whole solve at order 2.
"""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_count, check_type
from ..predictions import AbstractPrediction, Data, Noise
from .multistep import AbstractODEMultistep
from .nodes import (
    AbstractVariable,
    NoiseRatio,
    Step,
    Time,
    VPTime,
    check_extrapolated,
    constant_weight,
    lagrange_weights,
)

__all__ = ["DEIS", "IPNDM", "LMS", "AdamsBashforth"]


class AdamsBashforth(AbstractODEMultistep):
    """Variable-step Adams-Bashforth on the data, the noise or the velocity, with Lagrange nodes in a chosen variable.

    **Arguments:** `order`: 1 to 4, the number of evaluations in a step; `prediction`: what is extrapolated, `Data()`,
    `Noise()` or `Velocity()` (here E - D at the time of the `Linear` path, where it is dx/dt), whatever the network
    predicts; `variable`: `Time()`, `LogSNR()`, `NoiseRatio()` or `VPTime()`.

    With `Data()` and `Time()`, the defaults and the natural multistep of `Linear`, both ends are finite: onto sigma =
    0 it gives the data extrapolated to that time.

    **Raises:** `ValueError` for an order or a prediction outside these.

    The order is that from a full history; after an Euler step of ordinary length it is 2 at most. One network
    evaluation a step. Dense output has the order of the steps. Source: exponential Adams methods, Hochbruck & Ostermann
    (2010), Acta Numerica 19; the quantities and variables are those of the solvers below.
    """

    max_order: int = eqx.field(static=True)
    extrapolated: AbstractPrediction
    variable: AbstractVariable
    corrector: ClassVar[None] = None

    def __init__(
        self, order: int = 2, *, prediction: AbstractPrediction | None = None, variable: AbstractVariable | None = None
    ):
        self.max_order = check_count(order, "AdamsBashforth got order", most=4)
        self.extrapolated = check_extrapolated(Data() if prediction is None else prediction, "AdamsBashforth")
        self.variable = Time() if variable is None else variable
        check_type(self.variable, AbstractVariable, "AdamsBashforth's variable", "an instance such as LogSNR()")

    def predictor(self, step: Step) -> Float[Array, " history"]:
        """w_j, the integrals of the Lagrange polynomials."""
        return lagrange_weights(self.extrapolated, self.variable, step)[1:]


class DEIS(AbstractODEMultistep):
    """DEIS-tAB: Adams-Bashforth on the noise, in the time of the VP path.

    **Arguments:** `order`: 1 to 4, the number of evaluations in a step; the paper's tAB-r, of a polynomial of degree
    r, is order r + 1, and tAB3 the default.

    The order is that from a full history; after an Euler step of ordinary length it is 2 at most. One network
    evaluation a step. Dense output has the order of the steps. Source: Zhang & Chen (2022), arXiv 2204.13902; the
    integrals by Gauss-Legendre quadrature instead of a Riemann sum, on any path at equal log-SNR.
    """

    max_order: int = eqx.field(static=True)
    extrapolated: ClassVar[Noise] = Noise()
    corrector: ClassVar[None] = None

    def __init__(self, order: int = 4):
        self.max_order = check_count(order, "DEIS got order", most=4)

    def predictor(self, step: Step) -> Float[Array, " history"]:
        """w_j, the integrals of the Lagrange polynomials in VP time."""
        return lagrange_weights(self.extrapolated, VPTime(), step)[1:]


class LMS(AbstractODEMultistep):
    """Linear multistep on the noise in sigma/alpha, the `lms` sampler of k-diffusion, on any path.

    **Arguments:** `order`: 1 to 4, the number of evaluations in a step.

    The order is that from a full history; after an Euler step of ordinary length it is 2 at most. One network
    evaluation a step. Dense output has the order of the steps. Source: Adams-Bashforth for EDM's equation
    dx/dsigma = E; Karras et al. (2022), arXiv 2206.00364.
    """

    max_order: int = eqx.field(static=True)
    extrapolated: ClassVar[Noise] = Noise()
    corrector: ClassVar[None] = None

    def __init__(self, order: int = 4):
        self.max_order = check_count(order, "LMS got order", most=4)

    def predictor(self, step: Step) -> Float[Array, " history"]:
        """w_j, the integrals of the Lagrange polynomials in sigma/alpha."""
        return lagrange_weights(self.extrapolated, NoiseRatio(), step)[1:]


# Row p: the weights of P_1, P_2, P_3 when p evaluations are at hand; that of P_0 is one less their sum.
_CONSTANT = (
    (0, 0, 0),
    (-1 / 2, 0, 0),
    (-16 / 12, 5 / 12, 0),
    (-59 / 24, 37 / 24, -9 / 24),
)


class IPNDM(AbstractODEMultistep):
    """Adams-Bashforth with the coefficients of equal steps, whatever the steps are: iPNDM.

    The weights of P_0, P_1, ... are (3, -1)/2, (23, -16, 5)/12 and (55, -59, 37, -9)/24 of that of a constant P.

    **Arguments:** `order`: 1 to 4, the number of evaluations in a step; `prediction`: what is extrapolated,
    `Noise()`, `Data()` or `Velocity()`, whatever the network predicts.

    Of order p only on a grid of equal steps in the variable y of its prediction (sigma/alpha for the noise); of
    order 2 at most on other smooth grids. One network evaluation a step. Dense output is of order 1. Source: Liu et
    al. (2022), arXiv 2202.09778; Zhang & Chen (2022), arXiv 2204.13902.
    """

    max_order: int = eqx.field(static=True)
    extrapolated: AbstractPrediction
    corrector: ClassVar[None] = None

    def __init__(self, order: int = 4, *, prediction: AbstractPrediction | None = None):
        self.max_order = check_count(order, "IPNDM got order", most=4)
        self.extrapolated = check_extrapolated(Noise() if prediction is None else prediction, "IPNDM")

    def predictor(self, step: Step) -> Float[Array, " history"]:
        """The row of the table that the history fills."""
        at_hand = jnp.sum(jnp.cumprod(step.valid)) - 1
        rows = jnp.asarray(_CONSTANT, step.target.dtype)[: self.max_order, : self.max_order - 1]
        return rows[at_hand] * constant_weight(self.extrapolated, step)
