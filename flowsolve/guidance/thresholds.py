r"""Thresholds on the denoised prediction: a flow whose $E[x_0 | x_t]$ is kept where data can be.

A change $\delta$ of the denoised data is one of $\delta\,(a\sigma - b\alpha)/(c\,\sigma)$ of the output
$o = (a\,x_0 + b\,\epsilon)/c$ at the same $x_t$; so what no threshold touches is unchanged, to the last bit.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from .._checks import check, check_callable, known
from .._numerics import as_scalar, linear_combination
from .._types import Args, PRNGKey, Scalar, ScalarLike, State
from ..flow import AbstractFlow, AbstractFlowWrapper, check_flow
from ..predictions import Data, combine

__all__ = ["Clip", "DynamicThreshold", "Thresholded"]


class Thresholded(AbstractFlowWrapper):
    """A flow whose denoised prediction goes through a threshold.

    **Arguments:** `flow`; `threshold`: a callable, denoised -> denoised of one example: `Clip(-1.0, 1.0)`,
    `DynamicThreshold()` or any other.

    Where sigma = 0 the data is x itself, whatever a network says that predicts a velocity or noise: there it is left as
    it is.

    Source: Saharia et al. (2022), arXiv 2205.11487.
    """

    flow: AbstractFlow
    threshold: Callable[[State], State]

    def __check_init__(self):
        check_flow(self.flow, "Thresholded's flow")
        check_callable(
            self.threshold, "Thresholded got a threshold", "denoised -> denoised such as fs.guidance.Clip(-1.0, 1.0)."
        )

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        t = as_scalar(t)
        output = self.flow.output(t, x, args, key=key)
        on_x, on_output, denominator = self.mixture_weights(t, Data().coefficients(self.path, t))
        # The output says nothing about the data, or the data nothing about the output.
        mute = (denominator == 0) | (on_output == 0)
        factor = jnp.where(mute, 0, denominator / jnp.where(mute, 1, on_output))
        denoised = combine((on_x, on_output, jnp.where(mute, 1, denominator)), x, output)
        change = linear_combination((1, -1), (self.threshold(denoised), denoised))
        return linear_combination((1, factor), (output, change))


class Clip(eqx.Module):
    """Every element clipped to [low, high].

    **Arguments:** `low`, `high`: the range of the data, -1 to 1 by default.

    **Raises:** `ValueError` unless low < high.
    """

    low: Scalar = eqx.field(default=-1.0, converter=as_scalar)
    high: Scalar = eqx.field(default=1.0, converter=as_scalar)

    def __check_init__(self):
        bad = ~(known(self.low) < known(self.high))
        check(self.high, bad, "Clip got low = {} and high = {}, but wants low < high.", self.low, self.high)

    def __call__(self, denoised: State) -> State:
        """The clipped example."""
        return jax.tree.map(
            lambda leaf: jnp.clip(leaf, self.low.astype(leaf.dtype), self.high.astype(leaf.dtype)), denoised
        )


class DynamicThreshold(eqx.Module):
    r"""Imagen's dynamic thresholding: large examples are clipped at a quantile of their own and scaled back.

    With q the quantile of the absolute values of one example's elements and $m = \max(q, \mathrm{bound})$,

    $$\mathrm{clip}(x, -m, m)\,\frac{\mathrm{bound}}{m} .$$

    **Arguments:** `quantile`: from 0 to 1, 0.995 by default; `bound`: of the data, 1 by default.

    **Raises:** `ValueError` for a quantile outside of [0, 1] or a bound that is not positive.

    Source: Saharia et al. (2022), arXiv 2205.11487, where the bound is 1.
    """

    quantile: Scalar = eqx.field(default=0.995, converter=as_scalar)
    bound: Scalar = eqx.field(default=1.0, converter=as_scalar)

    def __check_init__(self):
        quantile, bound = known(self.quantile), known(self.bound)
        bad = ~((quantile >= 0) & (quantile <= 1) & (bound > 0))
        check(
            self.quantile,
            bad,
            "DynamicThreshold got quantile = {} and bound = {}, but wants a quantile in [0, 1] and a bound > 0.",
            self.quantile,
            self.bound,
        )

    def __call__(self, denoised: State) -> State:
        """The example within its bounds."""
        sizes = jnp.concatenate([jnp.abs(jnp.ravel(leaf)).astype(float) for leaf in jax.tree.leaves(denoised)])
        limit = jnp.maximum(jnp.quantile(sizes, self.quantile), self.bound)

        def bounded(leaf):
            most = limit.astype(leaf.dtype)
            # Exactly as it was where the limit is the bound.
            return jnp.clip(leaf, -most, most) * (self.bound / limit).astype(leaf.dtype)

        return jax.tree.map(bounded, denoised)
