r"""Oracles: data whose every quantity on every path is known in closed form.

With $x_t = \alpha x_0 + \sigma\epsilon$ and data $x_0 \sim p_0$, an oracle knows the marginal $p_t$ and

- denoised $D = E[x_0 | x_t]$, noise $E[\epsilon | x_t]$, score $= \nabla \ln p_t(x_t) = -E[\epsilon | x_t]/\sigma$,
- velocity $= \alpha' D + \sigma' E[\epsilon | x_t]$,

at any time of any path, its ends included. They are what a trained network would be if it were perfect: test a loss,
a solver or a guidance rule of your own against them.

`Gaussian`, $p_0 = N(m, C)$ with $S = \alpha^2 C + \sigma^2 I$ and $r = x_t - \alpha m$:

$$D = m + \alpha C S^{-1} r, \qquad E[\epsilon|x_t] = \sigma S^{-1} r, \qquad \mathrm{score} = -S^{-1} r$$

`GaussianMixture`: the same for each component k, averaged with the posterior weights
$w_k \propto \pi_k N(x_t; \alpha m_k, S_k)$. `Empirical`: a finite data set, the mixture of $N$ points with C = 0.

One example everywhere, of the structure of the mean: an array of any shape or any pytree of arrays. Covariances are
over the elements in the order of `jax.flatten_util.ravel_pytree`; their number is d.
"""

import abc
import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Real

from ._checks import check, check_key, describe, is_concrete
from ._numerics import as_scalar, linear_combination, normal_like
from ._types import Args, Like, PRNGKey, Scalar, ScalarLike, State
from .flow import AbstractFlow
from .paths import AbstractPath
from .predictions import AbstractPrediction, Score
from .sources import AbstractSource, Normal

__all__ = ["AbstractOracle", "Empirical", "Gaussian", "GaussianMixture", "OracleFlow"]


class AbstractOracle(eqx.Module):
    """A data distribution with closed-form marginals on every path."""

    @abc.abstractmethod
    def data_and_noise(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> tuple[State, State]:
        """(E[x_0|x_t = x], E[eps|x_t = x]) at time t, one example each."""

    @abc.abstractmethod
    def score(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> State:
        """grad ln p_t(x), finite at sigma = 0 too if the data has a density."""

    @abc.abstractmethod
    def log_prob(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> Scalar:
        """ln p_t(x) in nats, the marginal density of x_t."""

    @abc.abstractmethod
    def sample_data(self, key: PRNGKey, args: Args = None) -> State:
        """One example of the data."""

    def denoised(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> State:
        """E[x_0|x_t = x]."""
        return self.data_and_noise(path, t, x, args)[0]

    def noise(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> State:
        """E[eps|x_t = x]."""
        return self.data_and_noise(path, t, x, args)[1]

    def velocity(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> State:
        """dx_t/dt of the probability flow, alpha' E[x_0|x_t] + sigma' E[eps|x_t]."""
        return linear_combination(path.derivatives(t), self.data_and_noise(path, t, x, args))

    def predict(
        self,
        path: AbstractPath,
        t: ScalarLike,
        x: State,
        prediction: AbstractPrediction,
        args: Args = None,
    ) -> State:
        """The exact value of any prediction, without a conversion: finite wherever the truth is."""
        if isinstance(prediction, Score):
            return self.score(path, t, x, args)
        a, b, c = prediction.coefficients(path, as_scalar(t))
        return linear_combination((a / c, b / c), self.data_and_noise(path, t, x, args))

    def sample(
        self,
        key: PRNGKey,
        path: AbstractPath | None = None,
        t: ScalarLike | None = None,
        args: Args = None,
    ) -> State:
        """One example of the data or, with a path and a time, of x_t = alpha x_0 + sigma eps.

        **Raises:** `ValueError` if only one of `path` and `t` is given.
        """
        check_key(key, f"{type(self).__name__}.sample")
        if path is None and t is None:
            return self.sample_data(key, args)
        if path is None or t is None:
            raise ValueError("sample got one of path and t: give both for x_t, or none for the data.")
        data_key, noise_key = jax.random.split(key)
        data = self.sample_data(data_key, args)
        return path.interpolate(t, data, normal_like(noise_key, data))

    def flow(self, path: AbstractPath, prediction: AbstractPrediction) -> "OracleFlow":
        """The flow of a perfect network: its output is the exact `prediction` on `path`."""
        return OracleFlow(oracle=self, path=path, prediction=prediction)

    @property
    def like(self) -> Like:
        """The shapes and dtypes of one example."""
        return jax.eval_shape(self.sample_data, jax.random.key(0))


class OracleFlow(AbstractFlow):
    """The flow of an oracle on a path, with the exact value of `prediction` as its output.

    Its `velocity`, `score`, `denoised` and `noise` are converted from that output, as for any flow; those of the
    oracle itself are not.
    """

    oracle: AbstractOracle
    path: AbstractPath
    prediction: AbstractPrediction
    source: ClassVar[AbstractSource] = Normal()

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        del key
        return self.oracle.predict(self.path, t, x, self.prediction, args)


class Gaussian(AbstractOracle):
    """N(mean, covariance) over all elements of an example.

    **Arguments:** `mean`: one example; `covariance`: one variance, or (d,) variances of the elements, or a
    symmetric positive semi-definite (d, d) matrix, decomposed once, here.

    Each evaluation is accurate to a few ulp times the condition number of S. With a singular covariance there is no
    density at sigma = 0: noise, score and log_prob do not exist there (inf or nan), the denoised data does.

    **Raises:** `ValueError` if the covariance is of another shape, not symmetric or not positive semi-definite.
    """

    mean: State
    eigenvalues: Float[Array, " d"]
    eigenvectors: Float[Array, "d d"] | None

    def __init__(self, mean: Like, covariance: ScalarLike | Real[Array | np.ndarray, "..."]):
        self.mean = _floating(mean)
        values, vectors = _spectra(jnp.asarray(covariance)[None], 1, _flat(self.mean).size)
        self.eigenvalues = values[0]
        self.eigenvectors = None if vectors is None else vectors[0]

    @classmethod
    def isotropic(cls, mean: Like, std: ScalarLike) -> "Gaussian":
        """N(mean, std^2 I)."""
        return cls(mean, as_scalar(std) ** 2)

    @property
    def covariance(self) -> Float[Array, "d d"]:
        """The covariance matrix."""
        return _covariance(self.eigenvalues, self.eigenvectors)

    def data_and_noise(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> tuple[State, State]:
        data, noise, _, _ = self._all(path, t, x)
        return _as_state(data, x), _as_state(noise, x)

    def score(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> State:
        return _as_state(self._all(path, t, x)[2], x)

    def log_prob(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> Scalar:
        return self._all(path, t, x)[3]

    def sample_data(self, key: PRNGKey, args: Args = None) -> State:
        flat = _flat(self.mean)
        z = jnp.sqrt(self.eigenvalues) * jax.random.normal(key, flat.shape, flat.dtype)
        return _as_state(flat + _rotate(self.eigenvectors, z), self.mean)

    def flow_map(self, path: AbstractPath, t: ScalarLike, r: ScalarLike, x: State) -> State:
        r"""The state at time r of the probability flow that is at x at time t, in either direction.

        $x_r = \alpha_r m + S_r^{1/2} S_t^{-1/2} (x_t - \alpha_t m)$, as all S share the eigenvectors of C.
        """
        (alpha_t, sigma_t), (alpha_r, sigma_r) = path.coefficients(as_scalar(t)), path.coefficients(as_scalar(r))
        mean, residual = _flat(self.mean), _flat(x, self.mean) - alpha_t * _flat(self.mean)
        scales = (alpha_r**2 * self.eigenvalues + sigma_r**2) / (alpha_t**2 * self.eigenvalues + sigma_t**2)
        if self.eigenvectors is not None:
            residual = self.eigenvectors.T @ residual
        return _as_state(alpha_r * mean + _rotate(self.eigenvectors, jnp.sqrt(scales) * residual), x)

    def given(
        self,
        matrix: Real[Array | np.ndarray, "m d"],
        measurement: Real[Array | np.ndarray, " m"],
        noise_std: ScalarLike,
    ) -> "Gaussian":
        """The law of the data given measurement = matrix x_0 + noise_std N(0, I): a Gaussian again.

        **Arguments:** `matrix`: acts on the elements of an example; `noise_std`: > 0.
        """
        mean, covariance, _ = _condition(_flat(self.mean), self.covariance, matrix, measurement, noise_std)
        return Gaussian(_as_state(mean, self.mean), covariance)

    def _all(self, path: AbstractPath, t: ScalarLike, x: State):
        alpha, sigma = path.coefficients(as_scalar(t))
        mean = _flat(self.mean)
        return _component(alpha, sigma, _flat(x, self.mean), mean, self.eigenvalues, self.eigenvectors)


class GaussianMixture(AbstractOracle):
    """A mixture of Gaussians, sum_k weights_k N(means_k, covariances_k), conditional on a label if one is given.

    **Arguments:**

    - `weights`: (K,) non-negative numbers, normalised here;
    - `means`: one example with a leading axis of length K on every leaf;
    - `covariances`: one variance, (K,) variances, (K, d) variances of the elements or (K, d, d) matrices;
    - `labels`: (K,) integers, 0 to K - 1 by default. Components may share one.

    `args` of its methods is an integer label, traced or not: the mixture of the components with that label. None, or
    any negative label (for code that needs a null label of the same type), is the whole mixture. A traced label that
    no component has gives nan.

    **Raises:** `ValueError` for shapes that do not fit, covariances as for `Gaussian`, and a label that no component
    has, where it is concrete.
    """

    log_weights: Float[Array, " K"]
    means: State
    eigenvalues: Float[Array, "K d"]
    eigenvectors: Float[Array, "K d d"] | None
    labels: Int[Array, " K"]

    def __init__(
        self,
        weights: Real[Array | np.ndarray, " K"],
        means: Like,
        covariances: ScalarLike | Real[Array | np.ndarray, "..."],
        labels: Int[Array | np.ndarray, "..."] | None = None,
    ):
        weights = jnp.asarray(weights).astype(float)
        weights = check(
            weights,
            jnp.any(weights < 0) | ~(jnp.sum(weights) > 0),
            "GaussianMixture got a negative weight, or no positive one: give (K,) non-negative weights.",
        )
        self.log_weights = jnp.log(weights / jnp.sum(weights))
        self.means = _floating(means)
        count = weights.size
        flat = _flat_batch(self.means, count, "means of GaussianMixture")
        covariances = jnp.asarray(covariances)
        if covariances.ndim == 0:
            covariances = jnp.broadcast_to(covariances, (count,))
        self.eigenvalues, self.eigenvectors = _spectra(covariances, *flat.shape)
        self.labels = _labels(labels, count)

    def data_and_noise(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> tuple[State, State]:
        data, noise, _, log_probs = self._all(path, t, x, args)
        weights = jax.nn.softmax(log_probs)
        return _as_state(weights @ data, x), _as_state(weights @ noise, x)

    def score(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> State:
        _, _, scores, log_probs = self._all(path, t, x, args)
        return _as_state(jax.nn.softmax(log_probs) @ scores, x)

    def log_prob(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> Scalar:
        return jax.nn.logsumexp(self._all(path, t, x, args)[3])

    def sample_data(self, key: PRNGKey, args: Args = None) -> State:
        which, key = jax.random.split(key)
        k = jax.random.categorical(which, _masked(self.log_weights, self.labels, args))
        mean = jax.tree.map(lambda leaf: leaf[k], self.means)
        flat = _flat(mean)
        z = jnp.sqrt(self.eigenvalues[k]) * jax.random.normal(key, flat.shape, flat.dtype)
        vectors = None if self.eigenvectors is None else self.eigenvectors[k]
        return _as_state(flat + _rotate(vectors, z), mean)

    def given(
        self,
        matrix: Real[Array | np.ndarray, "m d"],
        measurement: Real[Array | np.ndarray, " m"],
        noise_std: ScalarLike,
    ) -> "GaussianMixture":
        """The law of the data given measurement = matrix x_0 + noise_std N(0, I): a mixture again.

        **Arguments:** `matrix`: acts on the elements of an example; `noise_std`: > 0.
        """
        flat = _flat_batch(self.means, self.labels.size, "means")
        covariances = jax.vmap(_covariance)(self.eigenvalues, self.eigenvectors)
        means, covariances, evidence = jax.vmap(_condition, (0, 0, None, None, None))(
            flat, covariances, matrix, measurement, noise_std
        )
        means = jax.vmap(_as_state)(means, self.means)
        weights = jax.nn.softmax(self.log_weights + evidence)
        return GaussianMixture(weights, means, covariances, self.labels)

    def _all(self, path: AbstractPath, t: ScalarLike, x: State, args: Args):
        """Data, noise and score of each component (K, d), and ln(weight_k p_k(x)) (K,)."""
        alpha, sigma = path.coefficients(as_scalar(t))
        means = _flat_batch(self.means, self.labels.size, "means")
        flat = _flat(x, jax.tree.map(lambda leaf: leaf[0], self.means))
        data, noise, score, log_prob = jax.vmap(_component, (None, None, None, 0, 0, 0))(
            alpha, sigma, flat, means, self.eigenvalues, self.eigenvectors
        )
        return data, noise, score, log_prob + _masked(self.log_weights, self.labels, args)


class Empirical(AbstractOracle):
    r"""A finite data set, each point as likely as another: the ideal denoiser of what a network was trained on.

    $$D = \sum_i w_i x_i, \qquad w \propto \exp(-|x - \alpha x_i|^2 / 2\sigma^2)$$

    **Arguments:** `data`: one example with a leading axis of length N on every leaf; `labels`: None, or (N,)
    integers, of which `args` of the methods selects one as in `GaussianMixture`.

    At sigma = 0 the data has no density. There D is the nearest point (their mean where several are equally near),
    `log_prob` is +inf on a point of the data and -inf elsewhere, and noise and score are 0 on it and infinite
    elsewhere, as are the predictions that hold the noise.

    Source: Karras et al. (2022), arXiv 2206.00364, eq. 57.
    """

    data: State
    labels: Int[Array, " N"] | None

    def __init__(self, data: Like, labels: Int[Array | np.ndarray, "..."] | None = None):
        self.data = _floating(data)
        count = jax.tree.leaves(self.data)[0].shape[0]
        _flat_batch(self.data, count, "data of Empirical")
        self.labels = None if labels is None else _labels(labels, count)

    def data_and_noise(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> tuple[State, State]:
        points, residuals, logits, _, sigma = self._all(path, t, x, args)
        weights = jax.nn.softmax(logits)
        # The mean of the differences, not the difference of the mean, which would round at the size of x.
        noise = _divide(weights @ residuals, sigma)
        return _as_state(weights @ points, x), _as_state(noise, x)

    def score(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> State:
        _, residuals, logits, _, sigma = self._all(path, t, x, args)
        return _as_state(-_divide(_divide(jax.nn.softmax(logits) @ residuals, sigma), sigma), x)

    def log_prob(self, path: AbstractPath, t: ScalarLike, x: State, args: Args = None) -> Scalar:
        points, _, logits, smallest, sigma = self._all(path, t, x, args)
        safe = jnp.where(sigma > 0, sigma, 1)
        regular = (
            jax.nn.logsumexp(logits)
            - 0.5 * smallest / safe**2
            - points.shape[1] * (jnp.log(safe) + 0.5 * math.log(2 * math.pi))
        )
        return jnp.where(sigma > 0, regular, jnp.where(smallest > 0, -jnp.inf, jnp.inf))

    def sample_data(self, key: PRNGKey, args: Args = None) -> State:
        i = jax.random.categorical(key, self._log_weights(args))
        return jax.tree.map(lambda leaf: leaf[i], self.data)

    def _log_weights(self, args: Args) -> Float[Array, " N"]:
        """Minus ln of their number for the points with the label, -inf for the others."""
        count = jax.tree.leaves(self.data)[0].shape[0]
        return _masked(jnp.full(count, -math.log(count), float), self.labels, args)

    def _all(self, path: AbstractPath, t: ScalarLike, x: State, args: Args):
        """Points and differences x - alpha x_i (N, d), logits up to a constant (N,), the least squared difference."""
        alpha, sigma = path.coefficients(as_scalar(t))
        points = _flat_batch(self.data, jax.tree.leaves(self.data)[0].shape[0], "data")
        flat = _flat(x, jax.tree.map(lambda leaf: leaf[0], self.data))
        residuals = flat[None] - alpha * points
        log_weights = self._log_weights(args)
        squares = jnp.sum(residuals**2, axis=1)
        squares = jnp.where(jnp.isfinite(log_weights), squares, jnp.inf)
        smallest = jnp.min(squares)
        excess = squares - smallest
        safe = jnp.where(sigma > 0, sigma, 1)
        nearest = jnp.where(excess > 0, -jnp.inf, 0.0)
        logits = jnp.where(sigma > 0, -0.5 * excess / safe**2, nearest)
        return points, residuals, logits + log_weights, smallest, sigma


# --- one Gaussian component ---------------------------------------------------------------------------------


def _component(
    alpha: Scalar,
    sigma: Scalar,
    x: Float[Array, " d"],
    mean: Float[Array, " d"],
    values: Float[Array, " d"],
    vectors: Float[Array, "d d"] | None,
) -> tuple[Float[Array, " d"], Float[Array, " d"], Float[Array, " d"], Scalar]:
    """(denoised, noise, score, log_prob) of N(mean, vectors diag(values) vectors^T) at x."""
    residual = x - alpha * mean
    z = residual if vectors is None else vectors.T @ residual
    variance = alpha**2 * values + sigma**2
    # A direction without variance, at sigma = 0: the data is its mean.
    regular = variance > 0
    gain = jnp.where(regular, alpha * values / jnp.where(regular, variance, 1), 0)
    whitened = z / variance
    log_prob = -0.5 * jnp.sum(z * whitened + jnp.log(variance) + math.log(2 * math.pi))
    return (
        mean + _rotate(vectors, gain * z),
        _rotate(vectors, sigma * whitened),
        -_rotate(vectors, whitened),
        log_prob,
    )


def _rotate(vectors: Float[Array, "d d"] | None, z: Float[Array, " d"]) -> Float[Array, " d"]:
    return z if vectors is None else vectors @ z


def _covariance(values: Float[Array, " d"], vectors: Float[Array, "d d"] | None) -> Float[Array, "d d"]:
    if vectors is None:
        return jnp.diag(values)
    return (vectors * values[None]) @ vectors.T


def _spectra(
    covariances: Real[Array, "K ..."], count: int, size: int
) -> tuple[Float[Array, "K d"], Float[Array, "K d d"] | None]:
    """Eigenvalues and, unless they are the unit vectors, eigenvectors of K covariances."""
    covariances = covariances.astype(float)
    shapes = [(count,), (count, size), (count, size, size)]
    if covariances.shape not in shapes:
        wanted = ["()", f"({size},)", f"({size}, {size})"]
        raise ValueError(
            f"a covariance has shape {covariances.shape[1:]} (and there are {covariances.shape[0]}), but for {count} "
            f"mean(s) of {size} elements one of {', '.join(wanted)} is wanted for each."
        )
    vectors = None
    if covariances.ndim == 1:
        values = jnp.broadcast_to(covariances[:, None], (count, size))
    elif covariances.ndim == 2:
        values = covariances
    else:
        scale = jnp.max(jnp.abs(covariances))
        skew = jnp.max(jnp.abs(covariances - jnp.swapaxes(covariances, 1, 2)))
        covariances = check(
            covariances,
            ~(skew <= 1e-5 * scale),
            "a covariance matrix is not symmetric (or not finite): pass (C + C.T)/2 of the one that is meant.",
        )
        values, vectors = jnp.linalg.eigh(covariances)
    values = check(
        values,
        ~jnp.all(values >= -1e-5 * jnp.max(jnp.abs(values))),
        "a covariance is not positive semi-definite: variances are squares, >= 0.",
    )
    return jnp.maximum(values, 0), vectors


def _condition(
    mean: Float[Array, " d"],
    covariance: Float[Array, "d d"],
    matrix: Real[Array | np.ndarray, "m d"],
    measurement: Real[Array | np.ndarray, " m"],
    noise_std: ScalarLike,
) -> tuple[Float[Array, " d"], Float[Array, "d d"], Scalar]:
    """Mean and covariance of N(mean, covariance) given a measurement, and ln of the measurement's density."""
    matrix = jnp.asarray(matrix).astype(mean.dtype)
    variance = as_scalar(noise_std) ** 2
    innovation = jnp.asarray(measurement).astype(mean.dtype) - matrix @ mean
    identity = jnp.eye(innovation.size, dtype=mean.dtype)
    measured = matrix @ covariance @ matrix.T + variance * identity
    factor = jax.scipy.linalg.cho_factor(measured, lower=True)
    gain = jax.scipy.linalg.cho_solve(factor, matrix @ covariance).T
    kept = jnp.eye(mean.size, dtype=mean.dtype) - gain @ matrix
    # Joseph's form, which stays positive semi-definite.
    updated = kept @ covariance @ kept.T + variance * (gain @ gain.T)
    log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(factor[0])))
    square = innovation @ jax.scipy.linalg.cho_solve(factor, innovation)
    evidence = -0.5 * (square + log_det + innovation.size * math.log(2 * math.pi))
    return mean + gain @ innovation, 0.5 * (updated + updated.T), evidence


def _divide(values: Float[Array, " d"], sigma: Scalar) -> Float[Array, " d"]:
    """values / sigma; at sigma = 0 infinite with the sign of the value, and 0 where that is 0."""
    safe = jnp.where(sigma > 0, sigma, 1)
    limit = jnp.where(values == 0, 0.0, jnp.where(values > 0, jnp.inf, -jnp.inf))
    return jnp.where(sigma > 0, values / safe, limit)


# --- labels, and examples as vectors ------------------------------------------------------------------------


def _labels(labels: Int[Array | np.ndarray, "..."] | None, count: int) -> Int[Array, " K"]:
    labels = jnp.arange(count) if labels is None else jnp.asarray(labels).astype(int)
    if labels.shape != (count,):
        raise ValueError(f"labels have shape {labels.shape}, but ({count},) is wanted.")
    return labels


def _masked(log_weights: Float[Array, " K"], labels: Int[Array, " K"] | None, args: Args) -> Float[Array, " K"]:
    """ln of the weights of the components with label `args`, normalised; -inf for the others."""
    if args is None:
        return log_weights
    if labels is None:
        raise ValueError("args is a label, but this oracle was made without labels: pass labels= to it.")
    label = jnp.asarray(args)
    if label.shape != () or not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(f"args is {describe(label)}, but one integer label (or None) is wanted.")
    chosen: Bool[Array, " K"] = (labels == label.astype(labels.dtype)) | (label < 0)
    if is_concrete(chosen) and not bool(np.any(np.asarray(chosen))):
        raise ValueError(f"no component has the label {int(label)}: labels are {labels}.")
    masked = jnp.where(chosen, log_weights, -jnp.inf)
    return masked - jax.nn.logsumexp(masked)


def _floating(tree: Like) -> State:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(float), tree)


def _flat(x: State, like: State | None = None) -> Float[Array, " d"]:
    """All elements of one example in a vector of the default float dtype."""
    if like is not None:
        shapes, wanted = jax.tree.map(jnp.shape, x), jax.tree.map(jnp.shape, like)
        if shapes != wanted:
            raise ValueError(
                f"x is {describe(x)}, but one example of this oracle is {describe(like)}: "
                "without a batch axis (use jax.vmap)."
            )
    return ravel_pytree(_floating(x))[0]


def _flat_batch(tree: State, count: int, name: str) -> Float[Array, "K d"]:
    """The examples in the rows of a matrix."""
    if any(leaf.ndim == 0 or leaf.shape[0] != count for leaf in jax.tree.leaves(tree)):
        raise ValueError(f"the {name} are {describe(tree)}, but every leaf wants a leading axis of {count}.")
    return jax.vmap(_flat)(tree)


def _as_state(flat: Float[Array, " d"], like: State) -> State:
    """A vector in the structure, shapes and dtypes of an example."""
    leaves, structure = jax.tree.flatten(like)
    stops = np.cumsum([leaf.size for leaf in leaves])
    parts = [
        flat[stop - leaf.size : stop].reshape(leaf.shape).astype(leaf.dtype)
        for stop, leaf in zip(stops, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, parts)
