"""One solve: `diffrax.diffeqsolve` run as `Settings` say, its answer in path time, and what is said where it failed."""

from collections.abc import Callable
from typing import TypeVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from ._checks import Collector, check_count, check_type, is_concrete
from ._numerics import all_finite
from ._settings import Settings
from ._steps import fixed_steps
from ._types import Args, Like, Scalar, State
from .dynamics import network_output
from .flow import AbstractVelocityFlow
from .solvers.counts import evaluations

_T = TypeVar("_T")


def check_network(flow: AbstractVelocityFlow, like: Like, args: Args) -> None:
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
    asked_more = saveat is not None or adjoint is not None or progress_meter is not None
    # An implicit solver takes its tolerances from the controller.
    implicit = isinstance(settings.solver, diffrax.AbstractImplicitSolver)
    if settings.ts is not None and not asked_more and not implicit:
        return _last_of_grid(terms, settings, x_start, args)
    if settings.ts is None:
        assert settings.controller is not None
        steps = None if max_steps is None else check_count(max_steps, "max_steps")
        controller = settings.controller
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
            _noticed(sol.result, final),
            {**sol.stats, "nfe": evaluations(settings.solver, sol.stats["num_steps"])},
        ),
        is_leaf=lambda leaf: leaf is None,
    )


def _last_of_grid(terms: diffrax.AbstractTerm, settings: Settings, x_start: PyTree, args: Args) -> diffrax.Solution:
    """The solution of fixed steps of which nothing but the last state is asked."""
    assert settings.ts is not None
    x, result = fixed_steps(terms, settings.solver, settings.ts, settings.table, x_start, args)
    steps = jnp.asarray(len(settings.ts) - 1)
    return diffrax.Solution(
        t0=settings.t_start,
        t1=settings.t_end,
        ts=settings.t_end[None],
        ys=jax.tree.map(lambda leaf: leaf[None], x),
        interpolation=None,
        stats={
            "num_steps": steps,
            "num_accepted_steps": steps,
            "num_rejected_steps": jnp.zeros_like(steps),
            "max_steps": len(settings.ts) - 1,
            "nfe": evaluations(settings.solver, steps),
        },
        result=_noticed(result, x),
        solver_state=None,
        controller_state=None,
        made_jump=None,
        event_mask=None,
    )


def _noticed(result: diffrax.RESULTS, final: PyTree) -> diffrax.RESULTS:
    """The result with a last state that is not finite among the failures: fixed steps do not notice one themselves."""
    return diffrax.RESULTS.where(
        all_finite(final) | (result != diffrax.RESULTS.successful),
        result,
        diffrax.RESULTS.nonfinite,  # pyright: ignore[reportArgumentType]
    )


# What happened and which knob to turn.
_CAUSES = (
    (
        diffrax.RESULTS.nonfinite,
        "the state became NaN or infinite: check the network's output there, take more steps, or keep away from a "
        "singular end with t_start or t_end",
    ),
    (
        diffrax.RESULTS.max_steps_reached,
        "the controller needed more than max_steps steps: raise max_steps, or loosen its rtol and atol",
    ),
    (
        diffrax.RESULTS.dt_min_reached,
        "the controller needed a step below its dtmin: lower dtmin, or loosen its rtol and atol",
    ),
    (
        diffrax.RESULTS.nonlinear_max_steps_reached,
        "the iteration that finds the start or the end of a step did not converge: take more steps, or give it more "
        "iterations (`iterations` of editing.invert, the root_finder of an implicit solver)",
    ),
)
_SUGGESTION = "With throw=False nothing is raised, and `solve` returns the result of each example."


#: One result for each solve, or batch of them, that was asked to raise.
_RESULTS = Collector()


def with_results(function: Callable[[], _T]) -> tuple[_T, list[diffrax.RESULTS]]:
    """function() and one result for each solve or batch of them in it, none of which raises."""
    return _RESULTS.collect(function)


def raise_on_failure(result: diffrax.RESULTS, value: _T, mesh: Mesh | AbstractMesh | None = None) -> _T:
    """Return `value`; raise one message if a solve, or any of a batch of them, failed (at run time if traced).

    The mesh is that over which a batch is spread.
    """
    if not is_concrete(result):
        results = _RESULTS.found()
        if results is not None:
            results.append(jax.tree.map(jnp.max, result))
            return nan_on_failure(result, value)
        bad = result != diffrax.RESULTS.successful
        texts = ["inside the solver or its controller", *(text for _, text in _CAUSES)]
        index = sum(jnp.where(result == cause, number, 0) for number, (cause, _) in enumerate(_CAUSES, 1))
        messages = [f"The solve failed: {text}. {_SUGGESTION}" for text in texts]
        # One number goes through the check, which would gather a whole batch from all devices.
        some = jnp.any(bad)

        def check(some: Bool[Array, ""], index: Int[Array, ""]) -> Bool[Array, ""]:
            return eqx.branched_error_if(some, some, index, messages)

        if mesh is not None:
            # By all devices: one that raised alone would leave the others waiting for it, until XLA ends the process.
            check = jax.shard_map(
                check, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
            )
        return _masked(bad & check(some, jnp.max(index)), value)
    codes = _on_this_host(jax.tree.leaves(result)[0])
    (success,) = jax.tree.leaves(diffrax.RESULTS.successful)
    failed = np.flatnonzero(codes != success)
    if failed.size == 0:
        return value
    texts = []
    for code in np.unique(codes.ravel()[failed]):
        known_text = next((text for cause, text in _CAUSES if jax.tree.leaves(cause) == [code]), None)
        same = failed[codes.ravel()[failed] == code]
        item = jax.tree.unflatten(jax.tree.structure(result), [jnp.asarray(code)])
        text = str(diffrax.RESULTS[item]).rstrip(".") if known_text is None else known_text
        which = f"{same.size} of {codes.size} examples, the first is number {same[0]}: " if codes.ndim else ""
        texts.append(which + text)
    raise RuntimeError(f"The solve failed{' for ' if codes.ndim else ': '}{'; '.join(texts)}. {_SUGGESTION}")


def nan_on_failure(result: diffrax.RESULTS, value: _T) -> _T:
    """`value`, NaN in the examples whose solve failed: no partial answer passes for a whole one."""
    return _masked(result != diffrax.RESULTS.successful, value)


def _masked(failed: Bool[Array, "..."], value: _T) -> _T:
    def mask(leaf: PyTree) -> PyTree:
        if not eqx.is_inexact_array(leaf):
            return leaf
        return jnp.where(failed.reshape(failed.shape + (1,) * (leaf.ndim - failed.ndim)), jnp.nan, leaf)

    return jax.tree.map(mask, value)


def _on_this_host(codes: Array) -> np.ndarray:
    """The codes of all examples, also of those that another process holds."""
    if isinstance(codes, jax.Array) and not codes.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(codes, tiled=True))
    return np.asarray(codes)


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
                f"saveat.ts are path times and must run as the solve does, from t = {start:g} to {end:g}: "
                "sort them that way and leave out those outside."
            )


def _in_solver_time(saveat: diffrax.SaveAt) -> diffrax.SaveAt:
    """A user's `SaveAt` in path time, turned to s = -t."""

    def turn(sub: diffrax.SubSaveAt) -> diffrax.SubSaveAt:
        ts = None if sub.ts is None else -jnp.asarray(sub.ts)
        function = sub.fn if sub.fn is diffrax.SubSaveAt(t1=True).fn else _InPathTime(sub.fn)
        return eqx.tree_at(lambda s: (s.ts, s.fn), sub, (ts, function), is_leaf=lambda leaf: leaf is None)

    is_sub = lambda leaf: isinstance(leaf, diffrax.SubSaveAt)  # noqa: E731
    return eqx.tree_at(lambda s: s.subs, saveat, jax.tree.map(turn, saveat.subs, is_leaf=is_sub))


class _InPathTime(eqx.Module):
    """A user's save function, given the path's time."""

    function: Callable[[Scalar, State, Args], PyTree]

    def __call__(self, s: Scalar, x: State, args: Args) -> PyTree:
        return self.function(-s, x, args)
