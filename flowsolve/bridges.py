r"""Schroedinger bridges: flows between two laws along Brownian bridges.

Between data $x_0$ and a draw $x_1$ of the source, on t in [0, 1],

$$x_t = (1 - t)\, x_0 + t\, x_1 + \gamma(t)\, z, \qquad \gamma = \sigma \sqrt{t (1 - t)}, \quad z \sim N(0, I).$$

With pairs from the entropic plan of $\varepsilon = 2\sigma^2$ (`couplings.Sinkhorn(2 * sigma**2, replace=True)`) this
is the Schroedinger bridge between the two laws: of all processes with these ends the one nearest to a Brownian motion
of diffusion sigma. Two regressions give it, of the velocity and of the score,

$$v = E[x_1 - x_0 + \gamma' z \mid x_t], \qquad \nabla \ln p_t = -E[z \mid x_t]/\gamma,$$

after which $dx = v\,dt$ has its marginals, and with the score so has $dx = [-v + \tfrac12 w\,\mathrm{score}] ds +
\sqrt{w}\, dW_s$ in s = -t for any $w(t) \ge 0$; $w = \sigma^2$ is the bridge itself. The one does not follow from the
other, as it does for a `Flow`: a `BridgeFlow` offers its velocity, and a score if it was given a network for it.

    flow = fs.BridgeFlow(velocity_network, sigma=0.5, source=fs.sources.Source(draw), score_network=score_network)
    loss = fs.losses.BridgeRegression(fs.couplings.Sinkhorn(2 * 0.5**2, replace=True))
    x = fs.sample(flow, like, num=64, key=key, solver=diffrax.Euler(), grid=fs.grids.Uniform(100),
                  dynamics=fs.ReverseSDE(diffusion=lambda t: 0.5**2))

Source: Tong et al. (2023), arXiv 2307.03672; Tong et al. (2023), arXiv 2302.00482 (without the score, SB-CFM).
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from ._checks import check_positive, check_state, check_type
from ._numerics import as_scalar, linear_combination
from ._types import Args, Network, PRNGKey, Scalar, ScalarLike, State
from .flow import AbstractVelocityFlow, check_has_score, check_output
from .paths import AbstractPath, Linear
from .sources import AbstractSource

__all__ = ["BridgeFlow"]


class BridgeFlow(AbstractVelocityFlow):
    """A velocity, and perhaps a score, along Brownian bridges from a source to the data.

    **Arguments:** `network`: `network(t, x, args, *, key=None)`, of one example, predicts the velocity; `sigma`: > 0,
    the diffusion of the bridge; `source`: the law at t = 1; `score_network`: None, or a network like the first that
    predicts the score, without which there is no `score` and no stochastic dynamics.

    Sampled with Diffrax's solvers: those of `solvers` step through a denoised prediction, which there is none of.
    """

    network: Network
    sigma: Scalar = eqx.field(converter=as_scalar)
    source: AbstractSource
    score_network: Network | None = None
    path: ClassVar[AbstractPath] = Linear()

    def __check_init__(self):
        check_positive(self, "sigma")
        check_type(self.source, AbstractSource, "source", "an instance such as fs.sources.Source(draw)")

    @property
    def has_score(self) -> bool:
        """Whether there is a network for the score."""
        return self.score_network is not None

    def output(
        self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None
    ) -> tuple[State, State | None]:
        """(velocity, score) at (t, x), the score None if there is no network for it."""
        check_state(x, "x")
        t = as_scalar(t)
        first, second = (None, None) if key is None else jax.random.split(key)
        velocity = self.network(t, x, args, key=first)
        check_output(velocity, x)
        if self.score_network is None:
            return velocity, None
        score = self.score_network(t, x, args, key=second)
        check_output(score, x)
        return velocity, score

    def velocity(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """dx_t/dt of the flow that carries the source to the data."""
        return self.output(t, x, args, key=key)[0]

    def score(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """grad ln p_t(x); raises if there is no network for it."""
        check_has_score(self, "A score")
        score = self.output(t, x, args, key=key)[1]
        assert score is not None
        return score

    def width(self, t: ScalarLike) -> tuple[Scalar, Scalar]:
        """(gamma, gamma') of the bridge at t; gamma' is infinite at both ends."""
        t = as_scalar(t)
        root = jnp.sqrt(t * (1 - t))
        return self.sigma * root, self.sigma * (1 - 2 * t) / (2 * root)

    def interpolate(self, t: ScalarLike, data: State, source: State, noise: State) -> State:
        """x_t = (1 - t) data + t source + gamma(t) noise, for one example."""
        t = as_scalar(t)
        return linear_combination((1 - t, t, self.width(t)[0]), (data, source, noise))
