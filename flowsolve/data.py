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

    def set_state(self, state: dict) -> None:
        """Go to a position that `get_state` gave.

        **Raises:** `ValueError` if it is one in another sequence of batches, naming what differs.
        """
        if not isinstance(state, dict):
            raise ValueError(f"set_state got {type(state).__name__}, but wants a position that get_state gave.")
        taken = check_count(state.get("taken"), "taken", least=0)
        there = {name: value for name, value in state.items() if name != "taken"}
        differing = [
            f"{name} is {there.get(name, 'nothing')} there, but {self._sequence.get(name, 'nothing')} here"
            for name in {**self._sequence, **there}
            if there.get(name) != self._sequence.get(name)
        ]
        if differing:
            raise ValueError(
                f"The position is of other batches: {'; '.join(differing)}: make the batches as those were made whose "
                "position was saved."
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
    which each takes its share of the rows of every batch.

    **Raises:** `ValueError` if there are no examples, or fewer than `batch_size`, or leading axes differ, or the
    processes do not divide the batch.
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
        lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves((data, args))}
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
        process, processes = (0, 1) if part is None else part
        if not 0 <= process < processes or self._size % processes:
            raise ValueError(
                f"Batches got part = {part} for batch_size = {batch_size}, but wants (process, processes) with the "
                "process below their number and the batch divisible by it."
            )
        self._sequence = {
            "kind": "Batches",
            "key": _key_text(self._key),
            "batch_size": self._size,
            "examples": self._count,
        }
        self._rows = process * self._size // processes, self._size // processes
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
        batch = _take(self._examples, self._order[1], place, rows, self._key, self._transform)
        self._taken += 1
        return batch


class Draws(_AbstractCounted):
    """Endless batches that a function draws, of simulated data or of pairs, each with a key of its own.

    An iterator whose n-th batch is draw(key folded with n), compiled once; its position can be saved as that of
    `Batches`.

    **Arguments:** `draw`: key -> x, or (x, args), with a leading batch axis; `key`: one typed key.
    """

    def __init__(self, draw: Callable[[PRNGKey], PyTree], *, key: PRNGKey):
        if not callable(draw):
            raise TypeError(f"Draws got a {type(draw).__name__}, but wants a function from a key to a batch.")
        self._draw = draw
        self._key = check_key(key, "Draws")
        self._sequence = {"kind": "Draws", "key": _key_text(self._key)}

    def __next__(self) -> PyTree:
        batch = _drawn(self._draw, self._key, np.asarray(self._taken, np.uint32))
        self._taken += 1
        return batch


def _key_text(key: PRNGKey) -> str:
    return f"{jax.random.key_impl(key)}{np.asarray(jax.random.key_data(key)).tolist()}"


@eqx.filter_jit
def _drawn(draw: Callable[[PRNGKey], PyTree], key: PRNGKey, number: UInt[Array | np.ndarray, ""]) -> PyTree:
    return draw(jax.random.fold_in(key, number))


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
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, 2**32 - 1), epoch), within)
    return transform(key, batch)
