"""EDM's preconditioning against the paper's formulas and against what it is for: unit variances on every path."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import PATHS, REFERENCES, times

from flowsolve import predictions
from flowsolve.flow import Flow
from flowsolve.preconditioning import EDMPreconditioner, angle, quarter_log_ratio


def zero(t, x, args, *, key=None):
    """A network as it is at initialisation."""
    del t, args, key
    return jax.tree.map(jnp.zeros_like, x)


@functools.cache
def coefficients(name):
    """(c_in, c_skip, c_out), both noise levels and the derivative of the angle, at times (n,)."""
    path = PATHS[name]

    def one(t, data_std):
        level = functools.partial(angle, path)
        return (
            *EDMPreconditioner(data_std).coefficients(path, t),
            quarter_log_ratio(path, t),
            *jax.value_and_grad(level)(t),
        )

    return jax.jit(jax.vmap(one, (0, None)))


@pytest.mark.quick
def test_golden_values_of_the_paper():
    """Karras et al. (2022), table 1, sigma_data = 0.5."""
    sigma = np.array([0.002, 0.1, 0.5, 2.0, 80.0])
    c_in, c_skip, c_out, c_noise, *_ = coefficients("edm")(np.float32(sigma), jnp.asarray(0.5))
    np.testing.assert_allclose(c_skip, 0.25 / (sigma**2 + 0.25), rtol=1e-6)
    np.testing.assert_allclose(c_out, sigma * 0.5 / np.sqrt(0.25 + sigma**2), rtol=1e-6)
    np.testing.assert_allclose(c_in, 1 / np.sqrt(sigma**2 + 0.25), rtol=1e-6)
    np.testing.assert_allclose(c_noise, np.log(sigma) / 4, rtol=1e-6)
    # sigma = sigma_data: skip one half, out 1/(2 sqrt 2), in sqrt 2.
    assert [float(c[2]) for c in (c_skip, c_out, c_in)] == pytest.approx([0.5, 8**-0.5, 2**0.5], rel=1e-6)
    assert EDMPreconditioner().data_std == 0.5


@pytest.mark.parametrize("name", PATHS)
def test_unit_variances_on_every_path(name):
    """For data of standard deviation s: of c_in x_t, and of the network's target (x_0 - c_skip x_t)/c_out.

    And c_skip is the one with the smallest c_out, which is how the paper derives it.
    """
    data_std, t = 0.7, times(name)
    got = [np.float64(c) for c in coefficients(name)(t, jnp.asarray(data_std))]
    c_in, c_skip, c_out, c_noise, level, slope = got
    alpha, sigma, *_ = REFERENCES[name](np.float64(t))
    np.testing.assert_allclose(c_in**2 * (alpha**2 * data_std**2 + sigma**2), 1, rtol=1e-5)

    def variance(skip):  # of x_0 - skip (alpha x_0 + sigma eps)
        return (1 - skip * alpha) ** 2 * data_std**2 + (skip * sigma) ** 2

    noisy = sigma > 1e-3  # below, 1 - c_skip alpha is only as good as the rounding of c_skip
    np.testing.assert_allclose(variance(c_skip)[noisy] / c_out[noisy] ** 2, 1, rtol=1e-4)
    np.testing.assert_allclose(
        variance(data_std**2 * alpha / (alpha**2 * data_std**2 + sigma**2)), c_out**2, rtol=1e-4, atol=1e-30
    )
    for shift in (-0.01, 0.01):
        assert (variance(c_skip + shift) > c_out**2).all()

    np.testing.assert_allclose(level, np.arctan2(sigma, alpha), rtol=1e-5, atol=1e-7)
    assert np.isfinite(slope).all() and (np.diff(level) >= 0).all()
    inner = (alpha > 0) & (sigma > 0)
    np.testing.assert_allclose(c_noise[inner], np.log(sigma[inner] / alpha[inner]) / 4, rtol=1e-4, atol=1e-6)
    assert np.isinf(c_noise[~inner]).all()


@pytest.mark.parametrize("name", ["linear", "vp", "edm"])
def test_at_initialisation_it_is_the_best_linear_denoiser(name):
    """A network that returns 0 gives c_skip x, the exact denoiser of N(0, s^2 I)."""
    path, data_std = PATHS[name], 0.7
    flow = Flow(zero, path, predictions.Data(), EDMPreconditioner(data_std, angle))
    t = times(name)
    x = np.float32(np.random.default_rng(0).normal(size=(len(t), 3)))
    alpha, sigma, *_ = REFERENCES[name](np.float64(t))
    found = jax.jit(jax.vmap(flow.denoised))(t, x)
    gain = alpha * data_std**2 / (alpha**2 * data_std**2 + sigma**2)
    np.testing.assert_allclose(found, gain[:, None] * x, rtol=2e-6, atol=1e-12)


@pytest.mark.quick
def test_the_ends_and_what_the_network_gets():
    path, data_std, seen = PATHS["linear"], 0.25, []

    def network(t, x, args, *, key=None):
        seen.append((t, x, args, key))
        return jax.tree.map(lambda leaf: leaf + 1, x)

    flow = Flow(network, path, predictions.Data(), EDMPreconditioner(data_std, angle))
    x, key = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(4.0)}, jax.random.key(0)
    for t, level in ((0.0, 0.0), (0.5, np.pi / 4), (1.0, np.pi / 2)):
        found = flow.output(t, x, "args", key=key)
        got_t, got_x, args, got_key = seen.pop()
        norm = np.hypot(t, (1 - t) * data_std)
        assert got_t == pytest.approx(level, abs=1e-7) and got_t.dtype == jnp.float32 and got_t.shape == ()
        np.testing.assert_allclose(got_x["a"], x["a"] / norm, rtol=1e-6)
        assert args == "args" and got_key is key
        expected = {
            0.0: x["a"],  # x/alpha, whatever the network says
            0.5: 0.5 * data_std**2 / norm**2 * x["a"] + 0.5 * data_std / norm * (x["a"] / norm + 1),
            1.0: data_std * (x["a"] + 1),
        }[t]
        np.testing.assert_allclose(found["a"], expected, rtol=1e-6)


def test_data_std_may_be_learned():
    """A plain number is no leaf; an array is one, with a gradient."""

    def denoised(preconditioner):
        return Flow(zero, PATHS["vp"], predictions.Data(), preconditioner).denoised(0.5, jnp.ones(()))

    assert jax.tree.leaves(eqx.filter(EDMPreconditioner(0.5), eqx.is_array)) == []
    gradient = eqx.filter_grad(denoised)(EDMPreconditioner(jnp.asarray(0.5))).data_std
    h = 1e-2
    slope = (denoised(EDMPreconditioner(0.5 + h)) - denoised(EDMPreconditioner(0.5 - h))) / (2 * h)
    assert gradient == pytest.approx(float(slope), rel=1e-3)


@pytest.mark.quick
def test_messages():
    for data_std in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="standard deviation, > 0"):
            EDMPreconditioner(data_std)
    with pytest.raises(ValueError, match="preconditioner that predicts Data"):
        Flow(zero, PATHS["vp"], predictions.Noise(), EDMPreconditioner())
