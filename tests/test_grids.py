"""Inference grids: n + 1 points, exact ends, strictly monotone, and the published formulas, on every path."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import PATHS, REFERENCES

from flowsolve import grids, paths, times

LINEAR, VP, EDM = paths.Linear(), paths.VP(), paths.EDM()


def kinds(n):
    """One grid of n steps of each kind that runs between any ends."""
    return {
        "uniform": grids.Uniform(n),
        "power": grids.Power(n),
        "karras": grids.Karras(n),
        "log_snr": grids.LogSNR(n),
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


def ratio(name, t):
    """sigma/alpha in float64."""
    alpha, sigma, *_ = REFERENCES[name](np.float64(t))
    with np.errstate(divide="ignore"):
        return sigma / alpha


def assert_spaced(name, ts, spacing):
    """The inner points have the ratios spacing(n, first, last), with infinite ends replaced as documented."""
    first, last = ratio(name, ts[:1])[0], ratio(name, ts[-1:])[0]
    first, steps = (80.0 if np.isinf(first) else first), len(ts) - 1
    exact = spacing(steps - 1, first, 0.002) if last == 0 else spacing(steps, first, last)[:-1]
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

    middle = np.float32(0.5) * (high + low)
    for t_start, t_end in [(high, low), (high, middle), (middle, low)]:
        descending, ascending = all_grids(t_start, t_end), all_grids(t_end, t_start)
        for which, ts in descending.items():
            ts = np.asarray(ts)
            assert ts.shape == (int(which[-1]) + 1,) and ts.dtype == np.float32
            assert ts[0] == t_start and ts[-1] == t_end
            assert np.all(np.diff(ts) < 0)
            np.testing.assert_array_equal(ascending[which], ts[::-1])
        assert_spaced(name, np.asarray(descending["karras 7"]), lambda n, *ends: exact_karras(n, 7.0, *ends))
        assert_spaced(name, np.asarray(descending["log_snr 7"]), lambda n, *ends: np.geomspace(*ends, n + 1))


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
], ids=["karras", "log_snr"])  # fmt: skip
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
    for make in (grids.Uniform, grids.Power, grids.Karras, grids.LogSNR):
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


@pytest.mark.parametrize("path", [LINEAR, VP, EDM], ids=lambda path: type(path).__name__)
def test_gradients_are_finite(path):
    """In the ends and the parameters, at ends where sigma/alpha is 0 or infinite too."""

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(inputs):
        every, t_start, t_end = inputs
        return sum(jnp.sum(jnp.sin(grid(path, t_start, t_end))) for grid in every.values())

    some = {kind: grid for kind, grid in kinds(4).items() if kind in ("power", "log_snr", "shifted")}
    high, low = ends_of(path)
    for t_start, t_end in [(high, low), (high, np.float32(0)), (0.5 * high, 2 * low + 0.1)]:
        leaves = jax.tree.leaves(gradient((some, jnp.asarray(t_start), jnp.asarray(t_end))))
        assert len(leaves) > 2 and all(np.all(np.isfinite(leaf)) for leaf in leaves)


def test_float64(x64):
    ts = np.asarray(grids.Karras(18)(EDM, t_end=0.0))
    assert ts.dtype == np.float64
    np.testing.assert_allclose(ts[:-1], exact_karras(17, 7, 80.0, 0.002), rtol=1e-13)
