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
    evaluations_per_step: eqx.AbstractClassVar[int]
    evaluations_at_start: eqx.AbstractClassVar[int]

    @property
    @abc.abstractmethod
    def default_dynamics(self) -> AbstractDynamics | None:
        """The equation that the solver's own fields name, such as its noise level; None if they leave it open."""

    @abc.abstractmethod
    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Raise `ValueError` if the solver cannot step through this equation."""
