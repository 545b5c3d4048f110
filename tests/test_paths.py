"""Every path against float64 formulas, finite differences and brute-force Gaussian conditioning."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import PATHS, REFERENCES, times

from flowsolve import paths

ULP = 2.0**-23


@functools.cache
def table(name):
    """What a path says at times (n,), compiled once."""
    path = PATHS[name]

    def one(t):
        alpha, sigma = path.coefficients(t)
        d_alpha, d_sigma = path.derivatives(t)
        log_snr = path.log_snr(t)
        return {
            "alpha": alpha,
            "sigma": sigma,
            "d_alpha": d_alpha,
            "d_sigma": d_sigma,
            "second": jax.jvp(path.derivatives, (t,), (jnp.ones_like(t),))[1],
            "log_snr": log_snr,
            "time_at": path.time_at(alpha, sigma),
            "inverse": path.inverse_log_snr(log_snr),
        }

    return jax.jit(jax.vmap(one))


def inward(t):
    """The neighbouring float32 times, inside the path at its far end."""
    return np.where(t == t[-1], np.nextafter(t, t[0]), np.nextafter(t, np.float32(np.inf)))


@pytest.mark.parametrize("name", PATHS)
def test_values_and_derivatives_in_float32(name):
    """Within 8 ulp, or what an ulp of t makes of them, of independent float64 formulas; the ends included."""
    t = times(name, 48)
    got = table(name)(t)
    exact = REFERENCES[name](np.float64(t))
    moved = REFERENCES[name](np.float64(inward(t)))
    for key, value, next_value in zip(("alpha", "sigma", "d_alpha", "d_sigma"), exact, moved, strict=True):
        error = np.abs(np.float64(got[key]) - value)
        allowed = 8 * (ULP * np.abs(value) + np.abs(next_value - value)) + 1e-30
        assert (error <= allowed).all(), (key, t[error > allowed], (error / allowed).max())
    # The derivative in t of a velocity is finite, the ends included.
    assert np.isfinite(got["second"]).all()


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_against_finite_differences(name, x64):
    """alpha', sigma', f and g^2 of the library's own alpha and sigma, in float64."""
    t = np.float64(times(name))[1:-1]
    path = PATHS[name]
    h = 1e-3 * np.minimum(t - path.t_data, path.t_noise - t)

    @jax.jit
    @jax.vmap
    def evaluate(t):
        names = ("alpha", "sigma", "d_alpha", "d_sigma", "f", "g_squared", "g_squared_over_2_sigma")
        values = (
            *path.coefficients(t),
            *path.derivatives(t),
            path.f(t),
            path.g_squared(t),
            path.g_squared_over_2_sigma(t),
        )
        return dict(zip(names, values, strict=True))

    got = evaluate(np.concatenate([t, t + h, t - h]))
    here, upper, lower = (
        {key: np.asarray(value)[i * t.size : (i + 1) * t.size] for key, value in got.items()} for i in range(3)
    )
    rounding = 1e-15 / h

    def close(found, slope, size):
        error = np.abs(found - slope)
        assert (error <= 1e-5 * np.abs(slope) + rounding * size).all(), (t, found, slope)

    for key in ("alpha", "sigma"):
        close(here["d_" + key], (upper[key] - lower[key]) / (2 * h), here[key])
    # The derivatives of ln alpha and of sigma^2 give the forward SDE: d sigma^2/dt = 2 f sigma^2 + g^2.
    close(here["f"], (np.log(upper["alpha"]) - np.log(lower["alpha"])) / (2 * h), 1)
    growth = (upper["sigma"] ** 2 - lower["sigma"] ** 2) / (2 * h)
    close(2 * here["f"] * here["sigma"] ** 2 + here["g_squared"], growth, here["sigma"] ** 2)
    np.testing.assert_allclose(2 * here["sigma"] * here["g_squared_over_2_sigma"], here["g_squared"], rtol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_log_snr_decreases_and_has_an_inverse(name):
    t = times(name, 48)
    got = table(name)(t)
    log_snr = np.float64(got["log_snr"])
    assert (np.diff(log_snr) < 0).all()
    assert not np.isnan(log_snr).any()
    alpha, sigma, d_alpha, d_sigma = REFERENCES[name](np.float64(t))
    assert (np.isposinf(log_snr) == (sigma == 0)).all()
    assert (np.isneginf(log_snr) == (alpha == 0)).all()

    # The sensitivity of t to a relative error in alpha : sigma, and to an error in log_snr.
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.abs(alpha * d_sigma - sigma * d_alpha) / (alpha * sigma)
        sensitivity = np.where(alpha * sigma == 0, 0, 1 / rate)
        from_log_snr = np.where(alpha * sigma == 0, 0, sensitivity * np.abs(log_snr))
    low, high = t[0], t[-1]
    for key, extra in (("time_at", 0), ("inverse", from_log_snr)):
        error = np.abs(np.float64(got[key]) - np.float64(t))
        assert (error <= 8 * ULP * (t + sensitivity + extra)).all(), (key, t, error)
    # At an end where log_snr is infinite, the time is exact: a grid may contain it.
    for end in (low, high):
        if np.isinf(log_snr[t == end]).all():
            assert got["time_at"][t == end] == end and got["inverse"][t == end] == end


@pytest.mark.parametrize("name", PATHS)
def test_posterior_is_gaussian_conditioning(name, x64):
    """q(x_s | x_t, x_0) from the 2 x 2 joint covariance of (x_s, x_t) given x_0."""
    path = PATHS[name]
    t = np.concatenate([[path.t_data], np.float64(times(name))[1:-1], [path.t_noise]])
    # Neighbours, far apart, and both ends.
    later = np.concatenate([t[1:], t[5:], t[-1:]])
    earlier = np.concatenate([t[:-1], t[:-5], t[:1]])
    x_t, x_0 = 0.7, -1.3
    posterior = jax.jit(jax.vmap(lambda s, t: path.posterior(s, t, jnp.array([x_t]), jnp.array([x_0]))))
    mean, variance = posterior(earlier, later)

    (alpha_s, sigma_s, *_), (alpha_t, sigma_t, *_) = REFERENCES[name](earlier), REFERENCES[name](later)
    ratio = alpha_t / alpha_s
    covariance = ratio * sigma_s**2  # x_t = ratio x_s + independent noise
    gain = covariance / sigma_t**2
    np.testing.assert_allclose(mean[:, 0], alpha_s * x_0 + gain * (x_t - alpha_t * x_0), rtol=1e-9, atol=1e-12)
    exact = sigma_s**2 - gain * covariance
    assert (np.abs(variance - exact) <= 1e-9 * sigma_s**2).all()


@pytest.mark.parametrize("name", ["linear", "cosine", "vp", "discrete_linear", "shifted_vp"])
def test_noise_split_never_nan(name):
    """Also for times one ulp apart, where rounding alone decides the sign of 1 - rho^2."""
    path = PATHS[name]
    rng = np.random.default_rng(0)
    t = rng.uniform(path.t_data, path.t_noise, 2000).astype(np.float32)
    kept, fresh = jax.jit(jax.vmap(path.noise_split))(np.nextafter(t, np.float32(-1)), t)
    assert np.isfinite(kept).all() and np.isfinite(fresh).all()
    np.testing.assert_allclose(kept**2 + fresh**2, 1, atol=1e-5)


def test_discrete_posterior_variance_is_ddpm():
    """Ho et al.: beta_tilde_k = (1 - abar_{k-1})/(1 - abar_k) beta_k."""
    path = PATHS["discrete_linear"]
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    k = np.array([1, 2, 10, 500, 999])
    variance = jax.vmap(lambda s, t: path.posterior(s, t, jnp.zeros(1), jnp.zeros(1))[1])(
        jnp.float32(k / 1000), jnp.float32((k + 1) / 1000)
    )
    np.testing.assert_allclose(variance, (1 - alpha_bar[k - 1]) / (1 - alpha_bar[k]) * betas[k], rtol=5e-4)


@pytest.mark.quick
def test_golden_values():
    # Song et al. (2020): VP's marginal at t = 1, exp(-(b0 + b1)/2) = exp(-10.05); sub-VP's standard deviation is
    # 1 - exp(-int beta), not 1 - exp(-2 int beta).
    assert paths.VP().alpha(1.0) ** 2 == pytest.approx(math.exp(-10.05), rel=1e-5)
    assert paths.VP().sigma(0.5) == pytest.approx(math.sqrt(1 - math.exp(-0.05 - 19.9 / 8)), rel=1e-6)
    assert paths.SubVP().sigma(0.5) == pytest.approx(1 - math.exp(-0.05 - 19.9 / 8), rel=1e-6)
    assert paths.VE().sigma(0.0) == pytest.approx(0.01, rel=1e-6)
    assert paths.VE().sigma(1.0) == pytest.approx(50.0, rel=1e-6)
    # Ho et al. (2020): linear betas from 1e-4 to 0.02.
    ddpm = paths.Discrete.linear()
    assert ddpm.alpha(ddpm.time_of(999)) ** 2 == pytest.approx(4.0358e-05, rel=1e-4)
    assert ddpm.alpha(ddpm.time_of(0)) ** 2 == pytest.approx(1 - 1e-4, rel=1e-6)
    # Nichol & Dhariwal (2021): abar(t) = f(t)/f(0), f = cos^2((t + s)/(1 + s) pi/2).
    f = [math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0.0, 0.3)]
    assert paths.Cosine().alpha(0.3) ** 2 == pytest.approx(f[1] / f[0], rel=1e-6)
    cosine = paths.Discrete.cosine(1000)
    assert cosine.alpha(0.3) ** 2 == pytest.approx(f[1] / f[0], rel=1e-5)
    assert cosine.betas[-1] == 0.999
    # Karras et al. (2022).
    assert (paths.EDM().t_data, paths.EDM().t_noise) == (0.002, 80.0)
    assert paths.EDM().sigma(80.0) == 80 and paths.EDM().alpha(80.0) == 1


@pytest.mark.quick
def test_exact_ends():
    for path in (paths.Linear(), paths.Trigonometric(), paths.OrnsteinUhlenbeck(t_noise=1.0), paths.Cosine()):
        assert path.sigma(0.0) == 0 and path.alpha(0.0) == 1
        assert path.alpha(1.0) == 0 and path.sigma(1.0) == 1
    for path in (paths.VP(), paths.SubVP(), paths.Discrete.linear(10)):
        assert path.sigma(0.0) == 0 and path.alpha(0.0) == 1
    linear = paths.Linear()
    assert linear.log_snr(0.0) == jnp.inf and linear.inverse_log_snr(jnp.inf) == 0
    assert linear.log_snr(1.0) == -jnp.inf and linear.inverse_log_snr(-jnp.inf) == 1
    # g^2 = 2t/(1 - t): 0 at the data, +inf at alpha = 0, where f is -inf.
    assert linear.g_squared(0.0) == 0 and linear.g_squared(1.0) == jnp.inf
    assert linear.g_squared(0.5) == 2 and linear.f(0.5) == -2 and linear.f(1.0) == -jnp.inf
    # A proportion that a diffusion reaches only after infinite time.
    assert paths.VP().time_at(0.0, 1.0) == jnp.inf and paths.SubVP().time_at(0.0, 1.0) == jnp.inf


def test_discrete_timesteps_both_ways():
    for steps in (2, 49, 1000):
        path = paths.Discrete.linear(steps, 1e-4, 0.02)
        k = jnp.arange(steps)
        t = jax.vmap(path.time_of)(k)
        assert (jax.vmap(path.timestep)(t) == k).all()
        alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, steps))
        np.testing.assert_allclose(jax.jit(jax.vmap(path.alpha))(t) ** 2, alpha_bar, rtol=5e-6)
    assert path.timestep(1.0) == 999 and path.timestep(0.5004) == 499
    assert path.time_of(0) == pytest.approx(path.t_data)


@pytest.mark.parametrize("name", ["linear", "vp", "edm"])
def test_start_moments(name):
    """Mean and standard deviation at any time against samples, in standard errors; by default the prior."""
    path, n = PATHS[name], 40_000
    data_mean, data_std = 1.5, 0.4
    keys = jax.random.split(jax.random.key(3), 2)
    data = data_mean + data_std * jax.random.normal(keys[0], (n,))
    noise = jax.random.normal(keys[1], (n,))
    for t in (0.3, 0.8):
        samples = np.float64(path.interpolate(t, data, noise))
        mean, std = path.start(t, data_mean=data_mean, data_std=data_std)
        assert abs(samples.mean() - mean) < 4 * std / math.sqrt(n)
        assert abs(samples.std() - std) < 4 * std / math.sqrt(2 * n)
    mean, std = path.start()
    assert mean == 0 and std == path.sigma(path.t_noise)


SHIFTS = [-3.0, -0.5, 0.0, 2.0]


@pytest.mark.parametrize(
    "name", ["linear", "trigonometric", "cosine", "ornstein_uhlenbeck", "vp", "sub_vp", "ve", "edm"]
)
def test_shifted_log_snr_is_shifted_exactly(name):
    base = PATHS[name]
    t = times(name, 24)

    @jax.jit
    @jax.vmap
    def both(t, shift):
        shifted = paths.Shifted(base, shift)
        alpha, sigma = shifted.coefficients(t)
        return base.log_snr(t), shifted.log_snr(t), shifted.time_at(alpha, sigma), shifted.derivatives(t)

    grid, shifts = (a.ravel() for a in np.meshgrid(t, np.float32(SHIFTS)))
    log_snr, shifted, back, slopes = both(grid, shifts)
    finite = np.isfinite(log_snr)
    np.testing.assert_allclose(shifted[finite], (log_snr + shifts)[finite], rtol=3e-6, atol=3e-6)
    assert (shifted[~finite] == log_snr[~finite]).all()
    assert all(np.isfinite(slope).all() for slope in slopes)
    rate = 1e-5 if name != "edm" else 1e-5 * np.maximum(grid, 1)
    assert (np.abs(back - grid) < rate).all()


@pytest.mark.quick
def test_shifted_linear_is_the_time_shift():
    """t' = k t/(1 + (k - 1) t) with k = exp(-shift/2): alpha and sigma of the shifted path are 1 - t' and t'."""
    k = math.sqrt(16384 / 4096)
    shifted = paths.Shifted(paths.Linear(), -2 * math.log(k))
    t = jnp.linspace(0, 1, 11)
    alpha, sigma = jax.vmap(shifted.coefficients)(t)
    np.testing.assert_allclose(sigma, k * t / (1 + (k - 1) * t), rtol=1e-6)
    np.testing.assert_allclose(alpha, (1 - t) / (1 + (k - 1) * t), rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "vp"])
def test_path_of_callables_is_the_path(name, x64):
    """Values, derivatives, and the root-find inverse with its first and second derivatives."""
    base = PATHS[name]
    path = paths.Path(base.alpha, base.sigma, t_data=base.t_data, t_noise=base.t_noise)
    t = np.linspace(base.t_data, base.t_noise, 9)[1:-1]

    def summary(path, t):
        alpha, sigma = path.coefficients(t)
        inverse = functools.partial(path.time_at, sigma=sigma)
        # Away from the curve's own scale, as a shift asks for it: only the proportion matters.
        first, second = jax.grad(inverse), jax.grad(jax.grad(inverse))
        return (
            *path.coefficients(t),
            *path.derivatives(t),
            path.time_at(2 * alpha, 2 * sigma),
            first(alpha),
            second(alpha),
            path.inverse_log_snr(path.log_snr(t)),
        )

    evaluate = jax.jit(lambda t: [jax.vmap(functools.partial(summary, p))(t) for p in (path, base)])
    for mine, exact in zip(*evaluate(t), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-8, atol=1e-9)


def test_root_find_gradient_in_parameters(x64):
    """The inverse's derivative in a parameter of the schedule, by finite differences."""

    @jax.jit
    def time(parameter):
        path = paths.VE(lambda t: 0.01 + parameter * t**2 + t)
        return path.time_at(1.0, 0.7)

    h = 1e-6
    slope = (time(2.0 + h) - time(2.0 - h)) / (2 * h)
    assert jax.grad(time)(2.0) == pytest.approx(float(slope), rel=1e-6)


def test_learned_parameters_have_one_copy():
    """A VE path whose schedule holds arrays: the gradient of its inverse reaches those same arrays."""
    path = paths.VE(paths.Geometric(jnp.asarray(0.01), jnp.asarray(50.0)))
    assert len(jax.tree.leaves(eqx.filter(path, eqx.is_array))) == 2
    grads = eqx.filter_grad(lambda path: path.time_at(1.0, 1.0))(path)
    ratio = math.log(5000)
    # t = ln(1/low)/ln(high/low)
    assert grads.schedule.sigma_max == pytest.approx(-math.log(100) / ratio**2 / 50, rel=1e-4)


@pytest.mark.quick
def test_messages():
    with pytest.raises(ValueError, match="t_data < t_noise"):
        paths.Linear(t_data=0.5, t_noise=0.2)
    with pytest.raises(ValueError, match=r"t_noise = 1\.5"):
        paths.OrnsteinUhlenbeck(t_noise=1.5)
    with pytest.raises(ValueError, match="0 <= sigma_min < 1"):
        paths.Linear(sigma_min=1.0)
    for betas in ([0.1, 1.2], [0.1], [0.0, 0.1]):
        with pytest.raises(ValueError, match=r"betas outside \(0, 1\)"):
            paths.Discrete(betas)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        paths.Geometric(1.0, 0.1)
    x = jnp.ones(2)
    for s, t in ((0.5, 0.5), (0.7, 0.5)):
        with pytest.raises(ValueError, match="s < t"):
            paths.Linear().posterior(s, t, x, x)
    with pytest.raises(ValueError, match="does not reach"):
        paths.Path(lambda t: 1 - 0.5 * t, lambda t: 0.1 + t).time_at(0.0, 1.0)
    with pytest.raises(ValueError, match="does not reach"):
        paths.Discrete.linear(10).time_at(0.0, 1.0)


def test_traced_checks_raise_at_run_time():
    x = jnp.ones(2)
    with pytest.raises(eqx.EquinoxRuntimeError, match="s < t"):
        jax.block_until_ready(eqx.filter_jit(paths.Linear().posterior)(jnp.asarray(0.7), jnp.asarray(0.5), x, x))


@pytest.mark.quick
def test_times_become_float32_scalars():
    path = paths.VP()
    for t in (1, 0.5, jnp.bfloat16(0.5), np.float64(0.5), jnp.int32(1)):
        assert path.alpha(t).dtype == jnp.float32 and path.log_snr(t).dtype == jnp.float32
    assert path.time_at(1, 1).dtype == jnp.float32


@pytest.mark.quick
def test_parameters_are_no_leaves():
    """The gradient of a flow is the gradient of its network, unless the user passes an array."""
    for name, path in PATHS.items():
        assert jax.tree.leaves(eqx.filter(path, eqx.is_array)) == [], name
    assert len(jax.tree.leaves(eqx.filter(paths.VP(beta_max=jnp.asarray(15.0)), eqx.is_array))) == 1
