"""Diffrax solvers of this field: they step through a flow's own structure instead of its vector field alone."""

from .base import AbstractFlowSolver
from .ddim import DDIM

__all__ = ["DDIM", "AbstractFlowSolver"]
