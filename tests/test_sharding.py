"""Training on a mesh: the same numbers, and each device keeps its part."""

import itertools
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from test_multihost import run

from flowsolve import losses, nn, paths, predictions, training
from flowsolve.data import Batches
from flowsolve.flow import Flow
from flowsolve.sharding import Layout

KEY = jax.random.key(0)
LIKE = jax.ShapeDtypeStruct((6,), jnp.float32)
DATA = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
OPTIMISER = optax.adamw(1e-3)


def mesh(*shape):
    names = ("replicas", "shards")[-len(shape) :]
    return jax.sharding.Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names)


def make_flow():
    return Flow(nn.ResidualMLP(LIKE, width=64, depth=2, key=KEY), paths.Linear(), predictions.Velocity())


def fit(layout, steps=6, every=2, flow=None, key=KEY):
    return training.fit(
        losses.Regression(),
        make_flow() if flow is None else flow,
        Batches(DATA, batch_size=16, key=KEY),
        OPTIMISER,
        steps=steps,
        key=key,
        every=every,
        layout=layout,
        progress=False,
    )


def arrays(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.number)]


def bytes_on(device, tree):
    return sum(
        shard.data.nbytes for leaf in arrays(tree) for shard in leaf.addressable_shards if shard.device == device
    )


@pytest.fixture(scope="module")
def alone():
    return list(fit(None))


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [((4,), ()), ((4,), "shards"), ((2, 2), "shards"), ((2, 2), ("replicas", "shards"))],
    ids=["data parallel", "fully sharded", "both", "over both axes"],
)
def test_the_numbers_are_those_of_one_device(alone, shape, parameters):
    states = list(fit(Layout(mesh(*shape), parameters=parameters, least=256)))
    for state, wanted in zip(states, alone, strict=True):
        np.testing.assert_allclose(state.metrics["loss"], wanted.metrics["loss"], rtol=1e-5)
    for got, want in zip(arrays(states[-1].averages), arrays(alone[-1].averages), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-6)


def test_each_device_keeps_its_part():
    layout = Layout(mesh(4), parameters="shards", least=256)
    *_, state = fit(layout)
    for part in (state.flow, state.averages, state.optimiser_state):
        whole = sum(leaf.nbytes for leaf in arrays(part))
        for device in jax.devices()[:4]:
            assert bytes_on(device, part) < 1.1 * whole / 4
    replicated = list(fit(Layout(mesh(4)), steps=2))[-1]
    assert bytes_on(jax.devices()[3], replicated.flow) == sum(leaf.nbytes for leaf in arrays(replicated.flow))


def test_one_trace_and_the_layout_stays():
    traces = []

    def loss(flow, x, args, *, key):
        traces.append(None)
        return losses.Regression()(flow, x, args, key=key)

    layout = Layout(mesh(2, 2), parameters="shards", least=256)
    batches = itertools.repeat(DATA[:16])
    states = list(
        training.fit(loss, make_flow(), batches, OPTIMISER, steps=5, key=KEY, every=2, layout=layout, progress=False)
    )
    assert len(traces) == 1
    for state in states:
        jax.tree.map(
            lambda leaf, sharding: (
                leaf.sharding.is_equivalent_to(sharding, leaf.ndim) or pytest.fail(str(leaf.sharding))
            ),
            eqx.filter(state.flow, eqx.is_array),
            layout.shardings(eqx.filter(state.flow, eqx.is_array)),
        )


def test_goes_on_from_one_layout_to_another(alone):
    first = next(iter(fit(Layout(mesh(4), parameters="shards", least=256))))
    batches = Batches(DATA, batch_size=16, key=KEY)
    batches.set_state({**batches.get_state(), "taken": 2})
    *_, state = training.fit(
        losses.Regression(), first, batches, OPTIMISER, steps=6, every=2, layout=Layout(mesh(2)), progress=False
    )
    np.testing.assert_allclose(state.metrics["loss"], alone[-1].metrics["loss"], rtol=1e-5)


@pytest.mark.quick
def test_the_longest_side_that_divides_is_divided():
    layout = Layout(mesh(4), parameters="shards", least=16)
    tree = {"a": jnp.zeros((8, 12)), "b": jnp.zeros((4, 6)), "c": jnp.zeros((5, 7)), "d": jnp.zeros(8), "e": "text"}
    specs = jax.tree.map(lambda sharding: sharding.spec, layout.shardings(tree))
    assert specs == {
        "a": PartitionSpec(None, ("shards",)),
        "b": PartitionSpec(("shards",)),
        "c": PartitionSpec(),
        "d": PartitionSpec(),
        "e": None,
    }


@pytest.mark.quick
def test_a_rule_comes_first():
    def rule(name, array):
        assert array.shape
        return PartitionSpec(None, "shards") if name.endswith("['a']") else None

    specs = Layout(mesh(4), rule=rule).shardings({"a": jnp.zeros((3, 4)), "b": jnp.zeros((4, 4))})
    assert specs["a"].spec == PartitionSpec(None, "shards") and specs["b"].spec == PartitionSpec()


@pytest.mark.quick
def test_errors():
    with pytest.raises(ValueError, match="the axis 'rows' for parameters, but the mesh has"):
        Layout(mesh(4), parameters="rows")
    with pytest.raises(ValueError, match="does not divide over the 4 devices"):
        Layout(mesh(4)).place_batch((jnp.zeros((6, 2)), None))


@pytest.mark.slow
def test_devices_of_two_processes_give_the_losses_of_one():
    """On eight devices and for 200 steps by hand: `python tests/sharded_losses.py`."""
    (text,) = run((Path(__file__).with_name("sharded_losses.py"), "--devices", "4", "--steps", "10"))
    rows = re.findall(r"(.+): ([\d.]+) of the bytes on a device; losses of 10 steps within ([\d.e+-]+)", text)
    assert [name for name, _, _ in rows] == ["one device", "4 devices", "4 devices in 2 processes"], text
    assert all(float(share) <= 1.03 / 4 for _, share, _ in rows[1:]), text
    assert all(float(apart) < 1e-5 for _, _, apart in rows), text
