"""Flows: what reaches the network, the other direction of time, another path; against exact oracles."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from members import PATHS, PREDICTIONS, REFERENCES, TARGETS, gaussian_truth

from flowsolve import paths, predictions
from flowsolve.flow import Flow, OnPath, TimeReversed
from flowsolve.preconditioning import EDMPreconditioner
from flowsolve.testing import Gaussian

LINEAR = PATHS["linear"]
QUANTITIES = ("velocity", "score", "denoised", "noise")


def echo(t, x, args, *, key=None):
    """A network that returns its input."""
    del t, args, key
    return x


def network_of(oracle, path, prediction):
    """An oracle behind the plain interface of a network."""

    def network(t, x, args, *, key=None):
        del key
        return oracle.predict(path, t, x, prediction, args)

    return network


def gaussian():
    _, means, covariances = TARGETS["gaussian"]
    return Gaussian(means[0], covariances[0])


def truths(name, t, x):
    """The four quantities of the Gaussian target in float64, (n, d) each."""
    rows = []
    for a, s, da, ds, point in zip(*REFERENCES[name](np.float64(t)), np.float64(x), strict=True):
        data, noise, score, _ = gaussian_truth(a, s, point, TARGETS["gaussian"][1][0], TARGETS["gaussian"][2][0])
        rows.append((da * data + ds * noise, score, data, noise))
    return dict(zip(QUANTITIES, map(np.array, zip(*rows, strict=True)), strict=True))


def assert_close(found, exact, relative):
    """Each example, relative to the norm of the truth."""
    error = np.linalg.norm(np.float64(found) - exact, axis=-1)
    size = np.linalg.norm(exact, axis=-1)
    assert (error <= relative * size).all(), error / size


# --- the network's side -----------------------------------------------------------------------------------------


@pytest.mark.quick
def test_what_the_network_gets():
    """One example, t a float32 scalar whatever was given, args and key as they are."""
    seen = []

    def network(t, x, args, *, key=None):
        seen.append((t, x, args, key))
        return x

    flow = Flow(network, LINEAR, predictions.Velocity())
    x, key = {"a": jnp.ones((2, 3)), "b": jnp.zeros(())}, jax.random.key(0)
    for t in (1, 0.5, np.float64(0.5), jnp.bfloat16(0.5), jnp.int32(0)):
        for method in (flow.output, flow.velocity, flow.denoised):
            found = method(t, x, {"label": 3}, key=key)
            assert jax.tree.structure(found) == jax.tree.structure(x)
            got_t, got_x, got_args, got_key = seen.pop()
            assert got_t.dtype == jnp.float32 and got_t.shape == ()
            assert got_x is x and got_args == {"label": 3} and got_key is key
    flow.noise(0.5, x)
    assert seen.pop()[2:] == (None, None)


def test_float64_under_x64(x64):
    flow = Flow(echo, LINEAR, predictions.Noise())
    for name in QUANTITIES:
        found = getattr(flow, name)(0.5, jnp.ones(3))
        assert found.dtype == jnp.float64
    # One float32 leaf stays one.
    assert flow.velocity(0.5, {"a": jnp.ones(3, jnp.float32)})["a"].dtype == jnp.float32


@pytest.fixture
def unchecked():
    """As users run it, without the checks of annotations, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.quick
def test_messages(unchecked):
    velocity, x = predictions.Velocity(), jnp.ones(3)
    cases = {
        "batch axis": lambda t, x, args, *, key=None: x[None],
        "casts its output back": lambda t, x, args, *, key=None: x.astype(jnp.bfloat16),
        "float32": lambda t, x, args, *, key=None: {"x": x},
    }
    for message, network in cases.items():
        with pytest.raises(ValueError, match=message):
            Flow(network, LINEAR, velocity).output(0.5, x)
    flow = Flow(echo, LINEAR, velocity)
    with pytest.raises(TypeError, match="int32, but a state must be floating point"):
        flow.output(0.5, jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match="no arrays"):
        flow.output(0.5, {})
    with pytest.raises(TypeError, match="order Flow"):
        Flow(echo, velocity, LINEAR)
    with pytest.raises(TypeError, match="order Flow"):
        Flow(echo, paths.Linear, velocity)
    with pytest.raises(TypeError, match="wants a callable"):
        Flow(LINEAR, echo, velocity)
    with pytest.raises(ValueError, match=r"pass predictions.Data\(\) to Flow"):
        Flow(echo, LINEAR, velocity, EDMPreconditioner(0.5))
    with pytest.raises(ValueError, match="Score cannot be had from Velocity"):
        flow.score(0.0, x)


def test_a_flow_is_a_pytree_of_its_network():
    """Its leaves are the network's, a new one does not retrace, and gradients have its structure."""
    traces = []

    class Linear(eqx.Module):
        weight: jax.Array

        def __call__(self, t, x, args, *, key=None):
            del args, key
            traces.append(None)
            return t * (self.weight @ x)

    def flow(weight):
        return Flow(Linear(weight), paths.VP(), predictions.V())

    x = jnp.ones(3)
    assert [leaf.shape for leaf in jax.tree.leaves(eqx.filter(flow(jnp.eye(3)), eqx.is_array))] == [(3, 3)]
    velocity = eqx.filter_jit(lambda flow, t, x: flow.velocity(t, x))
    first = velocity(flow(jnp.eye(3)), jnp.asarray(0.5), x)
    second = velocity(flow(2 * jnp.eye(3)), jnp.asarray(0.7), x)
    assert len(traces) == 1 and not jnp.allclose(first, second)
    grads = eqx.filter_grad(lambda flow: flow.velocity(0.5, x).sum())(flow(jnp.eye(3)))
    assert grads.network.weight.shape == (3, 3) and jnp.isfinite(grads.network.weight).all()


@functools.cache
def all_quantities():
    """Four quantities of a flow at (n,) times and (n, d) examples; one compiled function for flows of one structure."""

    def evaluate(flow, t, x):
        return {name: jax.vmap(getattr(flow, name))(t, x) for name in QUANTITIES}

    return eqx.filter_jit(evaluate)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_flow_quantities_are_exact(name):
    """Velocity, score, denoised and noise of one network, and any mixture of data and noise, on VP."""
    path, prediction = PATHS["vp"], PREDICTIONS[name]
    flow = Flow(network_of(gaussian(), path, prediction), path, prediction)
    t, x = np.float32([0.2, 0.5, 0.9]), np.float32(np.random.default_rng(0).normal(size=(3, 3)))
    exact = truths("vp", t, x)
    for quantity, found in all_quantities()(flow, t, x).items():
        assert_close(found, exact[quantity], 3e-4 if name == "data" or quantity == "denoised" else 3e-5)
    mixed = flow.mixture((jnp.asarray(2.0), jnp.asarray(-1.0), jnp.asarray(4.0)), jnp.asarray(t[1]), jnp.asarray(x[1]))
    assert_close(mixed, (2 * exact["denoised"][1] - exact["noise"][1]) / 4, 1e-4)


# --- time reversed ----------------------------------------------------------------------------------------------


def reversed_network(name):
    """The exact network of someone whose time runs from noise at 0 to data at 1: x_t' = t' x_0 + (1 - t') eps."""
    mean, std = jnp.array([1.0, -0.5]), 0.7

    def network(t, x, args, *, key=None):
        del args, key
        alpha, sigma = t, 1 - t
        variance = alpha**2 * std**2 + sigma**2
        data = mean + alpha * std**2 / variance * (x - alpha * mean)
        noise = sigma / variance * (x - alpha * mean)
        return {
            "data": data,
            "noise": noise,
            "velocity": data - noise,  # dx/dt', from noise to data
            "v": alpha * noise - sigma * data,
            "score": -(x - alpha * mean) / variance,
        }[name]

    return network, Gaussian.isotropic(mean, std)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_time_reversed_network_is_exact(name):
    network, oracle = reversed_network(name)
    prediction = PREDICTIONS[name]
    flow = Flow(TimeReversed(network, LINEAR, prediction), LINEAR, prediction)
    t = np.float32([0.125, 0.3, 0.7, 0.9])
    x = np.float32(np.random.default_rng(0).normal(size=(4, 2)))

    @jax.jit
    def both(t, x):
        expected = {
            "velocity": jax.vmap(functools.partial(oracle.velocity, LINEAR))(t, x),
            "score": jax.vmap(functools.partial(oracle.score, LINEAR))(t, x),
            "denoised": jax.vmap(functools.partial(oracle.denoised, LINEAR))(t, x),
            "noise": jax.vmap(functools.partial(oracle.noise, LINEAR))(t, x),
        }
        return {key: jax.vmap(getattr(flow, key))(t, x) for key in QUANTITIES}, expected

    found, expected = both(t, x)
    for key in QUANTITIES:
        assert_close(found[key], np.float64(expected[key]), 2e-5)


@pytest.mark.parametrize("path", [LINEAR, PATHS["edm"]], ids=["linear", "edm"])
def test_time_reversed_twice_is_the_network(path):
    """Exactly, at times that are exact in float32; and the ends are exchanged."""

    def network(t, x, args, *, key=None):
        del args, key
        return t * x

    for prediction in PREDICTIONS.values():
        once = TimeReversed(network, path, prediction)
        twice = TimeReversed(once, path, prediction)
        for t in (0.0, 0.25, 0.8125, 1.0) if path is LINEAR else (path.t_noise,):
            np.testing.assert_allclose(
                twice(t, jnp.ones(2), None), network(jnp.float32(t), jnp.ones(2), None), rtol=1e-7
            )
        sign = prediction.time_reversal_sign
        assert once(path.t_data, jnp.ones(()), None) == pytest.approx(sign * path.t_noise, rel=1e-6)


# --- another path -----------------------------------------------------------------------------------------------

MOVED = ["linear", "trigonometric", "ornstein_uhlenbeck", "sub_vp", "edm", "discrete_linear"]


@functools.cache
def moved_flows(source):
    """The exact flow on one path, moved to all the others: {target: (flow, t, x, quantities)}."""
    rng = np.random.default_rng(0)
    names = [name for name in MOVED if name != source]
    # Every prediction in its turn.
    chosen = dict(zip(names, itertools.cycle(["velocity", "v", "noise", "score", "data"]), strict=False))
    flows, ts, xs = {}, {}, {}
    for target in names:
        flow = gaussian().flow(PATHS[source], PREDICTIONS[chosen[target]])
        flows[target] = OnPath(flow, PATHS[target])
        low, high = float(flows[target].path.t_data), float(flows[target].path.t_noise)
        steps = np.linspace(0.02, 0.98, 6)
        t = low * (high / low) ** steps if target == "edm" else low + (high - low) * steps
        if target == "discrete_linear":
            t = (np.floor(t * 1000) + 0.5) / 1000  # where alpha' does not jump
        t = np.float32(np.concatenate([t, [low, high]]))
        alpha, sigma, *_ = REFERENCES[target](np.float64(t))
        x = alpha[:, None] * TARGETS["gaussian"][1][0] + (alpha + sigma)[:, None] * rng.normal(size=(len(t), 3))
        ts[target], xs[target] = t, np.float32(x)

    @jax.jit
    def evaluate(ts, xs):
        return {
            name: {key: jax.vmap(getattr(flow, key))(ts[name], xs[name]) for key in ("velocity", "denoised")}
            for name, flow in flows.items()
        }

    found = evaluate(ts, xs)
    return {name: (flows[name], ts[name], xs[name], found[name]) for name in names}


@pytest.mark.parametrize("source", MOVED)
def test_moved_flow_is_the_exact_flow_there(source):
    """An exact flow on path A, moved to B, is the exact flow on B: all pairs, up to the drawn-in ends."""
    # Near its end an ulp of this path's time is a part in 1000 of alpha; the other's data prediction says the least
    # about the noise where a variance-exploding path has next to none.
    tolerance = {"ornstein_uhlenbeck": 2e-3, "discrete_linear": 1e-3}.get(source, 1e-4)
    for target, (flow, t, x, found) in moved_flows(source).items():
        exact = truths(target, t, x)
        for key, value in found.items():
            inside = slice(None, -2)
            assert_close(value[inside], exact[key][inside], tolerance)
            # At the ends the conversion may be singular, by nature: then inf, never nan.
            assert not np.isnan(value).any(), (target, key)
        # The network is asked nothing outside of what it knows.
        trained = PATHS[source]
        ends = flow.path.t_data, flow.path.t_noise
        (low_a, low_s), (high_a, high_s) = (flow.path.coefficients(jnp.asarray(end)) for end in ends)
        tau = [float(trained.time_at(low_a, low_s)), float(trained.time_at(high_a, high_s))]
        span = trained.t_noise - trained.t_data
        assert tau[0] >= trained.t_data - 1e-6 * span and tau[1] <= trained.t_noise + 1e-6 * span, (target, tau)


@pytest.mark.quick
def test_moved_flow_keeps_the_ends_that_are_known():
    flow = OnPath(gaussian().flow(LINEAR, predictions.Velocity()), paths.EDM())
    assert (flow.path.t_data, flow.path.t_noise) == (0.002, 80.0)
    # From EDM to Linear: sigma/alpha between 0.002 and 80, so t between 0.002/1.002 and 80/81.
    flow = OnPath(gaussian().flow(paths.EDM(), predictions.Data()), LINEAR)
    assert flow.path.t_data == pytest.approx(0.002 / 1.002, rel=1e-5)
    assert flow.path.t_noise == pytest.approx(80 / 81, rel=1e-6)
    assert type(flow.path) is paths.Linear
