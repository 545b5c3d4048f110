r"""Preconditioning: a network F with inputs and targets of unit variance, on any path.

EDM's scheme, written for $x_t/\alpha$ so that it holds on every Gaussian path, with s the data's standard deviation:

$$D(x, t) = c_\mathrm{skip} x + c_\mathrm{out} F(c_\mathrm{in} x, c_\mathrm{noise}), \qquad
  n = \sqrt{\sigma^2 + \alpha^2 s^2}$$
$$c_\mathrm{in} = 1/n, \quad c_\mathrm{skip} = \alpha s^2/n^2, \quad c_\mathrm{out} = \sigma s/n, \quad
  c_\mathrm{noise} = \tfrac14 \ln(\sigma/\alpha)$$

A consistency function is x itself at `t_data`: so is this where sigma = 0 there, and `ConsistencyPreconditioner` on
every path.

Source: Karras et al. (2022), arXiv 2206.00364, where alpha = 1.
"""

import abc
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from ._numerics import as_scalar, linear_combination
from ._types import Args, Network, PRNGKey, Scalar, ScalarLike, State
from .paths import AbstractPath
from .predictions import AbstractPrediction, Data

__all__ = [
    "AbstractPreconditioner",
    "AbstractSkipPreconditioner",
    "ConsistencyPreconditioner",
    "EDMPreconditioner",
    "angle",
    "quarter_log_ratio",
]


class AbstractPreconditioner(eqx.Module):
    """A scaling of a network's input, time and output that makes it predict `prediction`."""

    #: What the preconditioned network predicts.
    prediction: eqx.AbstractVar[AbstractPrediction]

    @abc.abstractmethod
    def apply(
        self, network: Network, path: AbstractPath, t: Scalar, x: State, args: Args, *, key: PRNGKey | None
    ) -> State:
        """The preconditioned prediction at (t, x), from one call of the network."""


def quarter_log_ratio(path: AbstractPath, t: Scalar) -> Scalar:
    """c_noise = ln(sigma/alpha)/4 of EDM; infinite where sigma or alpha is 0."""
    return -0.125 * path.log_snr(t)


def angle(path: AbstractPath, t: Scalar) -> Scalar:
    """c_noise = atan2(sigma, alpha), from 0 (data) to pi/2 (noise): finite at both ends of every path."""
    alpha, sigma = path.coefficients(t)
    return jnp.arctan2(sigma, alpha)


class AbstractSkipPreconditioner(AbstractPreconditioner):
    """D(x, t) = c_skip x + c_out F(c_in x, c_noise): data from a skip connection beside the network."""

    data_std: eqx.AbstractVar[ScalarLike]
    noise_level: eqx.AbstractVar[Callable[[AbstractPath, Scalar], Scalar]]

    def __check_init__(self):
        if isinstance(self.data_std, float | int) and not (self.data_std > 0 and math.isfinite(self.data_std)):
            raise ValueError(
                f"{type(self).__name__} got data_std = {self.data_std}, but wants the data's standard deviation, > 0."
            )

    @abc.abstractmethod
    def coefficients(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """(c_in, c_skip, c_out) at time t."""

    def apply(
        self, network: Network, path: AbstractPath, t: Scalar, x: State, args: Args, *, key: PRNGKey | None
    ) -> State:
        c_in, c_skip, c_out = self.coefficients(path, t)
        output = network(self.noise_level(path, t), linear_combination((c_in,), (x,)), args, key=key)
        return linear_combination((c_skip, c_out), (x, output))


def _scheme(
    data_std: ScalarLike, alpha: Scalar, sigma: Scalar, alpha_data: Scalar, above: Scalar
) -> tuple[Scalar, Scalar, Scalar]:
    """(c_in, c_skip, c_out), with `above` the noise counted from a data end of scale `alpha_data`."""
    std = alpha * data_std
    norm = jnp.sqrt(sigma**2 + std**2)
    # In this order the quotient is exactly 1 at the end, where alpha is alpha_data and `above` is 0.
    skip = (alpha_data * data_std) * std / (above**2 + std**2)
    return 1 / norm, skip, alpha_data * above * data_std / norm


class EDMPreconditioner(AbstractSkipPreconditioner):
    """EDM's preconditioning for any path.

    **Arguments:** `data_std`: standard deviation of the data's elements; `noise_level`: the number that the network
    gets in place of t, a function of the path and t: `quarter_log_ratio` (the paper's) or, on a path that reaches
    alpha = 0 or sigma = 0 (`Linear`, `Trigonometric`), `angle`.

    Source: Karras et al. (2022), arXiv 2206.00364.
    """

    data_std: ScalarLike = 0.5
    noise_level: Callable[[AbstractPath, Scalar], Scalar] = quarter_log_ratio
    prediction: Data = eqx.field(default=Data(), init=False)

    def coefficients(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        alpha, sigma = path.coefficients(t)
        return _scheme(self.data_std, alpha, sigma, jnp.ones_like(alpha), sigma)


class ConsistencyPreconditioner(AbstractSkipPreconditioner):
    r"""EDM's preconditioning with f(t_data, x) = x, for a consistency function on a path whose data end has some noise.

    EDM's scheme with the noise level counted from that end, $m = \sigma - \alpha\,\sigma_d/\alpha_d$, where
    $\alpha_d, \sigma_d$ are those of `t_data`:

    $$c_\mathrm{skip} = \frac{\alpha_d\,\alpha s^2}{m^2 + \alpha^2 s^2}, \qquad
      c_\mathrm{out} = \frac{\alpha_d\, m\, s}{\sqrt{\sigma^2 + \alpha^2 s^2}}$$

    and $c_\mathrm{in}$, $c_\mathrm{noise}$ as there. At `t_data` c_skip = 1 and c_out = 0, to the last bit. Where
    sigma_d = 0 it is `EDMPreconditioner`.

    **Arguments:** as `EDMPreconditioner`.

    Source: Song et al. (2023), arXiv 2303.01469, appendix C, where alpha = 1.
    """

    data_std: ScalarLike = 0.5
    noise_level: Callable[[AbstractPath, Scalar], Scalar] = quarter_log_ratio
    prediction: Data = eqx.field(default=Data(), init=False)

    def coefficients(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        t_data = as_scalar(path.t_data)
        alpha, sigma = path.coefficients(t)
        alpha_data, sigma_data = path.coefficients(t_data)
        above = (sigma * alpha_data - alpha * sigma_data) / alpha_data
        # At the end itself two rounded products need not cancel. The derivative stays.
        above = jnp.where(t == t_data, above - jax.lax.stop_gradient(above), above)
        return _scheme(self.data_std, alpha, sigma, alpha_data, above)
