"""The oracles against numpy in float64: linear algebra, quadrature, brute force; and what makes them easy to use."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import PATHS, PREDICTIONS, REFERENCES, TARGETS, gaussian_truth, mixture_truth, times

from flowsolve import paths
from flowsolve.testing import Empirical, Gaussian, GaussianMixture

LINEAR = PATHS["linear"]


def make(target):
    """A target of the table as the oracle that a user would take for it."""
    weights, means, covariances = TARGETS[target]
    if len(weights) == 1:
        return Gaussian(means[0], covariances[0])
    return GaussianMixture(weights, means, covariances)


@functools.cache
def quantities(path_name):
    """Everything an oracle says at (t, x), compiled once per path and kind of oracle."""
    path = PATHS[path_name]

    def one(oracle, t, x, args):
        data, noise = oracle.data_and_noise(path, t, x, args)
        return {
            "data": data,
            "noise": noise,
            "score": oracle.score(path, t, x, args),
            "log_prob": oracle.log_prob(path, t, x, args),
            "velocity": oracle.velocity(path, t, x, args),
            "gradient": jax.grad(lambda x: oracle.log_prob(path, t, x, args))(x),
        }

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0, None)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["linear", "sub_vp", "edm"])
def test_oracle_against_linear_algebra(name, target):
    """float32 to 5e-6 of each quantity, on the closed interval; S has condition numbers up to 30 here."""
    t = times(name, 16)
    rng = np.random.default_rng(0)
    weights, means, covariances = TARGETS[target]
    xs, exact, sizes = [], [], []
    for a, s, da, ds in zip(*REFERENCES[name](np.float64(t)), strict=True):
        x = np.float64(np.float32(a * rng.multivariate_normal(means[0], covariances[0]) + s * rng.normal(size=3)))
        data, noise, score, log_prob = mixture_truth(a, s, x, weights, means, covariances)
        xs.append(np.float32(x))
        exact.append((data, noise, score, da * data + ds * noise, log_prob))
        norms = [np.abs(value).max() for value in (data, noise, score)]
        sizes.append((*norms, abs(da) * norms[0] + abs(ds) * norms[1], abs(log_prob)))
    got = quantities(name)(make(target), t, np.array(xs), None)
    got = {key: np.float64(value).reshape(len(t), -1) for key, value in got.items()}
    for i, key in enumerate(("data", "noise", "score", "velocity", "log_prob")):
        error = np.abs(got[key] - np.array([row[i] for row in exact]).reshape(len(t), -1)).max(axis=1)
        assert (error <= 5e-6 * np.array([size[i] for size in sizes])).all(), (key, t, error)
    np.testing.assert_allclose(got["gradient"], got["score"], rtol=2e-5, atol=2e-5)


def test_oracle_in_float64(x64):
    """Under x64 the same to 1e-12, both ends included."""
    t = np.array([0.0, 1e-6, 0.3, 1 - 1e-6, 1.0])
    x = np.random.default_rng(1).normal(size=(5, 3))
    for target in ("gaussian", "mixture"):
        got = quantities("linear")(make(target), t, x, None)
        assert got["score"].dtype == jnp.float64
        for i, (a, s, *_) in enumerate(zip(*REFERENCES["linear"](t), strict=True)):
            exact = mixture_truth(a, s, x[i], *TARGETS[target])
            for key, value in zip(("data", "noise", "score", "log_prob"), exact, strict=True):
                np.testing.assert_allclose(got[key][i], value, rtol=1e-10, atol=1e-11)


def test_posterior_mean_by_quadrature():
    """In one dimension, straight from Bayes: integrals over x_0 of p_0(x_0) N(x; alpha x_0, sigma^2)."""
    weights, means, stds = np.array([0.7, 0.3]), np.array([-1.0, 1.5]), np.array([0.4, 0.8])
    oracle = GaussianMixture(weights, jnp.float32(means)[:, None], stds**2)
    grid = np.linspace(-8, 8, 200_001)

    def normal(x, mean, std):
        return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))

    prior = weights @ normal(grid, means[:, None], stds[:, None])
    t = np.float32([0.2, 0.5, 0.9, 0.9])
    x = np.float32([-0.4, 0.3, 2.0, -1.0])
    got = quantities("linear")(oracle, t, x[:, None], None)
    for i in range(len(t)):
        alpha, sigma = 1 - np.float64(t[i]), np.float64(t[i])
        joint = prior * normal(x[i], alpha * grid, sigma)
        evidence = joint.sum()
        data = (joint * grid).sum() / evidence
        noise = (joint * (x[i] - alpha * grid) / sigma).sum() / evidence
        np.testing.assert_allclose(got["data"][i, 0], data, rtol=1e-5)
        np.testing.assert_allclose(got["noise"][i, 0], noise, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got["velocity"][i, 0], noise - data, rtol=1e-5)
        np.testing.assert_allclose(got["log_prob"][i], np.log(evidence * (grid[1] - grid[0])), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "sub_vp"])
def test_continuity_equation(name, x64):
    """d ln p/dt + div v + v . score = 0: density, velocity and score belong together, on any path."""
    path, oracle = PATHS[name], make("mixture")

    @jax.jit
    @jax.vmap
    def residual(t, x):
        velocity = functools.partial(oracle.velocity, path, t)
        divergence = jnp.trace(jax.jacfwd(velocity)(x))
        rate = jax.grad(lambda t: oracle.log_prob(path, t, x))(t)
        return rate + divergence + velocity(x) @ oracle.score(path, t, x), rate

    t = np.linspace(path.t_data, path.t_noise, 6)[1:-1]
    total, rate = residual(t, np.random.default_rng(0).normal(size=(4, 3)))
    assert (np.abs(rate) > 1e-3).all()
    np.testing.assert_allclose(total / rate, 0, atol=1e-9)


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_every_prediction_is_finite_at_both_ends(kind):
    """The direct value and its gradients in x and t, under jit, where a conversion would be singular."""
    oracle = make(kind)

    @jax.jit
    @jax.vmap
    def outputs(t, x):
        def value(prediction, t, x):
            output = oracle.flow(LINEAR, prediction).output(t, x)
            return jnp.sum(output), output

        return {
            name: jax.grad(functools.partial(value, p), argnums=(0, 1), has_aux=True)(t, x)
            for name, p in PREDICTIONS.items()
        }

    t, x = np.float32([0, 1]), np.float32([[0.3, -1.0, 2.0]] * 2)
    found = outputs(t, x)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), found))
    for i in (0, 1):
        data, noise, score, _ = mixture_truth(1 - float(i), float(i), np.float64(x[i]), *TARGETS[kind])
        exact = {"data": data, "noise": noise, "velocity": noise - data, "score": score}
        exact["v"] = noise if i == 0 else -data
        for name, value in exact.items():
            np.testing.assert_allclose(found[name][1][i], value, rtol=2e-5, atol=1e-5)


# --- labels ---------------------------------------------------------------------------------------------------


def labelled():
    weights, means, covariances = TARGETS["mixture"]
    return GaussianMixture(weights, means, covariances, labels=np.array([4, 7, 4]))


def test_a_label_is_the_mixture_of_its_components():
    weights, means, covariances = TARGETS["mixture"]
    t, x = np.float32([0.1, 0.5, 1.0]), np.float32(np.random.default_rng(0).normal(size=(3, 3)))
    evaluate = quantities("linear")
    chosen = np.array([0, 2])
    parts = {
        4: (weights[chosen] / weights[chosen].sum(), means[chosen], covariances[chosen]),
        7: (np.ones(1), means[[1]], covariances[[1]]),
        -1: (weights, means, covariances),
    }
    for label, part in parts.items():
        got = evaluate(labelled(), t, x, jnp.asarray(label))  # traced
        for i, (a, s, *_) in enumerate(zip(*REFERENCES["linear"](np.float64(t)), strict=True)):
            exact = mixture_truth(a, s, np.float64(x[i]), *part)
            for key, value in zip(("data", "noise", "score", "log_prob"), exact, strict=True):
                np.testing.assert_allclose(got[key][i], value, rtol=2e-4, atol=2e-5)
    # A Python integer, and no label.
    assert labelled().log_prob(LINEAR, 0.5, jnp.asarray(x[0]), 7) == pytest.approx(
        gaussian_truth(0.5, 0.5, np.float64(x[0]), means[1], covariances[1])[3], rel=1e-5
    )
    first = jnp.asarray(x[0])
    whole = float(labelled().log_prob(LINEAR, 0.5, first))
    assert labelled().log_prob(LINEAR, 0.5, first, -1) == pytest.approx(whole, rel=1e-6)


@pytest.mark.quick
def test_labels_that_do_not_exist():
    oracle, x = labelled(), jnp.zeros(3)
    with pytest.raises(ValueError, match="no component has the label 5"):
        oracle.denoised(LINEAR, 0.5, x, 5)
    with pytest.raises(ValueError, match="one integer label"):
        oracle.denoised(LINEAR, 0.5, x, jnp.array([4, 7]))
    with pytest.raises(ValueError, match="made without labels"):
        Empirical(jnp.zeros((2, 3))).denoised(LINEAR, 0.5, x, 0)
    assert jnp.isnan(jax.jit(lambda label: oracle.log_prob(LINEAR, 0.5, x, label))(5))


# --- the empirical data set -----------------------------------------------------------------------------------


def test_empirical_against_brute_force():
    rng = np.random.default_rng(0)
    points = np.float32(rng.normal(size=(20, 2)))
    labels = np.arange(20) % 2
    oracle = Empirical(points, labels)
    t = np.float32([1e-3, 0.1, 0.5, 0.95, 1.0])
    x = np.float32((1 - t)[:, None] * points[:5] + t[:, None] * rng.normal(size=(5, 2)))
    for label, chosen in ((None, points), (1, points[labels == 1])):
        got = quantities("linear")(oracle, t, x, None if label is None else jnp.asarray(label))
        for i in range(len(t)):
            alpha, sigma = 1 - np.float64(t[i]), np.float64(t[i])
            squares = ((np.float64(x[i]) - alpha * np.float64(chosen)) ** 2).sum(axis=1)
            logits = -squares / (2 * sigma**2) - np.log(2 * np.pi * sigma**2)
            log_sum = np.logaddexp.reduce(logits)
            data = np.exp(logits - log_sum) @ np.float64(chosen)
            noise = (np.float64(x[i]) - alpha * data) / sigma
            # x - alpha x_i is known to an ulp of x, that is to ulp(x)/sigma of the noise.
            tolerance = 2e-6 * (1 + 1 / sigma)
            np.testing.assert_allclose(got["data"][i], data, atol=1e-5)
            np.testing.assert_allclose(got["noise"][i], noise, atol=tolerance)
            np.testing.assert_allclose(got["score"][i], -noise / sigma, atol=tolerance / sigma)
            np.testing.assert_allclose(got["log_prob"][i], log_sum - np.log(len(chosen)), atol=10 * tolerance)


def test_empirical_at_sigma_zero():
    points = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    x = jnp.array([[0.9, 0.1], [1.0, 0.0], [0.5, 0.0]])  # near a point, on it, between two
    got = quantities("linear")(Empirical(points), jnp.zeros(3), x, None)
    np.testing.assert_array_equal(got["data"], jnp.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0]]))
    assert (got["log_prob"] == jnp.array([-jnp.inf, jnp.inf, -jnp.inf])).all()
    assert (got["noise"][0] == jnp.array([-jnp.inf, jnp.inf])).all() and (got["noise"][1] == 0).all()
    assert (got["score"][0] == jnp.array([jnp.inf, -jnp.inf])).all() and (got["score"][1] == 0).all()
    # The denoised data is regular there, and so are its gradients; at alpha = 0 it is the mean.
    oracle = Empirical(points)

    @jax.jit
    def gradients(t, x):
        def total(t, x):
            data = oracle.denoised(LINEAR, t, x)
            return data.sum(), data

        return jax.grad(total, argnums=(0, 1), has_aux=True)(t, x)

    for t in (0.0, 1.0):
        found, data = gradients(t, x[0])
        assert all(jnp.isfinite(gradient).all() for gradient in found)
    np.testing.assert_allclose(data, points.mean(axis=0), rtol=1e-6)


def test_empirical_denoiser_does_not_round_at_small_noise():
    """A large data set far from the origin: exact to the resolution of x itself."""
    points = 100 + jnp.arange(4.0)[:, None]
    oracle = Empirical(points)
    sigma = 1e-3
    path = paths.EDM()
    x = points[2] + sigma * 0.7
    noise = oracle.noise(path, sigma, x)
    assert noise[0] == pytest.approx(float(x[0] - points[2, 0]) / sigma, rel=1e-6)


# --- samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "label"])
def test_samples_have_the_moments(kind):
    """Mean and covariance of the data and of x_t, in standard errors."""
    n, t = 20_000, 0.3
    weights, means, covariances = TARGETS["gaussian" if kind == "gaussian" else "mixture"]
    oracle, label = make("gaussian" if kind == "gaussian" else "mixture"), 1 if kind == "label" else None
    if label is not None:
        weights = np.eye(3)[label]
    mean = weights @ means
    second = covariances + means[:, :, None] * means[:, None]
    covariance = np.einsum("k,kij->ij", weights, second) - np.outer(mean, mean)
    keys = jax.random.split(jax.random.key(5), n)
    draw = jax.jit(jax.vmap(lambda key: (oracle.sample(key, args=label), oracle.sample(key, LINEAR, t, label))))
    for samples, alpha, sigma in zip(draw(keys), (1.0, 1 - t), (0.0, t), strict=True):
        samples = np.float64(samples)
        total = alpha**2 * covariance + sigma**2 * np.eye(3)
        std = np.sqrt(np.diag(total))
        assert (np.abs(samples.mean(axis=0) - alpha * mean) < 4.5 * std / math.sqrt(n)).all()
        found = np.cov(samples.T)
        # Twice the Gaussian's standard error: a mixture may have heavier tails.
        assert (np.abs(found - total) < 9 * np.outer(std, std) * math.sqrt(2 / n)).all()


def test_empirical_samples_are_its_points():
    points, labels = jnp.arange(6.0).reshape(6, 1), np.array([0, 1, 0, 1, 0, 1])
    oracle = Empirical(points, labels)
    keys = jax.random.split(jax.random.key(0), 300)
    draw = jax.jit(jax.vmap(oracle.sample_data, in_axes=(0, None)))
    assert set(np.ravel(draw(keys, jnp.asarray(1)))) == {1.0, 3.0, 5.0}
    counts = np.unique(np.ravel(draw(keys, jnp.asarray(-1))), return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 25


# --- shapes, dtypes, messages ---------------------------------------------------------------------------------


def test_images_and_pytrees_are_vectors_in_another_shape():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    covariance = root @ root.T + 0.5 * np.eye(6)
    mean, x = np.float32(rng.normal(size=(2, 6)))
    data, noise, score, log_prob = gaussian_truth(0.6, 0.4, np.float64(x), np.float64(mean), covariance)

    def as_image(v):
        return jnp.asarray(v).reshape(2, 3, 1)

    def as_tree(v):
        return {"a": jnp.asarray(v[:4]).reshape(2, 2), "b": (jnp.asarray(v[4]), jnp.asarray(v[5:]))}

    def twice(tree):
        return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tree)

    @jax.jit
    def evaluate(oracle, x):
        density = oracle.log_prob(LINEAR, 0.4, x)
        return *oracle.data_and_noise(LINEAR, 0.4, x), oracle.score(LINEAR, 0.4, x), density

    for shape, oracle in (
        (as_image, Gaussian(as_image(mean), covariance)),
        (as_tree, GaussianMixture(np.ones(2), twice(as_tree(mean)), np.stack([covariance] * 2))),
        (as_tree, Empirical(twice(as_tree(mean)))),
    ):
        *found, density = evaluate(oracle, shape(x))
        if isinstance(oracle, Empirical):
            exact = mean, (np.float64(x) - 0.6 * mean) / 0.4, -(np.float64(x) - 0.6 * mean) / 0.16
        else:
            exact = data, noise, score
            assert density == pytest.approx(log_prob, rel=1e-5)
        for value, truth in zip(found, exact, strict=True):
            truth = shape(truth.astype(np.float32))
            assert jax.tree.structure(value) == jax.tree.structure(truth)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), value, truth)
        assert jax.tree.structure(oracle.like) == jax.tree.structure(shape(x))
        assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, oracle.like, shape(x)))
    sample = jax.jit(lambda oracle, key: oracle.sample(key, LINEAR, 0.5))(oracle, jax.random.key(0))
    assert jax.tree.structure(sample) == jax.tree.structure(oracle.like)


def test_forms_of_a_covariance():
    mean, x = jnp.array([1.0, -1.0]), jnp.array([0.3, 0.8])
    score = jax.jit(lambda oracle: oracle.score(LINEAR, 0.4, x))
    full = score(Gaussian(mean, np.diag([0.25, 0.25])))
    isotropic = Gaussian.isotropic(mean, 0.5)
    for oracle in (Gaussian(mean, 0.25), Gaussian(mean, np.array([0.25, 0.25])), isotropic):
        np.testing.assert_allclose(score(oracle), full, rtol=1e-6)
    np.testing.assert_allclose(isotropic.covariance, 0.25 * np.eye(2))
    matrix = np.array([[2.0, 0.3], [0.3, 0.5]])
    np.testing.assert_allclose(Gaussian(mean, matrix).covariance, matrix, rtol=1e-6)
    means, exact = jnp.stack([mean, -mean]), [0.25 * np.eye(2)] * 2
    exact = mixture_truth(0.6, 0.4, np.float64(x), [0.75, 0.25], np.float64(means), exact)[2]
    for covariances in (0.25, np.full(2, 0.25), np.full((2, 2), 0.25), np.stack([np.diag([0.25, 0.25])] * 2)):
        found = score(GaussianMixture(np.array([3, 1]), means, covariances))
        np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.quick
def test_a_singular_covariance_has_a_denoiser_everywhere():
    oracle = Gaussian(jnp.array([1.0, 2.0]), np.array([4.0, 0.0]))
    for t in (0.0, 0.5, 1.0):
        found = oracle.denoised(LINEAR, t, jnp.array([3.0, 2.0]))
        assert found[1] == 2 and jnp.isfinite(found[0])
    gradient = jax.jacfwd(lambda x: oracle.denoised(LINEAR, 0.0, x))(jnp.array([3.0, 2.0]))
    np.testing.assert_allclose(gradient, np.diag([1.0, 0.0]))
    assert jnp.isfinite(oracle.score(LINEAR, 1e-3, jnp.array([3.0, 2.0]))).all()


def test_given_a_measurement():
    """The posterior of the data given y = A x_0 + noise: the joint Gaussian; a mixture by quadrature."""
    _, means, covariances = TARGETS["gaussian"]
    matrix, y, std = np.array([[1.0, -0.5, 0.2], [0.0, 1.0, 1.0]]), np.array([0.3, -1.2]), 0.4
    joint = matrix @ covariances[0] @ matrix.T + std**2 * np.eye(2)
    gain = covariances[0] @ matrix.T @ np.linalg.inv(joint)
    posterior = make("gaussian").given(matrix, y, std)
    np.testing.assert_allclose(posterior.mean, means[0] + gain @ (y - matrix @ means[0]), rtol=1e-5)
    np.testing.assert_allclose(posterior.covariance, covariances[0] - gain @ matrix @ covariances[0], atol=1e-5)

    w, m, s, slope = np.array([0.6, 0.4]), np.array([-1.0, 1.0]), np.array([0.5, 0.3]), 0.7
    mixture = GaussianMixture(w, jnp.float32(m)[:, None], s**2, labels=np.array([3, 8]))
    found = mixture.given(np.array([[slope]]), np.array([0.5]), 0.6)
    grid = np.linspace(-6, 6, 100_001)
    density = (w / s) @ np.exp(-0.5 * ((grid - m[:, None]) / s[:, None]) ** 2)
    density *= np.exp(-0.5 * ((0.5 - slope * grid) / 0.6) ** 2)
    mean = (density * grid).sum() / density.sum()
    second = (density * grid**2).sum() / density.sum()
    posterior_weights = np.exp(found.log_weights)
    np.testing.assert_allclose(posterior_weights @ found.means[:, 0], mean, rtol=1e-5)
    variances = found.eigenvalues[:, 0] + found.means[:, 0] ** 2
    np.testing.assert_allclose(posterior_weights @ variances, second, rtol=1e-5)
    assert (found.labels == mixture.labels).all()


@pytest.mark.quick
def test_dtypes():
    oracle = Gaussian(jnp.zeros(3), 1.0)
    x = jnp.ones(3, jnp.bfloat16)
    assert oracle.score(LINEAR, 0.5, x).dtype == jnp.bfloat16
    assert oracle.log_prob(LINEAR, 0.5, x).dtype == jnp.float32
    assert oracle.sample(jax.random.key(0)).dtype == jnp.float32
    integers = Gaussian(np.arange(3), 1)
    assert integers.mean.dtype == jnp.float32


@pytest.mark.quick
def test_messages():
    mean = jnp.zeros(2)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Gaussian(mean, np.ones(3))
    with pytest.raises(ValueError, match="not symmetric"):
        Gaussian(mean, np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="not positive semi-definite"):
        Gaussian(mean, np.array([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="not positive semi-definite"):
        Gaussian(mean, -1.0)
    with pytest.raises(ValueError, match="leading axis of 3"):
        GaussianMixture(np.ones(3), jnp.zeros((2, 2)), 1.0)
    with pytest.raises(ValueError, match="negative weight"):
        GaussianMixture(np.array([1.0, -1.0]), jnp.zeros((2, 2)), 1.0)
    with pytest.raises(ValueError, match=r"labels have shape \(3,\)"):
        GaussianMixture(np.ones(2), jnp.zeros((2, 2)), 1.0, labels=np.arange(3))
    oracle = Gaussian(mean, 1.0)
    with pytest.raises(ValueError, match="without a batch axis"):
        oracle.score(LINEAR, 0.5, jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match="one of path and t"):
        oracle.sample(jax.random.key(0), LINEAR)
