"""Batches over devices and in chunks: the same numbers bit for bit, nothing said between devices, every example's own
status."""

import re
from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flowsolve as fs
from flowsolve._progress import ChunkBar

LIKE = jax.ShapeDtypeStruct((8,), jnp.float32)
KEY = jax.random.key(3)
NUM = 37
LABELS = jnp.arange(NUM) % 3
PID = diffrax.PIDController(rtol=1e-3, atol=1e-3)


class Mlp(eqx.Module):
    """A small network with a label; NaN for labels below 0, and stiff for those above 5."""

    layers: eqx.nn.MLP

    def __init__(self, key):
        self.layers = eqx.nn.MLP(10, 8, 32, 2, activation=jax.nn.silu, key=key)

    def __call__(self, t, x, args, *, key=None):
        label = jnp.zeros(()) if args is None else args.astype(x.dtype)
        out = self.layers(jnp.concatenate([x, t[None], label[None]]))
        out = jnp.where(label > 5, 30 * jnp.sin(300 * t), out)
        return jnp.where(label < 0, jnp.nan, out)


FLOW = fs.Flow(Mlp(jax.random.key(0)), fs.paths.Linear(), fs.predictions.Velocity())
X = jax.random.normal(jax.random.key(1), (NUM, 8))
SETTINGS = {
    "adaptive": {"solver": diffrax.Tsit5(), "controller": PID},
    "stochastic": {"solver": fs.solvers.SDEDPMSolverPP(), "grid": fs.grids.Uniform(5)},
    "multistep": {"solver": fs.solvers.UniPC(3), "grid": fs.grids.LogSNR(6)},
}
# More devices than examples have places for, in parts that do not divide them; chunks that do not divide those.
SPREADS = {
    "1": ((1,), None),
    "2, chunk": ((2,), 5),
    "4": ((4,), None),
    "4, chunk": ((4,), 3),
    "2 x 2": ((2, 2), None),
}


def mesh_of(shape, kind):
    return None if shape is None else jax.make_mesh(shape, ("a", "b")[: len(shape)], axis_types=(kind,) * len(shape))


# --- the same numbers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    return {name: np.asarray(fs.sample(FLOW, LIKE, num=NUM, key=KEY, args=LABELS, **s)) for name, s in SETTINGS.items()}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("name", "how"),
    [*(("adaptive", how) for how in SPREADS), *((name, "4, chunk") for name in ("stochastic", "multistep"))],
)
def test_samples_are_bitwise_those_of_one_device(name, how, kind, alone):
    shape, chunk = SPREADS[how]
    mesh = mesh_of(shape, kind)
    x = fs.sample(FLOW, LIKE, num=NUM, key=KEY, args=LABELS, mesh=mesh, chunk=chunk, **SETTINGS[name])
    np.testing.assert_array_equal(x, alone[name])
    # Usable as any array is, also where the mesh has explicit axes.
    np.testing.assert_array_equal(jnp.sort(x[jnp.arange(3)], axis=0), np.sort(alone[name][:3], axis=0))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_mesh_of_set_mesh_is_used(kind, jit, alone):
    """Traced on that mesh first, without a program of an earlier call."""
    mesh = mesh_of((4,), kind)
    jax.clear_caches()

    def sample(flow, key):
        return fs.sample(flow, LIKE, num=36, key=key, args=LABELS[:36], throw=False, **SETTINGS["adaptive"])

    with jax.set_mesh(mesh):
        x = (eqx.filter_jit(sample) if jit else sample)(FLOW, KEY)
    np.testing.assert_array_equal(x, alone["adaptive"][:36])
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("a")), 2)


def test_a_mesh_goes_before_that_of_set_mesh(alone):
    """One of as many devices; JAX takes no other there, and fs.batched says so."""
    settings = {"num": NUM, "key": KEY, "args": LABELS, **SETTINGS["stochastic"]}
    with jax.set_mesh(jax.make_mesh((4,), ("c",), axis_types=(AxisType.Auto,))):
        x = fs.sample(FLOW, LIKE, mesh=mesh_of((2, 2), AxisType.Auto), **settings)
        with pytest.raises(ValueError, match="mesh has 2 devices, but that of jax"):
            fs.sample(FLOW, LIKE, mesh=mesh_of((2,), AxisType.Auto), **settings)
    np.testing.assert_array_equal(x, alone["stochastic"])


@pytest.mark.parametrize("kinds", [("Auto", "Auto"), ("Explicit", "Explicit"), ("Auto", "Explicit")])
@pytest.mark.parametrize("axis", ["a", "b"])
def test_sharded_parameters_run_under_the_compilers_partitioning(axis, kinds, alone):
    """Sharded over the axis beside the examples' (tensor parallel) or all there is (FSDP): to rounding."""
    kinds = tuple(getattr(AxisType, kind) for kind in kinds)
    if axis == "a":
        mesh = jax.make_mesh((4,), ("a",), axis_types=kinds[:1])
    else:
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=kinds)

    def put(leaf):
        even = eqx.is_array(leaf) and leaf.ndim == 2 and leaf.shape[0] % mesh.shape[axis] == 0
        spec = PartitionSpec(axis) if even else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec)) if eqx.is_array(leaf) else leaf

    flow = jax.tree.map(put, FLOW)
    for chunk in (None, 5):
        x = fs.sample(flow, LIKE, num=NUM, key=KEY, args=LABELS, mesh=mesh, chunk=chunk, **SETTINGS["stochastic"])
        np.testing.assert_allclose(x, alone["stochastic"], atol=2e-5)


def test_devices_do_not_speak_to_each_other():
    """No collective in the whole compiled program of a batched solve."""
    mesh = mesh_of((4,), AxisType.Auto)
    fast = fs.batched(eqx.Partial(fs.solve, throw=False, **SETTINGS["adaptive"]), mesh=mesh, chunk=4)
    text = jax.jit(lambda x: fast(FLOW, x).ys).lower(jnp.zeros((32, 8))).compile().as_text()
    assert "while" in text
    assert not re.findall(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", text)


# --- any function ---------------------------------------------------------------------------------------------------


def test_batched_log_prob_is_a_loop():
    """Against one call after another; a key gives each example its own probes, an array of keys the ones given."""
    function = eqx.Partial(fs.log_prob, divergence=fs.divergence.Hutchinson(), solver=diffrax.Heun())
    function = eqx.Partial(function, grid=fs.grids.Uniform(4))
    fast = fs.batched(function, mesh=mesh_of((2,), AxisType.Auto), chunk=2)
    x, labels = X[:5], LABELS[:5]
    keys = [jax.random.fold_in(KEY, i) for i in range(5)]
    loop = [function(FLOW, *row, key=key) for *row, key in zip(x, labels, keys, strict=True)]
    np.testing.assert_allclose(fast(FLOW, x, labels, key=KEY), jnp.stack(loop), rtol=1e-5)
    np.testing.assert_allclose(fast(FLOW, x, labels, key=jnp.stack(keys)), jnp.stack(loop), rtol=1e-5)


def test_pytrees_numbers_and_what_is_bound_with_partial():
    """A pytree of rows; None and numbers as they are; a bound array for all; what comes out that is no array."""

    def function(scale, rows, nothing, *, shift):
        assert nothing is None and scale == 2
        return {"sum": scale * (rows["a"] + rows["b"].sum()) + shift.sum(), "name": "x"}

    rows = {"a": jnp.arange(6.0), "b": jnp.arange(12.0).reshape(6, 2)}
    fast = fs.batched(eqx.Partial(function, shift=jnp.ones(7)), chunk=4)
    out = fast(2, rows, None)
    assert out["name"] == "x"
    expected = 2 * (np.arange(6) + np.arange(12).reshape(6, 2).sum(1)) + 7
    np.testing.assert_allclose(out["sum"], expected)


def test_keys_alone_make_a_batch():
    """`sample_and_log_prob` takes no array but its key."""
    function = eqx.Partial(fs.sample_and_log_prob, solver=diffrax.Heun(), grid=fs.grids.Uniform(4))
    keys = jax.random.split(KEY, 3)
    x, log_p = fs.batched(function, chunk=2)(FLOW, LIKE, key=keys)
    one_x, one_log_p = function(FLOW, LIKE, key=keys[2])
    np.testing.assert_allclose(x[2], one_x, atol=1e-5)
    np.testing.assert_allclose(log_p[2], one_log_p, rtol=1e-4)


# --- status ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [(None, 5), ((4,), None)])
def test_those_that_fail_are_marked_and_the_others_are_right(spread):
    """3 of 64 with a NaN network, and 1 of 64 that needs more than max_steps; the rest as in a clean run, bitwise."""
    shape, chunk = spread
    x = jax.random.normal(jax.random.key(5), (64, 8))
    good, bad = jnp.zeros(64, int), jnp.zeros(64, int).at[jnp.array([3, 17, 63])].set(-1)
    function = eqx.Partial(fs.solve, throw=False, max_steps=24, **SETTINGS["adaptive"])
    solve = fs.batched(function, mesh=mesh_of(shape, AxisType.Auto), chunk=chunk)
    clean = solve(FLOW, x, good)
    assert np.all(clean.result == diffrax.RESULTS.successful)

    failed = solve(FLOW, x, bad)
    marked = np.asarray(failed.result != diffrax.RESULTS.successful)
    assert np.flatnonzero(marked).tolist() == [3, 17, 63]
    np.testing.assert_array_equal(failed.ys[~marked], clean.ys[~marked])

    slow = solve(FLOW, x, good.at[40].set(9))
    assert np.flatnonzero(slow.result == diffrax.RESULTS.max_steps_reached).tolist() == [40]
    others = np.arange(64) != 40
    np.testing.assert_array_equal(slow.ys[others], clean.ys[others])
    np.testing.assert_array_equal(slow.stats["nfe"][others], clean.stats["nfe"][others])


# --- progress -------------------------------------------------------------------------------------------------------


class Shown:
    """What a tqdm bar would show."""

    bars: ClassVar[list] = []

    def __init__(self, total, unit):
        self.total, self.unit, self.n, self.closed, self.chunks = total, unit, 0, False, []
        Shown.bars.append(self)

    def set_postfix_str(self, text, refresh):
        self.chunks.append(text)

    def update(self, count):
        self.n += count

    def close(self):
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr("flowsolve._progress.import_tqdm", lambda who: Shown)
    Shown.bars = []
    return Shown.bars


def counted(key, **spread):
    settings = {"solver": fs.solvers.DDIM(), "grid": fs.grids.Uniform(2), "throw": False}
    return fs.sample(FLOW, LIKE, num=NUM, key=key, args=LABELS, progress=True, **spread, **settings)


@pytest.mark.parametrize("shape", [None, (4,)])
def test_a_bar_counts_the_chunks_and_the_samples(shape, bars):
    """Plainly, in a jit that runs twice, and under vmap and grad; the samples are those without it."""
    spread = {"mesh": mesh_of(shape, AxisType.Auto), "chunk": 5}
    chunks = 8
    plain = fs.sample(
        FLOW, LIKE, num=NUM, key=KEY, args=LABELS, solver=fs.solvers.DDIM(), grid=fs.grids.Uniform(2), **spread
    )

    def complete(number):
        jax.effects_barrier()
        assert len(bars) == number
        for bar in bars:
            assert bar.closed and bar.n == bar.total == NUM
            assert bar.chunks == [f"chunk {done}/{chunks}" for done in range(1, chunks + 1)]

    np.testing.assert_array_equal(counted(KEY, **spread), plain)
    complete(1)
    compiled = eqx.filter_jit(lambda key: counted(key, **spread))
    compiled(KEY), compiled(KEY)
    complete(3)
    jax.vmap(lambda key: counted(key, **spread))(jax.random.split(KEY, 2))
    complete(4)
    jax.jit(jax.grad(lambda scale: jnp.sum(scale * counted(KEY, **spread))))(1.0)
    complete(5)


def test_a_bar_that_was_stopped_does_not_disturb_the_next(bars):
    bar = ChunkBar(10, 2)
    bar(np.asarray(0))
    bar(np.asarray(0))
    bar(np.asarray(1))
    assert [shown.closed for shown in bars] == [True, True]
    assert [shown.n for shown in bars] == [5, 10]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("what", ["sample", "log_prob"])
def test_a_failure_on_one_device_raises(what, jit, kind):
    """Also where the devices must come together afterwards, as 10 examples do that 4 devices do not divide."""
    mesh = mesh_of((4,), kind)
    settings = {"solver": diffrax.Euler(), "grid": fs.grids.Uniform(2)}

    def function(labels):
        if what == "sample":
            return fs.sample(FLOW, LIKE, num=10, key=KEY, args=labels, mesh=mesh, **settings)
        return fs.batched(eqx.Partial(fs.log_prob, **settings), mesh=mesh)(FLOW, X[:10], labels)

    function = eqx.filter_jit(function) if jit else function
    labels = jnp.zeros(10, int)
    assert np.all(np.isfinite(function(labels)))
    message = "failed: the state became NaN" if jit else "1 of 10 examples, the first is number 9: the state became NaN"
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(function(labels.at[9].set(-1)))


def test_a_batch_inside_a_batch_counts_the_outer_examples():
    def function(label):
        labels = jnp.broadcast_to(label, (3,))
        x = fs.sample(FLOW, LIKE, num=3, key=KEY, args=labels, solver=diffrax.Euler(), grid=fs.grids.Uniform(2))
        return jnp.sum(x)

    fast = fs.batched(function)
    assert fast(jnp.zeros(4, int)).shape == (4,)
    with pytest.raises(RuntimeError, match="2 of 4 examples, the first is number 1"):
        fast(jnp.array([0, -1, 0, -1]))
