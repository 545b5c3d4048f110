"""What a solve was asked to do, checked and completed.

`settle` turns a user's request into `Settings`, a pytree: types are checked in Python, and all that needs arithmetic,
such as the grid and whether its times lie on the path, in one small compiled program before the solve is traced. Python
floats become arrays, so that a new tolerance does not retrace. Times inside are s = -t (see `dynamics`).
"""

import typing
import warnings
from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._checks import check, check_type, checked, is_concrete
from ._numerics import as_scalar, linear_combination, normal_with, tree_size
from ._types import Like, PRNGKey, Scalar, ScalarLike, State
from .brownian import StepNoise, TreeNoise
from .dynamics import AbstractDynamics, ProbabilityFlow, ReverseSDE, check_noise
from .flow import AbstractFlow, AbstractVelocityFlow
from .grids import AbstractGrid, LogSNR
from .paths import AbstractPath
from .predictions import AbstractPrediction, conversion_weights, is_singular
from .solvers import DDIM, AbstractFlowSolver
from .solvers.base import AbstractGridAwareSolver
from .solvers.multistep import AbstractMultistep, StepWeights

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
    #: Mean and standard deviation of every element at the end where the noise is, from a normal source; from another
    #: the mean is 0 and the other number the scale of the noise.
    prior: tuple[Scalar, Scalar]
    #: The weights of all steps, of a multistep solver on a grid.
    table: StepWeights | None


def settle(
    flow: AbstractVelocityFlow,
    *,
    solver: diffrax.AbstractSolver | None,
    grid: AbstractGrid | None,
    controller: diffrax.AbstractStepSizeController | None,
    dynamics: AbstractDynamics | None,
    t_start: ScalarLike | None,
    t_end: ScalarLike | None,
    moments: tuple[ScalarLike, ScalarLike] | None = None,
    encode: bool = False,
) -> Settings:
    """Check a request and fill in what it leaves open. `encode` runs from data to noise.

    `moments` are mean and standard deviation of the data's elements, where the law at the noise end is wanted.
    """
    if not isinstance(flow, AbstractVelocityFlow):
        raise TypeError(
            f"flow is a {type(flow).__name__}, but wants an AbstractFlow: wrap a network with "
            "Flow(network, path, prediction)."
        )
    if solver is None:
        solver = DEFAULT_SOLVER()
    check_type(solver, diffrax.AbstractSolver, "solver", "an instance such as fs.solvers.DDIM() or diffrax.Tsit5()")
    if isinstance(_unwrapped(solver), AbstractFlowSolver) and not isinstance(flow, AbstractFlow):
        raise TypeError(
            f"{type(solver).__name__} steps through the denoised data, but a {type(flow).__name__} predicts its "
            "velocity alone: use a solver of Diffrax, such as diffrax.Heun()."
        )
    dynamics = _settle_dynamics(solver, dynamics)
    if dynamics.stochastic:
        check_noise(dynamics, flow)
    if dynamics.stochastic and encode:
        raise ValueError("encode follows the probability flow, but got a stochastic dynamics or solver: leave it out.")
    if controller is None:
        grid = DEFAULT_GRID() if grid is None else grid
        check_type(grid, AbstractGrid, "grid", "an instance such as fs.grids.Uniform(20)")
    else:
        if grid is not None:
            raise ValueError(
                "Both grid and controller were given: grid= is for fixed steps, controller= for adaptive ones."
            )
        _check_controller(controller, solver)
        _warn_of_tolerance(flow, controller)
        controller = jax.tree.map(lambda leaf: as_scalar(leaf) if isinstance(leaf, float) else leaf, controller)
    ends = [None if t is None else as_scalar(t) for t in (t_start, t_end)]
    prediction = flow.prediction if isinstance(flow, AbstractFlow) else None
    coupled = None if flow.source.has_score or moments is None else type(flow.source).__name__
    moments = jax.tree.map(as_scalar, (0.0, 0.0) if moments is None else moments)
    return checked(_complete, flow.path, prediction, solver, grid, controller, dynamics, ends, moments, encode, coupled)


def _complete(
    path: AbstractPath,
    prediction: AbstractPrediction | None,
    solver: diffrax.AbstractSolver,
    grid: AbstractGrid | None,
    controller: diffrax.AbstractStepSizeController | None,
    dynamics: AbstractDynamics,
    ends: list[Scalar | None],
    moments: tuple[Scalar, Scalar],
    encode: bool,
    coupled: str | None,
) -> Settings:
    """The arithmetic of `settle`. `coupled` names a source whose law is wanted and known at t_noise alone."""
    t_start, t_end = ends
    if t_start is not None:
        t_start = _check_time(path, t_start, "t_start")
    if t_end is not None:
        t_end = _check_time(path, t_end, "t_end")
    if encode:
        t_start = as_scalar(path.t_data) if t_start is None else t_start
        t_end = as_scalar(path.t_noise) if t_end is None else t_end
    if grid is not None:
        times = grid(path, t_start, t_end)
        start = _check_time(path, times[0], "The grid's first time")
        end = _check_time(path, times[-1], "The grid's last time")
        ts = -times
    else:
        assert controller is not None
        controller = _controller_in_solver_time(controller)
        start = as_scalar(path.t_noise) if t_start is None else t_start
        end = as_scalar(path.t_data) if t_end is None else t_end
        ts = None
    end = check(
        end,
        (start >= end) if encode else (start <= end),
        "The solve goes from t = {} to t = {}, but its times must "
        f"{'rise, from data to noise' if encode else 'fall, from noise to data'}.",
        start,
        end,
    )
    # A HalfSolver passes for the solver inside, but steps beside the grid.
    plain = type(solver) is not diffrax.HalfSolver
    if isinstance(solver, AbstractGridAwareSolver) and plain:
        solver = solver.for_times(jnp.stack([start, end]) if ts is None else -ts)
    table = None
    if isinstance(solver, AbstractMultistep) and plain and ts is not None:
        assert prediction is not None
        table = solver.table(path, prediction, dynamics, -ts)
    start = _check_regular(path, prediction, solver, dynamics, start, "t_start")
    if _evaluates_end(solver):
        end = _check_regular(path, prediction, solver, dynamics, end, "t_end")
    data_mean, data_std = moments
    if coupled is not None:
        at_noise = (end if encode else start) == as_scalar(path.t_noise)
        end = check(
            end,
            ~(at_noise & (data_mean == 0) & (data_std == 0)),
            f"The flow's source is {coupled}, whose law is known at t_noise = {{}} alone, but another time there or "
            "moments of the data were given: leave them out, or give `solve` an x_start.",
            as_scalar(path.t_noise),
        )
    prior = path.start(end if encode else start, data_mean=data_mean, data_std=data_std)
    return Settings(solver, dynamics, ts, controller, start, end, prior, table)


def opaque(settings: Settings) -> Settings:
    """The same settings, kept from the compiler where they are constants.

    In a user's own jit they are, and folding them rounds otherwise than computing with them: behind this barrier a
    vmapped `solve` gives the bits of `sample`.
    """
    arrays, rest = eqx.partition(settings, eqx.is_array)
    return eqx.combine(jax.lax.optimization_barrier(arrays), rest)


def draw_prior(flow: AbstractVelocityFlow, settings: Settings, key: PRNGKey, like: Like) -> State:
    """One state at the noise end."""
    if flow.source.has_score:
        return normal_with(key, like, settings.prior)
    return linear_combination((settings.prior[1],), (flow.source.sample(key, like),))


def log_prior(flow: AbstractVelocityFlow, settings: Settings, x: State) -> Scalar:
    """ln of the density of a state at the noise end."""
    mean, std = settings.prior
    noise = jax.tree.map(lambda leaf: (leaf - mean.astype(leaf.dtype)) / std.astype(leaf.dtype), x)
    return flow.source.log_prob(noise) - tree_size(x) * jnp.log(std)


def noise_path(settings: Settings, like: Like, key: PRNGKey) -> diffrax.AbstractBrownianPath:
    """The Brownian path of one example: a draw per step on a fixed grid, a tree for anything else."""
    levy_area = _levy_area(settings.solver)
    if settings.ts is None or type(settings.solver) is diffrax.HalfSolver:
        start, end = -settings.t_start, -settings.t_end
        return TreeNoise(start, end, (end - start) * 2.0**-14, like, key, levy_area)
    return StepNoise(like, key, settings.ts, levy_area)


def _controller_in_solver_time(controller: diffrax.AbstractStepSizeController) -> diffrax.AbstractStepSizeController:
    """A user's controller with its `step_ts` and `jump_ts`, if any, turned from path time to s = -t."""
    if not isinstance(controller, diffrax.ClipStepSizeController):
        return controller
    turned = [None if ts is None else jnp.sort(-jnp.asarray(ts)) for ts in (controller.step_ts, controller.jump_ts)]
    inner = _controller_in_solver_time(controller.controller)
    return eqx.tree_at(
        lambda c: (c.step_ts, c.jump_ts, c.controller), controller, (*turned, inner), is_leaf=lambda leaf: leaf is None
    )


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


def _warn_of_tolerance(flow: AbstractVelocityFlow, controller: diffrax.AbstractStepSizeController) -> None:
    """Warn where the controller would chase the rounding of a network in half precision, or of any other."""
    while hasattr(controller, "controller"):
        controller = controller.controller  # pyright: ignore[reportAttributeAccessIssue]
    tolerances = [getattr(controller, name, None) for name in ("rtol", "atol")]
    if not all(eqx.is_array_like(value) and is_concrete(value) for value in tolerances):
        return
    tolerance = max(float(np.max(np.asarray(value))) for value in tolerances)
    nodes = jax.tree.leaves(flow, is_leaf=lambda node: hasattr(node, "compute_dtype"))
    # That of `nn.Precision`, or of the parameters themselves.
    dtypes = {jnp.dtype(getattr(node, "compute_dtype", getattr(node, "dtype", bool))) for node in nodes}
    dtypes = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    coarsest = max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps), default=None)
    # Rounding errors of an evaluation are smaller than eps and partly cancel over the stages of a step.
    if coarsest is not None and tolerance < (resolved := float(jnp.finfo(coarsest).eps) / 8):
        warnings.warn(
            f"The controller's tolerance {tolerance:g} is below what a network in {coarsest} resolves, about "
            f"{resolved:.1g}: its rounding passes for error and costs steps. Loosen rtol and atol, or compute in "
            "float32.",
            stacklevel=4,
        )


def _check_time(path: AbstractPath, t: Scalar, name: str) -> Scalar:
    """`t`; raise if it is outside the path and not its clean end, where sigma = 0."""
    return check(
        t,
        ~path.contains(t),
        f"{name} is {{}}, outside {type(path).__name__}, which runs from t_data = {{}} to t_noise = {{}}: take a time "
        "inside.",
        t,
        as_scalar(path.t_data),
        as_scalar(path.t_noise),
    )


def _check_regular(
    path: AbstractPath,
    prediction: AbstractPrediction | None,
    solver: diffrax.AbstractSolver,
    dynamics: AbstractDynamics,
    t: Scalar,
    name: str,
) -> Scalar:
    """`t`; raise if an evaluation of the network there lies at a singularity of what is asked of it."""
    if prediction is None:
        return t
    steps_through_flow = isinstance(solver, AbstractFlowSolver)
    one, zero = jnp.ones_like(t), jnp.zeros_like(t)
    wanted = (one, zero, one) if steps_through_flow else dynamics.drift_mixture(path, t)
    what = "the denoised data" if steps_through_flow else f"the drift of {type(dynamics).__name__}"
    return check(
        t,
        is_singular(conversion_weights(path, t, prediction.coefficients(path, t), wanted)),
        f"At {name} = {{}} on {type(path).__name__} (alpha = {{}}, sigma = {{}}) {what} is not finite from a "
        f"{type(prediction).__name__} prediction: move {name} inside the path, or use a solver or a prediction that is "
        "regular there.",
        t,
        *path.coefficients(t),
    )


def _evaluates_end(solver: diffrax.AbstractSolver) -> bool:
    """Whether a step of the solver evaluates the drift at the step's end."""
    solver = _unwrapped(solver)
    if isinstance(solver, diffrax.AbstractERK) and isinstance(solver.tableau, diffrax.ButcherTableau):
        return bool(np.any(np.asarray(solver.tableau.c) == 1.0))
    return type(solver) is diffrax.ReversibleHeun
