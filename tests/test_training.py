"""The training loop: converges to known optima, deterministic, and what it yields stays good."""

import inspect
import itertools
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

from flowsolve import averages, losses, nn, paths, predictions, times, training
from flowsolve.averages import Constant
from flowsolve.data import Batches
from flowsolve.flow import Flow

DIM, BATCH = 2, 8


class Affine(eqx.Module):
    """The network W x + b, whatever the time."""

    weight: Array
    bias: Array
    name: str = "affine"

    def __call__(self, t, x, args=None, *, key=None):
        del t, args, key
        return self.weight @ x + self.bias


def make_flow():
    network = Affine(0.1 * jnp.ones((DIM, DIM)), jnp.zeros(DIM))
    return Flow(network, paths.Linear(), predictions.Velocity())


def least_squares(flow, x, args, *, key):
    """mean |W x + b - args|^2: the optimum is that of linear regression, and no noise is drawn."""
    del key
    losses = jnp.sum((jax.vmap(lambda x: flow.output(0.5, x))(x) - args) ** 2, axis=-1)
    return jnp.mean(losses), losses


class MatchAtOneTime(eqx.Module):
    """Flow matching at one time t: noise from the key, velocity eps - x_0 as target."""

    t: Array

    def __call__(self, flow, x, args, *, key):
        noise = jax.random.normal(key, x.shape)
        x_t = (1 - self.t) * x + self.t * noise
        losses = jnp.mean((jax.vmap(lambda x: flow.output(self.t, x))(x_t) - (noise - x)) ** 2, axis=-1)
        return jnp.mean(losses), losses


def batch_mean(flow, x, args, *, key):
    """The mean of the batch: a loss whose value the test chooses, with a gradient of zero."""
    del args, key
    value = jnp.mean(x) + 0.0 * jnp.sum(flow.network.weight)
    return value, value


RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(BATCH, DIM)).astype(np.float32)
TARGETS = RNG.normal(size=(BATCH, DIM)).astype(np.float32)
SGD = optax.sgd(0.05)
KEY = jax.random.key(0)
AVERAGES = (Constant(0.9),)


def fit(loss, batches, optimiser=SGD, *, steps, key=KEY, ema=0.9, every=100, flow=None):
    flow = make_flow() if flow is None else flow
    return training.fit(loss, flow, batches, optimiser, steps=steps, key=key, ema=ema, every=every, progress=False)


def parameters(flow):
    return np.asarray(flow.network.weight), np.asarray(flow.network.bias)


def same(a, b):
    """Whether two pytrees hold the same bits."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    data = [
        tuple(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf for leaf in pair)
        for pair in leaves
        if eqx.is_array(pair[0])
    ]
    return all(np.array_equal(*pair, equal_nan=True) for pair in data)


def constant(value):
    return np.full((BATCH, DIM), value, np.float32)


# --- it trains ---------------------------------------------------------------------------------


def test_one_step_is_gradient_descent():
    state = training.init(make_flow(), SGD, key=KEY)
    batch = (jnp.asarray(INPUTS), jnp.asarray(TARGETS))
    after, measured = training.train_step(state, batch, loss=least_squares, optimiser=SGD, averages=AVERAGES)

    weight, bias = parameters(state.flow)
    error = INPUTS @ weight.T + bias - TARGETS
    np.testing.assert_allclose(measured.loss, np.mean(np.sum(error**2, axis=1)), rtol=1e-6)
    np.testing.assert_allclose(after.flow.network.weight, weight - 0.05 * 2 / BATCH * error.T @ INPUTS, rtol=1e-5)
    np.testing.assert_allclose(after.flow.network.bias, bias - 0.05 * 2 * error.mean(axis=0), rtol=1e-5)
    assert after.step == 1


def test_converges_to_linear_regression():
    *_, state = fit(least_squares, itertools.repeat((INPUTS, TARGETS)), optax.adam(0.03), steps=600)
    design = np.concatenate([INPUTS, np.ones((BATCH, 1))], axis=1)
    solution, residual, *_ = np.linalg.lstsq(design, TARGETS, rcond=None)
    weight, bias = parameters(state.flow)
    np.testing.assert_allclose(weight, solution[:DIM].T, atol=2e-3)
    np.testing.assert_allclose(bias, solution[DIM], atol=2e-3)
    np.testing.assert_allclose(state.metrics["loss"], residual.sum() / BATCH, rtol=1e-3)


def test_converges_to_the_velocity_of_a_gaussian():
    """Data N(m, s^2) on the straight path: at each t the velocity is linear in x, in closed form."""
    mean, std, t = 1.5, 0.5, 0.6
    data = mean + std * RNG.normal(size=(4_096, DIM)).astype(np.float32)
    mean, std = data.mean(), data.std()
    variance = (1 - t) ** 2 * std**2 + t**2
    slope = (t - (1 - t) * std**2) / variance
    intercept = -mean - slope * (1 - t) * mean

    rate = optax.linear_schedule(0.1, 0.005, 800)
    batches = Batches(data, batch_size=1_024, key=jax.random.key(1))
    *_, state = fit(MatchAtOneTime(jnp.float32(t)), batches, optax.adamw(rate), steps=800, ema=0.99, every=800)
    weight, bias = parameters(state.ema_flow)
    np.testing.assert_allclose(weight, slope * np.eye(DIM), atol=0.03)
    np.testing.assert_allclose(bias, intercept, atol=0.03)


def test_an_optimiser_may_ask_for_the_loss():
    optimiser = optax.chain(optax.sgd(0.05), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))
    *_, state = fit(batch_mean, itertools.repeat(constant(1.0)), optimiser, steps=6)
    assert state.optimiser_state[1].scale < 1


def test_only_the_network_is_trained():
    flow = make_flow()
    *_, state = fit(least_squares, itertools.repeat((INPUTS, TARGETS)), steps=3, flow=flow)
    assert state.flow.path == flow.path and state.flow.prediction == flow.prediction
    assert state.flow.network.name == "affine"
    assert len(jax.tree.leaves(state.averages)) == 2


# --- the moving average ------------------------------------------------------------------------


def test_average_equals_a_loop():
    flow = make_flow()
    average = parameters(flow)
    batches = itertools.repeat((INPUTS, TARGETS))
    for state in fit(least_squares, batches, steps=12, ema=0.7, every=1, flow=flow):
        average = [0.7 * old + 0.3 * new for old, new in zip(average, parameters(state.flow), strict=True)]
        for got, want in zip(parameters(state.ema_flow), average, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_average_of_a_constant_is_the_constant():
    """From step 0 on, to the last bit: no start at zeros, nothing to debias."""
    flow = make_flow()
    for state in fit(batch_mean, itertools.repeat(constant(1.0)), steps=5, ema=0.999, every=1, flow=flow):
        assert same(state.ema_flow, flow)
        assert same(state.flow, flow)


def test_without_average_it_is_the_weights():
    *_, state = fit(least_squares, itertools.repeat((INPUTS, TARGETS)), steps=5, ema=0.0)
    for got, want in zip(parameters(state.ema_flow), parameters(state.flow), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    "average", [averages.HalfLife(3.0), averages.HalfLife(50.0, ramp_up=0.3), averages.PowerFunction(0.15)]
)
def test_other_averages_equal_their_weights(average):
    """The average after n steps is the sum of all parameters with the weights of the table in averages.py."""
    flow = make_flow()
    batches = itertools.repeat((INPUTS, TARGETS))
    seen = [parameters(flow)[0]]
    for state in fit(least_squares, batches, steps=9, ema=average, every=1, flow=flow):
        seen.append(parameters(state.flow)[0])
    n = len(seen) - 1
    k = np.arange(n + 1.0)
    if isinstance(average, averages.PowerFunction):
        gamma = float(average.gamma)
        weights = np.append(0, (k[1:] / n) ** (gamma + 1) - (k[:-1] / n) ** (gamma + 1))
    else:
        half_lives = np.full(n, 3.0) if average.ramp_up is None else np.minimum(50.0, 0.3 * k[1:])
        decays = 0.5 ** (1 / half_lives)
        weights = np.append(np.prod(decays), [(1 - decays[i]) * np.prod(decays[i + 1 :]) for i in range(n)])
    np.testing.assert_allclose(weights.sum(), 1)
    expected = np.einsum("k,kij->ij", weights, np.float64(seen))
    np.testing.assert_allclose(state.ema_flow.network.weight, expected, rtol=2e-5)


def test_several_averages_or_none():
    several = (Constant(0.5), averages.PowerFunction(0.1))
    *_, both = fit(least_squares, itertools.repeat((INPUTS, TARGETS)), steps=5, ema=several)
    for average, kept in zip(several, both.averages, strict=True):
        *_, alone = fit(least_squares, itertools.repeat((INPUTS, TARGETS)), steps=5, ema=average)
        assert same(alone.ema_flow, both.with_parameters(kept))
    *_, without = fit(least_squares, itertools.repeat((INPUTS, TARGETS)), steps=5, ema=None)
    assert without.averages == () and same(without.flow, both.flow)
    with pytest.raises(ValueError, match="no moving average"):
        _ = without.ema_flow


# --- going on ------------------------------------------------------------------------------------


def test_goes_on_to_the_last_bit():
    """In two parts, with the state and the position of the first, it is the run in one part."""
    loss = MatchAtOneTime(jnp.float32(0.5))
    optimiser = optax.adamw(optax.cosine_decay_schedule(1e-2, 9))

    def batches():
        return Batches(INPUTS, batch_size=3, key=jax.random.key(3))

    *_, whole = fit(loss, batches(), optimiser, steps=9, every=4)
    *_, first = fit(loss, first_batches := batches(), optimiser, steps=5, every=4)
    second_batches = batches()
    second_batches.set_state(first_batches.get_state())
    *_, second = fit(loss, second_batches, optimiser, steps=9, every=9, flow=first, key=None)
    assert int(second.step) == 9
    assert same(
        (whole.flow, whole.averages, whole.optimiser_state), (second.flow, second.averages, second.optimiser_state)
    )
    assert int(first.step) == 5  # still the caller's
    assert list(fit(loss, batches(), optimiser, steps=9, flow=second, key=None)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": KEY}, "goes on with its own"),
        ({"key": None, "ema": None}, "0 moving averages for a state that has 1"),
        ({"key": None, "steps": 1}, "steps = 1 for a state that has done 2"),
    ],
)
def test_bad_ways_to_go_on_are_refused(options, message):
    *_, state = fit(batch_mean, itertools.repeat(constant(1.0)), steps=2)
    with pytest.raises(ValueError, match=message):
        fit(batch_mean, itertools.repeat(constant(1.0)), **{"steps": 4, "flow": state, **options})


# --- objectives of other shapes ------------------------------------------------------------------


def test_accumulated_gradients_are_those_of_the_whole_batch():
    halves = itertools.cycle([(INPUTS[:4], TARGETS[:4]), (INPUTS[4:], TARGETS[4:])])
    *_, parts = fit(least_squares, halves, optax.MultiSteps(optax.adam(0.03), 2), steps=10)
    *_, whole = fit(least_squares, itertools.repeat((INPUTS, TARGETS)), optax.adam(0.03), steps=5)
    for got, want in zip(parameters(parts.flow), parameters(whole.flow), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_half_precision_keeps_its_parameters_in_float32():
    """The gradient is that of the network in bfloat16, the parameters and their updates are not rounded to it."""
    flow = Flow(nn.Precision(make_flow().network, jnp.bfloat16), paths.Linear(), predictions.Velocity())
    *_, state = fit(least_squares, itertools.repeat((INPUTS, TARGETS)), optax.sgd(1e-4), steps=20, flow=flow)
    weight = state.flow.network.network.weight
    assert weight.dtype == jnp.float32
    *_, exact = fit(least_squares, itertools.repeat((INPUTS, TARGETS)), optax.sgd(1e-4), steps=20)
    moved = parameters(exact.flow)[0] - 0.1
    # Each update is below an ulp of bfloat16 at 0.1, and yet they add up.
    assert np.abs(moved).max() / 20 < 0.1 * 2**-8
    np.testing.assert_allclose(weight - 0.1, moved, rtol=0.05, atol=2e-6)


def test_loss_by_t_is_the_mean_in_each_bin():
    flow = Flow(make_flow().network, paths.Linear(), predictions.Velocity())
    loss = losses.Regression(times=times.Uniform(t_min=0.0, t_max=0.8))
    seen = []

    def watched(flow, x, args, *, key):
        value, aux = loss(flow, x, args, key=key)
        jax.debug.callback(lambda *parts: seen.append(parts), aux.t, aux.losses)
        return value, aux

    batch = np.tile(INPUTS, (8, 1))
    *_, state = fit(watched, itertools.repeat(batch), optax.sgd(0.0), steps=3, flow=flow)
    jax.effects_barrier()
    t, each = (np.concatenate(parts).astype(float) for parts in zip(*seen, strict=True))
    assert len(t) == 3 * len(batch)
    edges = np.asarray(state.metrics["t_edges"])
    np.testing.assert_allclose(np.arctan2(edges, 1 - edges), np.linspace(0, np.pi / 2, 9), atol=1e-6)
    for low, high, mean in zip(edges[:-1], edges[1:], state.metrics["loss_by_t"], strict=True):
        members = each[(t >= low) & (t < high)]
        if len(members):
            np.testing.assert_allclose(mean, members.mean(), rtol=1e-5)
        else:
            assert low >= 0.8 - 0.2 and np.isnan(mean)
    np.testing.assert_allclose(state.metrics["loss"], each.mean(), rtol=1e-5)


# --- what it yields ------------------------------------------------------------------------------


def test_yields_every_few_steps_and_at_the_last():
    states = list(fit(batch_mean, itertools.repeat(constant(1.0)), steps=7, every=3))
    assert [int(state.step) for state in states] == [3, 6, 7]
    assert [int(s.step) for s in fit(batch_mean, itertools.repeat(constant(1.0)), steps=6, every=3)] == [3, 6]


def test_loss_is_the_mean_since_the_last_yield():
    batches = map(constant, itertools.count(1.0))
    losses = [float(state.metrics["loss"]) for state in fit(batch_mean, batches, steps=5, every=2)]
    assert losses == [1.5, 3.5, 5.0]


def test_same_key_same_bits():
    loss = MatchAtOneTime(jnp.float32(0.5))

    def run(key):
        batches = Batches(INPUTS, batch_size=4, key=jax.random.key(3))
        *_, state = fit(loss, batches, optax.adamw(1e-2), steps=6, key=jax.random.key(key))
        return state

    first, again, other = run(0), run(0), run(1)
    assert same(first, again)
    assert not same(first.flow, other.flow)


def test_each_step_has_its_own_noise():
    def draw(flow, x, args, *, key):
        value = jax.random.normal(key) + 0.0 * jnp.sum(flow.network.weight)
        return value, None

    losses = [float(s.metrics["loss"]) for s in fit(draw, itertools.repeat(INPUTS), steps=6, every=1)]
    assert len(set(losses)) == 6


def test_yielded_states_and_the_given_flow_stay_valid():
    """The step donates its buffers: never those of a state that somebody holds."""
    flow = make_flow()
    states = list(fit(least_squares, itertools.repeat((INPUTS, TARGETS)), optax.adam(0.1), steps=6, every=2, flow=flow))
    weights = [parameters(state.flow)[0].copy() for state in states]
    assert np.array_equal(parameters(flow)[0], 0.1 * np.ones((DIM, DIM), np.float32))
    assert not np.array_equal(weights[0], weights[1]) and not np.array_equal(weights[1], weights[2])
    for state in states:
        assert all(not leaf.is_deleted() for leaf in jax.tree.leaves(state) if eqx.is_array(leaf))
    # Holding or dropping the states changes nothing.
    for state in fit(least_squares, itertools.repeat((INPUTS, TARGETS)), optax.adam(0.1), steps=6, every=2, flow=flow):
        last = np.array(state.flow.network.weight)
        del state
    assert np.array_equal(last, weights[2])


def test_the_step_donates():
    state = training.init(make_flow(), SGD, key=KEY)
    batch = (jnp.asarray(INPUTS), jnp.asarray(TARGETS))
    carried, rest = training._arrays_and_rest((state, training._empty_record(1, None)))
    setting, setting_rest = training._arrays_and_rest((least_squares, SGD, AVERAGES))
    batch_arrays, structure = jax.tree.flatten(batch)
    step = training._compiled_step(training._Static((rest, structure, setting_rest, None)))
    step(carried, batch_arrays, setting)
    assert state.flow.network.weight.is_deleted()
    assert not batch[0].is_deleted()


def test_state_shares_nothing_with_the_flow_or_within():
    """A buffer that two leaves share cannot be donated twice."""
    flow = make_flow()
    keeps_the_start = optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (g, s))
    state = training.init(flow, keeps_the_start, key=KEY)
    leaves = [leaf for leaf in jax.tree.leaves((flow, state)) if eqx.is_array(leaf)]
    leaves = [leaf for leaf in leaves if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(pointers)) == len(pointers)


def test_one_compilation_for_all_steps_and_runs():
    traces = []

    def loss(flow, x, args, *, key):
        traces.append(None)
        return least_squares(flow, x, args, key=key)

    batches = itertools.repeat((INPUTS, TARGETS))
    optimiser = optax.adam(1e-2)
    for ema, steps, key in [(0.9, 7, 0), (0.99, 3, 1)]:
        list(fit(loss, batches, optimiser, steps=steps, every=2, ema=ema, key=jax.random.key(key)))
    assert len(traces) == 1


def test_the_host_waits_only_to_yield(monkeypatch):
    fetched, last = [], [0]
    real = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: fetched.append(last[0]) or real(x))

    def batches():
        for last[0] in itertools.count(1):
            yield constant(1.0)

    list(fit(batch_mean, batches(), steps=10, every=4))
    assert fetched == [4, 8, 10]


# --- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["NaN", "infinite"])
def test_stops_at_a_loss_that_is_not_finite(bad):
    batches = (constant(bad if step >= 5 else 1.0) for step in itertools.count(1))
    seen = []
    with pytest.raises(training.TrainingDiverged, match=r"in step 5\. .*after 3 steps") as caught:
        seen.extend(fit(batch_mean, batches, steps=9, every=3))
    assert caught.value.step == 5
    good = caught.value.state
    assert int(good.step) == 3
    # Usable: training goes on from it.
    batch = (jnp.ones((BATCH, DIM)), None)
    after, measured = training.train_step(good, batch, loss=batch_mean, optimiser=SGD, averages=AVERAGES)
    assert int(after.step) == 4 and np.isfinite(measured.loss)


def test_a_failure_before_the_first_yield_gives_the_start():
    flow = make_flow()
    with pytest.raises(training.TrainingDiverged, match="in step 2") as caught:
        list(fit(batch_mean, map(constant, [1.0, np.nan, 1.0]), steps=3, flow=flow))
    assert int(caught.value.state.step) == 0
    assert same(caught.value.state.flow, flow)


def test_stops_at_parameters_that_are_not_finite():
    """The loss of the last step is that before its update: finite, though the update ruins the weights."""
    with pytest.raises(training.TrainingDiverged, match=r"parameter .* after step 1"):
        list(fit(least_squares, itertools.repeat((INPUTS, TARGETS)), optax.scale(jnp.nan), steps=1))


def test_batches_that_end_early():
    states = []
    with pytest.raises(ValueError, match="ended after 5 steps of 9"):
        for state in fit(batch_mean, map(constant, range(1, 6)), steps=9, every=3):
            states.append(state)
    assert [int(state.step) for state in states] == [3, 5]
    assert float(states[-1].metrics["loss"]) == 4.5


def test_a_loader_that_fails_loses_nothing():
    def loader():
        yield from map(constant, range(1, 6))
        raise OSError("the disk is gone")

    states = []
    with pytest.raises(OSError, match="the disk is gone"):
        for state in fit(batch_mean, loader(), steps=9, every=3):
            states.append(state)
    assert [int(state.step) for state in states] == [3, 5]


def test_what_a_compiled_loss_refuses_is_one_sentence():
    def weighted(flow, x, args, *, key):
        return losses.Regression()(flow, x, example_weight=args, key=key)

    batches = [(INPUTS, np.full(BATCH, 1.0 if step < 4 else -1.0, np.float32)) for step in range(6)]
    states = []
    with pytest.raises(ValueError, match=r"^example_weight has a negative number[^\n]*after step 3") as caught:
        for state in fit(weighted, batches, steps=6, every=3):
            states.append(state)
    assert int(states[-1].step) == 3 and len(str(caught.value)) < 200


def test_loss_by_t_is_that_of_the_examples_that_count():
    def masked(flow, x, args, *, key):
        return losses.Regression()(flow, x, mask=args, key=key)

    mask = np.arange(BATCH) < 3
    state = next(fit(masked, [(INPUTS, mask)], steps=1, every=1))
    _, aux = losses.Regression()(make_flow(), jnp.asarray(INPUTS), key=jax.random.fold_in(KEY, 0))
    edges = np.asarray(state.metrics["t_edges"])
    bins = np.searchsorted(edges[1:-1], aux.t[:3], side="right")
    for number in range(8):
        inside = np.asarray(aux.losses[:3])[bins == number]
        if not inside.size:
            assert np.isnan(state.metrics["loss_by_t"][number])
            continue
        np.testing.assert_allclose(state.metrics["loss_by_t"][number], inside.mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batches": 3}, "batches is a int"),
        ({"optimiser": 1e-3}, "optimiser is a float"),
        ({"optimiser": optax.adam}, "optimiser is a function"),
        ({"layout": 3}, "layout is a int"),
        ({"loss": losses.Regression}, "loss is the class Regression"),
        ({"loss": lambda flow, x, args, key: jnp.sum(x)}, r"The loss returned float32\[\], but wants \(value, aux\)"),
        ({"ema": Constant}, "ema is the class Constant"),
        ({"flow": None}, "flow is a NoneType"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_kind_is_named(given, message):
    settings = {
        "loss": batch_mean,
        "flow": make_flow(),
        "batches": [constant(1.0)],
        "optimiser": SGD,
        "ema": 0.9,
        "layout": None,
    } | given
    arguments = [settings.pop(name) for name in ("loss", "flow", "batches", "optimiser")]
    with pytest.raises(TypeError, match=message):
        # Without the tests' own check of annotations, which a user does not have.
        list(inspect.unwrap(training.fit)(*arguments, steps=1, key=KEY, progress=False, **settings))


def test_a_state_of_another_optimiser_is_named():
    state = training.init(make_flow(), optax.adam(1e-3), key=KEY)
    with pytest.raises(ValueError, match="a state of another optimiser"):
        training.fit(batch_mean, state, [constant(1.0)], SGD, steps=1, progress=False)
    with pytest.raises(ValueError, match="ended after 0 steps"):
        list(fit(batch_mean, [], steps=1))


def test_batches_that_change_their_shape():
    states = []
    batches = itertools.chain(map(constant, [1.0, 2.0]), [constant(3.0)[:5]])
    with pytest.raises(
        ValueError, match=r"The batch of step 3 is .*float32\[5, 2\].* those before were .*float32\[8, 2\]"
    ):
        for state in fit(batch_mean, batches, steps=9, every=4):
            states.append(state)
    assert [int(state.step) for state in states] == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"steps": 1, "every": 0}, "every = 0"),
        ({"steps": 1, "ema": 1.0}, "decay 1, but wants 0 <= decay < 1"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    """By the call itself, not by the first step."""
    with pytest.raises(ValueError, match=message):
        fit(batch_mean, itertools.repeat(constant(1.0)), **options)


def test_bad_data_and_flows_are_refused():
    with pytest.raises(TypeError, match="floating point"):
        list(fit(batch_mean, itertools.repeat(np.ones((BATCH, DIM), np.int32)), steps=1))
    with pytest.raises(ValueError, match="leading batch axis"):
        list(fit(batch_mean, itertools.repeat(np.float32(1.0)), steps=1))
    untrainable = Flow(lambda t, x, args, key=None: x, paths.Linear(), predictions.Velocity())
    with pytest.raises(ValueError, match="nothing to train"):
        fit(batch_mean, [], steps=1, flow=untrainable)


# --- the progress bar ----------------------------------------------------------------------------


def test_progress_bar(capsys):
    batches = itertools.repeat(constant(1.0))
    list(training.fit(batch_mean, make_flow(), batches, SGD, steps=4, key=KEY, every=2))
    text = capsys.readouterr().err
    last = text.split("\r")[-1]
    assert "4/4" in last and "loss 1," in last and "examples/s" in last
    assert text.count("\n") == 1


def test_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="progress=False"):
        training.fit(batch_mean, make_flow(), [], SGD, steps=1, key=KEY)
