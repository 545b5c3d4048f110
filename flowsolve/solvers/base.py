"""What the rest of the library asks of a solver that steps through a flow's own structure."""

import abc
from typing import TypeVar

import diffrax
import equinox as eqx

from ..dynamics import AbstractDynamics

__all__ = ["AbstractFlowSolver"]

_SolverState = TypeVar("_SolverState")


class AbstractFlowSolver(diffrax.AbstractSolver[_SolverState]):
    """A Diffrax solver that asks the flow for mixtures of data and noise instead of the drift alone.

    It runs on the terms of `dynamics` only, inside `solve` and `sample` or in a plain `diffrax.diffeqsolve`.
    """

    #: Network evaluations of one step, and of the start of a solve.
    evaluations_per_step: eqx.AbstractVar[int]
    evaluations_at_start: eqx.AbstractVar[int]

    @property
    @abc.abstractmethod
    def default_dynamics(self) -> AbstractDynamics:
        """The equation that is solved where none is asked for."""

    @abc.abstractmethod
    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Raise `ValueError` if the solver cannot step through this equation."""


def refuse_noise(solver: AbstractFlowSolver, dynamics: AbstractDynamics) -> None:
    """The `check_dynamics` of a solver for ordinary equations."""
    if dynamics.stochastic:
        raise ValueError(
            f"{type(solver).__name__} does not converge for a stochastic equation, but was given "
            f"{type(dynamics).__name__}: use SDEDPMSolverPP(), SASolver() or DDIM() with it, or ProbabilityFlow()."
        )
