"""The plain helpers against float64 NumPy on every path, back and forth, at the ends, and their times."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import PATHS, REFERENCES, times

import flowsolve as fs
from flowsolve import conversions, paths

KEY = jax.random.key(0)
ULP = 2.0**-23
#: Roundings allowed, in units of the terms of an answer; 8 were seen, where sigma is an exponential.
LIMIT = 12
X0, EPS = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)


@functools.cache
def program(name, x64):
    """Every helper at every time of a path, of states in the order of `truth`; there and back again as the last two."""
    path = PATHS[name]

    def one(t, x_t, velocity):
        x0, eps = jnp.asarray(X0), jnp.asarray(EPS)
        noisy = conversions.add_noise(path, t, x0, eps)
        back = conversions.data_from_velocity(path, t, noisy, conversions.velocity_from_data(path, t, noisy, x0))
        again = conversions.data_from_noise(path, t, noisy, conversions.noise_from_data(path, t, noisy, x0))
        return (
            noisy,
            conversions.data_from_noise(path, t, x_t, eps),
            conversions.data_from_velocity(path, t, x_t, velocity),
            conversions.noise_from_data(path, t, x_t, x0),
            conversions.velocity_from_data(path, t, x_t, x0),
            back,
            again,
        )

    return jax.jit(jax.vmap(one))


def truth(name, ts):
    """x_t and velocity in float32, and from these every answer in float64, with the size of the terms it is made of."""
    columns = (np.asarray(c, np.float64)[:, None] for c in REFERENCES[name](np.asarray(ts, np.float64)))
    alpha, sigma, d_alpha, d_sigma = (np.broadcast_to(c, (len(ts), 1)) for c in columns)
    x0, eps = X0.astype(np.float64), EPS.astype(np.float64)
    x_t = (alpha * x0 + sigma * eps).astype(np.float32)
    velocity = (d_alpha * x0 + d_sigma * eps).astype(np.float32)
    x, v = x_t.astype(np.float64), velocity.astype(np.float64)
    below = alpha * d_sigma - d_alpha * sigma
    with np.errstate(all="ignore"):
        answers = [
            (alpha * x0 + sigma * eps, np.abs(alpha * x0) + np.abs(sigma * eps)),
            ((x - sigma * eps) / alpha, (np.abs(x) + np.abs(sigma * eps)) / alpha),
            ((d_sigma * x - sigma * v) / below, (np.abs(d_sigma * x) + np.abs(sigma * v)) / below),
            ((x - alpha * x0) / sigma, (np.abs(x) + np.abs(alpha * x0)) / sigma),
            (
                (d_sigma * x - below * x0) / sigma,
                (np.abs(d_sigma * x) + (np.abs(alpha * d_sigma) + np.abs(sigma * d_alpha)) * np.abs(x0)) / sigma,
            ),
        ]
    return x_t, velocity, answers


def inner(name):
    ts = times(name)
    places = (ts - ts[0]) / (ts[-1] - ts[0])
    return ts[(places > 0.03) & (places < 0.97)]


@pytest.mark.parametrize("name", PATHS)
def test_against_numpy(name):
    """In float32 each is as good as its terms, and back and forth gives the data again."""
    # Where an ulp of t is much of alpha or sigma is a question of the path, answered in its own tests.
    ts = inner(name)
    x_t, velocity, answers = truth(name, ts)
    found = program(name, False)(jnp.asarray(ts), jnp.asarray(x_t), jnp.asarray(velocity))
    for value, (wanted, size) in zip(found, answers, strict=False):
        assert value.dtype == jnp.float32
        assert np.all(np.abs(np.asarray(value) - wanted) <= LIMIT * ULP * size)
    for value, (_, size) in zip(found[5:], (answers[2], answers[1]), strict=True):
        assert np.all(np.abs(np.asarray(value) - X0) <= LIMIT * ULP * (size + np.abs(X0)))


@pytest.mark.parametrize("name", PATHS)
def test_in_float64_states_of_float32_lose_one_rounding(name, x64):
    """Also next to the ends, where the terms are thousands of times larger than what is left of them."""
    ts = times(name)[1:-1].astype(np.float64)
    x_t, velocity, answers = truth(name, ts)
    found = program(name, True)(jnp.asarray(ts), jnp.asarray(x_t), jnp.asarray(velocity))
    for value, (wanted, size) in zip(found, answers, strict=False):
        assert value.dtype == jnp.float32
        assert np.all(np.abs(np.asarray(value) - wanted) <= 0.51 * ULP * np.abs(wanted) + 1e-9 * size)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_ends_of_the_linear_path_are_exact_or_refused(t):
    path, x0, eps = paths.Linear(), jnp.asarray(X0), jnp.asarray(EPS)
    x_t, velocity = (x0, eps)[int(t)], eps - x0
    assert np.array_equal(conversions.add_noise(path, t, x0, eps), x_t)
    np.testing.assert_allclose(conversions.data_from_velocity(path, t, x_t, velocity), x0, atol=1e-6)
    singular = (conversions.noise_from_data, x0) if t == 0 else (conversions.data_from_noise, eps)
    regular = (conversions.data_from_noise, eps, x0) if t == 0 else (conversions.noise_from_data, x0, eps)
    assert np.array_equal(regular[0](path, t, x_t, regular[1]), regular[2])
    with pytest.raises(ValueError, match="cannot be had from"):
        singular[0](path, t, x_t, singular[1])
    assert np.all(np.isposinf(jax.jit(lambda t: singular[0](path, t, x_t, singular[1]))(t)))


def test_dtypes_and_trees():
    """bfloat16 states are computed in float32 and rounded once."""
    x0 = {"a": jnp.asarray(X0, jnp.bfloat16), "b": jnp.asarray(X0[:4].reshape(2, 2))}
    eps = {"a": jnp.asarray(EPS, jnp.bfloat16), "b": jnp.asarray(EPS[:4].reshape(2, 2))}
    x_t = conversions.add_noise(paths.VP(), 0.3, x0, eps)
    assert x_t["a"].dtype == jnp.bfloat16 and x_t["b"].dtype == jnp.float32
    alpha, sigma = (np.float32(c) for c in REFERENCES["vp"](np.float64(0.3))[:2])
    exact = alpha * np.asarray(x0["a"], np.float32) + sigma * np.asarray(eps["a"], np.float32)
    np.testing.assert_allclose(np.asarray(x_t["a"], np.float32), exact, rtol=2.0**-8)
    np.testing.assert_allclose(x_t["b"], alpha * X0[:4].reshape(2, 2) + sigma * EPS[:4].reshape(2, 2), rtol=1e-5)


def test_times_from_a_list_are_its_points_but_the_last():
    """Each equally often, in standard errors; the first of a batch are those of a smaller one."""
    ts = conversions.times_from_list(paths.Linear(), (1.0, 0.75, 0.5, 0.0), num=3_000, key=KEY)
    values, counts = np.unique(np.asarray(ts), return_counts=True)
    assert np.array_equal(values, [0.5, 0.75, 1.0])
    assert np.all(np.abs(counts - 1_000) < 4 * np.sqrt(3_000 * 2 / 9))
    # Examples draw for themselves: runs of equal times are as long as chance makes them.
    assert abs(np.mean(np.asarray(ts[1:] == ts[:-1])) - 1 / 3) < 4 * np.sqrt(2 / 9 / 3_000)
    few = conversions.times_from_list(paths.Linear(), (1.0, 0.75, 0.5, 0.0), num=10, key=KEY)
    assert np.array_equal(few, ts[:10])


def test_times_from_a_distribution():
    ts = conversions.times_from(paths.EDM(), fs.times.LogNormal(), num=4_000, key=KEY)
    logs = np.log(np.asarray(ts))
    assert abs(logs.mean() + 1.2) < 4 * 1.2 / np.sqrt(4_000) and abs(logs.std() - 1.2) < 4 * 1.2 / np.sqrt(8_000)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: conversions.add_noise(paths.Linear, 0.5, x, x), TypeError, "path is the class Linear, but wants"),
        (lambda x: conversions.add_noise(paths.Linear(), 0.5, x, x[:2]), ValueError, "both want the same structure"),
        (lambda x: conversions.add_noise(paths.Linear(), jnp.ones(2), x, x), ValueError, "A number was wanted"),
        (lambda x: conversions.data_from_noise(paths.Linear(), 0.5, 1, x), TypeError, "The state holds a int"),
        (
            lambda x: conversions.times_from_list(paths.Linear(), (1.5, 0.0), num=2, key=KEY),
            ValueError,
            "times_from_list got times outside Linear",
        ),
        (
            lambda x: conversions.times_from_list(paths.Linear(), (0.5, -3.0), num=2, key=KEY),
            ValueError,
            "times_from_list got times outside Linear",
        ),
        (
            lambda x: conversions.times_from(paths.Linear(), (1.0, 0.0), num=2, key=KEY),
            TypeError,
            "times is a tuple, but wants an instance such as fs.times.Uniform",
        ),
    ],
)
def test_bad_input(untyped, call, kind, message):
    with pytest.raises(kind, match=message):
        call(jnp.asarray(X0))
