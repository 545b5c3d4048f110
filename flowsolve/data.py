r"""Batches of a data set in memory, whose n-th batch is a function of a key and n.

Epoch e visits the examples in the order of a permutation drawn from the key folded with e, batch after batch; those
that do not fill a last batch are left out of that epoch, others in each. So a position is one number, the batches
taken, beside what it counts: of a key, a batch size and a number of examples. A run that is resumed gets the batches it
would have had, or an error where these are others.

    batches = fs.data.Batches(x, labels, batch_size=256, key=jax.random.key(0))
    for state in fs.training.fit(loss, flow, batches, optimiser, steps=2_000, key=key):
        ...

Training takes any iterable of batches in its place. One that is to be resumed at its position, as `checkpoints` does,
has `get_state()` and `set_state(state)`: `Batches` does, and so do the iterators of `grain`.
"""

import abc
from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree, UInt

from ._checks import check_count, check_key, check_state, describe
from ._types import Args, PRNGKey

__all__ = ["Batches", "Draws", "Resumable"]


@runtime_checkable
class Resumable(Protocol):
    """An iterator of batches that knows its position."""

    def get_state(self) -> dict | bytes:
        """The position, of numbers and text that JSON holds, or bytes."""
        ...

    def set_state(self, state: dict | bytes) -> None:
        """Go to a position that `get_state` gave."""
        ...


class _AbstractCounted(abc.ABC):
    """An endless iterator whose position is the number of batches taken, of a sequence that the rest of it names."""

    _sequence: dict[str, str | int]
    _taken: int = 0

    def __iter__(self) -> Iterator[PyTree]:
        return self

    @abc.abstractmethod
    def __next__(self) -> PyTree: ...

    def get_state(self) -> dict:
        """The position: the number of batches taken, and what tells this sequence from others."""
        return {**self._sequence, "taken": self._taken}

    def set_state(self, state: dict | bytes) -> None:
        """Go to a position that `get_state` gave.

        **Raises:** `ValueError` if it is one in other batches, naming the first difference.
        """
        if not isinstance(state, dict):
            raise ValueError(f"set_state got {type(state).__name__}, but wants a position that get_state gave.")
        taken = check_count(state.get("taken"), "taken", least=0)
        there, here = {**state, "taken": None}, {**self._sequence, "taken": None}
        for name in {**here, **there}:
            if there.get(name) != here.get(name):
                raise ValueError(
                    f"The position is of other batches: {name} is {there.get(name, 'nothing')} there, but "
                    f"{here.get(name, 'nothing')} here: make the batches as those were made whose position was saved."
                )
        self._taken = taken


class Batches(_AbstractCounted):
    """Endless batches of a data set in memory, in a new random order each epoch.

    An iterator over tuples (x, args) of arrays on the device of the data, args None where there are none. The same key
    gives the same batches. A position is one in all batches of the same key, batch size and number of examples, and
    another number of processes goes on from it; the examples themselves and `transform` are not compared.

    **Arguments:** `data`: examples along the leading axis of every leaf, e.g. an array, or `couplings.Pairs`; `args`:
    their labels or the like, any pytree of arrays with the same leading axis, or None; `batch_size`: examples in a
    batch, of all processes together; `key`: for the order; `transform`: None, or (key, batch) -> batch with another
    key each time, for instance to augment; it is compiled with the taking; `part`: None, or (process, processes), of
    which each takes its share of the rows of every batch. `transform` gets these rows alone, and another key in each
    process: with another number of processes the rows are the same, but not what it draws.

    **Raises:** `ValueError` if there are no examples, or fewer than `batch_size`, or leading axes are missing or
    differ, or the processes do not divide the batch; `TypeError` if `transform` is no function.
    """

    def __init__(
        self,
        data: PyTree,
        args: Args = None,
        *,
        batch_size: int,
        key: PRNGKey,
        transform: Callable[[PRNGKey, tuple[PyTree, Args]], tuple[PyTree, Args]] | None = None,
        part: tuple[int, int] | None = None,
    ):
        self._key = check_key(key, "the order of the batches")
        data, args = jax.tree.map(jnp.asarray, (data, args))
        check_state(data, "data")
        leaves = jax.tree.leaves((data, args))
        if any(leaf.ndim == 0 for leaf in leaves):
            raise ValueError(
                "A leaf of data or args is a number, but Batches wants arrays of examples along their leading axes: "
                "make an array of a list, e.g. np.asarray(data)."
            )
        lengths = {leaf.shape[0] for leaf in leaves}
        if len(lengths) != 1:
            raise ValueError(
                f"The leaves of data and args have {sorted(lengths)} examples along their leading axes, but want the "
                "same."
            )
        (self._count,) = lengths
        if self._count == 0:
            raise ValueError(f"The data set is empty: data is {describe(data)}, but wants at least one example.")
        self._size = check_count(batch_size, "Batches got batch_size")
        if self._size > self._count:
            raise ValueError(
                f"Batches got batch_size = {batch_size} for {self._count} examples, but wants at most as many: take a "
                "smaller batch."
            )
        process, processes = _checked_part(part, "Batches")
        if self._size % processes:
            raise ValueError(
                f"Batches got part = {part} for batch_size = {batch_size}, but wants the batch divisible by the number "
                "of processes."
            )
        if transform is not None and not callable(transform):
            raise TypeError(
                f"transform is of type {type(transform).__name__}, but wants a function (key, batch) -> batch, or None."
            )
        self._sequence = {
            "kind": "Batches",
            "key": _key_text(self._key),
            "batch_size": self._size,
            "examples": self._count,
        }
        self._rows = process * self._size // processes, self._size // processes
        self._process = np.asarray(process, np.uint32)
        self._examples = data, args
        self._transform = transform
        self._order: tuple[int, Int[Array, " count"]] | None = None

    @property
    def epoch_length(self) -> int:
        """Batches in an epoch."""
        return self._count // self._size

    def __next__(self) -> tuple[PyTree, Args]:
        epoch, within = divmod(self._taken, self.epoch_length)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, _order(self._key, np.asarray(epoch, np.int32), self._count)
        first, rows = self._rows
        place = np.asarray([epoch, within, within * self._size + first], np.int32)
        batch = _take(self._examples, self._order[1], place, rows, self._key, self._process, self._transform)
        self._taken += 1
        return batch


class Draws(_AbstractCounted):
    """Endless batches that a function draws, of simulated data or of pairs, each with a key of its own.

    An iterator whose n-th batch is draw(key folded with n, then with the process if there are several), compiled once;
    its position can be saved as that of `Batches`, and is one in draws of the same key and number of processes.

    **Arguments:** `draw`: key -> x, or (x, args), with a leading batch axis; `key`: one typed key; `part`: None, or
    (process, processes), each of which draws its own rows of a batch: `draw` then gives the rows of one process.

    **Raises:** `TypeError` if `draw` is no function; `ValueError` for a `part` that is none.
    """

    def __init__(self, draw: Callable[[PRNGKey], PyTree], *, key: PRNGKey, part: tuple[int, int] | None = None):
        if not callable(draw):
            raise TypeError(f"Draws got a {type(draw).__name__}, but wants a function from a key to a batch.")
        self._draw = draw
        self._key = check_key(key, "Draws")
        process, processes = _checked_part(part, "Draws")
        self._process = np.asarray(process, np.uint32) if processes > 1 else None
        self._sequence = {"kind": "Draws", "key": _key_text(self._key), "processes": processes}

    def __next__(self) -> PyTree:
        batch = _drawn(self._draw, self._key, np.asarray(self._taken, np.uint32), self._process)
        self._taken += 1
        return batch


def _checked_part(part: tuple[int, int] | None, owner: str) -> tuple[int, int]:
    """(process, processes), those of one process for None."""
    if part is None:
        return 0, 1
    match part:
        case (int() | np.integer()) as process, (int() | np.integer()) as processes if 0 <= process < processes:
            return int(process), int(processes)
    raise ValueError(
        f"{owner} got part = {part}, but wants (process, processes), the process from 0 and below their number, e.g. "
        "(jax.process_index(), jax.process_count())."
    )


def _key_text(key: PRNGKey) -> str:
    return f"{jax.random.key_impl(key)}{np.asarray(jax.random.key_data(key)).tolist()}"


@eqx.filter_jit
def _drawn(
    draw: Callable[[PRNGKey], PyTree],
    key: PRNGKey,
    number: UInt[Array | np.ndarray, ""],
    process: UInt[Array | np.ndarray, ""] | None,
) -> PyTree:
    key = jax.random.fold_in(key, number)
    return draw(key if process is None else jax.random.fold_in(key, process))


@eqx.filter_jit
def _order(key: PRNGKey, epoch: Int[Array | np.ndarray, ""], count: int) -> Int[Array, " count"]:
    return jax.random.permutation(jax.random.fold_in(key, epoch), count)


@eqx.filter_jit
def _take(
    examples: PyTree,
    order: Int[Array, " count"],
    place: Int[Array | np.ndarray, "3"],
    rows: int,
    key: PRNGKey,
    process: UInt[Array | np.ndarray, ""],
    transform: Callable[[PRNGKey, tuple[PyTree, Args]], tuple[PyTree, Args]] | None,
) -> tuple[PyTree, Args]:
    """The examples at order[start : start + rows] for place = (epoch, batch within it, start).

    Compiled, so that the host never waits for `order`.
    """
    epoch, within, start = (place[i] for i in range(3))
    indices = jax.lax.dynamic_slice(order, (start,), (rows,))
    batch = jax.tree.map(lambda leaf: jnp.take(leaf, indices, axis=0, unique_indices=True), examples)
    if transform is None:
        return batch
    # Another number than any epoch's, from whose key its order comes.
    for number in (2**32 - 1, epoch, within, process):
        key = jax.random.fold_in(key, number)
    return transform(key, batch)
