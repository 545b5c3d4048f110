"""flowsolve: a functional ODE/SDE solver suite for flow matching and diffusion models, on Equinox and Diffrax.

Data at small t, noise at large t; every function takes one example, batched by `jax.vmap`; everything is a pytree.
"""

from . import (
    averages,
    batching,
    bridges,
    brownian,
    checkpoints,
    couplings,
    data,
    divergence,
    dynamics,
    editing,
    flow,
    grids,
    guidance,
    likelihood,
    losses,
    metrics,
    nn,
    paths,
    preconditioning,
    predictions,
    reflow,
    sampling,
    sharding,
    solvers,
    sources,
    testing,
    times,
    training,
    tuning,
    weights,
)
from .batching import batched
from .bridges import BridgeFlow
from .dynamics import ProbabilityFlow, ReverseSDE
from .flow import AbstractFlow, Flow, OnPath, TimeReversed
from .likelihood import bits_per_dim, log_prob, sample_and_log_prob
from .preconditioning import EDMPreconditioner
from .predictions import convert
from .sampling import encode, sample, solve

__all__ = [
    "AbstractFlow",
    "BridgeFlow",
    "EDMPreconditioner",
    "Flow",
    "OnPath",
    "ProbabilityFlow",
    "ReverseSDE",
    "TimeReversed",
    "averages",
    "batched",
    "batching",
    "bits_per_dim",
    "bridges",
    "brownian",
    "checkpoints",
    "convert",
    "couplings",
    "data",
    "divergence",
    "dynamics",
    "editing",
    "encode",
    "flow",
    "grids",
    "guidance",
    "likelihood",
    "log_prob",
    "losses",
    "metrics",
    "nn",
    "paths",
    "preconditioning",
    "predictions",
    "reflow",
    "sample",
    "sample_and_log_prob",
    "sampling",
    "sharding",
    "solve",
    "solvers",
    "sources",
    "testing",
    "times",
    "training",
    "tuning",
    "weights",
]
