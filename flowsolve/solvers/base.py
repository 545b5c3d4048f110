"""What a solver that steps through a flow's own structure is, and what all of them share."""

import abc
from typing import Any, ClassVar, TypeVar

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._numerics import as_scalar
from .._types import Args, Scalar, ScalarLike, State
from ..dynamics import AbstractDynamics, FlowField, ProbabilityFlow, network_output, unwrap
from ..flow import AbstractFlow
from ..paths import AbstractPath
from ..predictions import Triple, combine

__all__ = ["AbstractFlowSolver"]

_SolverState = TypeVar("_SolverState")


class AbstractFlowSolver(diffrax.AbstractSolver[_SolverState]):
    """A Diffrax solver that asks the flow for mixtures of data and noise instead of the drift alone.

    It runs on the terms of `dynamics` only, inside `solve` and `sample` or in a plain `diffrax.diffeqsolve`.
    """

    #: Network evaluations of one step, and of the start of a solve.
    evaluations_per_step: eqx.AbstractVar[int]
    evaluations_at_start: eqx.AbstractVar[int]
    term_structure: ClassVar[type] = diffrax.AbstractTerm

    @property
    @abc.abstractmethod
    def default_dynamics(self) -> AbstractDynamics:
        """The equation that is solved where none is asked for."""

    @abc.abstractmethod
    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Raise `ValueError` if the solver cannot step through this equation."""

    def func(self, terms: diffrax.AbstractTerm, t0: ScalarLike, y0: State, args: Args) -> Any:
        """The vector field of the terms, which Diffrax asks for to choose a first step."""
        return terms.vf(as_scalar(t0), y0, args)


class AbstractProbabilityFlowSolver(AbstractFlowSolver[_SolverState]):
    """A solver of the probability flow alone."""

    @property
    def default_dynamics(self) -> AbstractDynamics:
        """The probability flow."""
        return ProbabilityFlow()

    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Raise for a stochastic equation."""
        if dynamics.stochastic:
            raise ValueError(
                f"{type(self).__name__} does not converge for a stochastic equation, but was given "
                f"{type(dynamics).__name__}: use SDEDPMSolverPP(), SASolver() or DDIM() with it, or ProbabilityFlow()."
            )


class AbstractStochasticSolver(AbstractFlowSolver[_SolverState], diffrax.AbstractItoSolver[_SolverState]):
    """A solver that may draw noise."""

    def strong_order(self, terms: diffrax.AbstractTerm) -> float:
        """At least 1/2, as for any scheme that freezes the network over a step."""
        del terms
        return 0.5


class AbstractGridAwareSolver(AbstractFlowSolver[_SolverState]):
    """A solver that wants to know the times of the solve, which `solve` and `sample` tell it."""

    @abc.abstractmethod
    def for_times(self, times: Float[Array, " points"]) -> "AbstractGridAwareSolver":
        """This solver for a solve along these path times, from first to last; raise if it cannot go along them."""


class AbstractMemorylessSolver(AbstractFlowSolver[None]):
    """A solver that carries nothing from step to step."""

    evaluations_at_start: ClassVar[int] = 0

    def init(self, terms: diffrax.AbstractTerm, t0: ScalarLike, t1: ScalarLike, y0: State, args: Args) -> None:
        """Nothing to begin with; the equation is checked."""
        del t0, t1, y0, args
        field, _, _ = unwrap(terms, type(self).__name__)
        self.check_dynamics(field.dynamics)


class Evaluation(eqx.Module):
    """The network's output at one x and time, from which all mixtures of data and noise there are had."""

    flow: AbstractFlow
    t: Scalar
    x: State
    output: State

    def mixture(self, target: Triple) -> State:
        """(a E[x_0|x] + b E[eps|x])/c for target = (a, b, c)."""
        return combine(self.flow.mixture_weights(self.t, target), self.x, self.output)

    def data_and_noise(self) -> tuple[State, State]:
        """E[x_0|x] and E[eps|x]."""
        one, zero = jnp.ones_like(self.t), jnp.zeros_like(self.t)
        return self.mixture((one, zero, one)), self.mixture((zero, one, one))


def evaluate(field: FlowField, t: Scalar, x: State, args: Args) -> Evaluation:
    """One call of the network."""
    return Evaluation(field.flow, t, x, network_output(field.flow, t, x, args))


def error_scale(path: AbstractPath, start: Scalar, target: Scalar) -> Scalar:
    """The scale of the state at the start over that at the target, at least 1: a factor of error estimates.

    Diffrax measures an error against the larger of both states. Where a step shrinks the state, as on `EDM`, the error
    is of the size of the smaller one.
    """
    (alpha, sigma), (alpha_to, sigma_to) = path.coefficients(start), path.coefficients(target)
    return jnp.maximum(1, (alpha + sigma) / (alpha_to + sigma_to))
