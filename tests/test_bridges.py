r"""Bridges: between two Gaussians everything about a Schroedinger bridge is known.

With reference diffusion sigma, ends N(m_0, s_0^2) and N(m_1, s_1^2) have the entropic coupling of covariance
c = (sqrt(4 s_0^2 s_1^2 + sigma^4) - sigma^2)/2, and the bridge's marginal is a Gaussian whose velocity and score are
linear (Janati et al., 2020, arXiv 2006.02572).
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import flowsolve as fs
from flowsolve import couplings, losses, sources

KEY = jax.random.key(0)
LIKE = jax.ShapeDtypeStruct((2,), jnp.float32)
DATA_MEAN, DATA_STD = np.array([1.0, -0.5]), 0.6
SOURCE_MEAN, SOURCE_STD = np.array([-1.0, 0.5]), 1.1
SIGMA = 0.8
COVARIANCE = (np.sqrt(4 * DATA_STD**2 * SOURCE_STD**2 + SIGMA**4) - SIGMA**2) / 2


def moments(t):
    """Mean, variance and half the derivative of the variance at t, and the derivative of the mean."""
    mean = (1 - t) * DATA_MEAN + t * SOURCE_MEAN
    variance = (1 - t) ** 2 * DATA_STD**2 + t**2 * SOURCE_STD**2 + t * (1 - t) * (2 * COVARIANCE + SIGMA**2)
    growth = -(1 - t) * DATA_STD**2 + t * SOURCE_STD**2 + (1 - 2 * t) * (COVARIANCE + SIGMA**2 / 2)
    return mean, variance, growth, SOURCE_MEAN - DATA_MEAN


class Exact(eqx.Module):
    """What perfect networks say, times 1 + error."""

    error: jax.Array
    of_score: bool = eqx.field(static=True)

    def __call__(self, t, x, args=None, *, key=None):
        mean, variance, growth, drift = moments(t)
        mean, drift = jnp.asarray(mean, x.dtype), jnp.asarray(drift, x.dtype)
        exact = -(x - mean) / variance if self.of_score else drift + growth / variance * (x - mean)
        return (1 + self.error) * exact


def draw(key, like):
    return jnp.asarray(SOURCE_MEAN, like.dtype) + SOURCE_STD * jax.random.normal(key, like.shape, like.dtype)


def density(x):
    return jnp.sum(jax.scipy.stats.norm.logpdf(x, jnp.asarray(SOURCE_MEAN, x.dtype), SOURCE_STD))


def bridge(error=0.0, score_error=0.0):
    networks = Exact(jnp.asarray(error), False), Exact(jnp.asarray(score_error), True)
    return fs.BridgeFlow(networks[0], SIGMA, sources.Source(draw, density), networks[1])


def check_moments(x):
    num = len(x)
    assert np.all(np.abs(x.mean(axis=0) - DATA_MEAN) < 4 * DATA_STD / np.sqrt(num))
    assert np.all(np.abs(x.var(axis=0) / DATA_STD**2 - 1) < 4 * np.sqrt(2 / num))


def test_the_probability_flow_carries_the_source_to_the_data():
    x = fs.sample(bridge(), LIKE, num=8192, key=KEY, solver=diffrax.Heun(), grid=fs.grids.Uniform(50))
    check_moments(np.asarray(x))


@pytest.mark.parametrize("w", [SIGMA**2, 0.2], ids=["the bridge", "less noise"])
def test_so_does_the_stochastic_equation(w):
    dynamics = fs.ReverseSDE(diffusion=lambda t: w)
    x = fs.sample(
        bridge(), LIKE, num=8192, key=KEY, solver=diffrax.Euler(), grid=fs.grids.Uniform(400), dynamics=dynamics
    )
    check_moments(np.asarray(x))
    # A wrong score is seen.
    wrong = fs.sample(
        bridge(score_error=-1.0),
        LIKE,
        num=8192,
        key=KEY,
        solver=diffrax.Euler(),
        grid=fs.grids.Uniform(400),
        dynamics=dynamics,
    )
    assert np.all(wrong.var(axis=0) / DATA_STD**2 > 1 + 4 * np.sqrt(2 / 8192))


def test_density():
    x = jnp.asarray([0.4, 0.1])
    wanted = scipy.stats.norm.logpdf(x, DATA_MEAN, DATA_STD).sum()
    np.testing.assert_allclose(fs.log_prob(bridge(), x), wanted, rtol=1e-5)


def pairs(num, key):
    """Draws from the entropic coupling."""
    matrix = np.linalg.cholesky([[DATA_STD**2, COVARIANCE], [COVARIANCE, SOURCE_STD**2]])
    both = np.asarray(jax.random.normal(key, (num, 2, 2))) @ matrix.T
    data, source = both[..., 0] + DATA_MEAN, both[..., 1] + SOURCE_MEAN
    return couplings.Pairs(jnp.asarray(data, jnp.float32), jnp.asarray(source, jnp.float32))


def test_the_optimum_of_the_loss_is_the_bridge():
    """Any other multiple of the exact velocity or score has a larger loss, by more than chance."""
    data = pairs(20_000, KEY)
    loss = losses.BridgeRegression(couplings.Independent())
    of = eqx.filter_jit(lambda flow: loss(flow, data, key=jax.random.key(1))[1].losses)
    exact = np.float64(of(bridge()))
    for errors in [(0.2, 0.0), (-0.2, 0.0), (0.0, 0.2), (0.0, -0.2)]:
        difference = np.float64(of(bridge(*errors))) - exact
        assert difference.mean() > 3 * difference.std() / np.sqrt(len(exact))


def test_loss_of_one_example():
    rng = np.random.default_rng(0)
    x0, x1, z = rng.normal(size=(3, 2))
    t, flow = 0.3, bridge()
    gamma = SIGMA * np.sqrt(t * (1 - t))
    d_gamma = SIGMA**2 * (1 - 2 * t) / (2 * gamma)
    x = (1 - t) * x0 + t * x1 + gamma * z
    mean, variance, growth, drift = moments(t)
    velocity, score = drift + growth / variance * (x - mean), -(x - mean) / variance
    parts = np.mean((velocity - (x1 - x0 + d_gamma * z)) ** 2), np.mean((gamma * score + z) ** 2)
    arrays = [jnp.asarray(v, jnp.float32) for v in (x0, x1, z)]
    for weight in (1.0, 2.5):
        loss = losses.BridgeRegression(couplings.Independent(), score_weight=weight)
        found = loss.one(flow, arrays[0], t=t, source=arrays[1], noise=arrays[2])
        np.testing.assert_allclose(found, parts[0] + weight * parts[1], rtol=1e-5)
    without = fs.BridgeFlow(flow.network, SIGMA, flow.source)
    found = losses.BridgeRegression(couplings.Independent()).one(
        without, arrays[0], t=t, source=arrays[1], noise=arrays[2]
    )
    np.testing.assert_allclose(found, parts[0], rtol=1e-5)


def test_minibatch_plans_have_the_bridges_covariance():
    """Sinkhorn's plan at epsilon = 2 sigma^2 between two large batches is near the entropic coupling."""
    keys = jax.random.split(KEY, 2)
    data = pairs(1024, keys[0]).data
    source = jax.vmap(lambda key: draw(key, LIKE))(jax.random.split(keys[1], 1024))
    coupling = couplings.Sinkhorn(2 * SIGMA**2, replace=True)
    partner = eqx.filter_jit(coupling)(KEY, data, source)
    data, partner = np.asarray(data), np.asarray(partner)
    found = np.mean((data - data.mean(axis=0)) * (partner - partner.mean(axis=0)), axis=0)
    assert np.all(np.abs(found - COVARIANCE) < 0.1)
    assert COVARIANCE > 0.3


@pytest.mark.quick
def test_what_it_does_not_offer_is_refused_by_type(untyped):
    flow = bridge()
    without = fs.BridgeFlow(flow.network, SIGMA, flow.source)
    x = jnp.ones(2)
    np.testing.assert_allclose(flow.score(0.4, x), Exact(jnp.asarray(0.0), True)(0.4, x), rtol=1e-6)
    with pytest.raises(TypeError, match="A score was asked of a BridgeFlow without a score: give it a score_network"):
        without.score(0.4, x)
    options = {"num": 2, "key": KEY, "grid": fs.grids.Uniform(4)}
    noisy = {"solver": diffrax.Euler(), "dynamics": fs.ReverseSDE(diffusion=lambda t: SIGMA**2)}
    with pytest.raises(TypeError, match="BridgeFlow without a score"):
        fs.sample(without, LIKE, **options, **noisy)
    with pytest.raises(TypeError, match=r"takes its noise from a Gaussian path.*diffusion"):
        fs.sample(flow, LIKE, **options, solver=diffrax.Euler(), dynamics=fs.ReverseSDE(1.0))
    for solver in (fs.solvers.DDIM(), fs.solvers.UniPC(2)):
        with pytest.raises(TypeError, match="steps through the denoised data, but a BridgeFlow predicts its velocity"):
            fs.sample(flow, LIKE, **options, solver=solver)
    with pytest.raises(ValueError, match="score_weight = -1"):
        losses.BridgeRegression(couplings.Independent(), score_weight=-1.0)
    with pytest.raises(TypeError, match="dropout is a float, but wants None or a"):
        losses.BridgeRegression(couplings.Independent(), dropout=0.1)
    with pytest.raises(ValueError, match="sigma = 0"):
        fs.BridgeFlow(flow.network, 0.0, flow.source)
