"""One solve: settings checked and completed, then `diffrax.diffeqsolve`, then the answer in path time.

`settle` turns what a user asked for into `Settings`, a pytree: concrete input is checked here, in Python, before
anything is traced, and Python floats become arrays, so that a new tolerance does not retrace. `integrate` runs it.
Times inside are s = -t (see `dynamics`); times that go in and come out are path times.
"""

import typing
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ._checks import check, check_type, is_concrete
from ._numerics import all_finite, as_scalar
from ._types import Args, Like, PRNGKey, Scalar, ScalarLike, State
from .brownian import StepNoise, TreeNoise
from .dynamics import AbstractDynamics, ProbabilityFlow, ReverseSDE, network_output
from .flow import AbstractFlow
from .grids import AbstractGrid, LogSNR
from .paths import AbstractPath
from .predictions import is_singular
from .solvers import DDIM, AbstractFlowSolver
from .solvers.base import AbstractGridAwareSolver
from .solvers.counts import evaluations

_T = TypeVar("_T")

# Chosen by tests/benchmarks/default_solver.py.
DEFAULT_SOLVER = diffrax.Ralston
DEFAULT_GRID = partial(LogSNR, 32)


class Settings(eqx.Module):
    """A checked and complete request for a solve."""

    solver: diffrax.AbstractSolver
    dynamics: AbstractDynamics
    #: The grid in s = -t, or None with an adaptive controller.
    ts: Float[Array, " n"] | None
    controller: diffrax.AbstractStepSizeController | None
    t_start: Scalar
    t_end: Scalar


def settle(
    flow: AbstractFlow,
    *,
    solver: diffrax.AbstractSolver | None,
    grid: AbstractGrid | None,
    controller: diffrax.AbstractStepSizeController | None,
    dynamics: AbstractDynamics | None,
    t_start: ScalarLike | None,
    t_end: ScalarLike | None,
    encode: bool = False,
) -> Settings:
    """Check a request and fill in what it leaves open. `encode` runs from data to noise."""
    if not isinstance(flow, AbstractFlow):
        raise TypeError(
            f"flow is a {type(flow).__name__}, but wants an AbstractFlow: wrap a network with "
            "Flow(network, path, prediction)."
        )
    path = flow.path
    if solver is None:
        solver = DEFAULT_SOLVER()
    check_type(solver, diffrax.AbstractSolver, "solver", "an instance such as fs.solvers.DDIM() or diffrax.Tsit5()")
    dynamics = _settle_dynamics(solver, dynamics)
    if dynamics.stochastic and encode:
        raise ValueError("encode follows the probability flow, but got a stochastic dynamics or solver: leave it out.")
    if t_start is not None:
        t_start = _check_time(path, t_start, "t_start")
    if t_end is not None:
        t_end = _check_time(path, t_end, "t_end")
    if encode:
        t_start = path.t_data if t_start is None else t_start
        t_end = path.t_noise if t_end is None else t_end
    if controller is None:
        grid = DEFAULT_GRID() if grid is None else grid
        check_type(grid, AbstractGrid, "grid", "an instance such as fs.grids.Uniform(20)")
        times = grid(path, t_start, t_end)
        start = _check_time(path, times[0], "The grid's first time")
        end = _check_time(path, times[-1], "The grid's last time")
        ts = -times
    else:
        if grid is not None:
            raise ValueError(
                "Both grid and controller were given: grid= is for fixed steps, controller= for adaptive ones."
            )
        _check_controller(controller, solver)
        controller = _controller_in_solver_time(controller)
        controller = jax.tree.map(lambda leaf: as_scalar(leaf) if isinstance(leaf, float) else leaf, controller)
        start = as_scalar(path.t_noise if t_start is None else t_start)
        end = as_scalar(path.t_data if t_end is None else t_end)
        ts = None
    wanted = "rise, from data to noise" if encode else "fall, from noise to data"
    end = check(
        end,
        (start >= end) if encode else (start <= end),
        f"The solve goes from t = {_show(start)} to t = {_show(end)}, but its times must {wanted}.",
    )
    # A HalfSolver passes for the solver inside, but steps beside the grid.
    if isinstance(solver, AbstractGridAwareSolver) and type(solver) is not diffrax.HalfSolver:
        solver = solver.for_times(jnp.stack([start, end]) if ts is None else -ts)
    settings = Settings(solver, dynamics, ts, controller, start, end)
    _check_singular(flow, settings)
    return settings


def opaque(settings: Settings) -> Settings:
    """The same settings, kept from the compiler where they are constants.

    In a user's own jit they are, and folding them rounds otherwise than computing with them: behind this barrier a
    vmapped `solve` gives the bits of `sample`.
    """
    arrays, rest = eqx.partition(settings, eqx.is_array)
    return eqx.combine(jax.lax.optimization_barrier(arrays), rest)


def check_network(flow: AbstractFlow, like: Like, args: Args) -> None:
    """Raise what the flow raises for one example of this shape, before anything deeper is traced."""
    # Behind the network's own jit the trace is kept and used again by the solve.
    eqx.filter_eval_shape(network_output, flow, jnp.ones(()), like, args)


def integrate(
    terms: diffrax.AbstractTerm,
    settings: Settings,
    x_start: PyTree,
    args: Args,
    *,
    saveat: diffrax.SaveAt | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int | None = 4096,
    progress_meter: diffrax.AbstractProgressMeter | None = None,
) -> diffrax.Solution:
    """Run one solve of any terms in s = -t; never raises on a numerical failure, but marks it in `result`."""
    if adjoint is not None:
        check_type(adjoint, diffrax.AbstractAdjoint, "adjoint", "an instance such as diffrax.ForwardMode()")
    if isinstance(adjoint, diffrax.BacksolveAdjoint) and settings.ts is not None:
        raise ValueError(
            "BacksolveAdjoint solves backwards in time, which a grid of fixed steps cannot follow: pass controller=, "
            "or leave the adjoint out for diffrax.RecursiveCheckpointAdjoint()."
        )
    if settings.ts is None:
        assert settings.controller is not None
        controller, steps = settings.controller, max_steps
    else:
        controller, steps = diffrax.StepTo(settings.ts), settings.ts.shape[0] - 1
    last = diffrax.SubSaveAt(t1=True)
    # The last state as well, which tells whether the solve stayed finite. (BacksolveAdjoint allows one kind alone.)
    with_last = saveat is not None and not isinstance(adjoint, diffrax.BacksolveAdjoint)
    asked = diffrax.SaveAt(subs=last) if saveat is None else _in_solver_time(saveat)
    if with_last:
        asked = eqx.tree_at(lambda s: s.subs, asked, (asked.subs, last))
    sol = diffrax.diffeqsolve(
        terms,
        settings.solver,
        -settings.t_start,
        -settings.t_end,
        None,
        x_start,
        args,
        saveat=asked,
        stepsize_controller=controller,
        adjoint=diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint,
        max_steps=steps,
        throw=False,
        progress_meter=diffrax.NoProgressMeter() if progress_meter is None else progress_meter,
    )
    assert sol.ys is not None and sol.ts is not None
    ts, ys, final = (sol.ts[0], sol.ys[0], sol.ys[1]) if with_last else (sol.ts, sol.ys, sol.ys)
    successful = diffrax.RESULTS.successful
    # A fixed-step solve does not notice NaN by itself.
    result = diffrax.RESULTS.where(
        all_finite(final) | (sol.result != successful),
        sol.result,
        diffrax.RESULTS.nonfinite,  # pyright: ignore[reportArgumentType]
    )
    interpolation = sol.interpolation
    if interpolation is not None:
        interpolation = eqx.tree_at(lambda i: i.direction, interpolation, -interpolation.direction)
    return eqx.tree_at(
        lambda s: (s.t0, s.t1, s.ts, s.ys, s.interpolation, s.result, s.stats),
        sol,
        (
            -sol.t0,
            -sol.t1,
            jax.tree.map(jnp.negative, ts),
            ys,
            interpolation,
            result,
            {**sol.stats, "nfe": evaluations(settings.solver, sol.stats["num_steps"])},
        ),
        is_leaf=lambda leaf: leaf is None,
    )


def raise_on_failure(sol: diffrax.Solution, value: _T) -> _T:
    """Return `value`; raise one sentence if `sol`, or any example of a batch of it, failed (at run time if traced)."""
    bad = sol.result != diffrax.RESULTS.successful
    if not is_concrete(bad):
        return sol.result.error_if(value, bad)
    failed = np.flatnonzero(np.asarray(bad))
    if failed.size:
        first = jax.tree.map(lambda codes: jnp.ravel(codes)[failed[0]], sol.result)
        which = (
            f" for {failed.size} of {np.size(bad)} examples, the first is number {failed[0]}" if np.ndim(bad) else ""
        )
        raise RuntimeError(
            f"The solve failed{which}: {diffrax.RESULTS[first]} Check the network for NaN or infinite output, take "
            "more steps or a looser tolerance, or keep away from a singular end with t_start or t_end; with "
            "throw=False, `solve` returns the result of each example."
        )
    return value


def nan_on_failure(sol: diffrax.Solution, value: PyTree) -> PyTree:
    """`value`, NaN in the examples whose solve failed: no partial answer passes for a whole one."""
    failed = sol.result != diffrax.RESULTS.successful

    def mask(leaf: Array) -> Array:
        return jnp.where(jnp.reshape(failed, failed.shape + (1,) * (leaf.ndim - failed.ndim)), jnp.nan, leaf)

    return jax.tree.map(mask, value)


def check_saveat(saveat: diffrax.SaveAt, settings: Settings) -> None:
    """Raise unless the times to save at, where known, run with the solve and inside it."""
    check_type(saveat, diffrax.SaveAt, "saveat", "an instance such as diffrax.SaveAt(ts=...)")
    start, end = settings.t_start, settings.t_end
    for sub in jax.tree.leaves(saveat.subs, is_leaf=lambda leaf: isinstance(leaf, diffrax.SubSaveAt)):
        if sub.ts is None or not is_concrete((sub.ts, start, end)):
            continue
        ts = np.asarray(sub.ts)
        sign = 1 if end > start else -1
        inside = (sign * ts >= sign * float(start)) & (sign * ts <= sign * float(end))
        if not np.all(inside) or np.any(sign * np.diff(ts) < 0):
            raise ValueError(
                f"saveat.ts are path times and must run as the solve does, from t = {_show(start)} to {_show(end)}: "
                "sort them that way and leave out those outside."
            )


def noise_path(settings: Settings, like: Like, key: PRNGKey) -> diffrax.AbstractBrownianPath:
    """The Brownian path of one example: a draw per step on a fixed grid, a tree for anything else."""
    levy_area = _levy_area(settings.solver)
    if settings.ts is None or type(settings.solver) is diffrax.HalfSolver:
        start, end = -settings.t_start, -settings.t_end
        return TreeNoise(start, end, (end - start) * 2.0**-14, like, key, levy_area)
    return StepNoise(like, key, settings.ts, levy_area)


def _in_solver_time(saveat: diffrax.SaveAt) -> diffrax.SaveAt:
    """A user's `SaveAt` in path time, turned to s = -t."""

    def turn(sub: diffrax.SubSaveAt) -> diffrax.SubSaveAt:
        ts = None if sub.ts is None else -jnp.asarray(sub.ts)
        function = sub.fn if sub.fn is diffrax.SubSaveAt(t1=True).fn else _InPathTime(sub.fn)
        return eqx.tree_at(lambda s: (s.ts, s.fn), sub, (ts, function), is_leaf=lambda leaf: leaf is None)

    is_sub = lambda leaf: isinstance(leaf, diffrax.SubSaveAt)  # noqa: E731
    return eqx.tree_at(lambda s: s.subs, saveat, jax.tree.map(turn, saveat.subs, is_leaf=is_sub))


def _controller_in_solver_time(controller: diffrax.AbstractStepSizeController) -> diffrax.AbstractStepSizeController:
    """A user's controller with its `step_ts` and `jump_ts`, if any, turned from path time to s = -t."""
    if not isinstance(controller, diffrax.ClipStepSizeController):
        return controller
    turned = [None if ts is None else jnp.sort(-jnp.asarray(ts)) for ts in (controller.step_ts, controller.jump_ts)]
    inner = _controller_in_solver_time(controller.controller)
    return eqx.tree_at(
        lambda c: (c.step_ts, c.jump_ts, c.controller), controller, (*turned, inner), is_leaf=lambda leaf: leaf is None
    )


class _InPathTime(eqx.Module):
    """A user's save function, given the path's time."""

    function: Callable[[Scalar, State, Args], PyTree]

    def __call__(self, s: Scalar, x: State, args: Args) -> PyTree:
        return self.function(-s, x, args)


def _settle_dynamics(solver: diffrax.AbstractSolver, dynamics: AbstractDynamics | None) -> AbstractDynamics:
    """The dynamics asked for, by name or through the solver's own noise level; raises where the two disagree."""
    name = type(solver).__name__
    inner = _unwrapped(solver)
    if dynamics is None:
        dynamics = inner.default_dynamics if isinstance(inner, AbstractFlowSolver) else ProbabilityFlow()
    elif isinstance(inner, DDIM) and inner.eta is not None and (inner.stochastic or dynamics.stochastic):
        raise ValueError(
            "The noise level was given twice, by DDIM(eta) and by dynamics: keep one, DDIM() with "
            "dynamics=ReverseSDE(eta), or the solver's eta alone."
        )
    check_type(dynamics, AbstractDynamics, "dynamics", "an instance such as fs.dynamics.ReverseSDE(eta=1.0)")
    stochastic = isinstance(solver, diffrax.AbstractItoSolver | diffrax.AbstractStratonovichSolver)
    if not isinstance(solver.term_structure, type) and not (_wants_noise(solver) and stochastic):
        raise TypeError(
            f"{name} is a solver for split or second-order systems, but a flow is one first-order equation: use e.g. "
            "diffrax.Heun(), diffrax.Tsit5() or fs.solvers.DDIM()."
        )
    if _wants_noise(solver) and not dynamics.stochastic:
        raise ValueError(
            f"{name} solves stochastic equations only, but the dynamics is ProbabilityFlow: pass "
            "dynamics=ReverseSDE(eta=1.0), or a solver for ordinary equations such as diffrax.Heun()."
        )
    if isinstance(dynamics, ReverseSDE) and dynamics.noiseless and not _wants_noise(solver):
        dynamics = ProbabilityFlow()
    if isinstance(inner, AbstractFlowSolver):
        inner.check_dynamics(dynamics)
    if dynamics.stochastic and not stochastic:
        raise ValueError(
            f"{name} does not converge for a stochastic equation: use diffrax.Euler(), diffrax.EulerHeun(), "
            "diffrax.ShARK() or fs.solvers.DDIM() with ReverseSDE, or leave the dynamics at ProbabilityFlow."
        )
    return dynamics


def _unwrapped(solver: diffrax.AbstractSolver) -> diffrax.AbstractSolver:
    """The solver inside a `diffrax.HalfSolver`, which passes for it in every isinstance."""
    return solver.solver if type(solver) is diffrax.HalfSolver else solver


def _wants_noise(solver: diffrax.AbstractSolver) -> bool:
    """Whether the solver takes a drift and a diffusion, not one equation."""
    return typing.get_origin(solver.term_structure) is diffrax.MultiTerm


def _levy_area(solver: diffrax.AbstractSolver) -> type:
    """The Levy area that a solver needs of its Brownian path."""
    wanted = getattr(_unwrapped(solver), "minimal_levy_area", diffrax.AbstractBrownianIncrement)
    areas = (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea, diffrax.SpaceTimeTimeLevyArea)
    return next(area for area in areas if issubclass(area, wanted))


def _check_controller(controller: diffrax.AbstractStepSizeController, solver: diffrax.AbstractSolver) -> None:
    if not isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        raise TypeError(
            f"controller is {type(controller).__name__}, but wants an adaptive one such as diffrax.PIDController(rtol, "
            "atol): for fixed steps pass grid=."
        )
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise ValueError(
            f"{type(solver).__name__} has no error estimate, but an adaptive controller needs one: pass grid= for "
            "fixed steps, or a solver with an estimate such as diffrax.Tsit5() (diffrax.HalfSolver adds one to any)."
        )


def _check_time(path: AbstractPath, t: ScalarLike, name: str) -> Scalar:
    """`t` as a scalar; raise if it is outside the path and not its clean end, where sigma = 0."""
    t = as_scalar(t)
    low, high = as_scalar(path.t_data), as_scalar(path.t_noise)
    given = f" is {float(t):g}," if is_concrete(t) else " is"
    return check(
        t,
        ~path.contains(t),
        f"{name}{given} outside {type(path).__name__}, which runs from t_data = {_show(low)} to "
        f"t_noise = {_show(high)}: take a time inside.",
    )


def _show(t: Scalar) -> str:
    return f"{float(t):g}" if is_concrete(t) else "a traced value"


def _check_singular(flow: AbstractFlow, settings: Settings) -> None:
    """Raise where the first or last evaluation of the network lies at a singularity of what is asked of it."""
    path, dynamics = flow.path, settings.dynamics
    steps_through_flow = isinstance(settings.solver, AbstractFlowSolver)
    for t, name, evaluated in (
        (settings.t_start, "t_start", True),
        (settings.t_end, "t_end", _evaluates_end(settings.solver)),
    ):
        if not (evaluated and is_concrete((t, flow.path, dynamics))):
            continue
        one, zero = jnp.ones_like(t), jnp.zeros_like(t)
        wanted = (one, zero, one) if steps_through_flow else dynamics.drift_mixture(path, t)
        if bool(is_singular(flow.mixture_weights(t, wanted))):
            what = "the denoised data" if steps_through_flow else f"the drift of {type(dynamics).__name__}"
            raise ValueError(
                f"At {name} = {_show(t)} on {type(path).__name__} (alpha = {_show(path.alpha(t))}, "
                f"sigma = {_show(path.sigma(t))}) {what} is not finite from a {type(flow.prediction).__name__} "
                f"prediction: move {name} inside the path, or use a solver or a prediction that is regular there."
            )


def _evaluates_end(solver: diffrax.AbstractSolver) -> bool:
    """Whether a step of the solver evaluates the drift at the step's end."""
    solver = _unwrapped(solver)
    if isinstance(solver, diffrax.AbstractERK) and isinstance(solver.tableau, diffrax.ButcherTableau):
        return bool(np.any(np.asarray(solver.tableau.c) == 1.0))
    return type(solver) is diffrax.ReversibleHeun
