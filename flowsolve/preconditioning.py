r"""Preconditioning: a network F with inputs and targets of unit variance, on any path.

EDM's scheme, written for $x_t/\alpha$ so that it holds on every Gaussian path, with s the data's standard deviation:

$$D(x, t) = c_\mathrm{skip} x + c_\mathrm{out} F(c_\mathrm{in} x, c_\mathrm{noise}), \qquad
  n = \sqrt{\sigma^2 + \alpha^2 s^2}$$
$$c_\mathrm{in} = 1/n, \quad c_\mathrm{skip} = \alpha s^2/n^2, \quad c_\mathrm{out} = \sigma s/n, \quad
  c_\mathrm{noise} = \tfrac14 \ln(\sigma/\alpha)$$

Source: Karras et al. (2022), arXiv 2206.00364, where alpha = 1.
"""

import abc
import math
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp

from ._numerics import linear_combination
from ._types import Args, Network, PRNGKey, Scalar, ScalarLike, State
from .paths import AbstractPath
from .predictions import AbstractPrediction, Data

__all__ = ["AbstractPreconditioner", "EDMPreconditioner", "angle", "quarter_log_ratio"]


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


class EDMPreconditioner(AbstractPreconditioner):
    """EDM's preconditioning for any path.

    **Arguments:** `data_std`: standard deviation of the data's elements; `noise_level`: the number that the network
    gets in place of t, a function of the path and t: `quarter_log_ratio` (the paper's) or, on a path that reaches
    alpha = 0 or sigma = 0 (`Linear`, `Trigonometric`), `angle`.

    Source: Karras et al. (2022), arXiv 2206.00364.
    """

    data_std: ScalarLike = 0.5
    noise_level: Callable[[AbstractPath, Scalar], Scalar] = quarter_log_ratio
    prediction: Data = eqx.field(default=Data(), init=False)

    def __check_init__(self):
        if isinstance(self.data_std, float | int) and not (self.data_std > 0 and math.isfinite(self.data_std)):
            raise ValueError(
                f"EDMPreconditioner got data_std = {self.data_std}, but wants the data's standard deviation, > 0."
            )

    def coefficients(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """(c_in, c_skip, c_out) at time t."""
        alpha, sigma = path.coefficients(t)
        variance = sigma**2 + (alpha * self.data_std) ** 2
        norm = jnp.sqrt(variance)
        return 1 / norm, alpha * self.data_std**2 / variance, sigma * self.data_std / norm

    def apply(
        self, network: Network, path: AbstractPath, t: Scalar, x: State, args: Args, *, key: PRNGKey | None
    ) -> State:
        c_in, c_skip, c_out = self.coefficients(path, t)
        output = network(self.noise_level(path, t), linear_combination((c_in,), (x,)), args, key=key)
        return linear_combination((c_skip, c_out), (x, output))
