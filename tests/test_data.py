"""Batches in memory: permutations, positions, transforms, parts."""

import itertools
import json

import jax
import numpy as np
import pytest

from flowsolve.data import Batches, Draws, Resumable

KEY = jax.random.key(0)


def take(data, count, args=None, batch_size=3, key=0):
    batches = Batches(data, args, batch_size=batch_size, key=jax.random.key(key))
    return list(itertools.islice(batches, count))


def test_each_epoch_is_a_permutation():
    data = np.arange(12, dtype=np.float32)
    drawn = [x for x, _ in take(data, 8)]
    first, second = np.concatenate(drawn[:4]), np.concatenate(drawn[4:])
    assert np.array_equal(np.sort(first), data)
    assert np.array_equal(np.sort(second), data)
    assert not np.array_equal(first, second)


def test_the_last_partial_batch_is_left_out_and_changes():
    data = np.arange(11, dtype=np.float32)
    epochs = np.stack([x for x, _ in take(data, 30)]).reshape(10, 9)
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert set(epochs.ravel()) == set(data)


def test_args_follow_their_data():
    data = {"a": np.arange(10, dtype=np.float32), "b": np.arange(20, dtype=np.float32).reshape(10, 2)}
    for x, args in take(data, 7, args=(np.arange(10), np.arange(10) % 3)):
        assert np.array_equal(x["a"], args[0])
        assert np.array_equal(x["b"][:, 0], 2 * x["a"])
        assert np.array_equal(args[1], args[0] % 3)


def test_same_key_same_order():
    data = np.arange(12, dtype=np.float32)
    one, again, other = (np.stack([x for x, _ in take(data, 6, key=key)]) for key in (0, 0, 1))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert take(data, 1)[0][1] is None


def test_bad_batches_are_refused_at_once():
    data = np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match="batch_size = 5 for 4 examples"):
        Batches(data, batch_size=5, key=KEY)
    with pytest.raises(ValueError, match=r"\[3, 4\] examples"):
        Batches(data, np.arange(3), batch_size=2, key=KEY)
    with pytest.raises(TypeError, match="floating point"):
        Batches(np.ones((4, 2), np.int32), batch_size=2, key=KEY)


def test_a_position_is_resumed():
    """The batches after a position are those that would have come, from a new object too."""
    data = np.arange(11, dtype=np.float32)

    def jitter(key, batch):
        x, args = batch
        return x + jax.random.uniform(key, x.shape), args

    def make():
        return Batches(data, batch_size=3, key=KEY, transform=jitter)

    straight = make()
    wanted = [np.asarray(x) for x, _ in itertools.islice(straight, 10)]
    assert isinstance(straight, Resumable) and straight.get_state()["taken"] == 10
    for taken in (0, 2, 3, 7):
        resumed = make()
        resumed.set_state(straight.get_state() | {"taken": taken})
        for want in wanted[taken:]:
            np.testing.assert_array_equal(next(resumed)[0], want)


def test_a_position_of_other_batches_is_refused():
    """Another key, batch size, number of examples or kind; not another number of processes, which join to the same."""
    data = np.arange(12, dtype=np.float32)

    def make(data=data, batch_size=4, key=KEY, part=None):
        return Batches(data, batch_size=batch_size, key=key, part=part)

    whole = make()
    next(whole)
    position = json.loads(json.dumps(whole.get_state()))
    others = {
        "batch_size is 4 there, but 3 here": make(batch_size=3),
        "examples is 12 there, but 11 here": make(data[:11]),
        r"key is \w+\[0, 0\] there, but \w+\[0, 5\] here": make(key=jax.random.key(5)),
        "key is threefry2x32.* there, but rbg": make(key=jax.random.key(0, impl="rbg")),
        "kind is Batches there, but Draws here": Draws(lambda key: data, key=KEY),
    }
    for message, other in others.items():
        before = other.get_state()
        with pytest.raises(ValueError, match=rf"^The position is of other batches: .*{message}.*: make the batches as"):
            other.set_state(position)
        assert other.get_state() == before
    parts = [make(part=(i, 2)) for i in range(2)]
    for part in parts:
        part.set_state(position)
    np.testing.assert_array_equal(np.concatenate([next(part)[0] for part in parts]), next(whole)[0])


def test_a_transform_has_its_own_key_each_time():
    data = np.zeros((4, 1), np.float32)

    def noise(key, batch):
        x, args = batch
        return x + jax.random.normal(key, x.shape), args

    drawn = np.concatenate([x for x, _ in itertools.islice(Batches(data, batch_size=2, key=KEY, transform=noise), 8)])
    assert len(np.unique(drawn)) == 16


def test_processes_share_the_rows_of_a_batch():
    data = np.arange(24, dtype=np.float32)
    whole = Batches(data, np.arange(24), batch_size=6, key=KEY)
    parts = [Batches(data, np.arange(24), batch_size=6, key=KEY, part=(i, 3)) for i in range(3)]
    for _ in range(5):
        x, args = next(whole)
        pieces = [next(part) for part in parts]
        np.testing.assert_array_equal(np.concatenate([piece[0] for piece in pieces]), x)
        np.testing.assert_array_equal(np.concatenate([piece[1] for piece in pieces]), args)


def test_processes_draw_their_own():
    """What a transform adds in one process it adds in no other, and so with draws; the rows stay the same."""
    data = np.arange(0, 800, 100, dtype=np.float32)

    def noise(key, batch):
        x, args = batch
        return x + jax.random.uniform(key, x.shape), args

    plain = Batches(data, batch_size=4, key=KEY)
    augmented = [Batches(data, batch_size=4, key=KEY, transform=noise, part=(i, 2)) for i in range(2)]
    added = []
    for _ in range(6):
        rows = np.concatenate([next(part)[0] for part in augmented])
        added.append(rows - next(plain)[0])
    assert np.min(added) > -1e-3 and np.max(added) < 1 + 1e-3
    assert len(np.unique(added)) == 24

    def draw(key):
        return jax.random.normal(key, (3,))

    draws = [Draws(draw, key=KEY, part=(i, 2)) for i in range(2)]
    drawn = [np.asarray(next(part)) for _ in range(4) for part in draws]
    assert len(np.unique(drawn)) == 24
    np.testing.assert_array_equal(next(Draws(draw, key=KEY, part=(0, 1))), next(Draws(draw, key=KEY)))
    draws[1].set_state(draws[1].get_state() | {"taken": 2})
    np.testing.assert_array_equal(next(draws[1]), drawn[5])
    with pytest.raises(ValueError, match="processes is 2 there, but 1 here"):
        Draws(draw, key=KEY).set_state(draws[0].get_state())


def test_one_trace_for_all_batches():
    traces = []

    def count(key, batch):
        traces.append(None)
        return batch

    list(itertools.islice(Batches(np.ones((10, 2), np.float32), batch_size=3, key=KEY, transform=count), 9))
    assert len(traces) == 1


def test_draws_are_functions_of_key_and_number():
    traces = []

    def draw(key):
        traces.append(None)
        return jax.random.normal(key, (3,)), None

    draws = Draws(draw, key=KEY)
    first = [np.asarray(x) for x, _ in itertools.islice(draws, 4)]
    assert len(traces) == 1 and len(np.unique(first)) == 12
    np.testing.assert_allclose(first[2], jax.random.normal(jax.random.fold_in(KEY, 2), (3,)), rtol=1e-6)
    draws.set_state(draws.get_state() | {"taken": 2})
    np.testing.assert_array_equal(next(draws)[0], first[2])
    assert draws.get_state()["taken"] == 3 and isinstance(draws, Resumable)


def test_bad_data_sets_are_refused():
    data = np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match="data set is empty"):
        Batches(np.ones((0, 2), np.float32), batch_size=1, key=KEY)
    with pytest.raises(ValueError, match=r"part = \(0, 3\) for batch_size = 4"):
        Batches(data, batch_size=4, key=KEY, part=(0, 3))
    with pytest.raises(ValueError, match=r"part = \(2, 2\), but wants \(process, processes\)"):
        Batches(data, batch_size=4, key=KEY, part=(2, 2))
    with pytest.raises(ValueError, match=r"Draws got part = \(-1, 2\), but wants"):
        Draws(lambda key: data, key=KEY, part=(-1, 2))
    with pytest.raises(ValueError, match=r"is a number, but Batches wants arrays.*np\.asarray\(data\)\.$"):
        Batches(data.tolist(), batch_size=2, key=KEY)
    with pytest.raises(ValueError, match="is a number, but Batches wants arrays"):
        Batches(data, 3, batch_size=2, key=KEY)
    with pytest.raises(ValueError, match="taken"):
        Batches(data, batch_size=2, key=KEY).set_state({})
