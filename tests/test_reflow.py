"""Reflow on Gaussian data, where the flow's map and its paths are known: x_0 = m + s eps."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import flowsolve as fs
from flowsolve import paths, predictions, reflow, sources

KEY = jax.random.key(0)
MEAN, STD = np.array([1.0, -0.5, 0.2]), 0.3
LIKE = jax.ShapeDtypeStruct((3,), jnp.float32)
ORACLE = fs.testing.Gaussian.isotropic(jnp.asarray(MEAN, jnp.float32), STD)
FLOW = ORACLE.flow(paths.Linear(), predictions.Velocity())
GRID = fs.grids.Uniform(64)


def test_pairs_are_the_flows_map():
    pairs = reflow.pairs(FLOW, LIKE, num=32, key=KEY, solver=diffrax.Heun(), grid=GRID)
    np.testing.assert_allclose(pairs.data, MEAN + STD * np.asarray(pairs.noise), atol=2e-3)
    noise = np.asarray(pairs.noise)
    assert len(np.unique(noise)) == noise.size and abs(noise.mean()) < 4 / np.sqrt(noise.size)
    few = reflow.pairs(FLOW, LIKE, num=10, key=KEY, solver=diffrax.Heun(), grid=GRID, chunk=4)
    np.testing.assert_allclose(few.data, pairs.data[:10], rtol=1e-6)


def test_pairs_of_a_path_that_scales_its_noise():
    """The noise of a pair is eps, of which the loss makes x_t = alpha x_0 + sigma eps, not the state at the end."""
    flow = ORACLE.flow(paths.EDM(), predictions.Data())
    pairs = reflow.pairs(flow, LIKE, num=16, key=KEY, solver=fs.solvers.UniPC(3), grid=fs.grids.Karras(40))
    std = np.std(np.asarray(pairs.noise))
    assert 0.7 < std < 1.3
    # The flow carries N(0, 80^2) to the data up to the difference of 80^2 and 80^2 + s^2, and of the means.
    np.testing.assert_allclose(pairs.data, MEAN + STD * np.asarray(pairs.noise), atol=0.02)


def test_conditions_stay_with_their_pair():
    mixture = fs.testing.GaussianMixture(np.ones(2), jnp.asarray([[4.0], [-4.0]]), 0.1)
    flow = mixture.flow(paths.Linear(), predictions.Velocity())
    labels = jnp.asarray([0, 1, 1, 0, 1])
    pairs = reflow.pairs(flow, jax.ShapeDtypeStruct((1,), jnp.float32), num=5, key=KEY, args=labels)
    assert np.array_equal(np.asarray(pairs.data)[:, 0] < 0, labels == 1)


def test_curvature_of_a_gaussian_flow():
    """x_t = (1 - t) m + S_t eps, S_t^2 = (1 - t)^2 s^2 + t^2: the integral over t is a number."""
    t = np.linspace(0, 1, 20_001)
    scale = np.sqrt((1 - t) ** 2 * STD**2 + t**2)
    bend = np.trapezoid((np.gradient(scale, t) - (1 - STD)) ** 2, t) * 3
    length = (MEAN**2).sum() + (1 - STD) ** 2 * 3
    found = reflow.curvature(FLOW, LIKE, num=4096, key=KEY, grid=fs.grids.Uniform(200))
    np.testing.assert_allclose(found, bend / length, rtol=4 * np.sqrt(2 / 4096 / 3) * 3)


def test_a_flow_that_stands_still_is_straight():
    still = fs.Flow(lambda t, x, args, *, key=None: 0 * x, paths.Linear(), predictions.Velocity())
    assert reflow.curvature(still, LIKE, num=2, key=KEY, grid=fs.grids.Uniform(2)) == 0


def test_a_straight_flow_has_no_curvature():
    """Trained on its own pairs the optimum is the straight line between them: here x_0 = m + s x_1 in closed form."""

    def network(t, x, args, *, key=None):
        # x_t = (1 - t) m + ((1 - t) s + t) eps, dx/dt = eps - x_0.
        mean = jnp.asarray(MEAN, x.dtype)
        noise = (x - (1 - t) * mean) / ((1 - t) * STD + t)
        return noise - mean - STD * noise

    straight = fs.Flow(network, paths.Linear(), predictions.Velocity(), source=sources.CoupledNormal())
    assert reflow.curvature(straight, LIKE, num=64, key=KEY, grid=fs.grids.Uniform(20)) < 1e-9
    # One step of Euler is the whole map, on pairs of which its loss is 0.
    pairs = reflow.pairs(straight, LIKE, num=64, key=KEY, solver=diffrax.Euler(), grid=fs.grids.Uniform(1))
    np.testing.assert_allclose(pairs.data, MEAN + STD * np.asarray(pairs.noise), atol=1e-5)
    value, _ = eqx.filter_jit(fs.losses.Regression())(straight, pairs, key=KEY)
    assert value < 1e-9


class Line(eqx.Module):
    """A velocity that is affine in x, and the same at all times."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, t, x, args, *, key=None):
        return self.weight * x + self.bias


FLOW_OF_PAIRS = fs.Flow(
    Line(jnp.zeros(3), jnp.zeros(3)), paths.Linear(), predictions.Velocity(), source=sources.CoupledNormal()
)


def test_distilled_at_t_noise_one_step_of_euler_is_the_pair():
    """The optimum is eps - x_0 = (1 - s) eps - m: found by fit, from the pairs alone, and one step from every noise."""
    pairs = reflow.pairs(FLOW, LIKE, num=64, key=KEY, solver=diffrax.Heun(), grid=GRID)
    loss = fs.losses.Regression(times=fs.times.Given((1.0, 0.0)))
    _, aux = loss(FLOW_OF_PAIRS, pairs, key=KEY)
    assert np.all(np.asarray(aux.t) == 1)
    *_, state = fs.training.fit(
        loss, FLOW_OF_PAIRS, [pairs] * 300, optax.adam(0.1), steps=300, key=KEY, every=300, ema=None, progress=False
    )
    network = state.flow.network
    np.testing.assert_allclose(network.weight, 1 - STD, atol=2e-3)
    np.testing.assert_allclose(network.bias, -MEAN, atol=2e-3)
    solver, grid = diffrax.Euler(), fs.grids.Uniform(1)
    ends = jax.vmap(lambda x: fs.solve(state.flow, x, solver=solver, grid=grid).ys[-1])(pairs.noise)
    np.testing.assert_allclose(ends, pairs.data, atol=5e-3)


def test_curvature_falls_from_round_to_round():
    """Five modes on a circle, whose paths bend; the loop at the top of `reflow`, with a small network."""
    angles = 2 * np.pi * np.arange(5) / 5
    means = 2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    flow = fs.testing.GaussianMixture(np.ones(5), jnp.asarray(means, jnp.float32), 0.04).flow(
        paths.Linear(), predictions.Velocity()
    )
    like = jax.ShapeDtypeStruct((2,), jnp.float32)
    network = fs.nn.ResidualMLP(like, width=32, depth=1, key=KEY)
    grid, optimiser = fs.grids.Uniform(16), optax.adam(optax.cosine_decay_schedule(3e-3, 300))

    def curvature(flow):
        return float(reflow.curvature(flow, like, num=500, key=KEY, grid=fs.grids.Uniform(40)))

    curvatures = [curvature(flow)]
    for number in range(2):
        key = jax.random.fold_in(KEY, number)
        pairs = reflow.pairs(flow, like, num=2_048, key=key, solver=diffrax.Heun(), grid=grid)
        batches = fs.data.Batches(pairs, batch_size=256, key=key)
        flow = fs.Flow(network, paths.Linear(), predictions.Velocity(), source=sources.CoupledNormal())
        *_, state = fs.training.fit(
            fs.losses.Regression(), flow, batches, optimiser, steps=300, key=key, ema=0.99, progress=False
        )
        flow = state.ema_flow
        network = flow.network
        curvatures.append(curvature(flow))
    assert curvatures[1] < curvatures[0] / 20 and curvatures[2] < curvatures[1] / 2
