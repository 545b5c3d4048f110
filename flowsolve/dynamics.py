r"""The differential equations that carry noise to data, as Diffrax terms.

All terms run in the increasing clock s = -t, from s = -t_noise to s = -t_data (Diffrax's stochastic Runge-Kutta
solvers are only right in an increasing clock). With w(t) >= 0,

$$dx = \left[-v + \tfrac12 w \,\mathrm{score}\right] ds + \sqrt{w}\, dW_s$$

has the same marginals p_t for every w: w = 0 is the probability flow dx = v dt, and w = eta^2 g^2 is the reverse SDE
at noise level eta, with eta = 1 the reverse of the forward SDE. Since score = -E[eps|x_t]/sigma, the drift is one
mixture of E[x_0|x_t] and E[eps|x_t], from one network evaluation:

$$-v + \tfrac12 w\,\mathrm{score} = -\alpha' E[x_0|x_t] - \left(\sigma' + \frac{w}{2\sigma}\right) E[\epsilon|x_t] .$$

In your own `diffrax.diffeqsolve`:

    terms = fs.dynamics.ProbabilityFlow().terms(flow)
    sol = diffrax.diffeqsolve(terms, diffrax.Tsit5(), -path.t_noise, -path.t_data, None, x, args,
                              stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4))

Source: Song et al. (2020), arXiv 2011.13456; Karras et al. (2022), arXiv 2206.00364; Ma et al. (2024),
arXiv 2401.08740.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array, Float, Int

from ._checks import check
from ._numerics import as_scalar
from ._types import Args, Like, PRNGKey, Scalar, ScalarLike, State
from .flow import AbstractFlow
from .paths import AbstractPath
from .predictions import Triple, combine

__all__ = ["AbstractDynamics", "FlowField", "ProbabilityFlow", "ReverseSDE", "StepNoise", "TreeNoise", "unwrap"]


class AbstractDynamics(eqx.Module):
    """A differential equation in s = -t with the marginals of the flow's path."""

    #: Whether the equation draws noise.
    stochastic: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def noise_weight(self, path: AbstractPath, t: Scalar) -> Scalar:
        """w(t) / (2 sigma(t)), the extra weight of E[eps|x_t] in the drift."""

    @abc.abstractmethod
    def diffusion(self, path: AbstractPath, t: Scalar) -> Scalar:
        """sqrt(w(t)), the scale of dW."""

    @abc.abstractmethod
    def terms(self, flow: AbstractFlow, brownian: diffrax.AbstractBrownianPath | None = None) -> diffrax.AbstractTerm:
        """The Diffrax terms in the clock s = -t.

        **Arguments:** `flow`: any flow; `brownian`: the Brownian path of a stochastic equation, over
        [-t_noise, -t_data], shaped like one example: `diffrax.VirtualBrownianTree`, or `StepNoise` on a fixed grid.
        """

    def drift_mixture(self, path: AbstractPath, t: Scalar) -> Triple:
        """The drift in s as a mixture (a, b, 1) of E[x_0|x_t] and E[eps|x_t]."""
        d_alpha, d_sigma = path.derivatives(t)
        return -d_alpha, -(d_sigma + self.noise_weight(path, t)), jnp.ones_like(t)


class ProbabilityFlow(AbstractDynamics):
    """The deterministic flow dx = v dt. Source: Song et al. (2020), arXiv 2011.13456."""

    stochastic: ClassVar[bool] = False

    def noise_weight(self, path: AbstractPath, t: Scalar) -> Scalar:
        del path
        return jnp.zeros_like(t)

    def diffusion(self, path: AbstractPath, t: Scalar) -> Scalar:
        del path
        return jnp.zeros_like(t)

    def terms(self, flow: AbstractFlow, brownian: diffrax.AbstractBrownianPath | None = None) -> diffrax.AbstractTerm:
        if brownian is not None:
            raise ValueError(
                "ProbabilityFlow got a Brownian path, but draws no noise: leave it out, or use ReverseSDE(eta)."
            )
        return diffrax.ODETerm(FlowField(flow, self))


class ReverseSDE(AbstractDynamics):
    """The reverse SDE with w = eta^2 g^2, or with any diffusion w(t) >= 0.

    Every eta >= 0 has the same marginals: 0 is the probability flow, 1 the time reversal of the forward SDE. Where
    alpha = 0 (t = 1 on `Linear`) g^2 is infinite: start below, or give a `diffusion` that is finite there.

    **Arguments:** `eta`: noise level >= 0, 1 by default; `diffusion`: None, or a callable t -> w(t) >= 0 in
    place of eta^2 g^2, for instance `lambda t: 2 * t`.

    Source: Song et al. (2020), arXiv 2011.13456; Ma et al. (2024), arXiv 2401.08740, whose w is this w.
    """

    #: The noise level; None where `diffusion` takes its place.
    eta: Scalar | None
    weight: Callable[[Scalar], Scalar] | None
    stochastic: ClassVar[bool] = True

    def __init__(self, eta: ScalarLike | None = None, *, diffusion: Callable[[Scalar], Scalar] | None = None):
        if callable(eta):
            raise TypeError("ReverseSDE got a callable for eta: pass w(t) by name, ReverseSDE(diffusion=...).")
        if eta is not None and diffusion is not None:
            raise ValueError(
                "ReverseSDE got both eta and diffusion: give one, diffusion is w(t) in place of eta^2 g^2."
            )
        self.weight = diffusion
        if diffusion is None:
            level = as_scalar(1.0 if eta is None else eta)
            self.eta = check(level, level < 0, f"ReverseSDE got eta = {eta}, but wants a noise level eta >= 0.")
        else:
            self.eta = None

    def noise_weight(self, path: AbstractPath, t: Scalar) -> Scalar:
        if self.eta is not None:
            return self.eta**2 * path.g_squared_over_2_sigma(t)
        w, d_w = jax.jvp(self._w, (t,), (jnp.ones_like(t),))
        sigma = path.coefficients(t)[1]
        # Where w and sigma vanish together the quotient has the limit of the derivatives.
        at_zero = jnp.where(w > 0, jnp.inf, d_w / (2 * path.derivatives(t)[1]))
        return jnp.where(sigma == 0, at_zero, w / (2 * jnp.where(sigma == 0, 1, sigma)))

    def diffusion(self, path: AbstractPath, t: Scalar) -> Scalar:
        if self.eta is not None:
            return self.eta * jnp.sqrt(path.g_squared(t))
        return jnp.sqrt(self._w(t))

    def terms(self, flow: AbstractFlow, brownian: diffrax.AbstractBrownianPath | None = None) -> diffrax.AbstractTerm:
        if brownian is None:
            raise ValueError(
                "ReverseSDE.terms got no Brownian path, but draws noise: pass e.g. diffrax.VirtualBrownianTree("
                "-path.t_noise, -path.t_data, tol=1e-3, shape=like, key=key)."
            )
        drift = diffrax.ODETerm(FlowField(flow, self))
        return diffrax.MultiTerm(drift, diffrax.ControlTerm(_Diffusion(flow.path, self), brownian))

    def _w(self, t: Scalar) -> Scalar:
        assert self.weight is not None
        return as_scalar(self.weight(t))


class FlowField(eqx.Module):
    """The drift (s, x, args) -> dx/ds of a flow under some dynamics: the vector field of its `diffrax.ODETerm`."""

    flow: AbstractFlow
    dynamics: AbstractDynamics

    def __call__(self, s: ScalarLike, x: State, args: Args) -> State:
        """The drift at one example x, at time t = -s."""
        t = -as_scalar(s)
        return self.mixture(self.dynamics.drift_mixture(self.flow.path, t), t, x, args)

    def mixture(self, target: Triple, t: Scalar, x: State, args: Args) -> State:
        """(a E[x_0|x_t] + b E[eps|x_t])/c for target = (a, b, c), from one network evaluation."""
        return combine(self.flow.mixture_weights(t, target), x, network_output(self.flow, t, x, args))


@eqx.filter_jit
def network_output(flow: AbstractFlow, t: Scalar, x: State, args: Args) -> State:
    """`flow.output` behind its own jit: Diffrax traces a vector field three times, this keeps the network at one."""
    return flow.output(t, x, args)


class _Diffusion(eqx.Module):
    """The diffusion (s, x, args) -> sqrt(w) I, as a diagonal operator on one example."""

    path: AbstractPath
    dynamics: AbstractDynamics

    def __call__(self, s: ScalarLike, x: State, args: Args) -> lineax.DiagonalLinearOperator:
        del args
        scale = self.dynamics.diffusion(self.path, -as_scalar(s))
        return lineax.DiagonalLinearOperator(jax.tree.map(lambda leaf: jnp.full_like(leaf, scale), x))


class StepNoise(diffrax.AbstractBrownianPath):
    """Independent Brownian increments for the steps of a fixed grid.

    The increment over a step is drawn from the key and the number of the step, so it is the same whatever the batch
    and whatever rounding did to the times, and a backward pass sees the noise of the forward pass: as cheap as
    `diffrax.UnsafeBrownianPath`, but open to every adjoint. Not for adaptive steps: increments over overlapping
    intervals are independent of each other.

    **Arguments:** `shape`: one example (arrays or their `jax.ShapeDtypeStruct`); `key`: a typed key; `ts`: the grid in
    the increasing clock; `levy_area`: what the solver needs beside the increment W, as in Diffrax:
    H ~ N(0, h/12), K ~ N(0, h/720).
    """

    shape: Like
    key: PRNGKey
    ts: Float[Array, " n"]
    levy_area: type = eqx.field(static=True)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, shape: Like, key: PRNGKey, ts: Float[Array, " n"], levy_area: type = diffrax.BrownianIncrement):
        self.shape = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shape)
        self.key = key
        self.ts = ts
        self.levy_area = levy_area

    @property
    def t0(self) -> Scalar:
        """The start of the grid."""
        return self.ts[0]

    @property
    def t1(self) -> Scalar:
        """The end of the grid."""
        return self.ts[-1]

    def evaluate(self, t0: ScalarLike, t1: ScalarLike | None = None, left: bool = True, use_levy: bool = False) -> Any:
        """The increment over [t0, t1], with its Levy area if `use_levy`."""
        del left
        if t1 is None:
            raise ValueError("StepNoise gives increments over steps: pass both ends, evaluate(t0, t1).")
        length = as_scalar(t1) - as_scalar(t0)
        key = self._step_key(as_scalar(t0), as_scalar(t1))
        leaves, structure = jax.tree.flatten(self.shape)
        keys = jax.random.split(key, (len(leaves), 3))

        def draw(column: int, variance: float) -> State:
            noise = [
                (jnp.sqrt(length * variance)).astype(leaf.dtype)
                * jax.random.normal(keys[row, column], leaf.shape, leaf.dtype)
                for row, leaf in enumerate(leaves)
            ]
            return jax.tree.unflatten(structure, noise)

        increment = draw(0, 1.0)
        if not use_levy:
            return increment
        dt = jax.tree.map(lambda leaf: length.astype(leaf.dtype), self.shape)
        if self.levy_area is diffrax.BrownianIncrement:
            return diffrax.BrownianIncrement(dt=dt, W=increment)
        if self.levy_area is diffrax.SpaceTimeLevyArea:
            return diffrax.SpaceTimeLevyArea(dt=dt, W=increment, H=draw(1, 1 / 12))
        return diffrax.SpaceTimeTimeLevyArea(dt=dt, W=increment, H=draw(1, 1 / 12), K=draw(2, 1 / 720))

    def _step_key(self, t0: Scalar, t1: Scalar) -> PRNGKey:
        """A key for [t0, t1], from the number of its grid cell and, to 1/64, its place inside the cell."""
        ts = jax.lax.stop_gradient(self.ts)
        t0, t1 = jax.lax.stop_gradient((t0, t1))
        middle = 0.5 * (t0 + t1)
        cell = jnp.clip(jnp.sum(ts <= middle) - 1, 0, ts.shape[0] - 2)
        start, end = ts[cell], ts[cell + 1]

        def place(t: Scalar) -> Int[Array, ""]:
            return jnp.round(64 * (t - start) / (end - start)).astype(int)

        key = jax.random.fold_in(self.key, cell)
        return jax.random.fold_in(key, 128 * place(t0) + place(t1))


class TreeNoise(diffrax.AbstractBrownianPath):
    """A `diffrax.VirtualBrownianTree` for any pytree, dictionaries included: one Brownian path for adaptive steps.

    **Arguments:** `t0`, `t1`: the interval in the increasing clock; `tolerance`: the spacing below which the path is
    interpolated; `shape`: one example; `key`: a typed key; `levy_area`: what the solver needs beside the increment.
    """

    tree: diffrax.VirtualBrownianTree
    structure: Any = eqx.field(static=True)
    levy_area: type = eqx.field(static=True)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        t0: ScalarLike,
        t1: ScalarLike,
        tolerance: ScalarLike,
        shape: Like,
        key: PRNGKey,
        levy_area: type = diffrax.BrownianIncrement,
    ):
        leaves, self.structure = jax.tree.flatten(shape)
        leaves = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        start, end, spacing = as_scalar(t0), as_scalar(t1), as_scalar(tolerance)
        self.tree = diffrax.VirtualBrownianTree(start, end, spacing, leaves, key, levy_area=levy_area)
        self.levy_area = levy_area

    @property
    def t0(self) -> Any:
        """The start of the interval."""
        return self.tree.t0

    @property
    def t1(self) -> Any:
        """The end of the interval."""
        return self.tree.t1

    def evaluate(self, t0: ScalarLike, t1: ScalarLike | None = None, left: bool = True, use_levy: bool = False) -> Any:
        """The increment over [t0, t1], with its Levy area if `use_levy`."""
        increment: Any = self.tree.evaluate(as_scalar(t0), None if t1 is None else as_scalar(t1), left, use_levy)
        if not use_levy:
            return jax.tree.unflatten(self.structure, increment)
        parts = {
            field.name: jax.tree.unflatten(self.structure, getattr(increment, field.name))
            for field in dataclasses.fields(increment)
        }
        return type(increment)(**parts)


def unwrap(term: diffrax.AbstractTerm, solver_name: str) -> tuple[FlowField, diffrax.AbstractTerm | None, Scalar]:
    """What a solver of this field needs of the terms it is given inside `diffrax.diffeqsolve`.

    Diffrax wraps every term and, where t0 > t1, negates its time; the wrapper is private to it. This is the one
    place that looks inside.

    **Returns:** the `FlowField`; the wrapped noise term or None; the direction: time t = -direction * s for the s that
    the solver is given.

    **Raises:** `TypeError` if the terms are not this library's.
    """
    noise = None
    if isinstance(term, diffrax.MultiTerm):
        term, noise = term.terms
    direction = getattr(term, "direction", 1)
    inner = getattr(term, "term", term)
    field = getattr(inner, "vector_field", None)
    if not isinstance(field, FlowField):
        raise TypeError(
            f"{solver_name} got the terms of another equation, but steps through a flow's own: give it "
            "dynamics.ProbabilityFlow().terms(flow) or dynamics.ReverseSDE(eta).terms(flow, brownian)."
        )
    return field, noise, as_scalar(direction)
