"""Network evaluations of a solve, for this library's solvers and Diffrax's."""

from typing import Any

import diffrax
import numpy as np

from .base import AbstractFlowSolver

__all__: list[str] = []


def evaluations(solver: diffrax.AbstractSolver, num_steps: Any) -> Any:
    """The number of network evaluations of `num_steps` steps, accepted or rejected; None for an unknown solver.

    A solver from elsewhere states its own with the attribute `evaluations_per_step` and, if not 0,
    `evaluations_at_start`.
    """
    counts = evaluation_counts(solver)
    if counts is None:
        return None
    per_step, at_start = counts
    return per_step * num_steps + at_start


def evaluation_counts(solver: diffrax.AbstractSolver) -> tuple[int, int] | None:
    """(evaluations per step, evaluations that do not depend on the number of steps)."""
    if type(solver) is diffrax.HalfSolver:
        counts = evaluation_counts(solver.solver)
        return None if counts is None else (3 * counts[0], counts[1])
    if isinstance(solver, AbstractFlowSolver) or hasattr(solver, "evaluations_per_step"):
        return solver.evaluations_per_step, getattr(solver, "evaluations_at_start", 0)  # pyright: ignore
    if isinstance(solver, diffrax.AbstractERK) and isinstance(solver.tableau, diffrax.ButcherTableau):
        stages = solver.tableau.num_stages
        # First same as last: the last stage of a step is the first of the next, rejected steps included.
        return (stages - 1, 1) if solver.tableau.fsal else (stages, 0)
    if isinstance(solver, diffrax.AbstractSRK):
        return _drift_stages(solver), 0
    return _COUNTS.get(type(solver))


def _drift_stages(solver: diffrax.AbstractSRK) -> int:
    """Stages at which a stochastic Runge-Kutta solver evaluates the drift."""
    stages = len(solver.tableau.b_sol)
    ignored = solver.tableau.ignore_stage_f
    return stages if ignored is None else stages - int(np.sum(np.asarray(ignored)))


_COUNTS: dict[type, tuple[int, int]] = {
    diffrax.Euler: (1, 0),
    diffrax.EulerHeun: (1, 0),
    diffrax.ItoMilstein: (1, 0),
    diffrax.StratonovichMilstein: (1, 0),
    diffrax.LeapfrogMidpoint: (1, 0),
    diffrax.ReversibleHeun: (1, 1),
}
