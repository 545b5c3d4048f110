"""Equal numbers in torchcfm: its pairs (x_t, u_t) for given noise, its plans by POT. Time runs the other way there.

In float32; behind a tolerance is what was measured with torchcfm 1.0.7 and POT.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.alike import BATCH, DATA, RNG, X, check, importorskip

import flowsolve as fs

torch = importorskip("torch")
cfm = importorskip("torchcfm.conditional_flow_matching")
OTPlanSampler = importorskip("torchcfm.optimal_transport").OTPlanSampler

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

T = np.array([0.1, 0.35, 0.6, 0.95], np.float32)  # their time
LINEAR = fs.paths.Linear()
PLAN = (RNG.normal(size=(8, 2)).astype(np.float32), RNG.normal(size=(8, 2)).astype(np.float32) + 1)  # noise, data


def theirs(matcher, *, noise=None):
    """(x_t, u_t) from the source X to DATA at their times T."""
    if noise is not None:
        matcher.sample_noise_like = lambda x: torch.from_numpy(noise)
    _, x_t, u_t = cfm.ConditionalFlowMatcher.sample_location_and_conditional_flow(
        matcher, torch.from_numpy(X), torch.from_numpy(DATA), torch.from_numpy(T)
    )
    return x_t.numpy(), u_t.numpy()


def pairs(path):
    """(x_t, -velocity) of the same pairs here."""

    def one(t, data, noise):
        d_alpha, d_sigma = path.derivatives(t)
        return path.interpolate(t, data, noise), -(d_alpha * data + d_sigma * noise)

    return jax.vmap(one)(jnp.asarray(1 - T), DATA, X)


def test_independent():
    for given, found in zip(theirs(cfm.ConditionalFlowMatcher(0.0)), pairs(LINEAR), strict=True):
        check(given, found, 2e-6)  # 3e-7


def test_variance_preserving():
    matcher = cfm.VariancePreservingConditionalFlowMatcher(0.0)
    for given, found in zip(theirs(matcher), pairs(fs.paths.Trigonometric()), strict=True):
        check(given, found, 2e-6)  # 3e-7


def test_target():
    """Their noise is the source, and their velocity a quotient."""
    matcher = cfm.TargetConditionalFlowMatcher(0.01)
    given, found = theirs(matcher, noise=X), pairs(fs.paths.Linear(sigma_min=0.01))
    check(given[0], found[0], 2e-6)  # 2e-7
    check(given[1], found[1], 1e-5)  # 4e-7


def test_constant_width_is_a_path():
    """x_t = t x_1 + (1 - t) x_0 + sigma eps with normal x_0: alpha, sigma of its marginals, and E[u_t | x_t, x_1]."""
    width = 0.3
    path = fs.paths.Path(lambda t: 1 - t, lambda t: jnp.sqrt(t**2 + width**2))
    num = 200_000
    x_0, eps = np.random.default_rng(1).normal(size=(2, num)).astype(np.float32)
    x_1, t = np.float32(0.7), np.float32(0.4)
    matcher = cfm.ConditionalFlowMatcher(width)
    matcher.sample_noise_like = lambda x: torch.from_numpy(eps)
    _, x_t, u_t = matcher.sample_location_and_conditional_flow(
        torch.from_numpy(x_0), torch.full((num,), x_1), torch.full((num,), t)
    )
    x_t, u_t = x_t.numpy(), u_t.numpy()
    alpha, sigma = path.coefficients(jnp.asarray(1 - t))
    # Five standard errors.
    assert abs(x_t.mean() - alpha * x_1) < 5 * sigma / np.sqrt(num)
    assert abs(x_t.std() - sigma) < 5 * sigma / np.sqrt(2 * num)
    # The regression of u on x_t is linear; its slope and value are the path's velocity of (x_1, eps(x_t)).
    slope, value = np.polyfit(x_t - alpha * x_1, u_t, 1)
    d_alpha, d_sigma = path.derivatives(jnp.asarray(1 - t))
    assert abs(slope - -d_sigma / sigma) < 5 * np.std(u_t) / sigma / np.sqrt(num)
    assert abs(value - -d_alpha * x_1) < 5 * np.std(u_t) / np.sqrt(num)


def test_bridge():
    """x_t, and the regression target x_1 - x_0 + gamma' z, without their + 1e-8."""
    noise = RNG.normal(size=(BATCH, 2)).astype(np.float32)
    given = theirs(cfm.SchrodingerBridgeConditionalFlowMatcher(sigma=0.5), noise=noise)
    flow = fs.BridgeFlow(lambda t, x, args=None, *, key=None: x, 0.5, fs.sources.Normal())

    def one(t, data, source, z):
        return flow.interpolate(t, data, source, z), -(source - data + flow.width(t)[1] * z)

    found = jax.vmap(one)(jnp.asarray(1 - T), DATA, X, noise)
    check(given[0], found[0], 2e-6)  # 2e-7
    check(given[1], found[1], 1e-5)  # 4e-7


def test_bridge_loss():
    """Their two losses, [SF]2M: (v - u)^2 and (lambda s + eps)^2, of networks that are the identity."""
    sigma, noise = 0.5, RNG.normal(size=(BATCH, 2)).astype(np.float32)
    matcher = cfm.SchrodingerBridgeConditionalFlowMatcher(sigma=sigma)
    x_t, u_t = theirs(matcher, noise=noise)
    weight = matcher.compute_lambda(torch.from_numpy(T)).numpy()[:, None]
    given = np.mean((x_t - u_t) ** 2 + (weight * (sigma**2 / 2 * np.tanh(x_t)) + noise) ** 2, axis=1)
    flow = fs.BridgeFlow(
        lambda t, x, args=None, *, key=None: -x,
        sigma,
        fs.sources.Normal(),
        lambda t, x, args=None, *, key=None: jnp.tanh(x),
    )
    loss = fs.losses.BridgeRegression(fs.couplings.Independent())
    found = jax.vmap(lambda t, data, source, z: loss.one(flow, data, t=t, source=source, noise=z))(
        jnp.asarray(1 - T), DATA, X, noise
    )
    check(given, found, 1e-5)  # 1e-7


def test_regression_loss():
    x_t, u_t = theirs(cfm.ConditionalFlowMatcher(0.0))
    given = np.mean((np.tanh(x_t) * (1 + T[:, None]) - u_t) ** 2, axis=1)
    network = fs.TimeReversed(
        lambda t, x, args=None, *, key=None: jnp.tanh(x) * (1 + t), LINEAR, fs.predictions.Velocity()
    )
    flow = fs.Flow(network, LINEAR, fs.predictions.Velocity())
    found = jax.vmap(lambda t, data, noise: fs.losses.Regression().one(flow, data, t=t, noise=noise))(
        jnp.asarray(1 - T), DATA, X
    )
    check(given, found, 1e-5)  # 1e-7


def test_exact_plan():
    noise, data = PLAN
    plan = OTPlanSampler(method="exact").get_map(torch.from_numpy(noise), torch.from_numpy(data))
    order = fs.couplings.Assignment().order(jax.random.key(0), jnp.asarray(data), jnp.asarray(noise))
    assert np.array_equal(np.argmax(plan, axis=0), order)


def test_sinkhorn_plan():
    noise, data = PLAN
    sampler = OTPlanSampler(method="sinkhorn", reg=2 * 0.7**2)
    plan = sampler.get_map(torch.from_numpy(noise), torch.from_numpy(data))
    coupling = fs.couplings.Sinkhorn(2 * 0.7**2, tolerance=1e-6)
    check(plan.T, jnp.exp(coupling.log_plan(jnp.asarray(data), jnp.asarray(noise))), 1e-4)  # 2e-6


def test_what_is_drawn():
    """n of n pairs with replacement from an exact plan leave out about 1/e of the data; a permutation none."""
    noise, data = (torch.from_numpy(x) for x in RNG.normal(size=(2, 256, 2)).astype(np.float32))
    np.random.seed(0)  # noqa: NPY002, the generator that POT's plans are drawn with there
    _, drawn = OTPlanSampler(method="exact").sample_plan(noise, data)
    left_out = 1 - len(np.unique(drawn.numpy(), axis=0)) / 256
    assert abs(left_out - np.exp(-1)) < 0.06
    order = fs.couplings.Assignment().order(jax.random.key(0), jnp.asarray(data.numpy()), jnp.asarray(noise.numpy()))
    assert len(np.unique(order)) == 256


def test_wasserstein():
    given = importorskip("torchcfm.optimal_transport").wasserstein(*(torch.from_numpy(x) for x in PLAN))
    np.testing.assert_allclose(given, fs.metrics.wasserstein(*(jnp.asarray(x) for x in PLAN)), rtol=1e-5)


def test_sampling_by_torchdiffeq():
    """Euler and midpoint steps of a trained field."""
    odeint = importorskip("torchdiffeq").odeint
    network = fs.TimeReversed(
        lambda t, x, args=None, *, key=None: jnp.tanh(x) * (1 + t), LINEAR, fs.predictions.Velocity()
    )
    flow = fs.Flow(network, LINEAR, fs.predictions.Velocity())
    for method, solver in (("euler", diffrax.Euler()), ("midpoint", diffrax.Midpoint())):
        given = odeint(
            lambda t, x: torch.tanh(x) * (1 + t),
            torch.from_numpy(X),
            torch.tensor([0.0, 1.0]),
            method=method,
            options={"step_size": 0.1},
        )[-1]
        solve = eqx.Partial(fs.solve, solver=solver, grid=fs.grids.Uniform(10))
        check(given.numpy(), fs.batched(solve)(flow, jnp.asarray(X)).ys[:, -1], 1e-5)  # 2e-7
