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

Exponential solvers ask for the noise level $\eta^2 = w/g^2$ and for the share of the noise that a step keeps: over a
step from t to s < t, with x_0 frozen, $x_s = \alpha_s x_0 + \sigma_s (k \epsilon_t + \sqrt{1 - k^2} z)$ with

$$k = \exp\left(-\int_s^t \frac{w}{2\sigma^2}\, dt\right) = \exp\left(-\int \eta^2\, d\lambda\right),
\qquad \lambda = \ln(\alpha/\sigma) .$$

Source: Song et al. (2020), arXiv 2011.13456; Karras et al. (2022), arXiv 2206.00364; Ma et al. (2024),
arXiv 2401.08740; Xue et al. (2023), arXiv 2309.05019; Cui et al. (2023), arXiv 2309.06169.
"""

import abc
import math
from collections.abc import Callable
from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import PyTree

from ._checks import check, known
from ._numerics import as_scalar, integral, is_zero, linear_combination, safe_power
from ._types import Args, Scalar, ScalarLike, State
from .brownian import NoiseSource
from .flow import AbstractFlow, AbstractVelocityFlow, check_has_score
from .paths import AbstractPath
from .predictions import Triple, Velocity, combine

__all__ = [
    "AbstractDynamics",
    "AddedNoise",
    "ExtendedReverseSDE",
    "FlowField",
    "ProbabilityFlow",
    "ReverseSDE",
    "unwrap",
]


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
    def level_squared(self, path: AbstractPath, t: Scalar) -> Scalar:
        """The squared noise level eta^2 = w(t)/g(t)^2."""

    @abc.abstractmethod
    def kept(self, path: AbstractPath, t_from: Scalar, t_to: Scalar) -> Scalar:
        """The share k of the noise at `t_from` that is left at `t_to` < `t_from`, see the top of this module."""

    @abc.abstractmethod
    def terms(
        self, flow: AbstractVelocityFlow, brownian: diffrax.AbstractBrownianPath | None = None
    ) -> diffrax.AbstractTerm:
        """The Diffrax terms in the clock s = -t.

        **Arguments:** `flow`: any flow, but for a stochastic equation one that has a score; `brownian`: the Brownian
        path of a stochastic equation, over [-t_noise, -t_data], shaped like one example:
        `diffrax.VirtualBrownianTree`, or `StepNoise` on a fixed grid.
        """

    def drift_mixture(self, path: AbstractPath, t: Scalar) -> Triple:
        """The drift in s as a mixture (a, b, 1) of E[x_0|x_t] and E[eps|x_t]."""
        d_alpha, d_sigma = path.derivatives(t)
        return -d_alpha, -(d_sigma + self.noise_weight(path, t)), jnp.ones_like(t)


class _AbstractNoiseless(AbstractDynamics):
    """The equation dx = v dt."""

    def noise_weight(self, path: AbstractPath, t: Scalar) -> Scalar:
        del path
        return jnp.zeros_like(t)

    def diffusion(self, path: AbstractPath, t: Scalar) -> Scalar:
        del path
        return jnp.zeros_like(t)

    def level_squared(self, path: AbstractPath, t: Scalar) -> Scalar:
        del path
        return jnp.zeros_like(t)

    def kept(self, path: AbstractPath, t_from: Scalar, t_to: Scalar) -> Scalar:
        del path, t_from
        return jnp.ones_like(t_to)


class ProbabilityFlow(_AbstractNoiseless):
    """The deterministic flow dx = v dt. Source: Song et al. (2020), arXiv 2011.13456."""

    stochastic: ClassVar[bool] = False

    def terms(
        self, flow: AbstractVelocityFlow, brownian: diffrax.AbstractBrownianPath | None = None
    ) -> diffrax.AbstractTerm:
        if brownian is not None:
            raise ValueError(
                "ProbabilityFlow got a Brownian path, but draws no noise: leave it out, or use ReverseSDE(eta)."
            )
        return diffrax.ODETerm(vector_field(flow, self))


class AddedNoise(_AbstractNoiseless):
    """The probability flow, with noise at hand for solvers that add their own: `Churn`, `Restart`.

    The equation itself is dx = v dt; only what the solver adds is random.
    """

    stochastic: ClassVar[bool] = True

    def terms(
        self, flow: AbstractVelocityFlow, brownian: diffrax.AbstractBrownianPath | None = None
    ) -> diffrax.AbstractTerm:
        return _stochastic_terms(self, flow, brownian)


class ReverseSDE(AbstractDynamics):
    """The reverse SDE with w = eta^2 g^2, or with any diffusion w(t) >= 0.

    Every eta >= 0 has the same marginals: 0 is the probability flow (and needs no key), 1 the time reversal of the
    forward SDE. Where alpha = 0 (t = 1 on `Linear`) g^2 is infinite: solvers that step through the flow's own structure
    start there all the same; for others start below, or give a `diffusion` that is finite there.

    **Arguments:** `eta`: noise level >= 0, 1 by default; `diffusion`: None, or a callable t -> w(t) >= 0 in
    place of eta^2 g^2, for instance `lambda t: 2 * t`; `interval`: None, or the two path times between which there is
    noise, with the probability flow outside.

    The derivative of a solve in eta at eta = 0 comes out as 0, from any solver: begin above it to learn eta.

    Source: Song et al. (2020), arXiv 2011.13456; Ma et al. (2024), arXiv 2401.08740, whose w is this w; Xue et
    al. (2023), arXiv 2309.05019, whose tau is eta, on an interval.
    """

    #: The noise level; None where `diffusion` takes its place.
    eta: Scalar | None
    weight: Callable[[Scalar], Scalar] | None
    interval: tuple[Scalar, Scalar] | None
    #: Whether eta was given as the number 0: then the equation is the probability flow.
    noiseless: bool = eqx.field(static=True)
    stochastic: ClassVar[bool] = True

    def __init__(
        self,
        eta: ScalarLike | None = None,
        *,
        diffusion: Callable[[Scalar], Scalar] | None = None,
        interval: tuple[ScalarLike, ScalarLike] | None = None,
    ):
        if callable(eta):
            raise TypeError("ReverseSDE got a callable for eta: pass w(t) by name, ReverseSDE(diffusion=...).")
        if diffusion is not None and not callable(diffusion):
            raise TypeError(
                f"ReverseSDE got diffusion = {diffusion!r}, but wants a callable t -> w(t) such as lambda t: 2 * t."
            )
        if eta is not None and diffusion is not None:
            raise ValueError(
                "ReverseSDE got both eta and diffusion: give one, diffusion is w(t) in place of eta^2 g^2."
            )
        self.weight = diffusion
        self.noiseless = eta is not None and is_zero(eta)
        if diffusion is None:
            level = as_scalar(1.0 if eta is None else eta)
            self.eta = check(
                level, ~(known(level) >= 0), f"ReverseSDE got eta = {eta}, but wants a noise level eta >= 0."
            )
        else:
            self.eta = None
        self.interval = None
        if interval is not None:
            if not isinstance(interval, tuple | list) or len(interval) != 2:
                raise ValueError(f"ReverseSDE got interval = {interval!r}, but wants two path times.")
            first, second = as_scalar(interval[0]), as_scalar(interval[1])
            low, high = jnp.minimum(first, second), jnp.maximum(first, second)
            high = check(
                high, ~(low < high), f"ReverseSDE got interval = {interval}, but wants two different path times."
            )
            self.interval = low, high

    def noise_weight(self, path: AbstractPath, t: Scalar) -> Scalar:
        if self.eta is not None:
            return self._where_noisy(t, self.eta**2 * path.g_squared_over_2_sigma(t))
        w, d_w = jax.jvp(self._w, (t,), (jnp.ones_like(t),))
        sigma = path.coefficients(t)[1]
        # Where w and sigma vanish together the quotient has the limit of the derivatives.
        at_zero = jnp.where(w > 0, jnp.inf, d_w / (2 * path.derivatives(t)[1]))
        return self._where_noisy(t, jnp.where(sigma == 0, at_zero, w / (2 * jnp.where(sigma == 0, 1, sigma))))

    def diffusion(self, path: AbstractPath, t: Scalar) -> Scalar:
        if self.eta is not None:
            return self._where_noisy(t, self.eta * jnp.sqrt(path.g_squared(t)))
        return self._where_noisy(t, jnp.sqrt(self._w(t)))

    def level_squared(self, path: AbstractPath, t: Scalar) -> Scalar:
        if self.eta is not None:
            return self._where_noisy(t, self.eta**2)
        return self._where_noisy(t, self._w(t) / path.g_squared(t))

    def kept(self, path: AbstractPath, t_from: Scalar, t_to: Scalar) -> Scalar:
        if self.interval is not None:
            low, high = self.interval
            noisy_from, noisy_to = jnp.clip(t_from, low, high), jnp.clip(t_to, low, high)
            outside = noisy_from <= noisy_to
            t_from, t_to = jnp.where(outside, t_from, noisy_from), jnp.where(outside, t_to, noisy_to)
        else:
            outside = jnp.zeros_like(t_to, bool)
        if self.eta is not None:
            share = safe_power(path.noise_split(t_to, t_from)[0], self.eta**2)
        else:
            # Times below sigma = 0 are not reached: the nodes lie inside the step.
            exponent = integral(lambda t: self._w(t) / (2 * path.coefficients(t)[1] ** 2), t_to, t_from)
            share = jnp.exp(-exponent)
        return jnp.where(outside, 1, share)

    def terms(
        self, flow: AbstractVelocityFlow, brownian: diffrax.AbstractBrownianPath | None = None
    ) -> diffrax.AbstractTerm:
        return _stochastic_terms(self, flow, brownian)

    def _w(self, t: Scalar) -> Scalar:
        assert self.weight is not None
        return as_scalar(self.weight(t))

    def _where_noisy(self, t: Scalar, value: Scalar) -> Scalar:
        if self.interval is None:
            return value
        low, high = self.interval
        return jnp.where((t >= low) & (t <= high), value, 0)


def _paper_log_scaler(ratio: Scalar) -> Scalar:
    return jnp.logaddexp(ratio**0.3, math.log(10.0))


class ExtendedReverseSDE(AbstractDynamics):
    r"""The reverse SDE whose noise level is set by a function of sigma/alpha, as ER-SDE has it.

    A step keeps $k = \psi(\sigma_s/\alpha_s)/\psi(\sigma_t/\alpha_t)$ of the noise; so
    $w = \eta^2 g^2$ with $\eta^2 = d\ln\psi/d\ln(\sigma/\alpha)$. A constant psi is the probability flow, $\psi(r) = r$
    the reverse SDE with eta = 1.

    **Arguments:** `log_scaler`: ln psi as a function of sigma/alpha, not decreasing (the logarithm, as psi itself
    overflows); by default that of $\exp(r^{0.3}) + 10$.

    Source: Cui et al. (2023), arXiv 2309.06169, whose noise scale function phi(r) is r psi(r); the default is the one
    its experiments recommend.
    """

    log_scaler: Callable[[Scalar], Scalar] = eqx.field(default_factory=lambda: _paper_log_scaler)
    stochastic: ClassVar[bool] = True

    def noise_weight(self, path: AbstractPath, t: Scalar) -> Scalar:
        return self.level_squared(path, t) * path.g_squared_over_2_sigma(t)

    def diffusion(self, path: AbstractPath, t: Scalar) -> Scalar:
        return jnp.sqrt(self.level_squared(path, t) * path.g_squared(t))

    def level_squared(self, path: AbstractPath, t: Scalar) -> Scalar:
        ratio = _ratio(path, t)
        return ratio * jax.jvp(self.log_scaler, (ratio,), (jnp.ones_like(ratio),))[1]

    def kept(self, path: AbstractPath, t_from: Scalar, t_to: Scalar) -> Scalar:
        return jnp.exp(self.log_scaler(_ratio(path, t_to)) - self.log_scaler(_ratio(path, t_from)))

    def terms(
        self, flow: AbstractVelocityFlow, brownian: diffrax.AbstractBrownianPath | None = None
    ) -> diffrax.AbstractTerm:
        return _stochastic_terms(self, flow, brownian)


def _ratio(path: AbstractPath, t: Scalar) -> Scalar:
    """sigma/alpha; 1e30 stands for the infinity at alpha = 0, where any psi has its limit."""
    alpha, sigma = path.coefficients(t)
    return jnp.where(alpha == 0, 1e30, sigma / jnp.where(alpha == 0, 1, alpha))


def _stochastic_terms(
    dynamics: AbstractDynamics, flow: AbstractVelocityFlow, brownian: diffrax.AbstractBrownianPath | None
) -> diffrax.AbstractTerm:
    """Drift and diffusion of a stochastic equation."""
    check_noise(dynamics, flow)
    if brownian is None:
        raise ValueError(
            f"{type(dynamics).__name__}.terms got no Brownian path, but draws noise: pass e.g. "
            "diffrax.VirtualBrownianTree(-path.t_noise, -path.t_data, tol=1e-3, shape=like, key=key)."
        )
    drift = diffrax.ODETerm(vector_field(flow, dynamics))
    return diffrax.MultiTerm(drift, diffrax.ControlTerm(_Diffusion(flow.path, dynamics), brownian))


def check_noise(dynamics: AbstractDynamics, flow: AbstractVelocityFlow) -> None:
    """Raise unless the flow offers what the noise of a stochastic equation wants."""
    own_diffusion = isinstance(dynamics, ReverseSDE) and dynamics.weight is not None
    if not isinstance(flow, AbstractFlow) and not own_diffusion:
        raise TypeError(
            f"{type(dynamics).__name__} takes its noise from a Gaussian path, but a {type(flow).__name__} has none: "
            "give w(t) by name, e.g. ReverseSDE(diffusion=lambda t: sigma**2)."
        )
    check_has_score(flow, f"{type(dynamics).__name__}, which wants a score,")


def vector_field(flow: AbstractVelocityFlow, dynamics: AbstractDynamics) -> "FlowField | _BridgeField":
    """The drift (s, x, args) -> dx/ds of a flow under some dynamics."""
    return FlowField(flow, dynamics) if isinstance(flow, AbstractFlow) else _BridgeField(flow, dynamics)


class FlowField(eqx.Module):
    """The drift (s, x, args) -> dx/ds of a flow under some dynamics: the vector field of its `diffrax.ODETerm`."""

    flow: AbstractFlow
    dynamics: AbstractDynamics

    def __call__(self, s: ScalarLike, x: State, args: Args) -> State:
        """The drift at one example x, at time t = -s."""
        t = -as_scalar(s)
        if isinstance(self.dynamics, _AbstractNoiseless) and self.flow.prediction == Velocity():
            # The network's own output, without a conversion that reads x once more.
            return linear_combination((-1.0,), (network_output(self.flow, t, x, args),))
        return self.mixture(self.dynamics.drift_mixture(self.flow.path, t), t, x, args)

    def mixture(self, target: Triple, t: Scalar, x: State, args: Args) -> State:
        """(a E[x_0|x_t] + b E[eps|x_t])/c for target = (a, b, c), from one network evaluation."""
        return combine(self.flow.mixture_weights(t, target), x, network_output(self.flow, t, x, args))


class _BridgeField(eqx.Module):
    """The drift of a flow whose velocity and score are networks of their own, see `bridges`."""

    flow: AbstractVelocityFlow
    dynamics: AbstractDynamics

    def __call__(self, s: ScalarLike, x: State, args: Args) -> State:
        t = -as_scalar(s)
        velocity, score = network_output(self.flow, t, x, args)
        if not self.dynamics.stochastic:
            return linear_combination((-1.0,), (velocity,))
        return linear_combination((-1.0, 0.5 * self.dynamics.diffusion(self.flow.path, t) ** 2), (velocity, score))


@eqx.filter_jit
def network_output(flow: AbstractVelocityFlow, t: Scalar, x: State, args: Args) -> PyTree:
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


def unwrap(term: diffrax.AbstractTerm, solver_name: str) -> tuple[FlowField, NoiseSource | None, Scalar]:
    """What a solver of this field needs of the terms it is given inside `diffrax.diffeqsolve`.

    Diffrax wraps every term and, where t0 > t1, negates its time; the wrapper is private to it. This and
    `brownian.NoiseSource` are the places that look inside.

    **Returns:** the `FlowField`; the source of noise or None; the direction: time t = -direction * s for the s that
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
    return field, None if noise is None else NoiseSource(noise), as_scalar(direction)
