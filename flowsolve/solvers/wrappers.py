r"""Noise added around the steps of another solver: churn, restarts, Langevin corrections.

Each wraps a solver and is one. With the ratio $\rho = \sigma/\alpha$, raising the noise of x from t to u > t is

$$x_u = \frac{\alpha_u}{\alpha_t} x_t + \alpha_u \sqrt{\rho_u^2 - \rho_t^2}\, z .$$

- `Churn` raises the noise by a factor before each step, which then starts from there;
- `Restart` raises it from t_min back to t_max after the step that reaches t_min, solves down again, and repeats;
- `LangevinCorrector` follows each step by steps of Langevin dynamics at the time reached.
"""

import abc
from typing import Any, ClassVar, TypeVar, cast

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check, check_count, check_type, known
from .._numerics import as_scalar, linear_combination, safe_sqrt
from .._types import Args, Scalar, ScalarLike, State
from ..dynamics import AbstractDynamics, AddedNoise, FlowField, ProbabilityFlow, unwrap
from ..grids import AbstractGrid, LogSNR
from ..paths import AbstractPath
from ..predictions import Noise
from .base import AbstractFlowSolver, AbstractGridAwareSolver, AbstractStochasticSolver
from .counts import evaluation_counts
from .interpolation import StepInterpolation
from .multistep import AbstractMultistep
from .nodes import mixture_of
from .tuned import TunedMultistep

__all__ = ["Churn", "LangevinCorrector", "Restart"]


class AbstractWrapper(AbstractStochasticSolver[Any]):
    """A solver around another one."""

    solver: eqx.AbstractVar[diffrax.AbstractSolver]
    interpolation_cls: ClassVar[type] = StepInterpolation

    @abc.abstractmethod
    def inner_terms(self, terms: diffrax.AbstractTerm, field: FlowField) -> diffrax.AbstractTerm:
        """The terms that the inner solver steps through."""

    def order(self, terms: diffrax.AbstractTerm) -> int | None:
        """The inner solver's."""
        return self.solver.order(terms)

    def init(self, terms: diffrax.AbstractTerm, t0: ScalarLike, t1: ScalarLike, y0: State, args: Args) -> Any:
        """The inner solver's state."""
        field, _, _ = unwrap(terms, type(self).__name__)
        self.check_dynamics(field.dynamics)
        return self.solver.init(self.inner_terms(terms, field), as_scalar(t0), as_scalar(t1), y0, args)


def raise_noise(path: AbstractPath, t: Scalar, u: Scalar, x: State, normal: State) -> State:
    """x at time t, carried to u >= t by fresh noise; x itself where u = t."""
    (alpha, sigma), (alpha_u, sigma_u) = path.coefficients(t), path.coefficients(u)
    scale = jnp.where(u == t, 1, alpha_u / jnp.where(alpha == 0, 1, alpha))
    added = safe_sqrt((sigma_u - scale * sigma) * (sigma_u + scale * sigma))
    return linear_combination((scale, jnp.where(u == t, 0, added)), (x, normal))


def inner_counts(solver: diffrax.AbstractSolver) -> tuple[int, int]:
    """Evaluations of a step and of the start of a wrapped solver."""
    counts = evaluation_counts(solver)
    assert counts is not None
    return counts


def _check_inner(solver: object, name: str) -> None:
    """Raise unless `solver` is a plain solver with a known number of evaluations."""
    if isinstance(solver, AbstractWrapper):
        raise ValueError(
            f"{name} got {type(solver).__name__}, which adds noise of its own, but wants a plain solver such as "
            "solvers.EDMHeun(): wrappers do not nest."
        )
    check_type(solver, diffrax.AbstractSolver, f"{name}'s solver", "an instance such as solvers.EDMHeun()")
    if evaluation_counts(cast(diffrax.AbstractSolver, solver)) is None:
        raise TypeError(
            f"{name} got solver = {type(solver).__name__}, but wants a solver whose evaluations are known, such as "
            "solvers.EDMHeun() or diffrax.Heun()."
        )


_Wrapper = TypeVar("_Wrapper", bound=AbstractWrapper)


def _with_inner_for(wrapper: _Wrapper, times: Float[Array, " points"]) -> _Wrapper:
    """The wrapper with the inner solver told the times of the solve, if it wants to know."""
    if not isinstance(wrapper.solver, AbstractGridAwareSolver):
        return wrapper
    return eqx.tree_at(lambda w: w.solver, wrapper, wrapper.solver.for_times(times))


def check_off_grid(solver: object, name: str) -> None:
    """Raise unless `solver` is as `_check_inner` wants it and can start from any time."""
    _check_inner(solver, name)
    if isinstance(solver, TunedMultistep):
        raise ValueError(
            f"{name} got TunedMultistep, which steps through its own grid alone, but starts from times beside the "
            "grid: wrap a solver for any grid such as EDMHeun()."
        )


def check_one_step(solver: object, name: str) -> None:
    """Raise unless `solver` is as `check_off_grid` wants it and keeps no history."""
    check_off_grid(solver, name)
    if isinstance(solver, AbstractMultistep) and solver.history > 0:
        raise ValueError(
            f"{name} got {type(solver).__name__}, whose history does not lie on the trajectory with the raised noise: "
            "use a one-step solver such as EDMHeun(), DPMSolverPPSinglestep() or DDIM()."
        )


class AbstractNoiseRaiser(AbstractWrapper):
    """A wrapper that raises the noise between steps of the probability flow."""

    @property
    def default_dynamics(self) -> AbstractDynamics:
        """The probability flow, with noise at hand."""
        return AddedNoise()

    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Raise for anything but the probability flow with added noise."""
        if not isinstance(dynamics, AddedNoise):
            raise ValueError(
                f"{type(self).__name__} adds its own noise to the probability flow, but was given "
                f"{type(dynamics).__name__}: leave dynamics out (in a plain diffeqsolve, use those of AddedNoise)."
            )
        if isinstance(self.solver, AbstractFlowSolver):
            self.solver.check_dynamics(ProbabilityFlow())

    def inner_terms(self, terms: diffrax.AbstractTerm, field: FlowField) -> diffrax.AbstractTerm:
        """The probability flow."""
        del terms
        return ProbabilityFlow().terms(field.flow)


class Churn(AbstractNoiseRaiser):
    """EDM's churn: before each step the noise sigma/alpha is raised by a factor 1 + gamma, on any path.

    **Arguments:** `solver`: a one-step solver of the probability flow, `EDMHeun()` for EDM's own sampler; `gamma`: the
    factor less one (EDM's S_churn divided by the number of steps; at most sqrt 2 - 1 there); `s_min`, `s_max`: the
    noise levels sigma/alpha between which it is raised; `s_noise`: the standard deviation of the noise that is added.

    The time is not raised past the path's `t_noise`. Evaluations are those of the inner solver. Dense output is linear.
    Source: Karras et al. (2022), arXiv 2206.00364.
    """

    solver: diffrax.AbstractSolver
    gamma: Scalar
    s_min: Scalar
    s_max: Scalar
    s_noise: Scalar

    def __init__(
        self,
        solver: diffrax.AbstractSolver,
        gamma: ScalarLike,
        *,
        s_min: ScalarLike = 0.0,
        s_max: ScalarLike = float("inf"),
        s_noise: ScalarLike = 1.0,
    ):
        check_one_step(solver, "Churn")
        factor, low, high, scale = (as_scalar(value) for value in (gamma, s_min, s_max, s_noise))
        self.solver = solver
        self.gamma = check(
            factor, ~(known(factor) >= 0), f"Churn got gamma = {gamma}, but wants a factor 1 + gamma with gamma >= 0."
        )
        self.s_min = low
        self.s_max = check(
            high,
            ~(known(low) < known(high)),
            f"Churn got s_min = {s_min} and s_max = {s_max}, but wants s_min < s_max.",
        )
        self.s_noise = check(scale, ~(known(scale) >= 0), f"Churn got s_noise = {s_noise}, but wants a deviation >= 0.")

    @property
    def evaluations_per_step(self) -> int:
        """Those of the inner solver, which begins anew at each step."""
        per_step, at_start = inner_counts(self.solver)
        return per_step + at_start

    @property
    def evaluations_at_start(self) -> int:
        """Those of the inner solver."""
        return inner_counts(self.solver)[1]

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ScalarLike,
        t1: ScalarLike,
        y0: State,
        args: Args,
        solver_state: Any,
        made_jump: Any,
    ) -> tuple[State, None, dict[str, Any], Any, diffrax.RESULTS]:
        """Raise the noise, then step."""
        del made_jump
        field, noise, _ = unwrap(terms, "Churn")
        assert noise is not None
        path = field.flow.path
        t = -as_scalar(t0)
        alpha, sigma = path.coefficients(t)
        inside = (sigma >= self.s_min * alpha) & (sigma <= self.s_max * jnp.where(alpha == 0, jnp.inf, alpha))
        # Not past the end of the path, beyond which some have no time.
        end_alpha, end_sigma = path.coefficients(as_scalar(path.t_noise))
        more = sigma * (1 + self.gamma)
        beyond = more * end_alpha >= end_sigma * alpha
        raised = path.time_at(jnp.where(beyond, end_alpha, alpha), jnp.where(beyond, end_sigma, more))
        u = jnp.where(inside & (self.gamma > 0), jnp.clip(raised, t, as_scalar(path.t_noise)), t)
        normal = linear_combination((self.s_noise,), (noise.normal(t0, t1),))
        x = raise_noise(path, t, u, y0, normal)
        # The inner solver's state knows nothing of the new x.
        y1, _, _, state, result = self.solver.step(
            self.inner_terms(terms, field), -u, as_scalar(t1), x, args, solver_state, True
        )
        return y1, None, {"y0": y0, "y1": y1, "formula": None}, state, result


class Restart(AbstractNoiseRaiser, AbstractGridAwareSolver[Any]):
    """Restart sampling around any solver of the probability flow.

    After the step that first reaches `t_min` the noise is raised to that of `t_max` and the flow solved down again to
    the time that the step reached, `repeats` times. On a coarse grid that time lies well below `t_min`.

    **Arguments:** `solver`: a solver of the probability flow; `interval`: (t_min, t_max), path times; `repeats`: how
    often; `grid`: the steps of one way down, `grids.LogSNR(4)` by default.

    Evaluations are those of the main steps and of repeats x grid.steps more. On fixed grids only. Dense output is
    linear. Source: Xu et al. (2023), arXiv 2306.14878.
    """

    solver: diffrax.AbstractSolver
    interval: tuple[Scalar, Scalar]
    repeats: int = eqx.field(static=True)
    grid: AbstractGrid

    def __init__(
        self,
        solver: diffrax.AbstractSolver,
        interval: tuple[ScalarLike, ScalarLike],
        *,
        repeats: int = 1,
        grid: AbstractGrid | None = None,
    ):
        check_off_grid(solver, "Restart")
        if not isinstance(interval, tuple | list) or len(interval) != 2:
            raise ValueError(f"Restart got interval = {interval!r}, but wants (t_min, t_max).")
        low, high = as_scalar(interval[0]), as_scalar(interval[1])
        high = check(
            high,
            ~(known(low) < known(high)),
            f"Restart got interval = {interval}, but wants (t_min, t_max), t_min < t_max.",
        )
        self.solver = solver
        self.interval = low, high
        self.repeats = check_count(repeats, "Restart got repeats")
        self.grid = LogSNR(4) if grid is None else grid
        check_type(self.grid, AbstractGrid, "Restart's grid", "an instance such as fs.grids.LogSNR(4)")

    @property
    def evaluations_per_step(self) -> int:
        """Those of the inner solver."""
        return inner_counts(self.solver)[0]

    @property
    def evaluations_at_start(self) -> int:
        """Those that do not depend on the main grid: of the start and of the restarts."""
        per_step, at_start = inner_counts(self.solver)
        return at_start + self.repeats * (at_start + self.grid.steps * per_step)

    def for_times(self, times: Float[Array, " points"]) -> "Restart":
        """This solver; raise, where the times are known, unless a solve along them passes through the interval."""
        low, high = self.interval
        t_start, t_end = times[0], times[-1]
        high = check(
            high,
            (t_end > low) | (high > t_start),
            "Restart got the interval from t = {} to {}, but the solve goes from t = {} to {}: take an interval "
            "inside.",
            low,
            high,
            t_start,
            t_end,
        )
        return _with_inner_for(eqx.tree_at(lambda w: w.interval, self, (low, high)), times)

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ScalarLike,
        t1: ScalarLike,
        y0: State,
        args: Args,
        solver_state: Any,
        made_jump: Any,
    ) -> tuple[State, None, dict[str, Any], Any, diffrax.RESULTS]:
        """The inner solver's step, and the restarts if it reaches t_min."""
        field, noise, _ = unwrap(terms, "Restart")
        assert noise is not None
        path = field.flow.path
        inner = self.inner_terms(terms, field)
        start, target = as_scalar(t0), as_scalar(t1)
        y1, _, _, state, result = self.solver.step(inner, start, target, y0, args, solver_state, made_jump)
        low, high = self.interval
        reached = (-start > low) & (-target <= low)

        def once(carried: Any, number: Any) -> tuple[Any, None]:
            x, state = carried
            ts = -self.grid(path, high, jnp.where(reached, -target, low))
            x = raise_noise(path, -target, high, x, noise.extra_normal(start, target, number))

            def down(carried: Any, index: Any) -> tuple[Any, None]:
                x, state = carried
                x, _, _, state, _ = self.solver.step(inner, ts[index], ts[index + 1], x, args, state, index == 0)
                return (x, state), None

            return jax.lax.scan(down, (x, state), jnp.arange(self.grid.steps))

        def restarts() -> Any:
            (x, new_state), _ = jax.lax.scan(once, (y1, state), jnp.arange(self.repeats))
            return jax.tree.map(lambda a, b: jnp.where(reached, a, b), (x, new_state), (y1, state))

        # All examples of a batch step together: one branch is run, also under vmap.
        y1, state = jax.lax.cond(eqxi.unvmap_any(reached), restarts, lambda: (y1, state))
        return y1, None, {"y0": y0, "y1": y1, "formula": None}, state, result


class LangevinCorrector(AbstractWrapper, AbstractGridAwareSolver[Any]):
    r"""A predictor-corrector sampler: each step of a solver is followed by Langevin dynamics at the time reached.

    $$x \leftarrow x + \delta \sigma^2\, \mathrm{score} + \sqrt{2 \delta}\, \sigma z
                  = x - \delta \sigma E[\epsilon|x] + \sqrt{2\delta}\, \sigma z$$

    **Arguments:** `solver`: any solver without a corrector of its own, of the probability flow or, as in the paper, of
    `ReverseSDE`; `steps`: how many Langevin steps; `step_size`: delta > 0, 0.05 by default.

    The paper's snr is delta = 2 snr^2 where $|E[\epsilon|x]| = |z|$, as on images: its 0.16 is 0.05 here. Deviation: it
    sets each step by the norms of the batch, which couples the examples. By an example's own norms the step would
    depend on the state, which is no longer Langevin dynamics, and far too wide in few dimensions.

    Where sigma = 0 there is nothing to correct. Evaluations are those of the inner solver, which begins anew after a
    correction if it keeps one, and `steps` more a step. Dense output is linear. Source: Song et al. (2020), arXiv
    2011.13456.
    """

    solver: diffrax.AbstractSolver
    steps: int = eqx.field(static=True)
    step_size: Scalar

    def __init__(self, solver: diffrax.AbstractSolver, *, steps: int = 1, step_size: ScalarLike = 0.05):
        _check_inner(solver, "LangevinCorrector")
        if isinstance(solver, AbstractMultistep) and solver.corrector is not None:
            raise ValueError(
                f"LangevinCorrector got a {type(solver).__name__} that corrects each step from where it left it, and "
                "would undo what Langevin's steps do: use it with corrector=False, or another solver."
            )
        self.solver = solver
        self.steps = check_count(steps, "LangevinCorrector got steps")
        length = as_scalar(step_size)
        self.step_size = check(
            length, ~(known(length) > 0), f"LangevinCorrector got step_size = {step_size}, but wants it positive."
        )

    @property
    def evaluations_per_step(self) -> int:
        """Those of the inner solver and one for each Langevin step."""
        per_step, at_start = inner_counts(self.solver)
        return per_step + at_start + self.steps

    @property
    def evaluations_at_start(self) -> int:
        """Those of the inner solver."""
        return inner_counts(self.solver)[1]

    @property
    def default_dynamics(self) -> AbstractDynamics:
        """The inner solver's if that is stochastic, else the probability flow with noise at hand."""
        inner = self.solver.default_dynamics if isinstance(self.solver, AbstractFlowSolver) else ProbabilityFlow()
        return inner if inner.stochastic else AddedNoise()

    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Raise for an equation that the inner solver does not solve, or without noise."""
        name = type(self.solver).__name__
        if not dynamics.stochastic:
            raise ValueError(
                "LangevinCorrector draws noise, but was given ProbabilityFlow: leave dynamics out, or use AddedNoise()."
            )
        if not isinstance(dynamics, AddedNoise) and not isinstance(self.solver, diffrax.AbstractItoSolver):
            raise ValueError(
                f"{name} inside LangevinCorrector does not solve {type(dynamics).__name__}: leave dynamics out, "
                "or wrap a solver for it such as DDIM()."
            )
        if isinstance(self.solver, AbstractFlowSolver):
            self.solver.check_dynamics(ProbabilityFlow() if isinstance(dynamics, AddedNoise) else dynamics)

    def for_times(self, times: Float[Array, " points"]) -> "LangevinCorrector":
        """This solver, the inner one told."""
        return _with_inner_for(self, times)

    def inner_terms(self, terms: diffrax.AbstractTerm, field: FlowField) -> diffrax.AbstractTerm:
        """The probability flow, or the stochastic equation that was given."""
        return ProbabilityFlow().terms(field.flow) if isinstance(field.dynamics, AddedNoise) else terms

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ScalarLike,
        t1: ScalarLike,
        y0: State,
        args: Args,
        solver_state: Any,
        made_jump: Any,
    ) -> tuple[State, None, dict[str, Any], Any, diffrax.RESULTS]:
        """The inner solver's step, then Langevin's."""
        del made_jump
        field, noise, _ = unwrap(terms, "LangevinCorrector")
        assert noise is not None
        path = field.flow.path
        start, target = as_scalar(t0), as_scalar(t1)
        # The state that the inner solver kept is of before the correction.
        fresh = inner_counts(self.solver)[1] > 0
        x, _, _, state, result = self.solver.step(
            self.inner_terms(terms, field), start, target, y0, args, solver_state, fresh
        )
        sigma = path.coefficients(-target)[1]
        clean = sigma == 0
        # On clean data, where the noise is not defined, a time at which it is; its step has length 0.
        t = jnp.where(clean, -start, -target)
        noise_at_t = mixture_of(Noise(), t)

        def langevin(x: State, number: Any) -> tuple[State, None]:
            eps = field.mixture(noise_at_t, t, x, args)
            z = noise.extra_normal(start, target, number)
            delta = self.step_size
            return linear_combination((1.0, -delta * sigma, jnp.sqrt(2 * delta) * sigma), (x, eps, z)), None

        x, _ = jax.lax.scan(langevin, x, jnp.arange(self.steps))
        return x, None, {"y0": y0, "y1": x, "formula": None}, state, result
