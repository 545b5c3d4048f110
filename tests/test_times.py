"""Training-time distributions against closed-form CDFs in float64, on every path."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from members import PATHS, REFERENCES

from flowsolve import grids, paths, times

LINEAR, VP, EDM = paths.Linear(), paths.VP(), paths.EDM()
TRUNCATED = {"t_min": 0.2, "t_max": 0.7}


@np.vectorize
def normal_cdf(z):
    return 0.5 * math.erfc(-z / math.sqrt(2))


def logit(s):
    return np.log(s) - np.log1p(-s)


def log_ratio(name, t):
    """ln(sigma/alpha) in float64."""
    alpha, sigma, *_ = REFERENCES[name](t)
    return np.log(sigma) - np.log(alpha)


def within(cdf, low, high):
    """The CDF conditioned on [low, high]."""
    return lambda t: (cdf(t) - cdf(np.float64(low))) / (cdf(np.float64(high)) - cdf(np.float64(low)))


@np.vectorize
def root_of_mode(s, scale):
    """The u of Esser et al.'s mode sampling, their 1 - u, with place s."""
    return scipy.optimize.brentq(lambda u: u - scale * (np.cos(np.pi / 2 * (1 - u)) ** 2 - u) - s, -1e-3, 1 + 1e-3)


def unshifted(s, k):
    return s / (k + (1 - k) * s)


def arcsine(s):
    return np.arcsin(np.sqrt(s)) * 2 / np.pi


def log_normal(name, mean, std):
    return lambda t: normal_cdf((log_ratio(name, t) - mean) / std)


def logit_normal(mean, std):
    return lambda s: normal_cdf((logit(s) - mean) / std)


# name: (distribution, path, its CDF in t).
CASES = {
    "uniform": (times.Uniform(), LINEAR, lambda t: t),
    "uniform_on_edm": (times.Uniform(), EDM, lambda t: (t - 0.002) / 79.998),
    "uniform_bounded": (times.Uniform(**TRUNCATED), LINEAR, within(lambda t: t, 0.2, 0.7)),
    "uniform_one_bound": (times.Uniform(t_min=0.2), LINEAR, within(lambda t: t, 0.2, 1.0)),
    "logit_normal": (times.LogitNormal(0.5, 1.3), LINEAR, logit_normal(0.5, 1.3)),
    "logit_normal_on_edm": (
        times.LogitNormal(-2.0, 0.7),
        EDM,
        lambda t: logit_normal(-2.0, 0.7)((t - 0.002) / 79.998),
    ),
    "logit_normal_bounded": (
        times.LogitNormal(0.5, 1.3, **TRUNCATED),
        LINEAR,
        within(logit_normal(0.5, 1.3), 0.2, 0.7),
    ),
    # All of what is left lies in the far tail, above the mean or below it.
    "logit_normal_upper_tail": (
        times.LogitNormal(-5.0, 0.7, **TRUNCATED),
        LINEAR,
        lambda t: 1 - within(lambda t: logit_normal(5.0, 0.7)(1 - t), 0.7, 0.2)(t),
    ),
    "logit_normal_lower_tail": (
        times.LogitNormal(5.0, 0.7, **TRUNCATED),
        LINEAR,
        within(logit_normal(5.0, 0.7), 0.2, 0.7),
    ),
    "log_normal": (times.LogNormal(), LINEAR, log_normal("linear", -1.2, 1.2)),
    "log_normal_on_edm": (times.LogNormal(), EDM, within(log_normal("edm", -1.2, 1.2), 0.002, 80)),
    "log_normal_on_vp": (times.LogNormal(), VP, within(log_normal("vp", -1.2, 1.2), 1e-4, 1)),
    "log_normal_cut": (
        times.LogNormal(1.0, 2.0, t_min=0.5, t_max=3.0),
        EDM,
        within(log_normal("edm", 1.0, 2.0), 0.5, 3.0),
    ),
    "log_normal_root_find": (times.LogNormal(), PATHS["path"], log_normal("path", -1.2, 1.2)),
    "u_shaped": (times.UShaped(), LINEAR, arcsine),
    "u_shaped_bounded": (times.UShaped(**TRUNCATED), LINEAR, within(arcsine, 0.2, 0.7)),
    "mode": (times.Mode(1.29), LINEAR, lambda t: root_of_mode(t, 1.29)),
    "mode_at_both_ends": (times.Mode(-1.0), EDM, lambda t: root_of_mode((t - 0.002) / 79.998, -1.0)),
    "mode_bounded": (times.Mode(0.8, **TRUNCATED), LINEAR, within(lambda t: root_of_mode(t, 0.8), 0.2, 0.7)),
    "beta": (times.Beta(1.0, 1.5), LINEAR, scipy.stats.beta(1.0, 1.5).cdf),
    "beta_on_edm": (times.Beta(0.6, 0.6), EDM, lambda t: scipy.stats.beta(0.6, 0.6).cdf((t - 0.002) / 79.998)),
    "beta_bounded": (times.Beta(2.0, 5.0, **TRUNCATED), LINEAR, within(scipy.stats.beta(2.0, 5.0).cdf, 0.2, 0.7)),
    "polynomial": (times.Polynomial(), EDM, within(lambda t: t ** (1 / 7), 0.002, 80)),
    "polynomial_bounded": (times.Polynomial(3.0, t_max=0.9), LINEAR, lambda t: (t / (1 - t) / 9) ** (1 / 3)),
    "log_snr_uniform": (times.LogSNRUniform(), EDM, within(lambda t: np.log(t), 0.002, 80)),
    "log_snr_uniform_on_vp": (
        times.LogSNRUniform(),
        VP,
        within(lambda t: log_ratio("vp", t), 1e-4, 1),
    ),
    "log_snr_uniform_bounded": (
        times.LogSNRUniform(**TRUNCATED),
        LINEAR,
        within(logit, 0.2, 0.7),
    ),
    "shifted": (times.Shifted(times.Uniform(), 3.0), LINEAR, lambda t: unshifted(t, 3.0)),
    "shifted_on_edm": (
        times.Shifted(times.Uniform(), 0.2),
        EDM,
        lambda t: unshifted((t - 0.002) / 79.998, 0.2),
    ),
    "shifted_logit_normal": (
        times.Shifted(times.LogitNormal(0.3, 0.8), 3.0),
        LINEAR,
        lambda t: logit_normal(0.3, 0.8)(unshifted(t, 3.0)),
    ),
    "stratified": (times.Stratified(times.LogitNormal()), LINEAR, logit_normal(0.0, 1.0)),
    "stratified_shifted": (
        times.Shifted(times.Stratified(times.Uniform()), 3.0),
        LINEAR,
        lambda t: unshifted(t, 3.0),
    ),
}


@functools.cache
def sampler(num):
    return eqx.filter_jit(lambda distribution, path, key: distribution.sample(path, key, num))


@eqx.filter_jit
def quantiles(distribution, path, u):
    return jax.vmap(lambda u: distribution.quantile(path, u))(u)


def kolmogorov_smirnov(uniform):
    """The largest distance between the empirical CDF and the diagonal, times sqrt(n)."""
    n = len(uniform)
    ordered, i = np.sort(uniform), np.arange(n)
    return np.maximum(ordered - i / n, (i + 1) / n - ordered).max() * np.sqrt(n)


@pytest.mark.parametrize("name", CASES)
def test_quantile_inverts_the_cdf(name):
    distribution, path, cdf = CASES[name]
    u = np.linspace(0, 1, 1001)[1:-1].astype(np.float32)
    t = np.float64(quantiles(distribution, path, jnp.asarray(u)))
    # One rounding of t moves the CDF by ulp(t) times the density.
    ulp = 2.0**-23 * np.abs(t)
    slack = np.abs(cdf(np.minimum(t + ulp, t[-1])) - cdf(t - ulp))
    assert np.all(np.abs(cdf(t) - u) < 2e-6 + 4 * slack)


@pytest.mark.parametrize("name", ["log_normal_on_edm", "shifted", "stratified"])
def test_samples_follow_the_cdf(name):
    distribution, path, cdf = CASES[name]
    t = sampler(20_000)(distribution, path, jax.random.key(1))
    assert t.dtype == jnp.float32
    assert kolmogorov_smirnov(cdf(np.float64(t))) < 1.63  # exceeded by chance once in a hundred keys


@pytest.mark.parametrize("path", PATHS)
def test_on_every_path(path):
    """Increasing, inside the path's ends, and defined on the closed interval of u."""
    path = PATHS[path]
    u = jnp.asarray(np.concatenate([[0], np.logspace(-7, -1, 7), np.linspace(0.2, 1, 9)]), jnp.float32)

    @jax.jit
    def all_members(u):
        distributions = [times.LogNormal(), times.Shifted(times.UShaped(), 2.0)]
        return [jax.vmap(lambda u, d=d: d.quantile(path, u))(u) for d in distributions]

    for t in np.asarray(all_members(u)):
        assert np.all(np.diff(t) >= 0) and t[0] < t[-1]
        assert np.float32(path.t_data) <= t[0] and t[-1] <= np.float32(path.t_noise)


@pytest.mark.parametrize("distribution", [times.Uniform(), times.LogitNormal(), times.UShaped()], ids=repr)
def test_unbounded_ones_reach_the_ends(distribution):
    for path in (LINEAR, VP, EDM):
        ends = quantiles(distribution, path, jnp.array([0.0, 1.0]))
        assert ends.tolist() == [np.float32(path.t_data), np.float32(path.t_noise)]


@pytest.mark.quick
def test_logit_normal_under_the_other_convention_of_time():
    """Pitfall 14: with t -> 1 - t the law of mean m is that of mean -m, not of m."""
    u = jnp.asarray((np.arange(200) + 0.5) / 200, jnp.float32)
    flipped = 1 - quantiles(times.LogitNormal(0.8, 0.9), LINEAR, 1 - u)
    np.testing.assert_allclose(flipped, quantiles(times.LogitNormal(-0.8, 0.9), LINEAR, u), atol=3e-7)

    edges = np.linspace(0, 1, 11)
    histograms = [
        np.histogram(sampler(20_000)(times.LogitNormal(mean, 0.9), LINEAR, jax.random.key(seed)), edges)[0]
        for mean, seed in [(0.8, 0), (-0.8, 1)]
    ]
    difference = histograms[0][::-1] - histograms[1]
    assert np.all(np.abs(difference) < 4 * np.sqrt(2 * histograms[1] + 1))
    assert histograms[0][5:].sum() > 15_000  # a positive mean favours noise, t > 1/2


@pytest.mark.quick
@pytest.mark.parametrize("num", [1, 50])
def test_stratified_has_one_per_stratum(num):
    stratified = times.Stratified(times.Uniform())
    draws = [np.float64(sampler(num)(stratified, LINEAR, jax.random.key(seed))) for seed in range(3)]
    for u in draws:
        assert np.array_equal(np.sort(np.floor(u * num)), np.arange(num))
    if num > 2:
        orders = [np.argsort(u) for u in draws]
        assert not np.array_equal(orders[0], np.arange(num))
        assert not np.array_equal(orders[0], orders[1])


def test_stratified_is_uniform_at_every_position():
    stratified = times.Stratified(times.Uniform())
    batches = np.float64([sampler(50)(stratified, LINEAR, key) for key in jax.random.split(jax.random.key(3), 300)])
    for position in range(5):
        assert kolmogorov_smirnov(batches[:, position]) < 1.63
    # The mean over a batch varies less, by 1/num.
    assert np.std(batches.mean(axis=1)) < 1.2 / 50 * np.sqrt(1 / 12 / 50)


@pytest.mark.quick
def test_independent_times_do_not_depend_on_the_batch():
    for distribution in (times.Uniform(), times.Shifted(times.LogitNormal(), 2.0)):
        key = jax.random.key(0)
        large, small = (sampler(num)(distribution, LINEAR, key) for num in (9, 4))
        assert np.array_equal(large[:4], small)
        assert len(set(large.tolist())) == 9


@pytest.mark.quick
def test_levels_are_in_the_open_interval():
    levels = np.asarray(times.Uniform().levels(jax.random.key(0), 50_000))
    assert 0 < levels.min() and levels.max() < 1
    # Midpoints between multiples of 2^-23: 0 cannot come up in any number of draws.
    assert np.all((levels.astype(np.float64) * 2**24) % 2 == 1)


@pytest.mark.quick
def test_shift_time():
    s = np.linspace(0, 1, 33).astype(np.float32)
    shift = jax.vmap(times.shift_time, (0, None))
    for k in (0.25, 1.0, 3.0):
        shifted = np.float64(shift(s, k))
        exact = k * np.float64(s) / (1 + (k - 1) * np.float64(s))
        np.testing.assert_allclose(shifted, exact, rtol=3e-7)
        assert shifted[0] == 0 and shifted[-1] == 1
        np.testing.assert_allclose(shift(jnp.asarray(shifted, jnp.float32), 1 / k), s, rtol=5e-7)
        # On Linear it multiplies sigma/alpha by k.
        inner = shifted[1:-1]
        np.testing.assert_allclose(inner / (1 - inner), k * s[1:-1] / (1 - s[1:-1]), rtol=1e-5)
    assert times.resolution_shift(4 * 4096) == 2.0
    assert times.resolution_shift(3 * 32 * 32, base=3 * 64 * 64) == 0.5


@pytest.mark.quick
def test_shifted_is_the_shift_of_what_is_inside():
    key = jax.random.key(5)
    inside = times.Uniform(t_min=0.1)
    shifted = times.Shifted(inside, 3.0).sample(LINEAR, key, 6)
    expected = jax.vmap(lambda t: times.shift_time(t, 3.0))(inside.sample(LINEAR, key, 6))
    np.testing.assert_allclose(shifted, expected, rtol=3e-7)


def test_given_times_are_equally_likely_but_the_last():
    given = times.Given([1.0, 0.7, 0.2, 0.0])
    drawn = np.asarray(sampler(30_000)(given, LINEAR, jax.random.key(0)))
    values, counts = np.unique(drawn, return_counts=True)
    np.testing.assert_array_equal(values, np.float32([0.2, 0.7, 1.0]))
    assert np.all(np.abs(counts - 10_000) < 4 * np.sqrt(30_000 * 2 / 9))
    stratified = sampler(6)(times.Stratified(given), LINEAR, jax.random.key(1))
    np.testing.assert_array_equal(np.sort(stratified), np.float32([0.2, 0.2, 0.7, 0.7, 1.0, 1.0]))
    points = grids.Karras(5)(EDM)
    drawn = sampler(200)(times.Given(points), EDM, jax.random.key(2))
    assert set(np.asarray(drawn).tolist()) == set(np.asarray(points[:-1]).tolist())


def test_polynomial_times_are_the_points_of_the_grid():
    """One law for training and inference: the quantiles at i/n are the points of `grids.Karras`."""
    points = grids.Karras(10)(EDM)
    np.testing.assert_allclose(points, quantiles(times.Polynomial(), EDM, jnp.linspace(1, 0, 11)), rtol=2e-5)


def test_beta_of_small_exponents():
    """Beta(a, 1) has the CDF t^a: for a = 0.01 four tenths of it lie below e^-80, and none of them are left out."""
    u = np.array([0.2, 0.46, 0.5, 0.9, 0.99])
    t = quantiles(times.Beta(0.01, 1.0), LINEAR, jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(t, np.maximum(np.float64(np.float32(u)) ** 100, np.exp(-80)), rtol=1e-3)
    t = quantiles(times.Beta(1.0, 0.01), LINEAR, jnp.asarray(1 - u, jnp.float32))
    np.testing.assert_allclose(1 - t, np.float64(1 - np.float32(1 - u)) ** 100, rtol=1e-3, atol=1e-7)
    t = quantiles(times.Beta(0.01, 1.0, t_max=0.5), LINEAR, jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(t, np.maximum(0.5 * np.float64(np.float32(u)) ** 100, np.exp(-80)), rtol=1e-3)


def test_new_values_do_not_retrace():
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def sample(distribution, key):
        return distribution.sample(EDM, key, 3)

    for i in range(3):
        inside = times.LogNormal(-1.2 + i, 1.0 + 0.1 * i, t_min=0.01 + i)
        sample(times.Shifted(times.Stratified(inside), 1.0 + i), jax.random.key(i))


def test_gradients_are_finite():
    u = jnp.asarray([1e-6, 1e-3, 0.3, 0.9, 1 - 1e-6])
    for distribution in (
        times.LogitNormal(t_max=0.9),
        times.Shifted(times.LogNormal(), 2.0),
        times.Mode(),
        times.Mode(t_max=0.9),
        times.Beta(0.7, 1.4),
        times.Polynomial(t_max=0.9),
    ):
        grads = eqx.filter_jit(eqx.filter_grad(lambda d, u: jnp.sum(jax.vmap(lambda u: d.quantile(LINEAR, u))(u))))(
            distribution, u
        )
        leaves = jax.tree.leaves(grads)
        assert leaves and all(np.all(np.isfinite(leaf)) for leaf in leaves)
        assert any(np.any(leaf != 0) for leaf in leaves)


def test_no_mass_between_the_bounds_is_no_nan():
    for mean, nearer in [(-300.0, 0.2), (300.0, 0.7)]:
        t = quantiles(times.LogitNormal(mean, 1.0, **TRUNCATED), LINEAR, jnp.array([0.1, 0.9]))
        np.testing.assert_allclose(t, nearer, rtol=1e-5)


@pytest.mark.quick
def test_errors():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="Uniform got bounds that are not t_data <= t_min < t_max"):
        times.Uniform(t_min=0.6, t_max=0.4).sample(LINEAR, key, 2)
    with pytest.raises(ValueError, match="on EDM"):
        times.LogNormal(t_max=100.0).sample(EDM, key, 2)
    with pytest.raises(ValueError, match="LogSNRUniform got an infinite log-SNR at an end of Linear"):
        times.LogSNRUniform().sample(LINEAR, key, 2)
    with pytest.raises(ValueError, match="infinite log-SNR"):
        times.LogSNRUniform(t_min=0.1).sample(LINEAR, key, 2)
    for bad in (1.8, -1.1, float("nan")):
        with pytest.raises(ValueError, match="Mode got scale"):
            times.Mode(bad)
    with pytest.raises(ValueError, match="a = 0"):
        times.Beta(0.0, 1.0)
    with pytest.raises(ValueError, match="infinite sigma/alpha at an end of Linear"):
        times.Polynomial().sample(LINEAR, key, 2)
    with pytest.raises(ValueError, match="times that do not fall"):
        times.Given([0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="two or more"):
        times.Given([0.5])
    with pytest.raises(ValueError, match="outside Linear's ends"):
        times.Given([80.0, 1.0, 0.0]).sample(LINEAR, key, 2)
    with pytest.raises(ValueError, match="std = 0"):
        times.LogitNormal(std=0.0)
    with pytest.raises(ValueError, match="std = -1"):
        times.LogNormal(std=-1.0)
    for distribution in (times.LogitNormal, times.LogNormal):
        with pytest.raises(ValueError, match="mean = nan, but wants it finite"):
            distribution(float("nan"))
    for num in (0, -2):
        with pytest.raises(ValueError, match=f"num = {num}, but wants an integer"):
            times.Uniform().sample(LINEAR, key, num)
    with pytest.raises(ValueError, match="shift = 0"):
        times.Shifted(times.Uniform(), 0.0)
    with pytest.raises(ValueError, match="dim = 0"):
        times.resolution_shift(0)
    with pytest.raises(TypeError):
        times.Uniform().sample(LINEAR, jnp.zeros(2, jnp.uint32), 2)


@pytest.mark.quick
def test_traced_bounds_are_checked_at_run_time():
    with pytest.raises(eqx.EquinoxRuntimeError, match="t_min < t_max"):
        sampler(2)(times.Uniform(t_min=0.6, t_max=0.4), LINEAR, jax.random.key(0)).block_until_ready()


def test_float64(x64):
    u = jnp.asarray([0.01, 0.4, 0.99])
    t = quantiles(times.LogNormal(), EDM, u)
    assert t.dtype == jnp.float64
    np.testing.assert_allclose(within(log_normal("edm", -1.2, 1.2), 0.002, 80)(np.asarray(t)), u, rtol=1e-12)
