"""score_sde's formulas, written by hand in NumPy: there is no package of it.

Both sides agree to 2e-6, of twenty steps of a chain to 3e-5, and to what the tolerances say.

From yang-song/score_sde, `sampling.py` at 947edf4 and `models/utils.py` at 20cd7db, and from the same authors'
score_sde_pytorch at c8c18d1 `sde_lib.py`, `losses.py` and `likelihood.py`, of which the JAX files are the model.
"""

import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.alike import DATA, RNG, X, check, ours, toy
from scipy import integrate

import flowsolve as fs

pytestmark = pytest.mark.slow

BETA_MIN, BETA_MAX = 0.1, 20.0
VP = fs.paths.VP(BETA_MIN, BETA_MAX, t_data=1e-3)
SUB_VP = fs.paths.SubVP(BETA_MIN, BETA_MAX, t_data=1e-3)
VE = fs.paths.VE(fs.paths.Geometric(0.01, 50.0))
TS = np.array([1e-3, 0.05, 0.4, 1.0])
Z = RNG.normal(size=(20, 4, 2))


def log_mean_coefficient(t):
    return -0.25 * t**2 * (BETA_MAX - BETA_MIN) - 0.5 * t * BETA_MIN


def marginal(name, t):
    """`marginal_prob`: the factor of the mean and the standard deviation, in float64."""
    if name == "VE":
        return np.ones_like(t), 0.01 * (50 / 0.01) ** t
    factor = np.exp(log_mean_coefficient(t))
    return factor, np.sqrt(1 - factor**2) if name == "VP" else 1 - factor**2


def forward(name, t):
    """`sde`: the drift's factor and the diffusion."""
    beta = BETA_MIN + t * (BETA_MAX - BETA_MIN)
    if name == "VE":
        return np.zeros_like(t), marginal(name, t)[1] * np.sqrt(2 * (np.log(50) - np.log(0.01)))
    if name == "VP":
        return -0.5 * beta, np.sqrt(beta)
    discount = 1 - np.exp(-2 * BETA_MIN * t - (BETA_MAX - BETA_MIN) * t**2)
    return -0.5 * beta, np.sqrt(beta * discount)


PATHS = {"VP": VP, "subVP": SUB_VP, "VE": VE}


@pytest.mark.parametrize("name", PATHS)
def test_sde(name):
    path, ts = PATHS[name], jnp.asarray(TS)
    for given, found in zip(marginal(name, TS), jax.vmap(path.coefficients)(ts), strict=True):
        np.testing.assert_allclose(found, given, rtol=5e-6)
    drift, diffusion = forward(name, TS)
    np.testing.assert_allclose(jax.vmap(path.f)(ts), drift, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(jnp.sqrt(jax.vmap(path.g_squared)(ts)), diffusion, rtol=2e-4)


def test_small_times():
    """The width of sub-VP as they compute it, in float32, has lost its digits at t = 1e-5; ours has not."""
    exact = -np.expm1(2 * log_mean_coefficient(1e-5))
    rounded = np.float32(1) - np.exp(np.float32(2 * log_mean_coefficient(1e-5)))
    assert 0.03 < abs(rounded / exact - 1) < 0.07  # 0.047
    np.testing.assert_allclose(SUB_VP.sigma(1e-5), exact, rtol=1e-6)


def test_discretised_betas():
    """DDPM's chain of `VPSDE.discretize`."""
    betas = np.linspace(BETA_MIN, BETA_MAX, 1000) / 1000
    path = fs.paths.Discrete(betas)
    found = jax.vmap(lambda k: path.alpha(path.time_of(k)) ** 2)(jnp.arange(1000))
    check(np.cumprod(1 - betas), found, 1e-5)


def network(xp, x, t):
    """A model of noise, given its labels 999 t; score = -model/std."""
    return toy(xp, x, 999 * t / 1000)


def flow_on(path):
    return fs.Flow(lambda t, x, args=None, *, key=None: network(jnp, x, t), path, fs.predictions.Noise())


@pytest.mark.parametrize("name", ["VP", "subVP"])
def test_score_and_reverse_drift(name):
    """`get_score_fn`, and the drift of the probability flow, of `reverse(..., probability_flow=True)`."""
    flow, t = flow_on(PATHS[name]), 0.4
    score = -network(np, X, t) / marginal(name, np.asarray(t))[1]
    drift, diffusion = forward(name, np.asarray(t))
    check(score, jax.vmap(lambda x: flow.score(t, x))(X), 1e-5)
    check(drift * X - 0.5 * diffusion**2 * score, jax.vmap(lambda x: flow.velocity(t, x))(X), 1e-5)


def test_euler_maruyama():
    """`EulerMaruyamaPredictor` with the same noise, each step from t to the next time."""
    ts = np.linspace(1, 1e-3, 21)
    x = X.astype(np.float64)
    for i, (t, s) in enumerate(itertools.pairwise(ts)):
        drift, diffusion = forward("VP", t)
        score = -network(np, x, t) / marginal("VP", t)[1]
        x = x + (drift * x - diffusion**2 * score) * (s - t) + diffusion * np.sqrt(t - s) * Z[i]
    found = ours(flow_on(VP), diffrax.Euler(), ts, dynamics=fs.ReverseSDE(1.0), noise=Z)
    check(x, found, 1e-4)


def test_ancestral():
    """`AncestralSamplingPredictor` on their chains, one step down the table each: VP's noise is beta, VE's smaller."""
    betas = np.linspace(BETA_MIN, BETA_MAX, 1000) / 1000
    path = fs.paths.Discrete(betas)
    kept = np.cumprod(1 - betas)
    x = X.astype(np.float64)
    for i, k in enumerate(range(600, 580, -1)):
        score = -toy(np, x, 0.3) / np.sqrt(1 - kept[k])
        x = (x + betas[k] * score) / np.sqrt(1 - betas[k]) + np.sqrt(betas[k]) * Z[i]
    flow = fs.Flow(lambda t, x, args=None, *, key=None: toy(jnp, x, 0.3), path, fs.predictions.Noise())
    ts = np.arange(601, 580, -1) / 1000
    solver = fs.solvers.Ancestral(fs.solvers.LargeVariance())
    check(x, ours(flow, solver, ts, dynamics=fs.ReverseSDE(1.0), noise=Z), 2e-4)

    sigmas = np.exp(np.linspace(np.log(0.01), np.log(50), 1000))
    x = X.astype(np.float64)
    for i, k in enumerate(range(600, 580, -1)):
        score, step = -toy(np, x, 0.3) / sigmas[k], sigmas[k] ** 2 - sigmas[k - 1] ** 2
        x = x + step * score + np.sqrt(sigmas[k - 1] ** 2 * step / sigmas[k] ** 2) * Z[i]
    flow = fs.Flow(lambda t, x, args=None, *, key=None: toy(jnp, x, 0.3), VE, fs.predictions.Noise())
    check(
        x, ours(flow, fs.solvers.Ancestral(), np.arange(600, 579, -1) / 999, dynamics=fs.ReverseSDE(1.0), noise=Z), 2e-4
    )


def test_annealed_langevin():
    """`AnnealedLangevinDynamics` with alpha = 1, after one step of DDIM: length 2 (snr sigma)^2."""
    snr, t, s = 0.16, 0.5, 0.4
    (alpha_t, sigma_t), (alpha_s, sigma_s) = marginal("VP", t), marginal("VP", s)
    x = X.astype(np.float64)
    eps = network(np, x, t)
    x = alpha_s * (x - sigma_t * eps) / alpha_t + sigma_s * eps
    size = 2 * (snr * sigma_s) ** 2
    x = x - size * network(np, x, s) / sigma_s + np.sqrt(2 * size) * Z[0]
    solver = fs.solvers.LangevinCorrector(fs.solvers.DDIM(), step_size=2 * snr**2)
    check(x, ours(flow_on(VP), solver, [t, s], dynamics=fs.dynamics.AddedNoise(), noise=Z[:1]), 1e-5)


def test_losses():
    """`get_sde_loss_fn`: (score std + z)^2, and with the likelihood's weighting g^2 (score + z/std)^2; means."""
    times = np.array([0.1, 0.35, 0.6, 0.95])
    factor, std = (c[:, None] for c in marginal("VP", times))
    noisy = factor * DATA + std * X
    score = -network(np, noisy, times[:, None]) / std
    plain = np.mean((score * std + X) ** 2, axis=1)
    likelihood = np.mean((score + X / std) ** 2, axis=1) * forward("VP", times)[1] ** 2

    def found(weight):
        loss = fs.losses.Regression(weight=weight)
        return jax.vmap(lambda t, x, z: loss.one(flow_on(VP), x, t=t, noise=z))(jnp.asarray(times), DATA, X)

    check(plain, found(fs.weights.SNR()), 1e-5)
    check(plain, found(None), 1e-5)

    def weight(path, t):
        return path.g_squared(t) * path.alpha(t) ** 2 / path.sigma(t) ** 4

    check(likelihood, found(fs.weights.Weight(weight)), 1e-5)


def test_likelihood():
    """`get_likelihood_fn` by SciPy's RK45 in bits/dim, with an exact divergence; their offset is that of [-1, 1]."""
    x, d = DATA[0].astype(np.float64), 2

    def drift(t, x):
        factor, diffusion = forward("VP", t)
        return factor * x + 0.5 * diffusion**2 * network(np, x, t) / marginal("VP", t)[1]

    def field(t, state):
        x, h = state[:d], 1e-5
        divergence = sum((drift(t, x + h * e)[i] - drift(t, x - h * e)[i]) / (2 * h) for i, e in enumerate(np.eye(d)))
        return np.append(drift(t, x), divergence)

    end = integrate.solve_ivp(field, (1e-3, 1.0), np.append(x, 0.0), rtol=1e-8, atol=1e-8).y[:, -1]
    prior = -d / 2 * np.log(2 * np.pi) - np.sum(end[:d] ** 2) / 2
    bits = -(prior + end[d]) / np.log(2) / d + 7
    log_p = fs.log_prob(flow_on(VP), jnp.asarray(x), controller=diffrax.PIDController(rtol=1e-6, atol=1e-6))
    np.testing.assert_allclose(fs.bits_per_dim(log_p, d, bin_width=2 / 256), bits, atol=2e-3)
