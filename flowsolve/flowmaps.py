r"""Flow maps: networks that go from one time of a flow to an earlier one in a single evaluation.

Along the probability flow $dx/dt = v(t, x)$ from t down to r the average velocity is

$$u(t, r, x_t) = \frac{1}{t - r} \int_r^t v(\tau, x_\tau)\, d\tau, \qquad x_r = x_t - (t - r)\, u(t, r, x_t),
\qquad u(t, t, x) = v(t, x) .$$

So a `FlowMap` is a flow as well, by its velocity at r = t: every solver, guidance and density takes it. `solvers.Jump`
goes by its average velocity, a jump from each time of a grid to the next:

    network = fs.nn.ResidualMLP(like, time_embedding=fs.nn.IntervalEmbedding(), key=key)
    flow_map = fs.flowmaps.FlowMap(network, fs.paths.Linear())
    ...                                                             # train: losses.MeanFlow, losses.Shortcut
    x = fs.sample(flow_map, like, num=64, key=key, solver=fs.solvers.Jump(), grid=fs.grids.Uniform(1))

A consistency function is the jump onto the data, $f(t, x) = x_{t_\mathrm{data}}$, with $f(t_\mathrm{data}, x) = x$:
`OntoData` of a flow map, or a `Flow` whose denoised data are trained to be that.

Source: Boffi, Albergo & Vanden-Eijnden (2024), arXiv 2406.07507 (flow maps); Geng et al. (2025), arXiv 2505.13447
(average velocity); Frans et al. (2024), arXiv 2410.12557 (shortcuts).
"""

from typing import ClassVar

from ._checks import check, check_callable, check_state, check_type, is_concrete, known
from ._numerics import as_scalar, linear_combination
from ._types import Args, Network, PRNGKey, ScalarLike, State
from .flow import AbstractFlow, check_output
from .paths import AbstractPath
from .predictions import AbstractPrediction, Data, Velocity
from .sources import AbstractSource, Normal

__all__ = ["FlowMap", "OntoData"]


class FlowMap(AbstractFlow):
    """A network of the average velocity between two times, on any Gaussian path.

    **Arguments:**

    - `network`: `network((t, r), x, args, *, key=None)`, with r <= t: one example in, its average velocity from t down
      to r out. Those of `nn` take the pair where they are built with `time_embedding=nn.IntervalEmbedding()`;
    - `path`: the path; `source`: the law of the noise, as in `Flow`.

    As a flow it predicts the velocity, that of the network at r = t.

    **Raises:** `TypeError` for a network that cannot be called or what is no path or source.
    """

    network: Network
    path: AbstractPath
    source: AbstractSource = Normal()
    prediction: ClassVar[AbstractPrediction] = Velocity()

    def __check_init__(self):
        check_callable(self.network, "FlowMap got a network", "network((t, r), x, args, *, key=None).")
        check_type(self.path, AbstractPath, "path", "an instance such as fs.paths.Linear()")
        check_type(self.source, AbstractSource, "source", "an instance such as fs.sources.CoupledNormal()")

    def average_velocity(
        self, t: ScalarLike, r: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None
    ) -> State:
        """u(t, r, x), of the structure of `x`, one example at time t.

        **Raises:** `ValueError` for r > t, where they are concrete, and for a network whose output is not like x.
        """
        check_state(x, "x")
        t, r = as_scalar(t), as_scalar(r)
        if is_concrete((t, r)):
            check(t, known(r) > known(t), "A flow map got t = {} and r = {}, but wants r <= t: swap them.", t, r)
        output = self.network((t, r), x, args, key=key)
        check_output(output, x)
        return output

    def jump(self, t: ScalarLike, r: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """x_r = x - (t - r) u(t, r, x), from one example at time t; exactly x for r = t."""
        t, r = as_scalar(t), as_scalar(r)
        return linear_combination((1.0, r - t), (x, self.average_velocity(t, r, x, args, key=key)))

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        return self.average_velocity(t, t, x, args, key=key)


class OntoData(AbstractFlow):
    """The consistency function of a flow map, f(t, x) = x_{t_data}, as a flow that predicts the data.

    For `losses.Consistency` and `solvers.ConsistencySampling`, which draw from it in several steps with new noise. Its
    data are one example of the data, not their mean given x_t: it has a score and a velocity in name only.

    **Arguments:** `flow_map`: a `FlowMap`.
    """

    flow_map: FlowMap
    prediction: ClassVar[AbstractPrediction] = Data()

    def __check_init__(self):
        check_type(self.flow_map, FlowMap, "flow_map", "a fs.flowmaps.FlowMap(network, path)")

    @property
    def path(self) -> AbstractPath:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The flow map's path."""
        return self.flow_map.path

    @property
    def source(self) -> AbstractSource:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The flow map's source."""
        return self.flow_map.source

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        return self.flow_map.jump(t, self.path.t_data, x, args, key=key)
