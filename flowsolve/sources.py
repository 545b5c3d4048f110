r"""What stands at the noise end of a path: the law of $\epsilon$ in $x_t = \alpha x_0 + \sigma \epsilon$.

A flow states its source. By default it is `Normal`: standard normal and independent of the data, of which a diffusion
model's formulas speak. Flow matching takes any law, and may pair it with the data (see `couplings`); then the
velocity $\alpha' E[x_0|x_t] + \sigma' E[\epsilon|x_t]$ still carries the one law to the other, and every solver of
ordinary equations is right, but $-E[\epsilon|x_t]/\sigma$ is no longer the score: only a flow whose source is `Normal`
has one, and with it a reverse SDE.

| source | law of eps | paired with the data | score |
|---|---|---|---|
| `Normal` | N(0, I) | no | yes |
| `CoupledNormal` | N(0, I) | as the loss's coupling does | no |
| `Source` | the user's | as the loss's coupling does, or not | no |
"""

import abc
import math
from collections.abc import Callable
from typing import ClassVar

import equinox as eqx

from ._checks import describe
from ._numerics import as_scalar, normal_like, tree_dot, tree_size
from ._types import Like, PRNGKey, Scalar, State

__all__ = ["AbstractSource", "CoupledNormal", "Normal", "Source"]


class AbstractSource(eqx.Module):
    """The law of the noise eps of one example."""

    #: Whether eps is standard normal and independent of the data, so that -E[eps|x_t]/sigma is the score.
    has_score: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def sample(self, key: PRNGKey, like: Like) -> State:
        """One eps, of the structure, shapes and dtypes of `like`."""

    @abc.abstractmethod
    def log_prob(self, noise: State) -> Scalar:
        """ln p(eps) in nats, of one example."""


class _AbstractNormal(AbstractSource):
    """N(0, I)."""

    def sample(self, key: PRNGKey, like: Like) -> State:
        return normal_like(key, like)

    def log_prob(self, noise: State) -> Scalar:
        return -0.5 * (as_scalar(tree_dot(noise, noise)) + tree_size(noise) * math.log(2 * math.pi))


class Normal(_AbstractNormal):
    """Standard normal noise, independent of the data: the source of a diffusion model."""

    has_score: ClassVar[bool] = True


class CoupledNormal(_AbstractNormal):
    """Standard normal noise that was paired with the data in training, by optimal transport or by a flow before."""

    has_score: ClassVar[bool] = False


class Source(AbstractSource):
    """Any law, such as another data set that is carried to the data.

    **Arguments:** `draw`: (key, like) -> eps, one example of the structure, shapes and dtypes of `like`; `density`:
    eps -> ln p(eps) in nats, or None if it is not known, without which a flow has no `log_prob`.
    """

    draw: Callable[[PRNGKey, Like], State]
    density: Callable[[State], Scalar] | None = None
    has_score: ClassVar[bool] = False

    def __check_init__(self):
        for name, value in (("draw", self.draw), ("density", self.draw if self.density is None else self.density)):
            if not callable(value):
                raise TypeError(
                    f"Source got {name} = {value!r}, but wants a function: draw (key, like) -> one example, density "
                    "example -> ln p in nats."
                )

    def sample(self, key: PRNGKey, like: Like) -> State:
        drawn = self.draw(key, like)
        if describe(drawn) != describe(like):
            raise ValueError(
                f"The draw of a Source returned {describe(drawn)}, but wants one example like {describe(like)}."
            )
        return drawn

    def log_prob(self, noise: State) -> Scalar:
        if self.density is None:
            raise ValueError(
                "This Source has no density, which a log-density of the data needs: Source(draw, density=...)."
            )
        return as_scalar(self.density(noise))
