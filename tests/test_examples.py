"""What the examples compute beside the library: distances, scalings, bits. They are run by `--smoke` elsewhere."""

import importlib.util
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

import flowsolve as fs

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(file):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"{file.stem}_script", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits():
    return load(EXAMPLES / "digits.py")


@pytest.fixture(scope="module")
def posterior():
    return load(EXAMPLES / "posterior.py")


@pytest.fixture(scope="module")
def splits(digits):
    return digits.load()


def test_digits_split_is_disjoint_and_stratified(splits):
    train, held_out = splits
    assert len(train.images) == 1_437 and len(held_out.images) == 360
    counts = np.bincount(train.labels) / 1_437 - np.bincount(held_out.labels) / 360
    assert np.abs(counts).max() < 0.01
    both = np.concatenate([train.images, held_out.images]).reshape(1_797, -1)
    assert len(np.unique(both, axis=0)) == len(both)


def test_digits_dequantise_fills_the_bins_and_rounds_back(digits, splits):
    levels = splits[1].images
    x = digits.dequantise(levels, jax.random.key(0))
    assert jnp.array_equal(digits.quantise(x), levels)
    assert -1 <= x.min() < -0.999 and 0.999 < x.max() <= 1
    # Uniform in a bin of width 2/17: mean in its middle, variance width^2/12.
    offset = np.asarray(x) - (2 / 17 * (np.asarray(levels) + 0.5) - 1)
    error = np.sqrt((2 / 17) ** 2 / 12 / offset.size)
    assert abs(offset.mean()) < 4 * error
    np.testing.assert_allclose(offset.var(), (2 / 17) ** 2 / 12, rtol=0.03)


def test_digits_quantise_stays_on_the_levels(digits):
    assert digits.quantise(jnp.asarray([-7.0, -1.0, 1.0, 7.0])).tolist() == [0, 0, 16, 16]


def test_digits_frechet_distance_of_moments(digits):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 4)) @ rng.normal(size=(4, 4))
    assert abs(digits.frechet_distance(a, a)) < 1e-8
    # A shift leaves the covariance: the distance is the squared shift.
    np.testing.assert_allclose(digits.frechet_distance(a, a + np.array([1, 2, 0, 0])), 5.0, rtol=1e-8)
    # Twice the feature: tr(C + 4 C - 2 * 2 C) + |m|^2.
    centred = a - a.mean(axis=0)
    np.testing.assert_allclose(
        digits.frechet_distance(centred, 2 * centred), np.trace(np.cov(a, rowvar=False)), rtol=1e-8
    )


def test_digits_frechet_distance_against_a_matrix_root(digits):
    """Covariances that do not commute, one of them singular."""
    rng = np.random.default_rng(1)
    a = rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) + 1
    b = rng.normal(size=(300, 3)) @ rng.normal(size=(3, 5))
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(ca) @ cb @ scipy.linalg.sqrtm(ca)).real
    want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca + cb - 2 * root)
    np.testing.assert_allclose(digits.frechet_distance(a, b), want, rtol=1e-5)
    np.testing.assert_allclose(digits.frechet_distance(b, a), want, rtol=1e-5)


def test_digits_nearest_distance(digits):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(7, 8, 8)), rng.normal(size=(9, 8, 8))
    want = np.mean([min(np.linalg.norm(x - y) for y in b) for x in a])
    np.testing.assert_allclose(digits.nearest_distance(a, b), want, rtol=1e-10)
    assert digits.nearest_distance(b, b) < 1e-6


def test_digits_bits_of_an_untrained_flow(digits, splits):
    """Its velocity is 0, so its density is N(0, I) at the dequantised image."""
    split = digits.Split(splits[1].images[:3], splits[1].labels[:3])
    flow = digits.make_flow(digits.SMOKE, jax.random.key(0))
    mean, error = digits.bits_per_dimension(flow, split, jax.random.key(1))
    x = np.asarray(digits.dequantise(split.images, jax.random.key(1))).reshape(3, -1)
    nats = -0.5 * np.mean(x**2, axis=1) - 0.5 * np.log(2 * np.pi)
    bits = -nats / np.log(2) - np.log2(2 / 17)
    np.testing.assert_allclose(mean, bits.mean(), rtol=1e-5)
    np.testing.assert_allclose(error, bits.std() / np.sqrt(3), rtol=1e-3)


# An observation of each that many draws of the prior explain, so that a plain average over them is the evidence.
OBSERVED = {
    "Gaussian linear": 0.2 * np.cos(np.arange(10)),
    "two moons": np.array([0.1, -0.3]),
    "SLCP": np.array([1.0, -2.0, 3.0, 0.5, -2.0, 4.0, -1.5, -4.0]),
}


@pytest.mark.parametrize("name", OBSERVED)
def test_posterior_exact_draws_and_evidence(posterior, name):
    """Evidence and first two moments against the prior's draws, weighted by the likelihood."""
    task, x = posterior.TASKS[name], jnp.asarray(OBSERVED[name], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 400_000)
    theta = jax.jit(jax.vmap(lambda key: task.from_normal(jax.random.normal(key, (task.dim,)))))(keys)
    weights = np.exp(np.asarray(jax.jit(jax.vmap(lambda theta: task.log_likelihood(theta, x)))(theta), np.float64))
    size = posterior.FULL._replace(candidates=50_000, samples=5_000)
    evidence = np.exp(float(posterior.log_evidence(task, x[None], size, jax.random.key(1))[0]))
    error = weights.std() / np.sqrt(len(weights)) + 0.01 * evidence
    assert error < 0.05 * evidence
    assert abs(evidence - weights.mean()) < 4 * error

    draws = np.asarray(posterior.exact_draws(task, x, size, jax.random.key(2)), np.float64)
    theta, weights = np.asarray(theta, np.float64), weights / weights.sum()
    for power in (1, 2):
        want = weights @ theta**power
        variance = weights @ (theta**power - want) ** 2
        # Of the weighted mean by the delta method, and of the plain one.
        error = np.sqrt(weights**2 @ (theta**power - want) ** 2 + variance / len(draws))
        assert np.all(np.abs((draws**power).mean(axis=0) - want) < 4.5 * error)


class ExactVelocity(eqx.Module):
    """Of the posterior of Gaussian linear in normal numbers, N(x/(2 sqrt(0.1)), 1/2), or of another variance."""

    variance: jax.Array

    def __call__(self, t, z, x, *, key=None):
        del key
        mean = x / (2 * np.sqrt(np.float32(0.1)))
        slope = (t - (1 - t) * self.variance) / ((1 - t) ** 2 * self.variance + t**2)
        return slope * (z - (1 - t) * mean) - mean


def test_posterior_coverage_and_gain(posterior):
    """Of the exact posterior uniform and exact; posteriors too wide or too narrow are found out."""
    task = posterior.TASKS["Gaussian linear"]
    pairs = posterior.draw_pairs(task, jax.random.key(0), 500)
    fits = {}
    for variance in (0.5, 0.7, 0.35):
        network = ExactVelocity(jnp.asarray(variance))
        flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
        fits[variance] = scipy.stats.kstest(posterior.levels_of(flow, pairs), "uniform", alternative="two-sided")
        if variance == 0.5:
            got = np.asarray(posterior.gain_of(flow, pairs))
    assert fits[0.5].pvalue > 0.05
    assert fits[0.7].statistic > 0.2 and fits[0.35].statistic > 0.2
    evidence = posterior.log_evidence(task, pairs.x, posterior.SMOKE, jax.random.key(1))
    want = np.asarray(jax.vmap(task.log_likelihood)(pairs.theta, pairs.x) - evidence)
    # To the tolerance of the solves.
    np.testing.assert_allclose(got, want, atol=0.06)
    np.testing.assert_allclose(got.mean(), want.mean(), atol=2e-3)
