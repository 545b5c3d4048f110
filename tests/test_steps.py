"""The loop over fixed steps is Diffrax's, step for step, with less to compile and to keep."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowsolve as fs
from flowsolve._steps import _segment_length

KEY = jax.random.key(3)
X = jax.random.normal(KEY, (6,))


class Network(eqx.Module):
    """One hidden layer."""

    first: jax.Array
    last: jax.Array

    def __call__(self, t, x, args, *, key=None):
        return jnp.tanh(x @ self.first + t) @ self.last


WEIGHTS = jax.random.normal(jax.random.key(0), (2, 6, 6))
FLOW = fs.Flow(Network(*WEIGHTS), fs.paths.Linear(), fs.predictions.Velocity())
SOLVERS = {
    "Ralston": diffrax.Ralston(),
    "first same as last": diffrax.Bosh3(),
    "evaluates at the start": diffrax.ReversibleHeun(),
    "half steps": diffrax.HalfSolver(diffrax.Euler()),
    "half steps of two stages": diffrax.HalfSolver(diffrax.Heun()),
    "multistep with a corrector": fs.solvers.UniPC(3),
    "singlestep": fs.solvers.DPMSolverPPSinglestep(3),
    "stochastic multistep": fs.solvers.SDEDPMSolverPP(),
    "restarts": fs.solvers.Restart(fs.solvers.EDMHeun(), (0.3, 0.6), grid=fs.grids.Uniform(2)),
}


@eqx.filter_jit
def final(flow, x, solver, steps, adjoint):
    """The end of a solve; with an adjoint named, Diffrax runs the loop."""
    return fs.solve(flow, x, solver=solver, grid=fs.grids.Uniform(steps), key=KEY, adjoint=adjoint, throw=False)


@pytest.mark.parametrize("name", SOLVERS)
def test_it_is_diffrax_step_for_step(name):
    ours = final(FLOW, X, SOLVERS[name], 7, None)
    theirs = final(FLOW, X, SOLVERS[name], 7, diffrax.RecursiveCheckpointAdjoint())
    np.testing.assert_allclose(ours.ys, theirs.ys, rtol=2e-6, atol=2e-6)
    assert ours.stats == theirs.stats
    assert (ours.t0, ours.t1, ours.ts) == (theirs.t0, theirs.t1, theirs.ts)
    assert ours.result == theirs.result == diffrax.RESULTS.successful


@pytest.mark.parametrize("steps", [64, 67, 96])
def test_segments_change_neither_the_state_nor_its_gradient(steps):
    """One segment; eight of eight steps and three over; twelve of eight."""
    solver = fs.solvers.DPMSolverPP(3)

    def value(flow, adjoint):
        return jnp.sum(final(flow, X, solver, steps, adjoint).ys ** 2)

    value_and_gradient = eqx.filter_value_and_grad(value)
    ours, theirs = (value_and_gradient(FLOW, adjoint) for adjoint in (None, diffrax.RecursiveCheckpointAdjoint()))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_encoding_runs_the_grid_the_other_way():
    settings = {"solver": fs.solvers.DPMSolverPP(2), "grid": fs.grids.Uniform(7), "t_start": 0.01}
    theirs = fs.encode(FLOW, X, adjoint=diffrax.DirectAdjoint(), **settings)
    np.testing.assert_allclose(fs.encode(FLOW, X, **settings), theirs, rtol=2e-6, atol=2e-6)


def test_forward_mode_needs_no_other_adjoint():
    """The derivative along a direction by jvp is that by finite differences."""
    with jax.enable_x64(True):
        network = Network(*jnp.asarray(WEIGHTS, float))
        flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
        x, direction = jnp.asarray(X, float), jnp.ones(6, float)
        end = lambda x: final(flow, x, diffrax.Ralston(), 5, None).ys  # noqa: E731
        _, derivative = jax.jvp(end, (x,), (direction,))
        differences = (end(x + 1e-5 * direction) - end(x - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(derivative, differences, rtol=1e-8)


MULTISTEP = {
    "DPM-Solver++ 2": fs.solvers.DPMSolverPP(2),
    "DPM-Solver++ 3": fs.solvers.DPMSolverPP(3),
    "UniPC": fs.solvers.UniPC(3),
    "DEIS": fs.solvers.DEIS(),
    "LMS": fs.solvers.LMS(),
    "SDE-DPM-Solver++": fs.solvers.SDEDPMSolverPP(),
    "SA": fs.solvers.SASolver(3),
    "ER-SDE": fs.solvers.ERSDE(),
}


@pytest.mark.parametrize("name", MULTISTEP)
def test_derivatives_in_the_times_of_both_modes_are_finite_differences(name):
    """Through the table of a multistep solver, from alpha = 0 and with the empty history of the first steps."""
    with jax.enable_x64(True):
        flow = fs.Flow(Network(*jnp.asarray(WEIGHTS, float)), fs.paths.Linear(), fs.predictions.Velocity())

        @jax.jit
        def end(t_end):
            grid = fs.grids.Uniform(5)
            sol = fs.solve(flow, jnp.ones(6), solver=MULTISTEP[name], grid=grid, t_end=t_end, key=KEY, throw=False)
            return jnp.sum(sol.ys)

        t = jnp.asarray(0.1)
        differences = (end(t + 1e-5) - end(t - 1e-5)) / 2e-5
        np.testing.assert_allclose(jax.grad(end)(t), differences, rtol=1e-6)
        np.testing.assert_allclose(jax.jvp(end, (t,), (jnp.ones_like(t),))[1], differences, rtol=1e-6)


def test_segment_lengths():
    """All steps up to 64; above, states kept for segments, one segment and what is left over: up to 3 sqrt(n)."""
    lengths = {steps: _segment_length(steps) for steps in range(1, 2000)}
    assert all(length == steps for steps, length in lengths.items() if steps <= 64)
    kept = {steps: steps // length + length + steps % length for steps, length in lengths.items() if steps > 64}
    assert all(count <= 3 * steps**0.5 + 2 for steps, count in kept.items())
    assert lengths[100] == 10 and lengths[1000] == 25


def test_gradients_keep_few_states_and_one_copy_of_the_parameters():
    """By XLA's own account: a batch of 32 needs far less than 32 times the parameters, and 900 steps little more
    than 30."""
    network = Network(*jax.random.normal(jax.random.key(0), (2, 256, 256)))
    like = jax.ShapeDtypeStruct((256,), jnp.float32)

    def temporaries(steps):
        @eqx.filter_grad
        def gradient(network):
            flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
            x = fs.sample(
                flow, like, num=32, key=KEY, solver=diffrax.Euler(), grid=fs.grids.Uniform(steps), throw=False
            )
            return jnp.mean(x**2)

        return eqx.filter_jit(gradient).lower(network).compile().compiled.memory_analysis().temp_size_in_bytes

    parameters, states = 2 * 256**2 * 4, 32 * 256 * 4
    few, many = temporaries(30), temporaries(900)
    print(f"{few / parameters:.1f} and {many / parameters:.1f} times the parameters")
    assert few < 40 * states + 4 * parameters
    assert many < 80 * states + 4 * parameters
