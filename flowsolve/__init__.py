"""flowsolve: a functional ODE/SDE solver suite for flow matching and diffusion models, on Equinox and Diffrax.

Data at small t, noise at large t; every function takes one example, batched by `jax.vmap`; everything is a pytree.
"""

from . import (
    batching,
    brownian,
    divergence,
    dynamics,
    flow,
    grids,
    guidance,
    likelihood,
    losses,
    nn,
    paths,
    preconditioning,
    predictions,
    sampling,
    solvers,
    testing,
    times,
    training,
    tuning,
)
from .batching import batched
from .dynamics import ProbabilityFlow, ReverseSDE
from .flow import AbstractFlow, Flow, OnPath, TimeReversed
from .likelihood import bits_per_dim, log_prob, sample_and_log_prob
from .preconditioning import EDMPreconditioner
from .predictions import convert
from .sampling import encode, sample, solve

__all__ = [
    "AbstractFlow",
    "EDMPreconditioner",
    "Flow",
    "OnPath",
    "ProbabilityFlow",
    "ReverseSDE",
    "TimeReversed",
    "batched",
    "batching",
    "bits_per_dim",
    "brownian",
    "convert",
    "divergence",
    "dynamics",
    "encode",
    "flow",
    "grids",
    "guidance",
    "likelihood",
    "log_prob",
    "losses",
    "nn",
    "paths",
    "preconditioning",
    "predictions",
    "sample",
    "sample_and_log_prob",
    "sampling",
    "solve",
    "solvers",
    "testing",
    "times",
    "training",
    "tuning",
]
