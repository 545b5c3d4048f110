"""Checkpoints: every bit comes back, nothing damaged is loaded, and nothing good is lost."""

import errno
import functools
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array
from test_multihost import free_address, run

from flowsolve import _store, checkpoints, data, losses, paths, predictions, training
from flowsolve.checkpoints import Checkpoints, CorruptCheckpoint
from flowsolve.flow import Flow
from flowsolve.sharding import Layout

TESTS = Path(__file__).parent
OPTIMISER = optax.adam(1e-2)


class Network(eqx.Module):
    """A linear map of (x, t), one activation, another linear map."""

    first: Array
    second: Array
    activation: object = eqx.field(static=True)

    def __init__(self, width=8, activation=jnp.tanh):
        self.first = jnp.linspace(-1, 1, width * 3).reshape(width, 3)
        self.second = jnp.linspace(1, -1, 2 * width).reshape(2, width)
        self.activation = activation

    def __call__(self, t, x, args=None, *, key=None):
        del args, key
        return self.second @ self.activation(self.first @ jnp.append(x, t))


def make_flow(width=8, activation=jnp.tanh, path=None):
    return Flow(Network(width, activation), path or paths.Linear(), predictions.Velocity())


@functools.cache
def fresh(**settings):
    """A state before the first step."""
    return training.init(make_flow(**settings), OPTIMISER, key=jax.random.key(5))


def state_at(step, loss=None, state=None):
    """A state in which all floating-point arrays depend on the step."""
    state = fresh() if state is None else state
    state = jax.tree.map(lambda x: x + jnp.asarray(step / 7, x.dtype) if eqx.is_inexact_array(x) else x, state)
    state = eqx.tree_at(lambda s: s.step, state, jnp.asarray(step, jnp.int32))
    return eqx.tree_at(lambda s: s.metrics, state, {"loss": jnp.asarray(step if loss is None else loss, jnp.float32)})


def bits(tree):
    """name -> (dtype, shape, bytes) of every array."""

    def of(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        return str(leaf.dtype), leaf.shape, found.tobytes()

    leaves = jax.tree_util.tree_flatten_with_path(eqx.filter(tree, eqx.is_array_like))[0]
    return {jax.tree_util.keystr(path): of(leaf) for path, leaf in leaves if hasattr(leaf, "dtype")}


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and bits(a) == bits(b)


def batches(key=1):
    return data.Batches(jnp.linspace(-1, 1, 40).reshape(20, 2), batch_size=4, key=jax.random.key(key))


def fit(state, batches, steps):
    loss = losses.Regression()
    return training.fit(loss, state, batches, OPTIMISER, steps=steps, ema=0.9, every=2, progress=False)


def save_all(directory, steps, **settings):
    with Checkpoints(directory, **settings) as saved:
        for step in steps:
            saved.save(state_at(step))


def contents(directory):
    """name -> bytes of every file."""
    files = (file for file in sorted(Path(directory).rglob("*")) if file.is_file())
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}


# --- what comes back -------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    """To the last bit of parameters, averages, optimiser, key, metrics and position of the data."""
    *_, wanted = fit(fresh(), batches(), 8)

    with Checkpoints(tmp_path) as saved:
        taken = batches()
        for state in fit(saved.resume(fresh(), taken), taken, 8):
            saved.save(state, taken)
            if int(state.step) == 4:
                break
    with Checkpoints(tmp_path) as saved:
        taken = batches()
        start = saved.resume(training.init(make_flow(), OPTIMISER, key=jax.random.key(6)), taken)
        assert int(start.step) == 4 and taken.get_state()["taken"] == 4
        for state in fit(start, taken, 8):
            saved.save(state, taken)
        assert same(state, wanted)
        assert same(saved.restore(fresh()), wanted)


def test_every_kind_of_array_comes_back(tmp_path):
    """Bitwise and of the same dtype; NumPy's as NumPy's, and a leaf that is no array from `like`."""
    rng = np.random.default_rng(0)
    dtypes = "bfloat16 float16 float32 int8 int32 uint8 uint32 bool complex64 float8_e4m3fn int4".split()
    tree = {dtype: jnp.asarray(rng.normal(size=(3, 2)) * 3).astype(dtype) for dtype in dtypes}
    tree |= {impl: jax.random.key(3, impl=impl) for impl in ("threefry2x32", "rbg", "unsafe_rbg")}
    tree |= {"keys": jax.random.split(jax.random.key(0), 4), "nan": jnp.asarray([jnp.nan, -0.0, jnp.inf])}
    tree |= {"empty": jnp.zeros((0, 3)), "scalar": jnp.asarray(2.5), "numpy": rng.normal(size=3), "text": "a"}
    tree |= {"a.b/c['d']": jnp.ones(2), "nested": (jnp.zeros(1), [jnp.arange(3)], None)}
    checkpoints.save(tmp_path / "x", tree)
    like = jax.tree.map(lambda x: jax.random.key(0, impl=jax.random.key_impl(x)) if is_key(x) else x, tree)
    like = jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_array(x) and not is_key(x) else x, like)
    like["keys"] = jax.random.split(jax.random.key(1), 4)
    like["numpy"] = np.zeros(3)
    found = checkpoints.load(tmp_path / "x", like)
    assert bits(found) == bits(tree)
    assert isinstance(found["numpy"], np.ndarray) and found["text"] == "a" and found["nested"][2] is None
    # As before, an array is not bound to a device, so that it goes wherever it is used.
    assert not found["float32"].committed
    structs = eqx.filter_eval_shape(lambda: {name: leaf for name, leaf in tree.items() if name != "numpy"})
    found = checkpoints.load(tmp_path / "x", structs | {"numpy": np.zeros(3)})
    assert bits(found) == bits(tree)


def is_key(x):
    return eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    """Though it is written later, and its buffers are given to a program meanwhile."""

    @functools.partial(jax.jit, donate_argnums=0)
    def spoiled(arrays):
        return [x * 0 for x in arrays]

    state = state_at(3)
    state = eqx.tree_at(lambda s: s.flow.network.first, state, jnp.ones((1_000, 300)))
    like = jax.tree.map(lambda x: x, state)
    wanted = bits(state)
    with Checkpoints(tmp_path) as saved:
        saved.save(state)
        arrays = [x for x in jax.tree.leaves(state) if eqx.is_inexact_array(x)]
        for _ in range(3):
            arrays = spoiled(arrays)
        like = eqx.filter_eval_shape(lambda: like)
        assert bits(saved.restore(like)) == wanted


def test_loading_runs_no_code(tmp_path):
    """Nothing is unpickled, evaluated or imported: Python reports each of these to an audit hook."""
    save_all(tmp_path, [1])
    events = {"pickle.find_class", "marshal.loads", "exec", "compile", "import", "subprocess.Popen"}
    seen = []
    listening = threading.Event()

    def hook(event, arguments):
        if listening.is_set() and event in events:
            # The tests' own checks of annotations are written and executed as they are needed.
            if not re.search("jaxtyping|beartype", sys._getframe(1).f_code.co_filename):
                seen.append((event, arguments))

    Checkpoints(tmp_path).restore(fresh())  # what is imported and compiled by the first call
    sys.addaudithook(hook)
    listening.set()
    Checkpoints(tmp_path).restore(fresh())
    assert not seen
    eval("1")
    assert seen
    listening.clear()


@pytest.mark.parametrize("kind", ["bytes", "grain"])
def test_any_position_comes_back(tmp_path, kind):
    if kind == "grain":
        grain = pytest.importorskip("grain")

        def source():
            dataset = grain.MapDataset.source(np.arange(24, dtype=np.float32).reshape(12, 2)).shuffle(seed=3).repeat()
            return iter(dataset.to_iter_dataset().batch(4))
    else:

        class Counting:
            def __init__(self):
                self.n = 0

            def __iter__(self):
                return self

            def __next__(self):
                self.n += 1
                return np.full(2, self.n)

            def get_state(self):
                return self.n.to_bytes(2, "little") + b"\xff"

            def set_state(self, state):
                assert state[2:] == b"\xff"
                self.n = int.from_bytes(state[:2], "little")

        source = Counting
    before, after = source(), source()
    first = [next(before) for _ in range(5)]
    with Checkpoints(tmp_path) as saved:
        saved.save(state_at(5), before)
        saved.restore(fresh(), after)
    following = [next(after) for _ in range(5)]
    np.testing.assert_array_equal(following, [next(before) for _ in range(5)])
    assert not np.array_equal(first, following)


# --- what is kept ----------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(tmp_path):
    scores = {1: float("nan"), 2: 0.5, 3: 3.0, 4: float("nan"), 5: 4.0, 6: 2.0}
    with Checkpoints(tmp_path, keep=2, best=lambda state: state.metrics["loss"]) as saved:
        for step, score in scores.items():
            saved.save(state_at(step, score))
        saved.wait()
        assert saved.steps == [2, 5, 6] and saved.best_step == 2
        assert same(saved.restore(fresh(), step=saved.best_step), state_at(2, 0.5))
        assert same(saved.restore(fresh()), state_at(6, 2.0))
    assert Checkpoints(tmp_path).best_step == 2


def test_only_whole_ones_count_and_only_its_own_are_removed(tmp_path):
    """A corrupt one is not among those kept; leftovers of a killed process go, other files stay."""
    save_all(tmp_path, [1, 2, 3])
    (tmp_path / "step-3" / "checkpoint.json").unlink()
    (tmp_path / ".incomplete-step-4" / "a").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "2024").mkdir()
    save_all(tmp_path, [4], keep=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["2024", "notes.txt", "step-2", "step-4"]


def test_a_directory_with_a_later_step_is_not_written_over(tmp_path):
    save_all(tmp_path, [1, 7])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"has a checkpoint of step 7, later than step 3.*another directory"):
        save_all(tmp_path, [3])
    assert contents(tmp_path) == before


def test_a_step_is_saved_again_in_its_place(tmp_path):
    save_all(tmp_path, [1])
    with Checkpoints(tmp_path) as saved:
        saved.save(state_at(1, loss=9.0))
        assert float(saved.restore(fresh()).metrics["loss"]) == 9.0
    assert len(list((tmp_path / "step-1").iterdir())) == 2  # one file, one set of arrays


def test_an_exception_in_the_loop_passes(tmp_path):
    with pytest.raises(KeyError), Checkpoints(tmp_path) as saved:
        saved.save(state_at(2))
        raise KeyError
    assert same(Checkpoints(tmp_path).restore(fresh()), state_at(2))


# --- damage ----------------------------------------------------------------------------------------


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte less": lambda content: content[:-1],
    "one more": lambda content: content + b"\0",
    "first byte": lambda content: flipped(content, 0),
    "middle byte": lambda content: flipped(content, len(content) // 2),
    "last byte": lambda content: flipped(content, len(content) - 1),
    "gone": lambda content: None,
}


def damaged(file, content):
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


def test_any_damage_to_any_file_is_named_and_the_one_before_is_used(tmp_path):
    save_all(tmp_path, [1, 2])
    files = contents(tmp_path / "step-2")
    assert len(files) > 5
    for name, content in files.items():
        file = tmp_path / "step-2" / name
        for change in DAMAGES.values():
            damaged(file, change(content))
            with pytest.raises(CorruptCheckpoint, match=rf"step-2 is corrupt, its {re.escape(name)} (is|has)"):
                Checkpoints(tmp_path).restore(fresh(), step=2)
            file.write_bytes(content)
        file.unlink()
        with pytest.warns(UserWarning, match=rf"step-2 is corrupt, its {re.escape(name)}.*of step 1 is used instead"):
            assert same(Checkpoints(tmp_path).restore(fresh()), state_at(1))
        file.write_bytes(content)
    assert same(Checkpoints(tmp_path).restore(fresh()), state_at(2))

    damaged(tmp_path / "step-2" / "checkpoint.json", None)
    next((tmp_path / "step-1").glob("a/manifest*")).unlink()
    before = contents(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"step-2 is corrupt.*; .*step-1 is corrupt.*put back a copy"):
        Checkpoints(tmp_path).resume(fresh())
    assert contents(tmp_path) == before


def test_what_is_no_directory_is_no_checkpoint(tmp_path):
    """A file in the place of a directory, or the reverse: the checkpoint before is used; other files stay."""
    save_all(tmp_path, [1, 2])
    (tmp_path / "step-99").write_text("mine")
    with pytest.warns(UserWarning, match=r"step-99 is corrupt, its checkpoint.json is missing: .* step 2 is used"):
        assert same(Checkpoints(tmp_path).restore(fresh()), state_at(2))
    for name in ("checkpoint.json", "a/manifest.ocdbt", "a"):
        place = tmp_path / "step-2" / name
        place.rename(tmp_path / "aside")
        place.mkdir() if (tmp_path / "aside").is_file() else place.write_text("")
        with pytest.warns(UserWarning, match=r"step-2 is corrupt, its .*step 1 is used"):
            assert same(Checkpoints(tmp_path).restore(fresh()), state_at(1))
        place.rmdir() if place.is_dir() else place.unlink()
        (tmp_path / "aside").rename(place)
    save_all(tmp_path, [3, 100], keep=1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-100", "step-99"]
    assert (tmp_path / "step-99").read_text() == "mine"
    for call in (Checkpoints(tmp_path / "step-99").resume, Checkpoints(tmp_path / "step-99" / "run").restore):
        with pytest.raises(OSError, match=r"^There are no checkpoints in \S+ \(Not a directory\): choose another"):
            call(fresh())


@pytest.mark.quick
def test_the_bytes_of_the_description_count(tmp_path):
    checkpoints.save(tmp_path / "x", {"w": jnp.ones(3)})
    file = tmp_path / "x" / "checkpoint.json"
    content = file.read_bytes()
    for at in range(0, len(content), 3):
        file.write_bytes(flipped(content, at))
        with pytest.raises(CorruptCheckpoint):
            checkpoints.load(tmp_path / "x", {"w": jnp.ones(3)})
    file.write_bytes(content)
    assert np.array_equal(checkpoints.load(tmp_path / "x", {"w": jnp.zeros(3)})["w"], jnp.ones(3))


# --- what does not fit -------------------------------------------------------------------------------


def test_a_state_that_does_not_fit_is_told_by_name(tmp_path):
    save_all(tmp_path, [1])

    def init(flow=None, optimiser=OPTIMISER, **settings):
        return training.init(make_flow() if flow is None else flow, optimiser, key=jax.random.key(0), **settings)

    cases = [
        (init(make_flow(width=9)), r"\.flow\.network\.first is float32\[8, 3\] there, but float32\[9, 3\] in `like`"),
        (init(make_flow(activation=jnp.sin)), r"\.flow\.network\.activation is tanh there, but sin"),
        (init(make_flow(path=paths.Cosine())), r"\.flow\.path is Linear there, but Cosine"),
        (init(make_flow(path=paths.Linear(0.1))), r"\.flow\.path\.sigma_min is 0.0 there, but 0.1"),
        (init(averages=2), r"\.averages is tuple of 1 there, but tuple of 2"),
        (init(optimiser=optax.sgd(0.1)), r"\.optimiser_state\[0\] is ScaleByAdamState there, but EmptyState"),
        (
            eqx.tree_at(lambda s: s.key, init(), jax.random.key(0, impl="rbg")),
            r"\.key is key<fry>\[\] there, but key<rbg>\[\]",
        ),
    ]
    for like, message in cases:
        with pytest.raises(ValueError, match=message):
            Checkpoints(tmp_path).restore(like)
    # It is not damage: an older one is not tried.
    save_all(tmp_path, [2])
    with pytest.raises(ValueError, match="step-2 does not fit"):
        Checkpoints(tmp_path).restore(cases[0][0])


def test_what_changes_from_process_to_process_fits(tmp_path):
    """Functions and classes that are defined anew, by the same name, elsewhere in memory."""

    def network():
        class Net(eqx.Module):
            w: Array
            f: object = eqx.field(static=True)
            g: object

            def __call__(self, t, x, args=None, *, key=None):
                return self.w * x

        return Net(jnp.ones(2), functools.partial(lambda x, y: x, y=jnp.tanh), jax.jit(lambda x: x))

    flow = Flow(network(), paths.Linear(), predictions.Velocity())
    checkpoints.save(tmp_path / "x", flow)
    assert " at 0x" not in (tmp_path / "x" / "checkpoint.json").read_text()
    like = Flow(network(), paths.Linear(), predictions.Velocity())
    assert bits(checkpoints.load(tmp_path / "x", like)) == bits(flow)


# --- two writers -------------------------------------------------------------------------------------


HOLDING = """
import os, sys, time
from flowsolve import _store
from pathlib import Path

_store.lock(Path(sys.argv[1]) / ".lock", Path(sys.argv[1]))
if os.fork() == 0:  # such as a worker that loads data, and lives on
    print(os.getpid(), flush=True)
    time.sleep(100)
time.sleep(100)
"""


def test_a_second_writer_is_told_and_readers_are_not_hindered(tmp_path):
    refused = r"^\S+ is being written by another run, which has locked \S+: wait until that has ended, or choose"
    with Checkpoints(tmp_path) as saved:
        saved.save(state_at(1))
        saved.wait()
        with pytest.raises(OSError, match=refused), Checkpoints(tmp_path):
            pass
        with pytest.raises(OSError, match=refused):
            Checkpoints(tmp_path).save(state_at(2))
        assert same(Checkpoints(tmp_path).restore(fresh()), state_at(1))
        saved.save(state_at(3))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-1", "step-3"]
    # One that was not entered holds it while it writes.
    saved = Checkpoints(tmp_path)
    saved.save(state_at(4))
    saved.wait()
    save_all(tmp_path, [5])
    with pytest.raises(KeyError), Checkpoints(tmp_path):
        raise KeyError
    save_all(tmp_path, [6])

    release = _store.lock(tmp_path / ".lock-x", tmp_path)
    with pytest.raises(OSError, match=r"x is being written by another run"):
        checkpoints.save(tmp_path / "x", jnp.ones(3))
    release()
    checkpoints.save(tmp_path / "x", jnp.ones(3))
    assert not list(tmp_path.glob(".lock*"))


def test_a_killed_writer_leaves_no_lock(tmp_path):
    """Though a fork of it lives on."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-c", HOLDING, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        fork = int(writer.stdout.readline())
        try:
            with pytest.raises(OSError, match="is being written by another run"), Checkpoints(tmp_path):
                pass
            writer.kill()
            writer.wait()
            os.kill(fork, 0)  # is there
            with Checkpoints(tmp_path):
                pass
        finally:
            os.kill(fork, signal.SIGKILL)


# --- a disk that refuses -----------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """Nothing more reaches the disk."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "fsync", fsync), monkeypatch.undo


def test_a_full_disk_loses_nothing(tmp_path, full_disk):
    fill, make_room = full_disk
    save_all(tmp_path, [1, 2], keep=1)
    with Checkpoints(tmp_path, keep=1) as saved:
        before = contents(tmp_path)
        fill()
        saved.save(state_at(3))  # returns; the next call tells
        with pytest.raises(OSError, match=r"^Step 3 could not be saved in \S+ \(No space left on device\): the newest"):
            saved.save(state_at(4))
        assert contents(tmp_path) == before  # nor is what was written in part still in the way
        make_room()
        saved.save(state_at(5))
    assert Checkpoints(tmp_path).steps == [5]

    fill()
    with pytest.raises(OSError, match=r"No space left on device\): the newest checkpoint is still that of step 5"):
        save_all(tmp_path, [6])
    with pytest.raises(OSError, match=r"x could not be saved \(No space left on device\)"):
        checkpoints.save(tmp_path / "x", jnp.ones(3))
    make_room()
    assert not (tmp_path / "x").exists() and Checkpoints(tmp_path).steps == [5]


def test_a_failure_below_orbax_is_one_sentence(tmp_path, caplog):
    """The kernel itself refuses to let the file of the arrays grow, in the midst of a write."""
    checkpoints.save(tmp_path / "x", {"w": jnp.ones(3)})
    before = contents(tmp_path)
    # Several, so that others are under way when the first fails; pytest fails if Python complains of what they do then.
    large = {f"w{i}": jax.random.normal(jax.random.key(i), (300, 300)) for i in range(8)}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        refused = r"x could not be saved \(File too large\): make room or choose another path\.$"
        with pytest.raises(OSError, match=refused) as caught:
            checkpoints.save(tmp_path / "x", large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(tmp_path) == before
    assert not caplog.records  # Orbax would log it with four tracebacks
    # Nor is its own traceback shown above the sentence.
    assert len(traceback.format_exception(caught.value)) < 10 and caught.value.__suppress_context__
    checkpoints.save(tmp_path / "x", large)
    assert bits(checkpoints.load(tmp_path / "x", jax.tree.map(jnp.zeros_like, large))) == bits(large)


def test_a_failed_write_is_noted_on_what_ends_the_loop(tmp_path, full_disk):
    fill, _ = full_disk
    with pytest.raises(KeyError) as caught, Checkpoints(tmp_path) as saved:
        fill()
        saved.save(state_at(3))
        raise KeyError
    assert "Step 3 could not be saved" in caught.value.__notes__[0]


def test_a_directory_that_cannot_be_written_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("mine")
    for directory, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        with pytest.raises(OSError, match=rf"^Checkpoints cannot be written to \S+ \({reason}\): choose another"):
            with Checkpoints(directory):
                pass
    with pytest.raises(FileExistsError, match="is there and is no checkpoint"):
        checkpoints.save(tmp_path / "file", jnp.ones(3))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_told_and_still_read(tmp_path):
    save_all(tmp_path, [1])
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match=r"^Checkpoints cannot be written to \S+ \(Permission denied\)"):
            with Checkpoints(tmp_path):
                pass
        assert same(Checkpoints(tmp_path).restore(fresh()), state_at(1))
    finally:
        tmp_path.chmod(0o700)


def test_without_orbax(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r'pip install "flowsolve\[train\]"'):
        Checkpoints(tmp_path)


# --- requests that make no sense -----------------------------------------------------------------------


@pytest.mark.quick
def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoint: save one first"):
        Checkpoints(tmp_path / "nowhere").restore(fresh())
    assert Checkpoints(tmp_path / "nowhere").resume(fresh()) is fresh()
    save_all(tmp_path, [1, 2])
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3, but those of \[1, 2\]"):
        Checkpoints(tmp_path).restore(fresh(), step=3)
    with pytest.raises(ValueError, match="saved without batches"):
        Checkpoints(tmp_path).restore(fresh(), batches())
    with Checkpoints(tmp_path) as saved:
        saved.save(state_at(3), batches(key=1))
    with pytest.raises(ValueError, match=r"position is of other batches: key is \S+ 1\] there, but \S+ 2\] here"):
        Checkpoints(tmp_path).resume(fresh(), batches(key=2))
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at"):
        checkpoints.load(tmp_path / "nowhere", fresh())


# --- devices and processes ------------------------------------------------------------------------------


def layout(count):
    return Layout(jax.make_mesh((count,), ("d",), devices=jax.devices()[:count]), parameters="d", least=1)


def test_from_four_devices_onto_two_and_one(tmp_path):
    state = state_at(3, state=fresh(width=16))
    with Checkpoints(tmp_path) as saved:
        saved.save(layout(4).place(state))
        wanted = bits(state)
        for count, like in itertools.product((4, 2, 1), (fresh(width=16), eqx.filter_eval_shape(lambda: state))):
            found = saved.restore(like, layout=layout(count))
            assert bits(found) == wanted
            weight = found.flow.network.first
            assert len(weight.sharding.device_set) == count
            assert weight.addressable_shards[0].data.size == weight.size // count
            moment = found.optimiser_state[0].mu.network.first
            assert moment.sharding == weight.sharding
        assert saved.restore(layout(2).place(fresh(width=16))).flow.network.first.sharding.num_devices == 2
        assert bits(saved.restore(fresh(width=16))) == wanted
        checkpoints.save(tmp_path / "flow", layout(4).place(state.flow))
        flow = checkpoints.load(tmp_path / "flow", state.flow, layout=layout(2))
        assert bits(flow) == bits(state.flow) and flow.network.first.sharding.num_devices == 2


TWO_PROCESSES = """
import sys
from pathlib import Path

sys.path[:0] = [sys.argv[3]]
import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import equinox as eqx
import numpy as np
import test_checkpoints as t
from flowsolve.sharding import Layout


class Own(list):
    def get_state(self):
        return {"process": jax.process_index()}

    def set_state(self, state):
        self.append(state["process"])


directory = Path(sys.argv[4])
layout = Layout(jax.make_mesh((4,), ("d",)), parameters="d", least=1)
state = t.state_at(7, state=t.fresh(width=16))
batches = t.batches()
for _ in range(3):
    next(batches)
with t.Checkpoints(directory) as saved:
    saved.save(layout.place(state), batches)
    saved.save(layout.place(t.state_at(8, state=t.fresh(width=16))), Own())
    own = Own()
    found = saved.restore(t.fresh(width=16), own, layout=layout)
    assert own == [jax.process_index()] and int(found.step) == 8
    # A file that is cut short is seen by both.
    if jax.process_index() == 0:
        file = next((directory / "step-8").rglob("manifest.ocdbt"))
        file.write_bytes(file.read_bytes()[:-1])
    other = t.batches()
    found = saved.resume(t.fresh(width=16), other, layout=layout)
    assert other.get_state()["taken"] == 3 and int(found.step) == 7
    weight = found.flow.network.first
    assert len(weight.addressable_shards) == 2 and weight.addressable_shards[0].data.size == weight.size // 4
    for shard in weight.addressable_shards:
        np.testing.assert_array_equal(shard.data, state.flow.network.first[shard.index])
    t.checkpoints.save(directory / "flow", state.flow)
    assert t.bits(t.checkpoints.load(directory / "flow", state.flow)) == t.bits(state.flow)
    saved.save(layout.place(t.state_at(9, state=t.fresh(width=16))), Own())
    # A second run is refused in each of its processes, so that none waits for the other.
    for call in (t.Checkpoints(directory).__enter__, lambda: t.Checkpoints(directory).save(t.state_at(10))):
        try:
            call()
        except OSError as error:
            assert "is being written by another run" in str(error), error
        else:
            raise AssertionError
print("done", len(jax.devices()))
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Of two devices each; then one process reads what they wrote."""
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    address, directory = free_address(), tmp_path / "run"
    texts = run(*[(script, address, process, TESTS, directory) for process in range(2)])
    assert all("done 4" in text for text in texts), texts

    saved = Checkpoints(directory)
    assert saved.steps == [7, 9]
    with pytest.raises(ValueError, match=r"positions of the batches of 2 processes, which differ.*are 1 processes now"):
        saved.restore(fresh(width=16), batches())
    taken = batches()
    found = saved.restore(fresh(width=16), taken, layout=layout(2), step=7)
    assert bits(found) == bits(state_at(7, state=fresh(width=16))) and taken.get_state()["taken"] == 3


# --- kill -9 ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed_to_the_same_bits():
    """Three times here, while a checkpoint is being written and not; `tests/kill_and_resume.py --kills 10` by hand."""
    script = TESTS / "kill_and_resume.py"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    command = [sys.executable, script, "--kills", "3", "--steps", "60"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"3 kills, [123] of them while writing, .*bitwise equal", done.stdout), done.stdout
