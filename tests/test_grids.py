"""Inference grids: n + 1 points, exact ends, strictly monotone, and the published formulas, on every path."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import PATHS, REFERENCES
from scipy import stats

from flowsolve import grids, paths, times

LINEAR, VP, EDM = paths.Linear(), paths.VP(), paths.EDM()
DDPM = paths.Discrete.linear()
TIMESTEPS = (grids.Leading, grids.Trailing, grids.Linspace, grids.Quadratic)


def kinds(n):
    """One grid of n steps of each kind that runs between any ends."""
    return {
        "uniform": grids.Uniform(n),
        "power": grids.Power(n),
        "karras": grids.Karras(n),
        "log_snr": grids.LogSNR(n),
        "poly_exponential": grids.PolyExponential(n, rho=1.5),
        "vp_power": grids.VPPower(n),
        "shifted": grids.Shifted(grids.Power(n), 2.0),
    }


@eqx.filter_jit
def evaluate(grid, path, t_start, t_end):
    return grid(path, t_start, t_end)


def ends_of(path):
    return np.float32(path.t_noise), np.float32(path.t_data)


def exact_karras(n, rho, first, last):
    """EDM's equation 5, in float64."""
    i = np.arange(n + 1) / n
    return (first ** (1 / rho) + i * (last ** (1 / rho) - first ** (1 / rho))) ** rho


def exact_poly_exponential(n, rho, first, last):
    """k-diffusion's sigmas: a ramp to the power rho between ln sigma_max and ln sigma_min, in float64."""
    return np.exp(np.linspace(1, 0, n + 1) ** rho * np.log(first / last) + np.log(last))


def exact_vp_power(n, power, first, last, b0=0.1, b1=20.0):
    """Levels at a power of the VP time, by the quadratic formula and back, in float64."""
    tau_first, tau_last = (
        (np.sqrt(b0**2 + 2 * (b1 - b0) * np.log1p(level**2)) - b0) / (b1 - b0) for level in (first, last)
    )
    tau = tau_last + (1 - np.arange(n + 1) / n) ** power * (tau_first - tau_last)
    return np.sqrt(np.expm1(tau * b0 + tau**2 * (b1 - b0) / 2))


def ratio(name, t):
    """sigma/alpha in float64."""
    alpha, sigma, *_ = REFERENCES[name](np.float64(t))
    with np.errstate(divide="ignore"):
        return sigma / alpha


def assert_spaced(name, ts, spacing, *, stand_in=True):
    """The inner points have the ratios spacing(n, first, last), with infinite ends replaced as documented.

    A ratio of 0 at the end is replaced only with `stand_in`.
    """
    first, last = ratio(name, ts[:1])[0], ratio(name, ts[-1:])[0]
    first, steps = (80.0 if np.isinf(first) else first), len(ts) - 1
    exact = spacing(steps - 1, first, 0.002) if last == 0 and stand_in else spacing(steps, first, last)[:-1]
    ulps = 4 * 2.0**-23 * np.float64(ts[1:-1])
    below, above = ratio(name, ts[1:-1] - ulps), ratio(name, ts[1:-1] + ulps)
    assert np.all((below * (1 - 1e-5) < exact[1:]) & (exact[1:] < above * (1 + 1e-5)))


@pytest.mark.parametrize("name", PATHS)
def test_on_every_path(name):
    """n + 1 points from end to end, descending; the same ones ascending; also between inner times."""
    path = PATHS[name]
    high, low = ends_of(path)

    @jax.jit
    def all_grids(t_start, t_end):
        return {f"{kind} {n}": grid(path, t_start, t_end) for n in (1, 7) for kind, grid in kinds(n).items()}

    def with_beta(t_start, t_end):
        # Not under the path's own compilation, as its quantiles are those of every path.
        return all_grids(t_start, t_end) | {f"beta {n}": grids.Beta(n)(path, t_start, t_end) for n in (1, 7)}

    middle = np.float32(0.5) * (high + low)
    for t_start, t_end in [(high, low), (high, middle), (middle, low)]:
        descending, ascending = with_beta(t_start, t_end), with_beta(t_end, t_start)
        for which, ts in descending.items():
            ts = np.asarray(ts)
            assert ts.shape == (int(which[-1]) + 1,) and ts.dtype == np.float32
            assert ts[0] == t_start and ts[-1] == t_end
            assert np.all(np.diff(ts) < 0)
            np.testing.assert_array_equal(ascending[which], ts[::-1])
        assert_spaced(name, np.asarray(descending["karras 7"]), lambda n, *ends: exact_karras(n, 7.0, *ends))
        assert_spaced(name, np.asarray(descending["log_snr 7"]), lambda n, *ends: np.geomspace(*ends, n + 1))
        ts = np.asarray(descending["poly_exponential 7"])
        assert_spaced(name, ts, lambda n, *ends: exact_poly_exponential(n, 1.5, *ends))
        ts = np.asarray(descending["vp_power 7"])
        assert_spaced(name, ts, lambda n, *ends: exact_vp_power(n, 2, *ends), stand_in=False)


@pytest.mark.quick
def test_karras_golden_values():
    """EDM's 18 steps: 18 noise levels from 80 to 0.002, then 0 (2206.00364, equation 5)."""
    exact = np.append(exact_karras(17, 7, 80.0, 0.002), 0)
    np.testing.assert_allclose(exact[:4], [80, 57.586, 40.786, 28.375], rtol=2e-5)
    by_end = grids.Karras(18)(EDM, t_end=0.0)
    np.testing.assert_allclose(by_end, exact, rtol=3e-6)
    np.testing.assert_allclose(grids.ThenClean(grids.Karras(18))(EDM), exact, rtol=3e-6)
    assert len(by_end) == 19
    # Between finite levels there is no such step.
    np.testing.assert_allclose(grids.Karras(17)(EDM), exact[:-1], rtol=3e-6)


@pytest.mark.parametrize(("grid", "exact"), [
    (grids.Karras(6, rho=7.0, sigma_min=0.01, sigma_max=50.0), exact_karras(5, 7.0, 50.0, 0.01)),
    (grids.LogSNR(6, sigma_min=0.01, sigma_max=50.0), np.geomspace(50.0, 0.01, 6)),
    (grids.PolyExponential(6, 0.5, sigma_min=0.01, sigma_max=50.0), exact_poly_exponential(5, 0.5, 50.0, 0.01)),
], ids=["karras", "log_snr", "poly_exponential"])  # fmt: skip
def test_infinite_ends(grid, exact):
    """On Linear: from t = 1, which stands for sigma_max, in n - 1 steps to sigma_min, then onto t = 0."""
    full = np.float64(grid(LINEAR))
    assert full[0] == 1 and full[-1] == 0 and len(full) == 7
    np.testing.assert_allclose((full / (1 - full + 1e-30))[1:-1], exact[1:], rtol=1e-5)
    # Finite ends: the fields are not used.
    inside = evaluate(grid, LINEAR, jnp.float32(0.99999), jnp.float32(1e-5))
    other = eqx.tree_at(lambda g: (g.sigma_min, g.sigma_max), grid, (jnp.float32(0.5), jnp.float32(1.0)))
    np.testing.assert_array_equal(inside, evaluate(other, LINEAR, jnp.float32(0.99999), jnp.float32(1e-5)))


@pytest.mark.quick
def test_poly_exponential():
    exact = np.append(exact_poly_exponential(17, 2.0, 80.0, 0.002), 0)
    np.testing.assert_allclose(grids.PolyExponential(18, rho=2.0)(EDM, t_end=0.0), exact, rtol=3e-6)
    # rho = 1 is the grid in log-SNR.
    for t_end in (0.0, 0.1):
        np.testing.assert_allclose(
            grids.PolyExponential(9)(LINEAR, t_end=t_end), grids.LogSNR(9)(LINEAR, t_end=t_end), rtol=1e-6
        )


@pytest.mark.quick
def test_vp_power():
    # On VP itself, a power of its own time; onto the clean data too, which no level stands for.
    for t_end in (1e-4, 0.0, 0.3):
        np.testing.assert_allclose(grids.VPPower(6)(VP, t_end=t_end), grids.Power(6)(VP, t_end=t_end), rtol=2e-6)
    other = paths.VP(0.3, 9.0)
    np.testing.assert_allclose(
        grids.VPPower(6, 1.5, beta_min=0.3, beta_max=9.0)(other), grids.Power(6, 1.5)(other), rtol=2e-6
    )
    np.testing.assert_allclose(
        grids.VPPower(6, beta_min=2.0, beta_max=2.0)(EDM, t_end=1.0)[1:-1],
        # A constant beta: tau is ln(1 + sigma^2)/2.
        np.sqrt(np.expm1(np.log(2) + (1 - np.arange(1, 6) / 6) ** 2 * np.log(6401 / 2))),
        rtol=2e-6,
    )
    # Equal steps in that time are the noise levels of the VP diffusion, from sqrt(exp(10.05) - 1) = 152.2.
    t = np.linspace(1, 1e-3, 12)
    sigmas = np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)
    np.testing.assert_allclose(grids.VPPower(11, power=1.0)(EDM, sigmas[0], sigmas[-1]), sigmas, rtol=3e-6)
    # alpha = 0 at the start: sigma_max stands for it.
    on_linear = np.float64(grids.VPPower(7, sigma_max=50.0)(LINEAR))
    exact = exact_vp_power(7, 2, 50.0, 0.0)
    assert on_linear[0] == 1 and on_linear[-1] == 0
    np.testing.assert_allclose(on_linear[1:-1], (exact / (1 + exact))[1:-1], rtol=2e-6)
    # No digits are lost near tau = 0: here the last of 200 steps leaves from tau = 2e-5.
    np.testing.assert_allclose(grids.VPPower(200)(EDM, t_end=0.0), exact_vp_power(200, 2, 80.0, 0.0), rtol=3e-6)


def test_beta():
    """Against SciPy's quantiles, and the distributions whose quantiles are elementary."""
    n = 50  # one number of steps, compiled once
    u = 1 - np.arange(n + 1) / n
    for a, b in [(0.6, 0.6), (0.2, 3.0), (2.0, 5.0), (30.0, 0.7), (100.0, 100.0)]:
        exact = stats.beta.ppf(u, np.float32(a).astype(float), np.float32(b).astype(float))
        np.testing.assert_allclose(grids.Beta(n, a, b)(LINEAR), exact, rtol=1e-5)
    np.testing.assert_allclose(grids.Beta(n, a, b)(EDM, 80.0, 3.0), 3 + 77 * exact, rtol=5e-6)
    np.testing.assert_allclose(grids.Beta(n, 1.0, 1.0)(VP), grids.Uniform(n)(VP), rtol=3e-6)
    np.testing.assert_allclose(grids.Beta(n, 1 / 3, 1.0)(VP), grids.Power(n, 3.0)(VP), rtol=5e-6)
    np.testing.assert_allclose(grids.Beta(n, 0.5, 0.5)(LINEAR), np.sin(np.pi * u / 2) ** 2, rtol=5e-6)
    # The paper's two exponents are equal: the steps are the same from both ends.
    symmetric = np.float64(grids.Beta(n)(LINEAR))
    np.testing.assert_allclose(symmetric + symmetric[::-1], 1, atol=2e-6)
    # Batched over its parameters.
    batch = jax.vmap(lambda a, b: grids.Beta(n, a, b)(LINEAR))(jnp.asarray([0.6, 2.0]), jnp.asarray([0.6, 5.0]))
    np.testing.assert_allclose(batch[0], symmetric, rtol=1e-6)
    np.testing.assert_allclose(batch[1], grids.Beta(n, 2.0, 5.0)(LINEAR), rtol=1e-6)


def test_beta_gradient():
    """The implicit derivative in both exponents and in the ends, against closed forms and finite differences."""
    inner = jax.jit(jax.jacrev(lambda *inputs: grids.Beta(4, *inputs[:2]).inner(LINEAR, *inputs[2:], 4), (0, 1, 2, 3)))

    def gradient(a, b):
        return inner(*(jnp.float32(value) for value in (a, b, 1, 0)))

    u = np.asarray([0.75, 0.5, 0.25])
    # b = 1: u^(1/a); a = 1: 1 - (1 - u)^(1/b).
    by_a, _, by_start, by_end = gradient(2.0, 1.0)
    np.testing.assert_allclose(by_a, -(u**0.5) * np.log(u) / 4, rtol=2e-5)
    np.testing.assert_allclose(by_start, u**0.5, rtol=2e-6)
    np.testing.assert_allclose(by_end, 1 - u**0.5, rtol=2e-6)
    np.testing.assert_allclose(gradient(1.0, 3.0)[1], (1 - u) ** (1 / 3) * np.log(1 - u) / 9, rtol=2e-5)
    h = 1e-6
    by_a, by_b, *_ = gradient(0.6, 0.6)
    np.testing.assert_allclose(
        by_a, (stats.beta.ppf(u, 0.6 + h, 0.6) - stats.beta.ppf(u, 0.6 - h, 0.6)) / (2 * h), rtol=2e-5
    )
    np.testing.assert_allclose(
        by_b, (stats.beta.ppf(u, 0.6, 0.6 + h) - stats.beta.ppf(u, 0.6, 0.6 - h)) / (2 * h), rtol=2e-5
    )


# k of 1000 timesteps, by hand: 1000/7 = 142.857 and 999/6 = 166.5, halves to the even number counted from 1.
BY_HAND = {
    (grids.Leading, 10): [900, 800, 700, 600, 500, 400, 300, 200, 100, 0],
    (grids.Trailing, 10): [999, 899, 799, 699, 599, 499, 399, 299, 199, 99],
    (grids.Linspace, 10): [999, 888, 777, 666, 555, 444, 333, 222, 111, 0],
    (grids.Quadratic, 10): [800, 632, 483, 355, 246, 158, 88, 39, 9, 0],  # 800 j^2/81
    (grids.Leading, 7): [852, 710, 568, 426, 284, 142, 0],
    (grids.Trailing, 7): [999, 856, 713, 570, 428, 285, 142],
    (grids.Linspace, 7): [999, 833, 666, 499, 333, 167, 0],
    (grids.Quadratic, 7): [800, 555, 355, 200, 88, 22, 0],  # 800 j^2/36
    (grids.Leading, 1): [0],
    (grids.Trailing, 1): [999],
    (grids.Linspace, 1): [999],
    (grids.Quadratic, 1): [800],
}


@pytest.mark.quick
@pytest.mark.parametrize(("kind", "n"), BY_HAND, ids=lambda value: getattr(value, "__name__", value))
def test_timesteps_by_hand(kind, n):
    """n evaluations at the published integers, then the clean data: n steps, n + 1 points."""
    grid, expected = kind(n), BY_HAND[kind, n]
    assert grid.timesteps(DDPM).tolist() == expected
    ts = np.asarray(grid(DDPM))
    assert len(ts) == n + 1 and ts[-1] == 0 and DDPM.sigma(ts[-1]) == 0
    np.testing.assert_array_equal(ts[:-1], np.float32((np.asarray(expected) + 1) / 1000))
    np.testing.assert_array_equal(jax.vmap(DDPM.timestep)(jnp.asarray(ts[:-1])), expected)
    # Its own ends may be named, in either order, also where they are traced.
    np.testing.assert_array_equal(evaluate(grid, DDPM, ts[0], ts[-1]), ts)
    np.testing.assert_array_equal(evaluate(grid, DDPM, ts[-1], ts[0]), ts[::-1])


@pytest.mark.quick
@pytest.mark.parametrize("kind", TIMESTEPS)
def test_timesteps_of_any_number_of_steps(kind):
    """n different timesteps out of T, largest first, for every n up to T; all of them at n = T."""
    for total in (2, 7, 100):
        for n in range(1, total + 1):
            k = kind(n).table(total)
            assert k.shape == (n,) and np.issubdtype(k.dtype, np.integer)
            assert np.all(np.diff(k) < 0) and k[0] < total and k[-1] >= 0
        assert k.tolist() == list(range(total))[::-1]
    for name, path in PATHS.items():
        if isinstance(path, paths.Discrete):
            ts = np.asarray(kind(9)(path))
            assert len(ts) == 10 and np.all(np.diff(ts) < 0), name
            assert np.all(ts[:-1] >= np.float32(path.t_data)) and ts[0] <= path.t_noise, name


@pytest.mark.quick
def test_quadratic_scale():
    # 0.5 * 1000 j^2/9; c j^2 is repeated nowhere up to 29 steps, and from 30 the smallest are counted up instead.
    assert grids.Quadratic(4, 0.5).timesteps(DDPM).tolist() == [500, 222, 55, 0]
    assert grids.Quadratic(29).timesteps(DDPM)[-4:].tolist() == [9, 4, 1, 0]
    j = np.arange(50)[::-1]
    plain = 800 * j**2 // 49**2
    assert plain[-4:].tolist() == [2, 1, 0, 0]
    k = grids.Quadratic(50).timesteps(DDPM)
    assert k[-6:].tolist() == [8, 5, 3, 2, 1, 0]
    np.testing.assert_array_equal(k[plain >= j], plain[plain >= j])


@pytest.mark.quick
@pytest.mark.parametrize("kind", TIMESTEPS)
def test_timesteps_errors(kind):
    name = kind.__name__
    with pytest.raises(TypeError, match=f"{name} got the path VP, but .* give the flow a Discrete path"):
        kind(3)(VP)
    with pytest.raises(TypeError, match="got the path Shifted"):
        kind(3)(paths.Shifted(DDPM, 1.0))
    with pytest.raises(ValueError, match=f"{name} got steps = 1001 .* 1000 timesteps, .* ask for 1000 steps or fewer"):
        kind(1001)(DDPM)
    for t_start, t_end in [(0.95, None), (None, 1e-3), (0.5, 0.0)]:
        with pytest.raises(ValueError, match=f"{name} was asked for other ends .* leave t_start and t_end out"):
            kind(3)(DDPM, t_start, t_end)
    with pytest.raises(ValueError, match=r"cannot take 2: .* leave ThenClean out"):
        grids.ThenClean(kind(3))(DDPM)
    with pytest.raises(ValueError, match="timesteps outside the path's ends"):
        kind(3)(paths.Discrete(DDPM.betas, t_data=0.4, t_noise=0.6))
    with pytest.raises(ValueError, match="steps = 0"):
        kind(0)


@pytest.mark.quick
def test_uniform_and_power():
    np.testing.assert_allclose(grids.Uniform(4)(LINEAR), [1, 0.75, 0.5, 0.25, 0], atol=1e-7)
    np.testing.assert_allclose(grids.Uniform(4)(EDM), np.linspace(80, 0.002, 5), rtol=1e-6)
    np.testing.assert_allclose(grids.Power(4)(LINEAR), [1, 9 / 16, 4 / 16, 1 / 16, 0], atol=1e-7)
    np.testing.assert_allclose(
        grids.Power(5, power=3.0)(EDM, 10.0, 1.0), 1 + 9 * (1 - np.arange(6) / 5) ** 3, rtol=1e-6
    )
    np.testing.assert_allclose(grids.Power(5, power=1.0)(VP), grids.Uniform(5)(VP), rtol=1e-6)


@pytest.mark.quick
def test_shift_is_applied_once():
    """Pitfalls 13 and 14: the training shift, once, with exact ends, and no NaN at one step."""
    k = 3.0
    shifted = grids.Shifted(grids.Uniform(8), k)(LINEAR)
    s = 1 - np.arange(9) / 8
    np.testing.assert_allclose(shifted, k * s / (1 + (k - 1) * s), rtol=1e-6)
    expected = jax.vmap(lambda t: times.shift_time(t, k))(grids.Uniform(8)(LINEAR))
    np.testing.assert_allclose(shifted, expected, rtol=3e-7)
    # The fractions of the grid and the quantiles of the training times are the same points.
    quantile = jax.vmap(lambda u: times.Shifted(times.Uniform(), k).quantile(LINEAR, u))
    np.testing.assert_allclose(shifted, quantile(jnp.asarray(s, jnp.float32)), rtol=3e-7)
    assert grids.Shifted(grids.Uniform(1), k)(LINEAR).tolist() == [1, 0]

    # From a time inside: the end stays, and the points are equally spaced before the shift.
    part = grids.Shifted(grids.Uniform(5), k)(LINEAR, t_start=0.6, t_end=0.1)
    assert part[0] == np.float32(0.6) and part[-1] == np.float32(0.1)
    spacing = np.diff(jax.vmap(lambda t: times.shift_time(t, 1 / k))(part))
    np.testing.assert_allclose(spacing, spacing.mean(), rtol=1e-5)
    # On another path between its own ends.
    on_edm = (np.float64(grids.Shifted(grids.Uniform(8), k)(EDM)) - 0.002) / 79.998
    np.testing.assert_allclose(on_edm, k * s / (1 + (k - 1) * s), rtol=1e-5, atol=1e-7)
    twice = grids.Shifted(grids.Shifted(grids.Uniform(8), 1.5), 2.0)(LINEAR)
    np.testing.assert_allclose(twice, shifted, rtol=1e-6)


@pytest.mark.quick
def test_then_clean():
    grid = grids.ThenClean(grids.Power(4))
    assert grid.steps == 4
    ts = grid(EDM)
    assert len(ts) == 5 and ts[-1] == 0
    np.testing.assert_array_equal(ts[:-1], grids.Power(3)(EDM))
    assert grids.ThenClean(grids.Power(1))(EDM).tolist() == [80, 0]
    assert grids.ThenClean(grids.Power(2))(EDM).tolist() == [80, np.float32(0.002), 0]
    np.testing.assert_array_equal(grid(EDM, 0.0, 80.0), ts[::-1])
    assert grid(VP)[-2] == np.float32(1e-4) and grid(VP)[-1] == 0
    # The shift is that of the path and keeps both last points in order.
    assert np.all(np.diff(grids.Shifted(grid, 3.0)(EDM)) < 0)
    with pytest.raises(ValueError, match="not strictly monotone"):
        grid(LINEAR)


@pytest.mark.quick
def test_given():
    ts = [1.0, 0.7, 0.3, 0.0]
    grid = grids.Given(ts)
    assert grid.steps == 3
    expected = np.asarray(ts, np.float32)
    for points in (grid(LINEAR), grid(LINEAR, 1.0, 0.0), grid(LINEAR, t_end=0.0), grids.Given(np.asarray(ts))(LINEAR)):
        np.testing.assert_array_equal(points, expected)
    np.testing.assert_array_equal(grid(LINEAR, 0.0, 1.0), expected[::-1])
    np.testing.assert_array_equal(grids.Given(ts[::-1])(LINEAR), expected[::-1])
    np.testing.assert_array_equal(grids.Given(ts[::-1])(LINEAR, 1.0, 0.0), expected)
    np.testing.assert_array_equal(grids.Given([1, 0])(LINEAR), [1, 0])
    assert grids.Given([80.0, 1.0, 0.0])(EDM)[-1] == 0  # the clean data lies below t_data = 0.002
    np.testing.assert_array_equal(eqx.filter_jit(lambda ts: grids.Given(ts)(LINEAR))(jnp.asarray(ts)), expected)


@pytest.mark.quick
def test_given_errors():
    nan = float("nan")
    for ts, message in [
        ([1.0], "shape .1."),
        (np.zeros(0), "shape .0."),
        (np.ones((1, 2)), "shape .1, 2."),
        ([1.0, 0.5, 0.6, 0.0], "not strictly monotone"),
        ([1.0, 0.5, 0.5, 0.0], "not strictly monotone"),
        ([1.0, nan, 0.0], "not strictly monotone"),
    ]:
        with pytest.raises(ValueError, match=message):
            grids.Given(ts)
    for ts, path in [
        ([1.1, 0.5], LINEAR),
        ([0.5, -0.1], LINEAR),
        ([80.0, 0.001], EDM),  # between the clean data and t_data
        ([1.0, 5e-5, 0.0], VP),
        ([1.0, 0.5], paths.OrnsteinUhlenbeck()),
    ]:
        with pytest.raises(ValueError, match="outside"):
            grids.Given(ts)(path)
    with pytest.raises(ValueError, match="other ends"):
        grids.Given([1.0, 0.5])(LINEAR, t_end=0.0)
    with pytest.raises(ValueError, match="other ends"):
        grids.Given([1.0, 0.5])(LINEAR, t_start=0.9)
    with pytest.raises(ValueError, match="put the clean time into ts"):
        grids.ThenClean(grids.Given([80.0, 1.0, 0.002]))(EDM)
    with pytest.raises(eqx.EquinoxRuntimeError, match="not strictly monotone"):
        eqx.filter_jit(lambda ts: grids.Given(ts)(LINEAR))(jnp.asarray([1.0, nan, 0.0])).block_until_ready()


@pytest.mark.quick
def test_steps():
    between = (grids.Uniform, grids.Power, grids.Beta, grids.Karras, grids.LogSNR, grids.PolyExponential, grids.VPPower)
    for make in (*between, *TIMESTEPS):
        for steps in (0, -3):
            with pytest.raises(ValueError, match=f"steps = {steps}"):
                make(steps)
        for steps in (2.0, True, "3", None, np.True_):
            with pytest.raises(TypeError):
                make(steps)
        assert make(np.int64(3)).steps == 3
    # Static: a leaf would be traced where a shape is wanted.
    assert jax.tree.leaves(grids.Uniform(3)) == []


@pytest.mark.quick
def test_errors():
    for t_start, t_end in [(0.5, 0.5), (float("nan"), 0.0)]:
        with pytest.raises(ValueError, match=r"Uniform of 3 steps .* give t_start and t_end that differ"):
            grids.Uniform(3)(LINEAR, t_start, t_end)
    with pytest.raises(ValueError, match="than the float type can tell apart"):
        grids.Power(1000, power=8.0)(EDM)
    with pytest.raises(ValueError, match="not strictly monotone"):
        grids.Karras(4)(LINEAR, 1e-4, 0.0)  # starts below sigma_min
    for make, name in [
        (lambda: grids.Power(3, power=0.0), "power = 0"),
        (lambda: grids.Karras(3, rho=-7.0), "rho = -7"),
        (lambda: grids.Karras(3, sigma_min=0.0), "sigma_min = 0"),
        (lambda: grids.LogSNR(3, sigma_max=float("inf")), "sigma_max = inf"),
        (lambda: grids.PolyExponential(3, rho=0.0), "rho = 0"),
        (lambda: grids.Beta(3, a=-0.6), "a = -0.6"),
        (lambda: grids.Beta(3, b=float("nan")), "b = nan"),
        (lambda: grids.VPPower(3, power=-1.0), "power = -1"),
        (lambda: grids.VPPower(3, beta_min=0.0), "beta_min = 0"),
        (lambda: grids.VPPower(3, beta_min=20.0, beta_max=0.1), "beta_min = 20 above beta_max = 0.1, .* swap them"),
        (lambda: grids.Quadratic(3, scale=1.0), "scale = 1.0, but wants a plain number above 0 and below 1"),
        (lambda: grids.Quadratic(3, scale=0), "scale = 0"),
        (lambda: grids.Shifted(grids.Uniform(3), 0.0), "shift = 0"),
    ]:
        with pytest.raises(ValueError, match=name):
            make()
    with pytest.raises(eqx.EquinoxRuntimeError, match="t_start and t_end that differ"):
        evaluate(grids.Uniform(3), LINEAR, jnp.float32(0.5), jnp.float32(0.5)).block_until_ready()


def test_new_values_do_not_retrace():
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def points(grid, t_start):
        return grid(LINEAR, t_start)

    for i in range(3):
        inside = grids.Karras(4, rho=5.0 + i, sigma_min=0.001 + 0.001 * i)
        points(grids.Shifted(inside, 1.0 + i), jnp.float32(1 - 0.1 * i))


def test_new_values_do_not_retrace_the_other_grids():
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def points(every, t_start):
        return [grid(LINEAR, t_start) for grid in every]

    for i in range(3):
        every = (
            grids.Beta(4, 0.5 + i, 1.0 - 0.2 * i),
            grids.PolyExponential(4, 1.0 + i),
            grids.VPPower(4, 1.0 + i, beta_min=0.1 + i, beta_max=20.0 - i),
        )
        points(every, jnp.float32(1 - 0.1 * i))


@pytest.mark.parametrize("path", [LINEAR, VP, EDM], ids=lambda path: type(path).__name__)
def test_gradients_are_finite(path):
    """In the ends and the parameters, at ends where sigma/alpha is 0 or infinite too."""

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(inputs):
        every, t_start, t_end = inputs
        return sum(jnp.sum(jnp.sin(grid(path, t_start, t_end))) for grid in every.values())

    some = {kind: grid for kind, grid in kinds(4).items() if kind not in ("uniform", "karras")}
    high, low = ends_of(path)
    for t_start, t_end in [(high, low), (high, np.float32(0)), (0.5 * high, 2 * low + 0.1)]:
        leaves = jax.tree.leaves(gradient((some, jnp.asarray(t_start), jnp.asarray(t_end))))
        assert len(leaves) > 2 and all(np.all(np.isfinite(leaf)) for leaf in leaves)


def test_float64(x64):
    ts = np.asarray(grids.Karras(18)(EDM, t_end=0.0))
    assert ts.dtype == np.float64
    np.testing.assert_allclose(ts[:-1], exact_karras(17, 7, 80.0, 0.002), rtol=1e-13)
    u = 1 - np.arange(9) / 8
    np.testing.assert_allclose(grids.Beta(8)(paths.Linear()), stats.beta.ppf(u, 0.6, 0.6), rtol=1e-12)
    on_edm = grids.VPPower(9)(EDM, t_end=0.0)
    np.testing.assert_allclose(on_edm, exact_vp_power(9, 2, 80.0, 0.0), rtol=1e-12)
    assert grids.Trailing(3)(DDPM).tolist() == [1.0, 0.667, 0.333, 0.0]
