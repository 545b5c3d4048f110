"""Diffrax solvers of this field: they step through a flow's own structure instead of its vector field alone."""

from .adams import DEIS, IPNDM, LMS, AdamsBashforth
from .ancestral import AbstractVariance, Ancestral, LargeVariance, LearnedVariance, PosteriorVariance
from .base import AbstractFlowSolver
from .ddim import DDIM
from .dpm_solver import DPMSolverPP, SDEDPMSolverPP
from .few_steps import ConsistencySampling, Jump
from .multistep import AbstractMultistep, AbstractODEMultistep, AbstractSDEMultistep
from .nodes import AbstractVariable, LogSNR, NoiseRatio, Time, VPTime
from .repaint import RePaint
from .singlestep import SEEDS2, DPMSolverPPSinglestep, EDMHeun
from .stochastic_adams import ERSDE, SASolver
from .tuned import TunedMultistep
from .unipc import AdaptiveUniPC, UniPC
from .wrappers import Churn, LangevinCorrector, Restart

__all__ = [
    "DDIM",
    "DEIS",
    "ERSDE",
    "IPNDM",
    "LMS",
    "SEEDS2",
    "AbstractFlowSolver",
    "AbstractMultistep",
    "AbstractODEMultistep",
    "AbstractSDEMultistep",
    "AbstractVariable",
    "AbstractVariance",
    "AdamsBashforth",
    "AdaptiveUniPC",
    "Ancestral",
    "Churn",
    "ConsistencySampling",
    "DPMSolverPP",
    "DPMSolverPPSinglestep",
    "EDMHeun",
    "Jump",
    "LangevinCorrector",
    "LargeVariance",
    "LearnedVariance",
    "LogSNR",
    "NoiseRatio",
    "PosteriorVariance",
    "RePaint",
    "Restart",
    "SASolver",
    "SDEDPMSolverPP",
    "Time",
    "TunedMultistep",
    "UniPC",
    "VPTime",
]
