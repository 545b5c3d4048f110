r"""Checkpoints: a run that is killed at any moment goes on to the last bit, and a damaged file is never loaded.

A checkpoint is a directory. Orbax writes the arrays into it, sharded as they are, and one more file says what they are:

    runs/moons/step-300/checkpoint.json     names, shapes, configuration, metrics, position of the data, and
                                            size and digest (BLAKE2) of every other file
    runs/moons/step-300/a/                  the arrays; b/ if another set was written in their place

It is written under a hidden name, brought to the disk (fsync) and renamed, so that it is whole or not there. Before
anything of it is loaded, every file is compared with its digest. Arrays are data and the rest is JSON: loading runs no
code. What is no array (the sizes of a network, its activation, the path) is described, not stored: it comes from
`like`, which must agree with the description; functions do by name.

    with fs.checkpoints.Checkpoints("runs/moons", keep=3) as checkpoints:
        start = checkpoints.resume(fs.training.init(flow, optimiser, key=key), batches)
        for state in fs.training.fit(loss, start, batches, optimiser, steps=2_000, every=100):
            checkpoints.save(state, batches)

With several processes all of them make the same calls and see the same directory. A directory is written by one run at
a time: while it is open a lock keeps others out, of which a killed run leaves nothing behind; reading wants no lock.
"""

import base64
import contextlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._checks import check_count, check_type
from ._store import (
    FILE,
    HIDDEN,
    CorruptCheckpoint,
    begin_writing,
    check_files,
    entries,
    exchange,
    hidden,
    import_orbax,
    local_path,
    lock,
    of_first,
    one_sentence,
    read_content,
    read_tree,
)
from ._types import ScalarLike
from .data import Resumable
from .sharding import Layout
from .training import TrainState

__all__ = ["Checkpoints", "CorruptCheckpoint", "load", "save"]

_T = TypeVar("_T")


class Checkpoints:
    """The checkpoints of one run, in a directory of its own; a context manager.

    **Arguments:** `directory`: where they are, on a file system that this machine has mounted; `keep`: how many of the
    newest are kept; `best`: None, or a function of the state, such as `lambda state: state.metrics["loss"]`, of whose
    values the checkpoint with the smallest is kept as well.

    Entering makes the directory and locks it; leaving waits for what is still being written. To read one that is being
    written, call `restore` without entering.

    **Raises:** `OSError` on entering if the directory cannot be written to, or another run is writing there;
    `ImportError` without orbax-checkpoint.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 3,
        best: Callable[[TrainState], ScalarLike] | None = None,
    ):
        import_orbax()  # now, not at the first save
        self._directory = local_path(directory)
        self._keep = check_count(keep, "Checkpoints got keep")
        self._best = best
        self._writing: Future[None] | None = None
        self._unlock: Callable[[], None] | None = None  # in the first process, while the directory is locked
        self._whole: set[int] = set()  # steps whose digests have been compared, or that were written here

    def __enter__(self) -> "Checkpoints":
        with one_sentence(f"Checkpoints cannot be written to {self._directory}", "choose another directory"):
            of_first(self._lock)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del kind, traceback
        try:
            if error is None:
                self.wait()
            elif (problem := self._outcome()) is not None:
                error.add_note(str(problem))
        finally:
            self._release()

    @property
    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, whole or not, in order; one that is being written is not there.

        **Raises:** `OSError` if the directory cannot be read, for instance because it is a file.
        """
        with one_sentence(f"There are no checkpoints in {self._directory}", "choose another directory"):
            names = [re.fullmatch(r"step-(\d+)", entry.name) for entry in entries(self._directory)]
        return sorted(int(name[1]) for name in names if name)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint by the function `best` with which it was saved; None if there is none."""
        self.wait()
        return self._best_of([step for step in self.steps if self._is_whole(step)])

    def save(self, state: TrainState, batches: Resumable | None = None) -> None:
        """Save a state; returns when it has been copied off the devices, and writes it while training goes on.

        One is written at a time: this waits for that before. Once it is whole, older ones are removed.

        **Arguments:** `state`: as `training.fit` yields it; `batches`: None, or the iterator whose position is saved
        along, `data.Batches` or one of `grain`.

        **Raises:** `OSError` if this one, or the one saved before, could not be written, or another run is writing
        there; those before are as they were. `ValueError` if the directory has a later step.
        """
        check_type(state, TrainState, "state", "a TrainState, as training.fit yields it")
        positions = self._agree(_position(batches))
        step = int(state.step)
        later = [other for other in self.steps if other > step and self._is_whole(other)]
        if later:
            raise ValueError(
                f"{self._directory} has a checkpoint of step {later[-1]}, later than step {step} that was to be saved: "
                "restore it and go on from there, or choose another directory."
            )
        facts = {
            "step": step,
            "score": None if self._best is None else float(self._best(state)),
            "metrics": {name: [str(value.dtype), np.asarray(value).tolist()] for name, value in state.metrics.items()},
            "positions": positions,
        }
        with self._saving(step), contextlib.ExitStack() as stack:
            if of_first(lambda: self._unlock is None):  # it was not entered
                of_first(self._lock)
                stack.callback(self._release)
            write = begin_writing(self._at(step), _unmeasured(state), facts)
            locked = stack.pop_all()
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing = thread.submit(self._write, step, write, locked)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until what was saved is on the disk.

        **Raises:** `OSError` if it could not be written.
        """
        self._agree(None)

    def restore(
        self,
        like: TrainState,
        batches: Resumable | None = None,
        *,
        layout: Layout | None = None,
        step: int | None = None,
    ) -> TrainState:
        """The newest whole checkpoint; a warning names those that are newer and corrupt.

        **Arguments:** `like`: a state of the same kind, from `training.init` with the same flow and optimiser; its
        arrays may be `jax.ShapeDtypeStruct`s, and say what goes to which devices unless `layout` does; `batches`: None,
        or the iterator that is set to the position that was saved along; `layout`: None, or where arrays go on a mesh,
        whatever the number of devices was before; `step`: None, or that of the checkpoint wanted, e.g. `best_step`.

        **Raises:** `FileNotFoundError` if there is none; `CorruptCheckpoint` if none, or not that of `step`, is whole;
        `ValueError` if it does not fit `like`, naming the first difference, or was saved without batches, or with
        the position of others.
        """
        check_type(like, TrainState, "like", "a TrainState, as training.init gives it")
        self.wait()
        steps = self.steps
        if not steps or (step is not None and step not in steps):
            wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}, but those of {steps}"
            raise FileNotFoundError(
                f"{self._directory} has {wanted}: save one first, or begin with resume, which without any gives back "
                "the state it got."
            )
        candidates = steps[::-1] if step is None else [step]
        found, problems = of_first(lambda: self._first_whole(candidates))
        if found is None:
            raise CorruptCheckpoint(f"{'; '.join(problems)}: put back a copy, or begin anew in another directory.")
        if problems:
            warnings.warn(f"{'; '.join(problems)}: the checkpoint of step {found} is used instead.", stacklevel=2)
        content = read_content(self._at(found))
        position = None if batches is None else _own_position(content, self._at(found))
        state = read_tree(self._at(found), content, _unmeasured(like), layout)
        if batches is not None and position is not None:
            batches.set_state(position)
        metrics = {name: jnp.asarray(np.asarray(value, dtype)) for name, (dtype, value) in content["metrics"].items()}
        return eqx.tree_at(lambda s: s.metrics, state, metrics)

    def resume(
        self, state: TrainState, batches: Resumable | None = None, *, layout: Layout | None = None
    ) -> TrainState:
        """The newest whole checkpoint, as `restore` gives it with `state` as `like`; `state` if there is none yet."""
        self.wait()
        return self.restore(state, batches, layout=layout) if self.steps else state

    def _at(self, step: int) -> Path:
        return self._directory / f"step-{step}"

    def _lock(self) -> None:
        """Make the directory, see that it can be written to, and keep others from doing so."""
        self._directory.mkdir(parents=True, exist_ok=True)
        probe = self._directory / f"{HIDDEN}probe"
        probe.touch()
        probe.unlink()
        self._unlock = lock(self._directory / ".lock", self._directory)

    def _release(self) -> None:
        if self._unlock is not None:
            self._unlock()
        self._unlock = None

    def _write(self, step: int, write: Callable[[], None], locked: contextlib.ExitStack) -> None:
        """In the thread that writes."""
        with locked:
            with self._saving(step):
                write()
            self._whole.add(step)
            if jax.process_index() == 0:
                self._remove_old()

    @contextlib.contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        before = self.steps
        kept = f"the newest checkpoint is still that of step {before[-1]}" if before else "there is no checkpoint yet"
        with one_sentence(
            f"Step {step} could not be saved in {self._directory}", f"{kept}; make room or choose another directory"
        ):
            yield

    def _outcome(self) -> BaseException | None:
        """Wait for what is being written; what went wrong, once."""
        writing, self._writing = self._writing, None
        return None if writing is None else writing.exception()

    def _agree(self, message: str | None) -> list[str | None]:
        """The messages of all processes, if what each of them was writing is written; else the problem of one."""
        problem = self._outcome()
        answers = exchange((None if problem is None else str(problem), message))
        for other, _ in answers:
            if other is not None:
                raise OSError(other) if problem is None else problem
        return [message for _, message in answers]

    def _is_whole(self, step: int) -> bool:
        try:
            check_files(self._at(step), read_content(self._at(step)), digests=step not in self._whole)
        except CorruptCheckpoint:
            return False
        self._whole.add(step)
        return True

    def _first_whole(self, steps: list[int]) -> tuple[int | None, list[str]]:
        """The first step that is whole, and what is wrong with those before it."""
        problems = []
        for step in steps:
            try:
                check_files(self._at(step), read_content(self._at(step)))
            except CorruptCheckpoint as error:
                problems.append(str(error))
            else:
                self._whole.add(step)
                return step, problems
        return None, problems

    def _best_of(self, whole: list[int]) -> int | None:
        scores = {step: read_content(self._at(step))["score"] for step in whole}
        scores = {step: score for step, score in scores.items() if score is not None and not math.isnan(score)}
        return min(scores, key=lambda step: scores[step]) if scores else None

    def _remove_old(self) -> None:
        """All but the newest and the best of those that are whole, and what a killed process left behind."""
        whole = [step for step in self.steps if self._is_whole(step)]
        best = None if self._best is None else self._best_of(whole)
        kept = {*whole[-self._keep :], best}
        for step in filter(lambda step: self._at(step).is_dir(), set(self.steps) - kept):
            # At once, so that a kill leaves no half of one.
            with contextlib.suppress(OSError):
                os.rename(self._at(step), hidden(self._at(step)))
        for entry in entries(self._directory):
            if entry.name.startswith(HIDDEN):
                shutil.rmtree(entry, ignore_errors=True)


def save(path: str | os.PathLike, tree: PyTree) -> None:
    """Save a flow, or any pytree with arrays, as one checkpoint, and wait until it is on the disk.

    **Arguments:** `path`: a directory that is made, or that of an earlier checkpoint, which this one then replaces as a
    whole; `tree`: e.g. `state.ema_flow`.

    **Raises:** `OSError` if it cannot be written, or another process is writing it, and an earlier one is as it was;
    `FileExistsError` if something else is at `path`; `ValueError` if the tree has no arrays.
    """
    path = local_path(path)
    if path.exists() and not (path / FILE).exists():
        raise FileExistsError(f"{path} is there and is no checkpoint: choose another path, or remove it.")

    def locked() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(lock(path.with_name(f".lock-{path.name}"), path))

    with (
        one_sentence(f"{path} could not be saved", "make room or choose another path"),
        contextlib.ExitStack() as stack,
    ):
        of_first(locked)
        begin_writing(path, tree, {})()
    exchange(None)  # nobody goes on before it is there


def load(path: str | os.PathLike, like: _T, *, layout: Layout | None = None) -> _T:
    """What `save` saved.

    **Arguments:** `path`: its directory; `like`: a pytree of the same kind, e.g. the flow before training; its arrays
    may be `jax.ShapeDtypeStruct`s, and say what goes to which devices unless `layout` does, see `sharding`.

    **Raises:** `FileNotFoundError` if there is nothing at `path`; `CorruptCheckpoint` if it is not what was written;
    `ValueError` if it does not fit `like`, naming the first difference.
    """
    path = local_path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no checkpoint at {path}: give the path that flowsolve.checkpoints.save got.")
    try:
        content = read_content(path)
        check_files(path, content)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(f"{error}: put back a copy, or save it anew.") from None
    return read_tree(path, content, like, layout)


def _unmeasured(state: TrainState) -> TrainState:
    """The state without its metrics, whose kinds change; they go into the JSON, where one can read them."""
    return eqx.tree_at(lambda s: s.metrics, state, {})


# --- the position of the data ------------------------------------------------------------------------


def _position(batches: Resumable | None) -> str | None:
    """The position of batches as JSON, in which bytes are {"base64": ...}."""
    if batches is None:
        return None
    if not isinstance(batches, Resumable):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which has no get_state and set_state: pass data.Batches or an "
            "iterator of grain, or leave batches out."
        )

    def encoded(value: Any) -> Any:
        if isinstance(value, bytes):
            return {"base64": base64.b64encode(value).decode()}
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        raise TypeError(f"batches.get_state() gave a {type(value).__name__}, but wants numbers, text and bytes.")

    return json.dumps(batches.get_state(), default=encoded)


def _own_position(content: Mapping[str, Any], path: Path) -> Any:
    """What set_state of this process wants."""
    positions = content["positions"]
    same_processes = len(positions) == jax.process_count()
    if not same_processes and len(set(positions)) > 1:
        raise ValueError(
            f"{path} has the positions of the batches of {len(positions)} processes, which differ, but there are "
            f"{jax.process_count()} processes now: start as many, or leave batches out."
        )
    position = positions[jax.process_index() if same_processes else 0]
    if position is None:
        raise ValueError(f"{path} was saved without batches, so it has no position for them: leave batches out.")

    def decoded(value: dict) -> Any:
        return base64.b64decode(value["base64"]) if value.keys() == {"base64"} else value

    return json.loads(position, object_hook=decoded)
