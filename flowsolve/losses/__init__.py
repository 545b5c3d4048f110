r"""Training losses: pytrees that are called on a flow and a batch.

    value, aux = loss(flow, x0, args, key=key)

`Regression` is flow matching, denoising score matching, DDPM and EDM, by its fields; `Hybrid` trains the variance of
the ancestral step beside it, `BridgeRegression` the flow of a bridge. The loss of one element's error is `squared`,
`absolute`, `Huber` or `PseudoHuber`. `ConditionDropout` is the setting that makes a flow ready for guidance.

For few steps: `MeanFlow`, `Shortcut` and `InductiveMomentMatching` train a `flowmaps.FlowMap`; `Consistency` and
`ContinuousConsistency` a flow whose data are the end of the trajectory.
"""

from .batch import Aux, ConditionDropout
from .consistency import Consistency, ContinuousConsistency, inverse_gap
from .elementwise import Huber, PseudoHuber, PseudoHuberNorm, absolute, squared
from .flow_maps import AbstractFlowMapLoss, MeanFlow, MeanFlowGuidance, Shortcut
from .hybrid import Hybrid
from .moment_matching import InductiveMomentMatching
from .regression import BridgeRegression, NormalNoise, Regression

__all__ = [
    "AbstractFlowMapLoss",
    "Aux",
    "BridgeRegression",
    "ConditionDropout",
    "Consistency",
    "ContinuousConsistency",
    "Huber",
    "Hybrid",
    "InductiveMomentMatching",
    "MeanFlow",
    "MeanFlowGuidance",
    "NormalNoise",
    "PseudoHuber",
    "PseudoHuberNorm",
    "Regression",
    "Shortcut",
    "absolute",
    "inverse_gap",
    "squared",
]
