"""What the comparisons with other libraries share: a toy network of NumPy, Torch and JAX, and flowsolve's steps."""

import warnings
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_solver_noise import GivenNoise, steps_over

import flowsolve as fs

BATCH = 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH, 2)).astype(np.float32)  # standard normal
DATA = RNG.normal(size=(BATCH, 2)).astype(np.float32)


def importorskip(name: str) -> Any:
    """The module, whatever it warns of when it is imported; without it the tests of a file are skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


def toy(xp: ModuleType, x: Any, level: Any) -> Any:
    """A prediction of noise at ln(sigma/alpha) = level, of one example or a batch, in NumPy, Torch or jax.numpy."""
    return xp.tanh(0.9 * x + 0.4 * xp.roll(x, 1, -1) + 0.2 * level)


class Toy(eqx.Module):
    """The same as a network on a path whose state has unit variance."""

    path: fs.paths.AbstractPath

    def __call__(self, t, x, args=None, *, key=None):
        return toy(jnp, x, -0.5 * self.path.log_snr(t))


def flow_of(path: fs.paths.AbstractPath) -> fs.Flow:
    return fs.Flow(Toy(path), path, fs.predictions.Noise())


@eqx.filter_jit
def _noisy(flow, solver, dynamics, ts, x, noise):
    def one(x, noise):
        brownian = GivenNoise(-ts, noise, noise, noise[:, None])
        return steps_over(dynamics.terms(flow, brownian), solver, ts, x)[-1]

    return jax.vmap(one, in_axes=(0, 1))(x, noise)


def ours(flow, solver, ts, x=X, *, dynamics=None, noise=None) -> np.ndarray:
    """flowsolve's last states, from a batch at ts[0] over the times ts, with one normal number (steps, batch, ...)."""
    ts, x = jnp.asarray(ts, jnp.float32), jnp.asarray(x)
    if noise is not None:
        return np.asarray(_noisy(flow, solver, dynamics, ts, x, jnp.asarray(noise, jnp.float32)))
    solve = eqx.Partial(fs.solve, solver=solver, grid=fs.grids.Given(ts))
    return np.asarray(fs.batched(solve)(flow, x).ys[:, -1])


def difference(theirs: Any, ours: Any) -> float:
    """The largest difference, relative to the root mean square of theirs, of each example in a batch of them."""
    theirs, ours = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
    assert theirs.shape == ours.shape
    size = np.sqrt(np.mean(np.square(theirs), axis=None if theirs.ndim == 1 else -1, keepdims=True))
    return float(np.max(np.abs(theirs - ours) / size))


def check(theirs: Any, ours: Any, tolerance: float) -> None:
    """Raise unless both are equal to `tolerance`, relative to the root mean square."""
    found = difference(theirs, ours)
    print(f"difference {found:.1e}")
    assert found < tolerance, f"they differ by {found:.1e} of their size"
