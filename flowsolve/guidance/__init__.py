r"""Guidance: a flow in, a flow out, so that every solver takes it and wrappers nest.

With $u$ the unconditional and $c$ the conditional prediction of a flow, or of a weaker and a better one,

| flow | its prediction |
|---|---|
| `ClassifierFree` | $u + s\,(c - u)$: scale s = 0 is unconditional, s = 1 conditional |
| `Autoguidance` | the same with u from a weaker flow |
| `Composed` | $u + \sum_k s_k (c_k - u)$: several conditions at once, those with $s_k < 0$ negated |
| `AddedScore` | that of the score $\nabla\ln p_t + s\,g$, g from a classifier, an energy or another score |
| `Thresholded` | its denoised prediction clipped, by `Clip` or `DynamicThreshold` |

A scale is a number or a schedule, any callable (path, t) -> scale: `Linear`, `Cosine`, `Interval`, `CFGPlusPlus`. In
`ClassifierFree` and `Autoguidance` a rule may take the place of the plain mixture: `Rescaled`, `Projected` (APG),
`ZeroStar` (CFG-Zero*), each in the prediction in which its paper states it.

A wrapper defines nothing but the output, in the prediction of the flow that it wraps: velocity, score, denoised and
noise all follow from that one value. What takes the whole example (a norm, a standard deviation, a quantile) takes
all elements of ONE example.
"""

from .conditions import Autoguidance, ClassifierFree, Composed
from .rules import AbstractRule, Projected, Rescaled, ZeroStar
from .schedules import CFGPlusPlus, Cosine, Interval, Linear, noise_level, time
from .scores import AddedScore, Gradient, LogProbability
from .thresholds import Clip, DynamicThreshold, Thresholded

__all__ = [
    "AbstractRule",
    "AddedScore",
    "Autoguidance",
    "CFGPlusPlus",
    "ClassifierFree",
    "Clip",
    "Composed",
    "Cosine",
    "DynamicThreshold",
    "Gradient",
    "Interval",
    "Linear",
    "LogProbability",
    "Projected",
    "Rescaled",
    "Thresholded",
    "ZeroStar",
    "noise_level",
    "time",
]
