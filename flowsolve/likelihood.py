r"""The exact log-density of a flow, by the change of variables along the probability flow.

$$\ln p(x_0) = \ln N(x_T;\, 0,\, \sigma(t_\mathrm{noise})^2 I)
   + \int_{t_\mathrm{data}}^{t_\mathrm{noise}} \nabla \cdot v(t, x_t)\, dt, \qquad \frac{dx}{dt} = v$$

in nats, from a normal source; from another one with its own density at the noise end. It is the density of what
`sample` draws: the flow started from the path's own prior. (On a path whose prior
is not quite its marginal at t_noise, such as VP or EDM, that differs a little from the density the network was
trained on.) The integral is carried beside the state and kept out of the error norm of an adaptive controller.

Source: Chen et al. (2018), arXiv 1806.07366; Grathwohl et al. (2018), arXiv 1810.01367; Song et al. (2020),
arXiv 2011.13456.
"""

import math
from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._checks import check, check_count, check_key, check_state, check_type
from ._integrate import check_network, integrate, nan_on_failure, raise_on_failure
from ._numerics import as_scalar, as_state, state_like
from ._settings import Settings, draw_prior, log_prior, opaque, settle
from ._types import Args, Like, PRNGKey, Scalar, ScalarLike, State
from .divergence import AbstractDivergence, Exact
from .dynamics import ProbabilityFlow, vector_field
from .flow import AbstractVelocityFlow
from .grids import AbstractGrid
from .solvers import AbstractFlowSolver

__all__ = ["bits_per_dim", "log_prob", "sample_and_log_prob"]


def log_prob(
    flow: AbstractVelocityFlow,
    x_data: State,
    args: Args = None,
    *,
    divergence: AbstractDivergence = Exact(),
    key: PRNGKey | None = None,
    solver: diffrax.AbstractSolver | None = None,
    grid: AbstractGrid | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    t_start: ScalarLike | None = None,
    t_end: ScalarLike | None = None,
    data_mean: ScalarLike = 0.0,
    data_std: ScalarLike = 0.0,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int | None = 4096,
    throw: bool = True,
) -> Scalar:
    """ln p(x) of ONE example in nats, from its encoding and the integral of the divergence; batch with `jax.vmap`.

    **Arguments:**

    - `flow`, `x_data`, `args`: as in `solve`; `x_data` lies at `t_start`, `t_data` by default;
    - `divergence`: `divergence.Exact()`, or `divergence.Hutchinson(k)`, unbiased, which needs `key`;
    - `solver`, `grid`, `controller`: `diffrax.Dopri8()` and `diffrax.PIDController(rtol=1e-5, atol=1e-5)` by default:
      the integral is not in the error norm, so a high order is what keeps it accurate. Any solver of
      ordinary equations; those of `solvers` step through a flow alone and are refused;
    - `t_start` < `t_end`, `adjoint`, `max_steps`, `throw`: as in `encode`;
    - `data_mean` m, `data_std` s: moments of the data's elements, for a `t_end` below `t_noise`: the prior is then
      N(alpha m, sigma^2 + alpha^2 s^2), as in `sample`.

    **Returns:** a scalar, differentiable in `x_data`, `args` and the network; NaN if the solve failed and `throw` is
    False.
    """
    check_state(x_data, "x_data")
    x_data = as_state(x_data)
    check_type(divergence, AbstractDivergence, "divergence", "an instance such as fs.divergence.Exact()")
    settings = _settle(flow, solver, grid, controller, t_start, t_end, data_mean, data_std, encode=True)
    if divergence.random:
        key = check_key(key, "this divergence")
    (_, value), result = _solve(flow, x_data, args, settings, divergence, key, adjoint, max_steps, encode=True)
    return raise_on_failure(result, value) if throw else value


def sample_and_log_prob(
    flow: AbstractVelocityFlow,
    like: Like,
    *,
    key: PRNGKey,
    args: Args = None,
    divergence: AbstractDivergence = Exact(),
    solver: diffrax.AbstractSolver | None = None,
    grid: AbstractGrid | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    t_start: ScalarLike | None = None,
    t_end: ScalarLike | None = None,
    data_mean: ScalarLike = 0.0,
    data_std: ScalarLike = 0.0,
    adjoint: diffrax.AbstractAdjoint | None = None,
    max_steps: int | None = 4096,
    throw: bool = True,
) -> tuple[State, Scalar]:
    """ONE sample and its ln p in nats, in one solve; batch with `jax.vmap` over keys.

    **Arguments:** `like`: one example's shape and dtype; `key`: a typed key; the rest as in `log_prob`, with
    `t_start` > `t_end`.

    **Returns:** (sample, ln p(sample)).
    """
    check_state(like, "like")
    start_key, probe_key = jax.random.split(check_key(key, "sampling"))
    check_type(divergence, AbstractDivergence, "divergence", "an instance such as fs.divergence.Exact()")
    settings = _settle(flow, solver, grid, controller, t_start, t_end, data_mean, data_std, encode=False)
    x_noise = draw_prior(flow, settings, start_key, state_like(like))
    value, result = _solve(flow, x_noise, args, settings, divergence, probe_key, adjoint, max_steps, encode=False)
    return raise_on_failure(result, value) if throw else value


def bits_per_dim(log_prob: Scalar, dim: int | np.integer, *, bin_width: ScalarLike = 1.0) -> Scalar:
    """Bits per dimension: -(ln p + d ln bin_width) / (d ln 2).

    **Arguments:** `log_prob`: ln p in nats of continuous data, for integers those with uniform noise added
    (dequantised); `dim`: the number of elements d; `bin_width`: the width of one quantisation level in the units in
    which the density was taken, e.g. 2/256 for 8-bit data scaled to [-1, 1].

    Source: Theis, van den Oord & Bethge (2015), arXiv 1511.01844.
    """
    dim = check_count(dim, "bits_per_dim got dim")
    width = as_scalar(bin_width)
    width = check(width, ~(width > 0), f"bin_width is {bin_width}, but wants the positive width of one level.")
    return -(log_prob / dim + jnp.log(width)) / math.log(2)


class _AugmentedField(eqx.Module):
    """The probability flow and d ln p/ds = div v along it, in s = -t."""

    field: Callable[[ScalarLike, State, Args], State]
    divergence: AbstractDivergence
    probes: PyTree

    def __call__(self, s: ScalarLike, state: tuple[State, Scalar], args: Args) -> tuple[State, Scalar]:
        x, _ = state
        # The field is dx/ds = -v, along which d ln p/ds = -div(dx/ds).
        value, divergence = self.divergence.apply(lambda x: self.field(s, x, args), x, self.probes)
        return value, -divergence


class _StateNorm(eqx.Module):
    """A controller's norm on the state alone, without the log-density beside it."""

    norm: Callable[[PyTree], Scalar]

    def __call__(self, state: tuple[State, Scalar]) -> Scalar:
        return self.norm(state[0])


def _without_log_density(
    controller: diffrax.AbstractStepSizeController,
) -> diffrax.AbstractStepSizeController:
    """The controller with the log-density out of its norm, also inside a wrapping controller."""
    if hasattr(controller, "norm"):
        return eqx.tree_at(lambda c: c.norm, controller, _StateNorm(controller.norm))  # pyright: ignore
    if hasattr(controller, "controller"):
        return eqx.tree_at(lambda c: c.controller, controller, _without_log_density(controller.controller))  # pyright: ignore
    return controller


def _settle(flow, solver, grid, controller, t_start, t_end, data_mean, data_std, *, encode) -> Settings:
    if isinstance(solver, AbstractFlowSolver):
        raise ValueError(
            f"{type(solver).__name__} steps through a flow and cannot carry its log-density: use a Diffrax solver of "
            "ordinary equations such as diffrax.Tsit5()."
        )
    if solver is None:
        solver = diffrax.Dopri8()
        if grid is None and controller is None:
            controller = diffrax.PIDController(rtol=1e-5, atol=1e-5)
    return settle(
        flow,
        solver=solver,
        grid=grid,
        controller=None if controller is None else _without_log_density(controller),
        dynamics=ProbabilityFlow(),
        t_start=t_start,
        t_end=t_end,
        moments=(data_mean, data_std),
        encode=encode,
    )


@eqx.filter_jit
def _solve(
    flow: AbstractVelocityFlow,
    x_start: State,
    args: Args,
    settings: Settings,
    divergence: AbstractDivergence,
    key: PRNGKey | None,
    adjoint: diffrax.AbstractAdjoint | None,
    max_steps: int | None,
    *,
    encode: bool,
) -> tuple[tuple[State, Scalar], diffrax.RESULTS]:
    """The final state and ln p of the data's end, both NaN if the solve failed."""
    check_network(flow, x_start, args)
    settings = opaque(settings)
    field = _AugmentedField(vector_field(flow, settings.dynamics), divergence, divergence.probes(x_start, key))
    state = (x_start, jnp.zeros_like(settings.t_start))
    sol = integrate(diffrax.ODETerm(field), settings, state, args, adjoint=adjoint, max_steps=max_steps)
    x_end, change = jax.tree.map(lambda leaf: leaf[-1], sol.ys)
    x_noise, from_noise = (x_end, -change) if encode else (x_start, change)
    log_p = log_prior(flow, settings, x_noise) + from_noise
    return nan_on_failure(sol.result, (x_end, log_p)), sol.result
