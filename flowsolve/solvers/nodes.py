r"""One step of an exponential scheme, and the weights of polynomial extrapolation over it.

With $\lambda = \ln(\alpha/\sigma)$ the probability flow is an integral in three equivalent ways, one for each quantity
P that a scheme may hold constant, or extrapolate by a polynomial, over a step from t to s:

| P | scaled state $\tilde x$ | variable y | $d\tilde x = P\,dy$ |
|---|---|---|---|
| data $D = E[x_0 \mid x]$ | $x/\sigma$ | $\alpha/\sigma$ | DPM-Solver++, UniPC |
| noise $E = E[\epsilon \mid x]$ | $x/\alpha$ | $\sigma/\alpha$ | DEIS, LMS |
| velocity $E - D$ | $x/(\alpha + \sigma)$ | $\sigma/(\alpha + \sigma)$ | on `Linear`: Adams-Bashforth on dx/dt |

A constant P gives $x_s = \alpha_s D + \sigma_s E$ in all three, finite from alpha = 0 and onto sigma = 0. Extrapolating
through the evaluations $P_j$ at nodes $\tau_j$ adds $\sum_j w_j (P_j - P_0)$ with

$$w_j = c_s \int L_j(\tau)\, dy, \qquad L_j(\tau) = \prod_{i \ne j} \frac{\tau - \tau_i}{\tau_j - \tau_i},
\qquad c_s \in \{\sigma_s, \alpha_s, \alpha_s + \sigma_s\} .$$

With noise, which the data form alone allows, y is $(\alpha/\sigma)\, k$, k the share of the noise kept to the end of
the step (see `dynamics`).
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._checks import check_type
from .._numerics import integral, phis
from .._types import Scalar, ScalarLike
from ..dynamics import AbstractDynamics
from ..paths import AbstractPath
from ..predictions import AbstractPrediction, Data, Noise, Triple, Velocity

__all__ = ["AbstractVariable", "LogSNR", "NoiseRatio", "Time", "VPTime"]


class Levels(eqx.Module):
    """Times of a path, and what it has there."""

    t: Float[Array, "*times"]
    alpha: Float[Array, "*times"]
    sigma: Float[Array, "*times"]
    #: lambda, 0 with a zero derivative where it is infinite; and whether it is finite.
    half_log_snr: Float[Array, "*times"]
    finite: Bool[Array, "*times"]

    def __getitem__(self, index: Any) -> "Levels":
        return jax.tree.map(lambda leaf: leaf[index], self)


def level(path: AbstractPath, t: Scalar) -> Levels:
    """What the path has at one time."""
    alpha, sigma = path.coefficients(t)
    finite = (alpha > 0) & (sigma > 0)
    half_log_snr = jnp.where(finite, jnp.log(jnp.where(finite, alpha, 1) / jnp.where(finite, sigma, 1)), 0)
    return Levels(t, alpha, sigma, half_log_snr, finite)


def levels(path: AbstractPath, ts: Float[Array, " times"]) -> Levels:
    """What the path has at each of several times."""
    return jax.vmap(lambda t: level(path, t))(ts)


def step_to(
    path: AbstractPath,
    dynamics: AbstractDynamics,
    target: Scalar,
    ts: Float[Array, " nodes"],
    valid: Bool[Array, " nodes"],
) -> "Step":
    """The step to `target` from the first of `ts`."""
    return Step(path, dynamics, level(path, target), levels(path, ts), valid)


class Step(eqx.Module):
    """A step to `end` from node 0; the other nodes are further evaluations, used where `valid`."""

    path: AbstractPath
    dynamics: AbstractDynamics
    end: Levels
    nodes: Levels
    valid: Bool[Array, " nodes"]

    @property
    def begin(self) -> Levels:
        """What the path has where the step starts."""
        return self.nodes[0]

    @property
    def target(self) -> Scalar:
        """The time that the step reaches."""
        return self.end.t

    @property
    def ts(self) -> Float[Array, " nodes"]:
        """The times of the nodes."""
        return self.nodes.t

    @property
    def start(self) -> Scalar:
        """The time that the step leaves."""
        return self.nodes.t[0]

    def latest(self, count: int | Int[Array, ""]) -> "Step":
        """The same step with the first `count` nodes alone."""
        return eqx.tree_at(lambda s: s.valid, self, self.valid & (jnp.arange(len(self.ts)) < count))

    def kept(self) -> Scalar:
        """The share of the noise that the step keeps: 1 on the probability flow."""
        return self.dynamics.kept(self.path, self.start, self.target)

    def ratio(self) -> Scalar:
        """k sigma_s/sigma_t, the factor of the state in the data form; 0 from sigma = 0, where it is not used."""
        sigma = self.nodes.sigma[0]
        return jnp.where(sigma == 0, 0, self.kept() * self.end.sigma / jnp.where(sigma == 0, 1, sigma))

    def data_weight(self) -> Scalar:
        """alpha_s - alpha_t k sigma_s/sigma_t, the weight of constant data: sigma_s times the integral dy."""
        return self.end.alpha - self.nodes.alpha[0] * self.ratio()

    def linear_weight(self) -> Scalar:
        r"""sigma_s times the integral over dy of the place in the step, which runs from 0 to 1 over it.

        The place is linear in lambda, on the probability flow alone; from alpha = 0 in alpha/sigma.
        """
        h, proper = self.span()
        from_noise = self.nodes.alpha[0] == 0
        return self.end.alpha * jnp.where(proper, h * phis(2, -h)[1], jnp.where(from_noise, 0.5, 0))

    def span(self) -> tuple[Scalar, Bool[Array, ""]]:
        """h = lambda_s - lambda_t and whether it is finite and not 0; 1 where it is not."""
        first, last = self.nodes.half_log_snr[0], self.end.half_log_snr
        proper = self.nodes.finite[0] & self.end.finite & (first != last)
        return jnp.where(proper, last - first, 1), proper

    def places(self) -> tuple[Float[Array, " nodes"], Bool[Array, " nodes"]]:
        """(lambda_j - lambda_0)/h of every node, 0 at node 0 and 1 at the target, and which can be used."""
        h, proper = self.span()
        usable = self.valid & self.nodes.finite & proper
        return jnp.where(usable, (self.nodes.half_log_snr - self.nodes.half_log_snr[0]) / h, 1), usable


def intermediate_time(path: AbstractPath, start: Scalar, target: Scalar, fraction: ScalarLike) -> Scalar:
    """The time at `fraction` of a step in lambda; in alpha/sigma from alpha = 0, in sigma/alpha onto sigma = 0."""
    begin, end = level(path, start), level(path, target)
    middle = begin.half_log_snr + fraction * (end.half_log_snr - begin.half_log_snr)
    proper = begin.finite & end.finite
    rest = jnp.where(begin.alpha == 0, fraction * end.alpha, begin.alpha)
    noise = jnp.where(end.sigma == 0, (1 - fraction) * begin.sigma, end.sigma)
    alpha = jnp.where(proper, jnp.exp(0.5 * jax.nn.log_sigmoid(2 * middle)), rest)
    sigma = jnp.where(proper, jnp.exp(0.5 * jax.nn.log_sigmoid(-2 * middle)), noise)
    return path.time_at(alpha, sigma)


class AbstractVariable(eqx.Module):
    """The variable tau in which a multistep scheme extrapolates."""

    @abc.abstractmethod
    def at(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
        """(tau, whether it is finite) at a time of the path; a node where it is not is left out."""

    @abc.abstractmethod
    def along(self, path: AbstractPath, level: Scalar) -> Scalar:
        """tau at lambda = `level`, finite."""


class Time(AbstractVariable):
    """tau = t, the path's own time: finite at both ends."""

    def at(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
        del path
        return t, jnp.isfinite(t)

    def along(self, path: AbstractPath, level: Scalar) -> Scalar:
        return path.inverse_log_snr(2 * level)


class LogSNR(AbstractVariable):
    """tau = lambda = ln(alpha/sigma), half the log-SNR."""

    def at(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
        there = level(path, t)
        return there.half_log_snr, there.finite

    def along(self, path: AbstractPath, level: Scalar) -> Scalar:
        del path
        return level


def _noise_ratio(path: AbstractPath, t: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
    alpha, sigma = path.coefficients(t)
    return jnp.where(alpha > 0, sigma / jnp.where(alpha > 0, alpha, 1), 0), alpha > 0


class NoiseRatio(AbstractVariable):
    """tau = sigma/alpha, the noise level of EDM."""

    def at(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
        return _noise_ratio(path, t)

    def along(self, path: AbstractPath, level: Scalar) -> Scalar:
        del path
        return jnp.exp(-level)


class VPTime(AbstractVariable):
    """tau = the time at which `paths.VP` has the same proportion of data and noise, on whatever path the flow lives.

    **Arguments:** `beta_min`, `beta_max`: the noise schedule of that path, 0.1 and 20 by default.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __check_init__(self):
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(
                f"VPTime got beta_min = {self.beta_min} and beta_max = {self.beta_max}, but wants "
                "0 < beta_min <= beta_max."
            )

    def at(self, path: AbstractPath, t: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
        ratio, finite = _noise_ratio(path, t)
        return self._time(jnp.log1p(ratio**2)), finite

    def along(self, path: AbstractPath, level: Scalar) -> Scalar:
        del path
        return self._time(jax.nn.softplus(-2 * level))

    def _time(self, integrated_beta: Scalar) -> Scalar:
        """t of t beta_min + t^2 (beta_max - beta_min)/2 = ln(1 + sigma^2/alpha^2), without cancellation."""
        slope = self.beta_max - self.beta_min
        return 2 * integrated_beta / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * integrated_beta))


def mixture_of(prediction: AbstractPrediction, t: Scalar) -> Triple:
    """(a, b, 1) of P = a E[x_0|x] + b E[eps|x]."""
    one, zero = jnp.ones_like(t), jnp.zeros_like(t)
    if isinstance(prediction, Data):
        return one, zero, one
    return (zero, one, one) if isinstance(prediction, Noise) else (-one, one, one)


def check_extrapolated(prediction: AbstractPrediction, solver_name: str) -> AbstractPrediction:
    """`prediction`; raise unless `prediction` is one that the steps of this module extrapolate."""
    check_type(prediction, AbstractPrediction, f"{solver_name}'s prediction", "an instance such as predictions.Data()")
    if not isinstance(prediction, Data | Noise | Velocity):
        raise ValueError(
            f"{solver_name} got prediction = {type(prediction).__name__}, but extrapolates one of Data(), Noise() and "
            "Velocity(), whatever the network predicts: take one of these."
        )
    return prediction


def constant_weight(prediction: AbstractPrediction, step: Step) -> Scalar:
    """c_s times the integral of dy over the step, 0 where it is infinite."""
    begin, alpha, sigma = step.begin, step.end.alpha, step.end.sigma
    if isinstance(prediction, Data):
        return jnp.where(begin.sigma == 0, 0, step.data_weight())
    if isinstance(prediction, Noise):
        return jnp.where(begin.alpha == 0, 0, sigma - alpha * begin.sigma / jnp.where(begin.alpha == 0, 1, begin.alpha))
    return sigma - begin.sigma * (alpha + sigma) / (begin.alpha + begin.sigma)


def basis(at: Scalar, nodes: Float[Array, " nodes"], usable: Bool[Array, " nodes"]) -> Float[Array, " nodes"]:
    """The Lagrange polynomials of the usable nodes at one point; 0 for the others."""
    others = usable[:, None] & usable[None, :] & ~jnp.eye(len(nodes), dtype=bool)
    distances = jnp.where(others, nodes[:, None] - nodes[None, :], 1)
    factors = jnp.where(others, (at - nodes[None, :]) / distances, 1)
    return jnp.where(usable, jnp.prod(factors, axis=1), 0)


def basis_to_clean(step: Step) -> Float[Array, " nodes"]:
    """The Lagrange polynomials of the nodes in sigma/alpha, at sigma = 0."""
    ratios, finite = jax.vmap(lambda t: _noise_ratio(step.path, t))(step.ts)
    return basis(jnp.zeros_like(step.target), ratios, step.valid & finite)


# Beyond this length in lambda the integrand e^-|lambda| is 4e-11 of its largest value, and 16 nodes still resolve it.
_LONGEST = 24.0


def lagrange_weights(prediction: AbstractPrediction, variable: AbstractVariable, step: Step) -> Float[Array, " nodes"]:
    """c_s times the integral of L_j dy over the step, for every node."""
    path, zero = step.path, jnp.zeros_like(step.target)
    taus, finite = jax.vmap(lambda t: variable.at(path, t))(step.ts)
    usable = step.valid & finite
    alpha_from, sigma_from, alpha, sigma = step.nodes.alpha[0], step.nodes.sigma[0], step.end.alpha, step.end.sigma
    first, last = step.nodes.half_log_snr[0], step.end.half_log_snr
    to_data, to_noise = sigma == 0, alpha == 0
    # Infinite ends: as far away as counts, on the side on which they lie.
    last = jnp.where(step.end.finite, last, first + jnp.where(to_data, _LONGEST, -_LONGEST))
    first = jnp.where(step.nodes.finite[0], first, last + jnp.where(sigma_from == 0, _LONGEST, -_LONGEST))

    # The density is largest at `anchor`, to which all exponentials are relative.
    if isinstance(prediction, Data):
        anchor = jnp.maximum(first, last)
        low, high = anchor - _LONGEST, anchor
        at_start = sigma * alpha_from / jnp.where(sigma_from == 0, 1, sigma_from)
        scale = jnp.where(last >= first, alpha, at_start)
        concentrated = to_data

        def density(level: Scalar) -> Scalar:
            bare = scale * jnp.exp(level - anchor)
            if not step.dynamics.stochastic:
                return bare
            t = path.inverse_log_snr(2 * level)
            return bare * step.dynamics.kept(path, t, step.target) * (1 + step.dynamics.level_squared(path, t))

    elif isinstance(prediction, Noise):
        anchor = jnp.minimum(first, last)
        low, high = anchor, anchor + _LONGEST
        at_start = alpha * sigma_from / jnp.where(alpha_from == 0, 1, alpha_from)
        scale = jnp.where(last <= first, sigma, at_start)
        concentrated = to_noise

        def density(level: Scalar) -> Scalar:
            return -scale * jnp.exp(anchor - level)

    else:
        low, high = zero - _LONGEST, zero + _LONGEST
        concentrated = jnp.zeros_like(to_data)

        def density(level: Scalar) -> Scalar:
            return -(alpha + sigma) * jax.nn.sigmoid(level) * jax.nn.sigmoid(-level)

    def integrand(level: Scalar) -> Float[Array, " nodes"]:
        return density(level) * basis(variable.along(path, level), taus, usable)

    weights = integral(integrand, jnp.clip(first, low, high), jnp.clip(last, low, high))
    # At an end where all of the integral lies in one point: P extrapolated to it, or left as it is.
    tau, tau_finite = variable.at(path, step.target)
    limit = (alpha + sigma) * jnp.where(tau_finite, basis(tau, taus, usable), 0)
    return jnp.where(concentrated, limit, weights)


def vandermonde_weights(
    nodes: Float[Array, " nodes"], usable: Bool[Array, " nodes"], moments: Float[Array, " nodes"]
) -> Float[Array, " nodes"]:
    """rho with sum_k rho_k nodes_k^i = moments_i for i below the number of usable nodes; 0 for the others."""
    count = len(nodes)
    own = jnp.arange(count)
    # Row k: the coefficients of the Lagrange polynomial of node k, lowest first, node by node of the others.
    coefficients = jnp.zeros((count, count), nodes.dtype).at[:, 0].set(1)
    for i in range(count):
        factor = usable & usable[i] & (own != i)
        distances = jnp.where(factor, nodes - nodes[i], 1)
        raised = jnp.concatenate([jnp.zeros((count, 1), nodes.dtype), coefficients[:, :-1]], axis=1)
        multiplied = (raised - nodes[i] * coefficients) / distances[:, None]
        coefficients = jnp.where(factor[:, None], multiplied, coefficients)
    return jnp.where(usable, jnp.sum(coefficients * moments[None], axis=1), 0)


def trapezoid_from_noise(step: Step) -> Float[Array, " history"]:
    """The corrector of a step from alpha = 0, where lambda is infinite: half the weight of the data at the target."""
    from_noise = step.nodes.alpha[0] == 0
    last = jnp.arange(1, len(step.ts)) == len(step.ts) - 1
    return jnp.where(last & from_noise, step.data_weight() / 2, 0)
