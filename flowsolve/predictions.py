r"""What a network predicts, and the conversion between any two predictions.

On a path $x_t = \alpha x_0 + \sigma \epsilon$ a prediction is three numbers at each time: its output o obeys

$$c\, o = a\, x_0 + b\, \epsilon$$

| prediction | a | b | c | output |
|---|---|---|---|---|
| Data | 1 | 0 | 1 | $x_0$ |
| Noise | 0 | 1 | 1 | $\epsilon$ |
| Velocity | $\alpha'$ | $\sigma'$ | 1 | $dx_t/dt$ |
| V | $-\sigma$ | $\alpha$ | 1 | $\alpha\epsilon - \sigma x_0$ (Salimans & Ho 2022) |
| Score | 0 | -1 | $\sigma$ | $-\epsilon/\sigma = \nabla \ln p_t$ |

(c is there for the score alone: it keeps conversions from it finite where sigma = 0.) With $x_t$ this is a 2 x 2
linear system in $(x_0, \epsilon)$, so every conversion is one line,

$$o_2 = \frac{(a b_2 - a_2 b)\, x_t + (a_2 \sigma - b_2 \alpha)\, c\, o}{c_2\, (a \sigma - b \alpha)} .$$

Where $c_2 (a\sigma - b\alpha) = 0$ the output says nothing about the target (the noise about the data at alpha = 0,
the data about the noise at sigma = 0) or the target is infinite (the score at sigma = 0): `convert` raises if the
time is concrete, and gives inf, never NaN, if it is traced.
"""

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from ._checks import is_concrete
from ._numerics import as_scalar, linear_combination
from ._types import Scalar, ScalarLike, State
from .paths import AbstractPath

__all__ = ["AbstractPrediction", "Data", "Noise", "Score", "V", "Velocity", "convert"]


class AbstractPrediction(eqx.Module):
    """A quantity that a network predicts: c output = a x_0 + b eps."""

    #: The sign of the output when time runs the other way: -1 for a derivative in time, +1 otherwise.
    time_reversal_sign: eqx.AbstractClassVar[int]

    @abc.abstractmethod
    def coefficients(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """(a, b, c) of c output = a x_0 + b eps at time t."""


class Data(AbstractPrediction):
    """The data x_0; its optimum is the denoiser E[x_0 | x_t]."""

    time_reversal_sign: ClassVar[int] = 1

    def coefficients(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        del path
        return jnp.ones_like(t), jnp.zeros_like(t), jnp.ones_like(t)


class Noise(AbstractPrediction):
    """The noise eps. Source: Ho, Jain & Abbeel (2020), arXiv 2006.11239."""

    time_reversal_sign: ClassVar[int] = 1

    def coefficients(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        del path
        return jnp.zeros_like(t), jnp.ones_like(t), jnp.ones_like(t)


class Velocity(AbstractPrediction):
    """The velocity dx_t/dt = alpha' x_0 + sigma' eps. Source: Lipman et al. (2022), arXiv 2210.02747."""

    time_reversal_sign: ClassVar[int] = -1

    def coefficients(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        d_alpha, d_sigma = path.derivatives(t)
        return d_alpha, d_sigma, jnp.ones_like(t)


class V(AbstractPrediction):
    """v = alpha eps - sigma x_0, not to be confused with `Velocity`.

    Source: Salimans & Ho (2022), arXiv 2202.00512.
    """

    time_reversal_sign: ClassVar[int] = 1

    def coefficients(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        alpha, sigma = path.coefficients(t)
        return -sigma, alpha, jnp.ones_like(t)


class Score(AbstractPrediction):
    """The score of a pair, -eps/sigma; its optimum is grad ln p_t(x_t).

    Source: Vincent (2011); Song et al. (2020), arXiv 2011.13456.
    """

    time_reversal_sign: ClassVar[int] = 1

    def coefficients(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        return jnp.zeros_like(t), -jnp.ones_like(t), path.coefficients(t)[1]


Triple = tuple[Scalar, Scalar, Scalar]


def conversion_weights(path: AbstractPath, t: Scalar, source: Triple, target: Triple) -> Triple:
    """The weights (w_x, w_o, denominator) of target = (w_x x_t + w_o output) / denominator.

    `source` and `target` are the (a, b, c) of two predictions at time t, or any other combination of
    x_0 and eps that is wanted.
    """
    alpha, sigma = path.coefficients(t)
    a, b, c = source
    a2, b2, c2 = target
    on_x, on_output, below = a * b2 - a2 * b, (a2 * sigma - b2 * alpha) * c, a * sigma - b * alpha
    # Two multiples of the same mixture (the noise and the score): known from each other at the ends as well.
    multiple = (below == 0) & (on_x == 0)
    larger = jnp.abs(a) > jnp.abs(b)
    on_output = jnp.where(multiple, jnp.where(larger, a2, b2) * c, on_output)
    below = jnp.where(multiple, jnp.where(larger, a, b), below)
    return on_x, on_output, c2 * below


def quotients(weights: Triple) -> tuple[Scalar, Scalar]:
    """(w_x, w_o) over the denominator; 1 where that has no finite value."""
    singular = is_singular(weights)
    on_x, on_output, denominator = (jnp.where(singular, 1, weight) for weight in weights)
    return on_x / denominator, on_output / denominator


def combine(weights: Triple, x_t: State, output: State) -> State:
    """(w_x x_t + w_o output) / denominator: inf, never NaN, where that has no finite value."""
    mixed = linear_combination(quotients(weights), (x_t, output))
    return jax.tree.map(lambda leaf: jnp.where(is_singular(weights), jnp.inf, leaf), mixed)


def convert(
    path: AbstractPath,
    t: ScalarLike,
    x_t: State,
    output: State,
    source: AbstractPrediction,
    target: AbstractPrediction,
) -> State:
    """Turn what one network predicts into another prediction, for one example.

    target = [(a b2 - a2 b) x_t + (a2 sigma - b2 alpha) c output] / [c2 (a sigma - b alpha)]

    **Arguments:** `path`, `t`: where x_t lies; `x_t`: the noisy example; `output`: the network's output there,
    of the same structure; `source`: what `output` is; `target`: what is wanted.

    **Returns:** the target's value, of the structure of `x_t`. The same prediction comes back unchanged.

    **Raises:** `ValueError` where `t` is concrete and the target is not determined by the output there
    (from Noise or Score at alpha = 0, from Data at sigma = 0), or infinite (Score at sigma = 0).
    """
    if source == target:
        return output
    t = as_scalar(t)
    weights = conversion_weights(path, t, source.coefficients(path, t), target.coefficients(path, t))
    if is_concrete(weights) and bool(np.any(is_singular(weights))):
        raise ValueError(
            f"{type(target).__name__} cannot be had from {type(source).__name__} on {type(path).__name__} at "
            f"t = {float(t):g}, where alpha = {float(path.alpha(t)):g} and sigma = {float(path.sigma(t)):g}: "
            "take a time strictly inside the path, or a prediction that is regular there (Velocity, V)."
        )
    return combine(weights, x_t, output)


def error_scale(path: AbstractPath, t: Scalar, source: tuple[Scalar, Scalar], target: Triple) -> Scalar:
    """The factor from an error of a x_0 + b eps, source = (a, b), to one of the target (a2 x_0 + b2 eps)/c2."""
    (a, b), (a2, b2, c2) = source, target
    alpha, sigma = path.coefficients(t)
    # Parallel combinations differ by a number, also where the source says nothing about any other.
    parallel = a * b2 == a2 * b
    on_data = jnp.abs(a) > jnp.abs(b)
    numerator = jnp.where(parallel, jnp.where(on_data, a2, b2), a2 * sigma - b2 * alpha)
    denominator = c2 * jnp.where(parallel, jnp.where(on_data, a, b), a * sigma - b * alpha)
    singular = denominator == 0
    return jnp.where(singular, jnp.inf, numerator / jnp.where(singular, 1, denominator))


def is_singular(weights: Triple) -> Bool[Array, ""]:
    """Whether a conversion with these weights has no finite answer."""
    on_x, on_output, denominator = weights
    return (denominator == 0) | ~(jnp.isfinite(on_x) & jnp.isfinite(on_output) & jnp.isfinite(denominator))
