r"""Rules that mix a conditional c and an unconditional u otherwise than $u + s (c - u)$.

| rule | stated in | guided prediction |
|---|---|---|
| `Rescaled` | v | $g\,(1 + \phi\,(\mathrm{std}\,c/\mathrm{std}\,g - 1))$, with $g = u + s\,(c - u)$ |
| `Projected` | data | $c + (s - 1)\,k\,(\Delta_\perp + \eta\,\Delta_\parallel)$, with $\Delta = c - u$ split along c |
| `ZeroStar` | velocity | $s\,c + (1 - s)\,s^* u$, with $s^* = \langle c, u\rangle/\lVert u\rVert^2$ |

Sums run over all elements of one example.

At one time every prediction is, up to a factor, the flow's own output o shifted by a multiple of $x_t$: with the
weights of `AbstractFlow.mixture_weights`,

$$\mathrm{denominator} \cdot \mathrm{prediction} = w_x\, x_t + w_o\, o .$$

So a rule that is stated in some prediction, and does not mind its scale, is applied to $w_x x_t + w_o o$, which is
finite at both ends of the path, and its result is an output again after the shift is undone.
"""

import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp

from .._checks import check, known
from .._numerics import as_scalar, linear_combination, optional_scalar, safe_sqrt, tree_dot, tree_size
from .._types import Scalar, State
from ..flow import AbstractFlow
from ..predictions import AbstractPrediction, Data, Triple, V, Velocity

__all__ = ["AbstractRule", "Projected", "Rescaled", "ZeroStar"]


class AbstractRule(eqx.Module):
    """How a conditional and an unconditional output are mixed; at scale 1 it gives the conditional one."""

    @abc.abstractmethod
    def combine(
        self, flow: AbstractFlow, t: Scalar, x: State, scale: Scalar, conditional: State, unconditional: State
    ) -> State:
        """The guided output, from two outputs in the prediction of `flow` at (t, x), one example."""


def plain(scale: Scalar, conditional: State, unconditional: State) -> State:
    """u + scale (c - u), exact at scales 0 and 1."""
    return linear_combination((scale, 1 - scale), (conditional, unconditional))


def _weights(flow: AbstractFlow, t: Scalar, prediction: AbstractPrediction) -> Triple:
    return flow.mixture_weights(t, prediction.coefficients(flow.path, t))


def _quotient(above: Scalar, below: Scalar) -> Scalar:
    """above/below; 0 where both are 0, as for a share of nothing."""
    nothing = (above == 0) & (below == 0)
    return jnp.where(nothing, 0, above / jnp.where(nothing, 1, below))


def _std(x: State) -> Scalar:
    """The standard deviation over all elements of one example."""
    size = tree_size(x)
    mean = jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, x)) / size
    centred = jax.tree.map(lambda leaf: leaf - mean.astype(leaf.dtype), x)
    return safe_sqrt(as_scalar(tree_dot(centred, centred)) / size)


class Rescaled(AbstractRule):
    """The guided v brought back, in part, to the standard deviation of the conditional one.

    **Arguments:** `share`: phi, 0 for no change, 1 for that standard deviation in full; 0.7 by default.

    Source: Lin et al. (2023), arXiv 2305.08891, whose networks predict v; on a path with alpha^2 + sigma^2 = 1 this is
    theirs whatever the network predicts.
    """

    share: Scalar = eqx.field(default=0.7, converter=as_scalar)

    def combine(
        self, flow: AbstractFlow, t: Scalar, x: State, scale: Scalar, conditional: State, unconditional: State
    ) -> State:
        on_x, on_output, _ = _weights(flow, t, V())
        guided = plain(scale, conditional, unconditional)
        std_conditional, std_guided = (
            _std(linear_combination((on_x, on_output), (x, output))) for output in (conditional, guided)
        )
        flat = std_guided == 0
        ratio = jnp.where(flat, 1, std_conditional / jnp.where(flat, 1, std_guided))
        factor = 1 + self.share * (ratio - 1)
        return linear_combination((factor, (factor - 1) * _quotient(on_x, on_output)), (guided, x))


class Projected(AbstractRule):
    """Adaptive projected guidance: the part of the difference along the conditional data counts less.

    The difference of the two denoised predictions is cut to a norm of at most `radius`, then its part parallel to the
    conditional one, which oversaturates, is multiplied by `parallel`.

    **Arguments:** `parallel`: eta, 0 by default, 1 for plain guidance; `radius`: > 0, infinite by default, in units of
    the data's norm over all elements.

    Source: Sadat et al. (2024), arXiv 2410.02416. Deviation: without its momentum, a running mean of differences over
    the steps of a sampler, which is no function of (t, x): this is the paper's method at momentum 0.
    """

    parallel: Scalar = eqx.field(default=0.0, converter=as_scalar)
    radius: Scalar = eqx.field(default=math.inf, converter=as_scalar)

    def __check_init__(self):
        radius = known(self.radius)
        check(self.radius, ~(radius > 0), "Projected got radius = {}, but wants a norm > 0.", self.radius)

    def combine(
        self, flow: AbstractFlow, t: Scalar, x: State, scale: Scalar, conditional: State, unconditional: State
    ) -> State:
        on_x, on_output, denominator = _weights(flow, t, Data())
        # A difference of outputs is one of data up to a factor, which both parts share and which is 0 where sigma = 0.
        difference = linear_combination((1, -1), (conditional, unconditional))
        data = linear_combination((on_x, on_output), (x, conditional))
        along = _quotient(as_scalar(tree_dot(difference, data)), as_scalar(tree_dot(data, data)))
        norm = jnp.abs(on_output) * safe_sqrt(as_scalar(tree_dot(difference, difference)))
        # min(1, radius/norm) without a division where the norm is 0.
        limit = self.radius * jnp.abs(denominator)
        cut = jnp.where(norm > limit, limit / jnp.where(norm > limit, norm, 1), 1)
        push = (scale - 1) * cut
        return linear_combination((1, push, push * (self.parallel - 1) * along), (conditional, difference, data))


class ZeroStar(AbstractRule):
    """CFG-Zero*: the unconditional velocity scaled to fit the conditional one, and no velocity at the very start.

    **Arguments:** `zero_above`: the velocity is 0 at times above this one, for an ODE solver's first steps
    ("zero-init"; 0.96 for the paper's 4% on `Linear`); None for nowhere.

    Source: Fan et al. (2025), arXiv 2503.18886, who count steps where this has a time.
    """

    zero_above: Scalar | None = eqx.field(default=None, converter=optional_scalar)

    def combine(
        self, flow: AbstractFlow, t: Scalar, x: State, scale: Scalar, conditional: State, unconditional: State
    ) -> State:
        on_x, on_output, _ = _weights(flow, t, Velocity())
        velocity = linear_combination((on_x, on_output), (x, unconditional))
        square = as_scalar(tree_dot(velocity, velocity))
        difference = linear_combination((1, -1), (conditional, unconditional))
        # s* - 1 in units of the output's weight, which may be 0 (of a score where sigma = 0), as then the shift is not.
        excess = as_scalar(tree_dot(difference, velocity)) / jnp.where(square == 0, 1, square)
        rest = (1 - scale) * jnp.where(square == 0, 0, excess)
        guided = plain(scale, conditional, unconditional)
        guided = linear_combination((1, rest * on_output, rest * on_x), (guided, unconditional, x))
        above = self.zero_above
        if above is None:
            return guided
        # Where the output has no say in the velocity, none stands still.
        mute = on_output == 0
        still = linear_combination((jnp.where(mute, 0, -on_x / jnp.where(mute, 1, on_output)),), (x,))
        return jax.tree.map(lambda moving, rest: jnp.where(t > above, rest, moving), guided, still)
