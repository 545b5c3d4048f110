r"""Training losses: pytrees that are called on a flow and a batch.

    value, aux = loss(flow, x0, args, key=key)

`Regression` is flow matching, denoising score matching, DDPM and EDM, by its fields; `Hybrid` trains the variance of
the ancestral step beside it, `BridgeRegression` the flow of a bridge. The loss of one element's error is `squared`,
`absolute`, `Huber` or `PseudoHuber`. `ConditionDropout` is the setting that makes a flow ready for guidance. For few
steps, `MeanFlow`, `Shortcut` and `InductiveMomentMatching` train a `flowmaps.FlowMap`.
"""

from .batch import Aux, ConditionDropout
from .elementwise import Huber, PseudoHuber, absolute, squared
from .flow_maps import AbstractFlowMapLoss, MeanFlow, MeanFlowGuidance, Shortcut
from .hybrid import Hybrid
from .moment_matching import InductiveMomentMatching
from .regression import BridgeRegression, NormalNoise, Regression

__all__ = [
    "AbstractFlowMapLoss",
    "Aux",
    "BridgeRegression",
    "ConditionDropout",
    "Huber",
    "Hybrid",
    "InductiveMomentMatching",
    "MeanFlow",
    "MeanFlowGuidance",
    "NormalNoise",
    "PseudoHuber",
    "Regression",
    "Shortcut",
    "absolute",
    "squared",
]
