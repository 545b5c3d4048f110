"""Tuning: exact where an exact answer exists, better than any formula where it does not, and a pytree."""

import io

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import gaussian_flow_map

import flowsolve as fs

LIKE = jax.ShapeDtypeStruct((3,), jnp.float32)


def two_modes(path):
    means = jnp.array([[0.8, -0.2, 0.1], [-0.5, 0.4, 0.0]])
    covariances = jnp.stack([jnp.diag(jnp.array([0.1, 0.02, 0.2])), jnp.diag(jnp.array([0.03, 0.2, 0.1]))])
    return fs.testing.GaussianMixture(jnp.array([0.5, 0.5]), means, covariances).flow(path, fs.predictions.Velocity())


def errors(flow, x_start, expected, **settings):
    ends = jax.vmap(lambda x: fs.solve(flow, x, throw=False, **settings).ys[-1])(x_start)
    return np.sqrt(np.mean((np.asarray(ends) - np.asarray(expected)) ** 2, axis=1))


def held_out(flow, num=256):
    x = flow.path.sigma(flow.path.t_noise) * jax.random.normal(jax.random.key(99), (num, 3))
    settings = {"solver": diffrax.Dopri8(), "grid": fs.grids.LogSNR(32), "throw": False}
    return x, jax.vmap(lambda x: fs.solve(flow, x, **settings).ys[-1])(x)


@pytest.mark.parametrize("path", [fs.paths.Linear(), fs.paths.VP()])
def test_all_zeros_is_ddim(path):
    """A tuned solver begins as DDIM on its grid, from alpha = 0 onto sigma = 0."""
    flow = two_modes(path)
    grid = fs.grids.Power(4)
    ts = grid(path)
    zeros = jnp.zeros(4)
    solver = fs.solvers.TunedMultistep(ts, ts[:-1], zeros, zeros, jnp.zeros((4, 2)))
    x = jnp.array([0.3, -1.0, 0.5])
    got = fs.solve(flow, x, solver=solver, grid=grid)
    assert got.stats["nfe"] == 4
    expected = fs.solve(flow, x, solver=fs.solvers.DDIM(), grid=grid).ys
    np.testing.assert_allclose(got.ys, expected, rtol=1e-5, atol=1e-6)


def test_weights_of_a_formula_make_its_solver():
    """The rows may be those of any multistep on the data: here DPM-Solver++ 2M's on a grid even in lambda."""
    path = fs.paths.VP()
    flow = two_modes(path)
    grid = fs.grids.LogSNR(5)
    ts = grid(path, 0.9, 0.1)
    zeros = jnp.zeros(5)
    # -1/(2 r_0) with r_0 = 1, once there is a history.
    weights = jnp.stack([jnp.full(5, -0.5), zeros], axis=1)
    solver = fs.solvers.TunedMultistep(ts, ts[:-1], zeros, zeros, weights)
    x = jnp.array([0.3, -1.0, 0.5])
    got = fs.solve(flow, x, solver=solver, grid=fs.grids.Given(ts)).ys
    expected = fs.solve(flow, x, solver=fs.solvers.DPMSolverPP(2), grid=fs.grids.Given(ts)).ys
    np.testing.assert_allclose(got, expected, rtol=2e-5)


@pytest.fixture(scope="module")
def tuned():
    flow = two_modes(fs.paths.Linear())
    settings = {"steps": 4, "num": 512, "updates": 400, "batch_size": 128, "progress": False}
    return flow, fs.tuning.tune(flow, LIKE, key=jax.random.key(0), **settings)


def test_tuned_beats_the_formulas_on_held_out_noise(tuned):
    flow, result = tuned
    x, expected = held_out(flow)
    ours = np.median(errors(flow, x, expected, solver=result.solver, grid=result.grid))
    rivals = [fs.solvers.DDIM(), fs.solvers.DPMSolverPP(2), fs.solvers.AdamsBashforth(2)]
    grids = [fs.grids.Uniform(4), fs.grids.Power(4), fs.grids.VPPower(4)]
    best = min(np.median(errors(flow, x, expected, solver=s, grid=g)) for s in rivals for g in grids)
    assert ours < best / 3


def test_a_tuned_solver_is_a_pytree_that_saves(tuned):
    flow, result = tuned
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, result)
    file.seek(0)
    blank = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if eqx.is_array(leaf) else leaf, result)
    read = eqx.tree_deserialise_leaves(file, blank)
    x = jnp.array([0.3, -1.0, 0.5])
    expected = fs.solve(flow, x, solver=result.solver, grid=result.grid).ys
    np.testing.assert_array_equal(fs.solve(flow, x, solver=read.solver, grid=read.grid).ys, expected)


def test_the_same_key_gives_the_same_numbers_and_the_bar_does_not_matter(tuned, capsys):
    flow, result = tuned
    settings = {"steps": 4, "num": 512, "updates": 400, "batch_size": 128}
    again = fs.tuning.tune(flow, LIKE, key=jax.random.key(0), **settings)
    np.testing.assert_allclose(again.grid.ts, result.grid.ts, rtol=1e-5)
    assert "loss" in capsys.readouterr().err


def test_the_grid_alone_is_learnt_for_a_given_solver():
    """Any solver of the probability flow, one of Diffrax's too; the solver comes back as it was."""
    flow = two_modes(fs.paths.Linear())
    x, expected = held_out(flow)
    for solver, steps in ((fs.solvers.UniPC(2), 4), (diffrax.Heun(), 2)):
        settings = {"num": 256, "updates": 150, "batch_size": 64, "progress": False, "grid": fs.grids.Uniform(steps)}
        result = fs.tuning.tune(flow, LIKE, steps=steps, key=jax.random.key(1), solver=solver, **settings)
        assert result.solver is solver
        before = errors(flow, x, expected, solver=solver, grid=fs.grids.Uniform(steps))
        after = errors(flow, x, expected, solver=solver, grid=result.grid)
        assert after.mean() < 0.9 * before.mean()


def test_guided_flows_labels_and_pytrees():
    """Two classes, each a Gaussian of its own in a dictionary of arrays: each row is solved with its own label."""
    path = fs.paths.Linear()
    means = jnp.array([[1.0, -1.0], [-0.5, 0.5]])
    covariance = np.array([[0.3, 0.1], [0.1, 0.2]])
    oracles = [fs.testing.Gaussian(mean, covariance).flow(path, fs.predictions.Velocity()) for mean in means]

    def network(t, x, label, *, key=None):
        first, second = (flow.velocity(t, x["x"]) for flow in oracles)
        return {"x": jnp.where(label == 0, first, second)}

    flow = fs.guidance.ClassifierFree(fs.Flow(network, path, fs.predictions.Velocity()), scale=1.0, null=jnp.array(1))
    labels = jnp.arange(256) % 2
    like = {"x": jax.ShapeDtypeStruct((2,), jnp.float32)}
    settings = {"steps": 3, "num": 256, "updates": 200, "batch_size": 64, "progress": False}
    result = fs.tuning.tune(flow, like, key=jax.random.key(2), args=labels, **settings)
    for label in (0, 1):
        x = np.array([0.7, -0.4])
        exact = gaussian_flow_map(path, means[label], covariance, 1.0, 0.0, x)
        x_start = {"x": jnp.asarray(x, jnp.float32)}
        got = fs.solve(flow, x_start, jnp.array(label), solver=result.solver, grid=result.grid).ys["x"][-1]
        ddim = fs.solve(flow, x_start, jnp.array(label), solver=fs.solvers.DDIM(), grid=fs.grids.VPPower(3)).ys["x"][-1]
        assert np.abs(got - exact).max() < 0.2 * np.abs(ddim - exact).max()


def test_a_grid_keeps_its_own_ends():
    """`ThenClean` goes on to sigma = 0 and `Given` begins below t_noise; one update is enough to be told."""
    flow = two_modes(fs.paths.EDM())
    settings = {"steps": 3, "num": 8, "updates": 1, "batch_size": 8, "progress": False, "key": jax.random.key(0)}
    settings |= {"reference_solver": fs.solvers.DDIM()}
    for grid in (fs.grids.ThenClean(fs.grids.Karras(3)), fs.grids.Given([40.0, 2.0, 0.3, 0.01])):
        result = fs.tuning.tune(flow, LIKE, grid=grid, **settings)
        np.testing.assert_array_equal(result.grid.ts[np.array([0, -1])], grid(flow.path)[np.array([0, -1])])


def test_a_flow_that_fails_says_so():
    def network(t, x, args, *, key=None):
        return jnp.full_like(x, jnp.nan)

    flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
    with pytest.raises(RuntimeError, match="All reference solves failed"):
        fs.tuning.tune(flow, LIKE, steps=2, key=jax.random.key(0), num=8, progress=False)
