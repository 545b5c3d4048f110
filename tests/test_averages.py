"""Averages after training: any width, from stored averages of two others."""

import jax.numpy as jnp
import numpy as np
import pytest

from flowsolve import averages
from flowsolve.averages import PowerFunction, Snapshot, reconstruct

STEPS = 4096


def trajectory(k):
    """Parameters after step k, smooth with a little noise, as training has them."""
    rng = np.random.default_rng(0)
    fraction = np.arange(1, STEPS + 1) / STEPS
    path = np.stack([np.exp(-3 * fraction), np.sin(7 * fraction), fraction**2], axis=1)
    return (path + 0.05 * rng.normal(size=path.shape))[:k]


def exact(std, step):
    """The average itself: the parameters with the weights of the table in averages.py."""
    gamma = float(PowerFunction(std).gamma)
    k = np.arange(step + 1.0)
    weights = np.diff((k / step) ** (gamma + 1))
    return weights @ trajectory(step)


def stored(*stds):
    """Snapshots every sixteenth of the training."""
    steps = range(STEPS // 16, STEPS + 1, STEPS // 16)
    return [Snapshot(std, step, {"w": exact(std, step)}) for std in stds for step in steps]


@pytest.mark.quick
def test_the_width_is_that_of_the_weights():
    """The standard deviation of the step under the weights, in units of the last."""
    for std in (0.02, 0.1, 0.25):
        gamma = float(PowerFunction(std).gamma)
        u = (np.arange(200_000) + 0.5) / 200_000
        density = (gamma + 1) * u**gamma
        mean = np.mean(density * u)
        np.testing.assert_allclose(np.sqrt(np.mean(density * (u - mean) ** 2)), std, rtol=1e-3)


@pytest.mark.quick
def test_weights_of_long_averages():
    """1 - beta_n to the last digits of float32, where beta_n itself is rounded to 6e-8."""
    for n in (1, 2, 10**3, 10**5, 10**7):
        step = jnp.asarray(n)
        for std in (0.05, 0.2886):
            average = PowerFunction(std)
            power = np.float64(average.gamma) + 1
            wanted = 1.0 if n == 1 else -np.expm1(power * np.log1p(-1 / n))
            np.testing.assert_allclose(average.fresh(step), wanted, rtol=1e-6)
        for half_life in (averages.HalfLife(n), averages.HalfLife(1e9, ramp_up=0.5)):
            h = n if half_life.ramp_up is None else 0.5 * n
            np.testing.assert_allclose(half_life.fresh(step), -np.expm1(-np.log(2) / h), rtol=1e-6)
            np.testing.assert_allclose(half_life.decay(step), 2 ** (-1 / h), rtol=1e-6)
    for d in (0.0, 0.9, 0.9999, 0.999999, 1 - 1e-9):
        np.testing.assert_allclose(averages.Constant(d).fresh(jnp.asarray(1)), 1 - d, rtol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("std", [0.05, 0.07, 0.1, 0.15])
@pytest.mark.parametrize("step", [None, STEPS * 3 // 4])
def test_any_width_is_reconstructed(std, step):
    snapshots = stored(0.05, 0.1)
    wanted = exact(std, STEPS if step is None else step)
    found = reconstruct(snapshots, std=std, step=step)["w"]
    error = np.abs(found - wanted).max()
    assert error < 2e-3
    # Nearer than the nearest of what is stored, unless it is itself stored.
    nearest = min(np.abs(snapshot.parameters["w"] - wanted).max() for snapshot in snapshots)
    assert nearest < 1e-12 or error < nearest / 3


@pytest.mark.quick
def test_a_constant_is_itself():
    constant = {"w": np.full((2, 3), 1.7, np.float32)}
    snapshots = [Snapshot(std, step, constant) for std in (0.05, 0.1) for step in (100, 300, 1000)]
    found = reconstruct(snapshots, std=0.08)["w"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 1.7, rtol=1e-6)


@pytest.mark.quick
def test_errors():
    one = Snapshot(0.1, 5, {"w": np.ones(2)})
    for make, message in [
        (lambda: PowerFunction(0.3), "std = 0.3, but wants a number with 0 < std < 0.2887"),
        (lambda: averages.HalfLife(0.0), "steps = 0"),
        (lambda: averages.Constant(1.0), "decay 1"),
        (lambda: reconstruct([], std=0.1), "got no snapshots"),
        (lambda: reconstruct([one, one._replace(parameters={"w": np.ones(3)})], std=0.1), "the parameters of one flow"),
        (lambda: reconstruct([one._replace(step=0)], std=0.1), "step = 0"),
        (lambda: reconstruct([one], std=0.1, step=0), "step = 0, but wants an integer from 1 to 5"),
        (lambda: reconstruct([one], std=0.1, step=6), "step = 6, but wants an integer from 1 to 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
