r"""From noise to data and back: one solve, a batch of samples, the encoding of data.

All three integrate a flow's dynamics (see `dynamics`) with any Diffrax solver or one of `solvers`, on a fixed grid or
with an adaptive controller. Times are path times: sampling runs from `t_noise` down to `t_data`, encoding up again.

Swap per call: the same flow with another `solver`, `grid`, `controller` or `dynamics`; nothing is rebuilt. Left open,
the solver is `diffrax.Ralston()` on `grids.LogSNR(32)`, 64 network evaluations: the pair of the smallest mean error
over eight paths in `tests/benchmarks/default_solver.py`.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from ._checks import check_batch, check_count, check_key, check_state
from ._integrate import check_network, check_saveat, integrate, nan_on_failure, raise_on_failure
from ._numerics import as_state, state_like
from ._settings import Settings, draw_prior, noise_path, opaque, settle
from ._types import Args, Like, PRNGKey, ScalarLike, State
from .batching import raise_on_any_failure, spread, spreading, with_automatic_axes
from .dynamics import AbstractDynamics
from .flow import AbstractVelocityFlow
from .grids import AbstractGrid

__all__ = ["encode", "sample", "solve"]


def solve(
    flow: AbstractVelocityFlow,
    x_start: State,
    args: Args = None,
    *,
    solver: diffrax.AbstractSolver | None = None,
    grid: AbstractGrid | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    dynamics: AbstractDynamics | None = None,
    key: PRNGKey | None = None,
    t_start: ScalarLike | None = None,
    t_end: ScalarLike | None = None,
    saveat: diffrax.SaveAt | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int | None = 4096,
    progress_meter: diffrax.AbstractProgressMeter | None = None,
    throw: bool = True,
) -> diffrax.Solution:
    """Carry ONE example from noise to data; batch with `jax.vmap`.

    **Arguments:**

    - `flow`: any flow; `x_start`: one example at `t_start`; `args`: its label, mask or context;
    - `solver`: any explicit Diffrax solver or one of `solvers`; `diffrax.Ralston()` by default;
    - `grid`: fixed steps, `grids.LogSNR(32)` by default; or `controller`: adaptive ones, e.g.
      `diffrax.PIDController(rtol=1e-4, atol=1e-4)`;
    - `dynamics`: `dynamics.ProbabilityFlow()` by default, or `dynamics.ReverseSDE(eta)`, which needs `key`;
    - `t_start`, `t_end`: path times, `t_noise` and `t_data` by default;
    - `saveat` (in path time), `adjoint`, `max_steps` (of an adaptive solve), `progress_meter`: as in
      `diffrax.diffeqsolve`. Left open, on a grid the gradient keeps 2 to 3 sqrt(steps) states, with the history of a
      multistep solver at each, and derivatives of both modes pass;
    - `throw`: whether a numerical failure raises; if not, it is in the solution's `result`.

    **Returns:** a `diffrax.Solution` in path time: `ts`, `ys` (a leading axis of saved times), `result`, and `stats`
    with "nfe", the number of network evaluations (None for a solver from elsewhere that does not state it).

    **Raises:** `ValueError`, `TypeError` for a request that makes no sense; `RuntimeError` for a failed solve.
    """
    check_state(x_start, "x_start")
    x_start = as_state(x_start)
    settings = settle(
        flow, solver=solver, grid=grid, controller=controller, dynamics=dynamics, t_start=t_start, t_end=t_end
    )
    if settings.dynamics.stochastic:
        key = check_key(key, f"solving a stochastic equation with {type(settings.solver).__name__}")
    if saveat is not None:
        check_saveat(saveat, settings)
    sol = _solve(flow, x_start, args, settings, key, saveat, adjoint, max_steps, progress_meter)
    return raise_on_failure(sol.result, sol) if throw else sol


def encode(
    flow: AbstractVelocityFlow,
    x_data: State,
    args: Args = None,
    *,
    solver: diffrax.AbstractSolver | None = None,
    grid: AbstractGrid | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    t_start: ScalarLike | None = None,
    t_end: ScalarLike | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int | None = 4096,
    throw: bool = True,
) -> State:
    """Carry ONE example from data to noise along the probability flow; `solve` brings it back.

    **Arguments:** as in `solve`, with `t_start` < `t_end`: `t_data` and `t_noise` by default.

    **Returns:** the noise-end state, of the structure of `x_data`; NaN where the solve failed and `throw` is False.
    """
    check_state(x_data, "x_data")
    x_data = as_state(x_data)
    settings = settle(
        flow,
        solver=solver,
        grid=grid,
        controller=controller,
        dynamics=None,
        t_start=t_start,
        t_end=t_end,
        encode=True,
    )
    x, result = _final(flow, x_data, args, settings, None, adjoint, max_steps, None)
    return raise_on_failure(result, x) if throw else x


def sample(
    flow: AbstractVelocityFlow,
    like: Like,
    *,
    num: int | np.integer,
    key: PRNGKey,
    args: Args = None,
    solver: diffrax.AbstractSolver | None = None,
    grid: AbstractGrid | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    dynamics: AbstractDynamics | None = None,
    t_start: ScalarLike | None = None,
    t_end: ScalarLike | None = None,
    data_mean: ScalarLike = 0.0,
    data_std: ScalarLike = 0.0,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int | None = 4096,
    progress_meter: diffrax.AbstractProgressMeter | None = None,
    throw: bool = True,
    mesh: Mesh | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> State:
    """Draw `num` samples of a flow, each independent of the others and of `num`.

    Example i starts from the path's prior, N(0, sigma(t_start)^2), or from the flow's own source, drawn with
    `jax.random.fold_in(key, i)` alone.

    **Arguments:**

    - `like`: ONE example's shape and dtype: an array or `jax.ShapeDtypeStruct`, or a pytree of them;
    - `num`: how many; `key`: a typed key; `args`: labels or context with a leading axis of length `num`, or None;
    - `solver`, `grid`, `controller`, `dynamics`, `t_start`, `t_end`, `adjoint`, `max_steps`, `progress_meter`, `throw`:
      as in `solve`;
    - `data_mean`, `data_std`: moments of the data's elements, for a start below `t_noise`: the start is then
      N(alpha m, sigma^2 + alpha^2 s^2);
    - `mesh`, `chunk`: the devices over which the samples are spread and how many each takes at a time, see `batched`;
      the samples are the same. `progress`: whether to show a bar of the chunks done.

    **Returns:** the samples, like `like` with a leading axis of length `num`, of float32 (float64 under x64), which is
    what a state is solved in. With `throw=False` the examples whose solve failed are NaN.

    **Raises:** as `solve`.
    """
    check_state(like, "like")
    key = check_key(key, "sampling")
    num = check_count(num, "sampling got num")
    check_batch(args, num)
    settings = settle(
        flow,
        solver=solver,
        grid=grid,
        controller=controller,
        dynamics=dynamics,
        t_start=t_start,
        t_end=t_end,
        moments=(data_mean, data_std),
    )
    over = spreading(mesh, chunk, progress, flow)
    x, result = _sample(flow, state_like(like), num, key, args, settings, adjoint, max_steps, progress_meter, over)
    x = with_automatic_axes(x)
    return raise_on_any_failure(result, x, over) if throw else x


@eqx.filter_jit
def _sample(
    flow, like, num, key, args, settings, adjoint, max_steps, progress_meter, over
) -> tuple[State, diffrax.RESULTS]:
    settings = opaque(settings)

    def one(shared, row: tuple[Int[Array, ""], Args]) -> tuple[State, diffrax.RESULTS]:
        flow, settings, key, rest = shared
        index, args = row
        start_key, noise_key = jax.random.split(jax.random.fold_in(key, index))
        x_start = draw_prior(flow, settings, start_key, like)
        args = eqx.combine(args, rest)
        return _final(flow, x_start, args, settings, noise_key, adjoint, max_steps, progress_meter)

    args, rest = eqx.partition(args, eqx.is_array_like)
    rows = jnp.arange(num), jax.tree.map(jnp.asarray, args)
    return spread(one, (flow, settings, key, rest), rows, num, over)


@eqx.filter_jit
def _final(flow, x_start, args, settings, key, adjoint, max_steps, progress_meter) -> tuple[State, diffrax.RESULTS]:
    """The last state of a solve, NaN if it failed."""
    sol = _solve(flow, x_start, args, settings, key, None, adjoint, max_steps, progress_meter)
    return nan_on_failure(sol.result, jax.tree.map(lambda leaf: leaf[-1], sol.ys)), sol.result


@eqx.filter_jit
def _solve(
    flow: AbstractVelocityFlow,
    x_start: State,
    args: Args,
    settings: Settings,
    key: PRNGKey | None,
    saveat: diffrax.SaveAt | None,
    adjoint: diffrax.AbstractAdjoint | None,
    max_steps: int | None,
    progress_meter: diffrax.AbstractProgressMeter | None,
) -> diffrax.Solution:
    check_network(flow, x_start, args)
    settings = opaque(settings)
    brownian = None
    if settings.dynamics.stochastic:
        assert key is not None
        brownian = noise_path(settings, x_start, key)
    return integrate(
        settings.dynamics.terms(flow, brownian),
        settings,
        x_start,
        args,
        saveat=saveat,
        adjoint=adjoint,
        max_steps=max_steps,
        progress_meter=progress_meter,
    )
