r"""What guided flows share: the flow they wrap, and the rule by which two predictions are mixed.

At one time every prediction is, up to a factor, the flow's own output o shifted by a multiple of $x_t$: with the
weights of `AbstractFlow.mixture_weights`,

$$\mathrm{denominator} \cdot \mathrm{prediction} = w_x\, x_t + w_o\, o .$$

So a rule that is stated in some prediction, and does not mind its scale, is applied to $w_x x_t + w_o o$, which is
finite at both ends of the path, and its result is an output again after the shift is undone.
"""

import abc

import equinox as eqx

from .._types import Scalar, State
from ..flow import AbstractFlow
from ..paths import AbstractPath
from ..predictions import AbstractPrediction
from ..sources import AbstractSource

__all__ = ["AbstractRule", "AbstractWrapper"]


class AbstractWrapper(AbstractFlow):
    """A flow around another, on its path, with its source, in its prediction."""

    flow: eqx.AbstractVar[AbstractFlow]

    @property
    def path(self) -> AbstractPath:
        """The wrapped flow's path."""
        return self.flow.path

    @property
    def prediction(self) -> AbstractPrediction:
        """What the wrapped flow predicts."""
        return self.flow.prediction

    @property
    def source(self) -> AbstractSource:
        """The wrapped flow's source."""
        return self.flow.source


class AbstractRule(eqx.Module):
    """How a conditional and an unconditional output are mixed; at scale 1 it gives the conditional one."""

    @abc.abstractmethod
    def combine(
        self, flow: AbstractFlow, t: Scalar, x: State, scale: Scalar, conditional: State, unconditional: State
    ) -> State:
        """The guided output, from two outputs in the prediction of `flow` at (t, x), one example."""
