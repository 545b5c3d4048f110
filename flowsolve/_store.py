"""One tree of arrays in one directory: written whole or not at all, and compared with its digests before it is read.

See `checkpoints`, which is for users.
"""

import contextlib
import dataclasses
import fcntl
import functools
import gc
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .sharding import Layout

_T = TypeVar("_T")


class CorruptCheckpoint(ValueError):
    """A file of a checkpoint is missing, or is not what was written."""


#: The file that makes a directory a checkpoint.
FILE = "checkpoint.json"
#: What the name of a directory begins with that is not yet, or no longer, a checkpoint.
HIDDEN = ".incomplete-"
#: What Python raises for a file that is not there, or for a directory in its place, or a file in its directory's.
_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
#: The two places for arrays in the directory of a checkpoint, so that one can replace another.
_PLACES = ("a", "b")


def begin_writing(target: Path, tree: PyTree, facts: Mapping[str, Any]) -> Callable[[], None]:
    """Copy the arrays of a tree off the devices; returns the writing, which may run in another thread."""
    orbax = import_orbax()
    arrays = {name: leaf for name, leaf in _by_name(tree).items() if isinstance(leaf, jax.Array | np.ndarray)}
    # Orbax does not store arrays without elements.
    stored = {name: _own(_data(leaf)) for name, leaf in arrays.items() if leaf.size}
    if not stored:
        raise ValueError(f"There is nothing to save at {target}: the tree has no arrays.")
    content = {
        "format": 1,
        **facts,
        "arrays": {name: str(jax.random.key_impl(leaf)) if _is_key(leaf) else None for name, leaf in arrays.items()},
        "structure": _description(tree),
        "versions": {"jax": jax.__version__, "orbax-checkpoint": orbax.__version__},
    }
    first = jax.process_index() == 0
    directory, used = of_first(lambda: _prepared(target))
    directory, place = Path(directory), next(name for name in _PLACES if name != used)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_orbax_silent())
        checkpointer = orbax.AsyncCheckpointer(orbax.PyTreeCheckpointHandler())
        stack.callback(checkpointer.close)
        checkpointer.save(directory / place, args=orbax.args.PyTreeSave(stored))
        open_until_written = stack.pop_all()

    def write() -> None:
        kept = used
        try:
            with open_until_written:
                checkpointer.wait_until_finished()
            if first:
                _replace_file(directory / FILE, _text(content | {"place": place, "files": _files(directory / place)}))
                kept = place
                if directory != target:
                    shutil.rmtree(target, ignore_errors=True)  # a corrupt one, if any
                    os.rename(directory, target)
                _to_disk(target.parent)
        finally:
            # After a failure this makes room on a full disk; after a success it removes what was replaced.
            if first:
                _clear(target if kept == place else directory, kept)

    return write


def _prepared(target: Path) -> tuple[str, str | None]:
    """The directory to write into, made, and which place in it is in use."""
    used = None
    with contextlib.suppress(CorruptCheckpoint):
        used = read_content(target)["place"]
    directory = hidden(target) if used is None else target
    _clear(directory, used)
    directory.mkdir(parents=True, exist_ok=True)
    return str(directory), used


def read_tree(path: Path, content: Mapping[str, Any], like: _T, layout: Layout | None) -> _T:
    """The tree of a checkpoint that has been checked."""
    orbax = import_orbax()
    _check_fits(path, content["structure"], _description(like))
    shardings = {} if layout is None else _by_name(layout.shardings(like))
    leaves = {name: leaf for name, leaf in _by_name(like).items() if name in content["arrays"]}
    targets, arguments = {}, {}
    for name, leaf in leaves.items():
        data = _data(leaf)
        if data.size:
            sharding = shardings.get(name, _sharding(data))
            targets[name] = jax.ShapeDtypeStruct(data.shape, data.dtype)
            # Without a sharding it comes as NumPy's, of which JAX makes an array that is not bound to a device.
            arguments[name] = (
                orbax.RestoreArgs(restore_type=np.ndarray, dtype=data.dtype)
                if sharding is None
                else orbax.ArrayRestoreArgs(sharding=sharding, global_shape=data.shape, dtype=data.dtype)
            )
    checkpointer = orbax.Checkpointer(orbax.PyTreeCheckpointHandler())
    restored = checkpointer.restore(
        path / content["place"], args=orbax.args.PyTreeRestore(targets, restore_args=arguments)
    )
    checkpointer.close()

    def final(location: tuple, leaf: Any) -> Any:
        name = jax.tree_util.keystr(location)
        if name not in leaves:
            return leaf
        data = restored[name] if name in restored else np.zeros(_data(leaf).shape, _data(leaf).dtype)
        if isinstance(leaf, np.ndarray):
            return np.asarray(data)
        data = data if isinstance(data, jax.Array) else jnp.array(data)
        return jax.random.wrap_key_data(data, impl=content["arrays"][name]) if _is_key(leaf) else data

    return jax.tree_util.tree_map_with_path(final, like)


def read_content(path: Path) -> dict[str, Any]:
    """What the file of a checkpoint says."""
    try:
        text = (path / FILE).read_text(encoding="utf-8")
        content = json.loads(text)["content"]
        # The file must be, to the letter, what is written for its content, the digest of which it holds.
        intact = _text(content) == text
    except _NO_FILE:
        raise CorruptCheckpoint(f"{path} is corrupt, its {FILE} is missing") from None
    except (ValueError, KeyError, TypeError):
        intact, content = False, {}
    if not intact:
        raise CorruptCheckpoint(f"{path} is corrupt, its {FILE} is not what was written")
    if content["format"] != 1:
        raise ValueError(f"{path} is a checkpoint of a later version of flowsolve: update flowsolve to load it.")
    return content


def _text(content: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
    return json.dumps({"digest": digest, "content": content}, indent=1) + "\n"


def check_files(path: Path, content: Mapping[str, Any], *, digests: bool = True) -> None:
    """Raise unless every file is there, of its size and, with `digests`, of its digest."""
    for name, (size, digest) in content["files"].items():
        file = path / content["place"] / name
        try:
            problem = (
                f"has {file.stat().st_size} bytes instead of {size}"
                if file.stat().st_size != size
                else "is not what was written"
                if digests and _digest(file) != digest
                else None
            )
        except _NO_FILE:
            problem = "is missing"
        if problem:
            raise CorruptCheckpoint(f"{path} is corrupt, its {content['place']}/{name} {problem}")


def _files(path: Path) -> dict[str, tuple[int, str]]:
    """Size and digest of every file below a directory, all of which are then on the disk."""
    found = {}
    for entry in sorted(path.rglob("*")):
        if entry.is_file():
            found[entry.relative_to(path).as_posix()] = entry.stat().st_size, _digest(entry)
        _to_disk(entry)
    _to_disk(path)
    return found


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, functools.partial(hashlib.blake2b, digest_size=16)).hexdigest()


def _clear(path: Path, used: str | None) -> None:
    """Remove what is not in use from the directory of a checkpoint, all of it if nothing is."""
    for entry in entries(path):
        if entry.name != used and entry.name.split(".")[0] in _PLACES:
            shutil.rmtree(entry, ignore_errors=True)
    if used is None:
        shutil.rmtree(path, ignore_errors=True)


def _replace_file(file: Path, text: str) -> None:
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    _to_disk(new)
    os.replace(new, file)
    _to_disk(file.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


#: Descriptors of the locked files of this process.
_LOCKS: set[int] = set()


def lock(file: Path, target: Path) -> Callable[[], None]:
    """Make a file and lock it while `target` is written; returns what removes it again. Raise if it is locked.

    The kernel lets go of the lock when the process ends, in whatever way, and a file that nobody has locked keeps
    nobody out. Nor does any on a file system without locks.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OSError(
                f"{target} is being written by another run, which has locked {file}: wait until that has ended, or "
                "choose another place."
            ) from None
        except OSError:
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        os.close(descriptor)  # of a file that its holder has removed meanwhile
    _LOCKS.add(descriptor)

    def release() -> None:
        if descriptor in _LOCKS:  # not in a fork
            _LOCKS.remove(descriptor)
            with contextlib.suppress(OSError):
                file.unlink()
            os.close(descriptor)

    return release


def _close_locks() -> None:
    """In a fork, which would otherwise hold the locks after the process that took them is gone."""
    while _LOCKS:
        os.close(_LOCKS.pop())


os.register_at_fork(after_in_child=_close_locks)


def hidden(path: Path) -> Path:
    """Where a checkpoint is while it is not, or no longer, one."""
    return path.with_name(HIDDEN + path.name)


def entries(path: Path) -> list[Path]:
    """What is in a directory; nothing if there is none, and an error if something else is there."""
    try:
        return list(path.iterdir())
    except FileNotFoundError:
        return []


def local_path(path: str | os.PathLike) -> Path:
    """An absolute path, which Orbax wants; raise for an address, which as a path would be another place."""
    if "://" in os.fspath(path):
        raise ValueError(
            f"{os.fspath(path)} is an address, but checkpoints want a directory of this machine: mount the storage."
        )
    return Path(path).absolute()


# --- the tree: arrays by name, and a description of all else -----------------------------------------


def _by_name(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by name, such as ".flow.network.layers[0].weight"."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: Any) -> Any:
    """The array itself, or the numbers of typed keys."""
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def _own(leaf: Any) -> Any:
    """With several processes an array that each of them has by itself is saved by the first, as NumPy's are."""
    alone = jax.process_count() > 1 and isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    return np.asarray(leaf) if alone else leaf


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where an array is bound to; None if it is nowhere in particular."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    return getattr(leaf, "sharding", None)


def _description(tree: PyTree) -> dict[str, str]:
    """Name -> what is there, for a tree, its nodes, its leaves and its static fields.

    Functions and other objects go by their names: nothing in it changes from one process, or one file of code, to
    another.
    """
    found: dict[str, str] = {}

    def walk(name: str, value: Any) -> None:
        kind = type(value).__name__
        if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            found[name] = f"{value.dtype}{list(value.shape)}"
        elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
            found[name] = repr(value)
        elif isinstance(value, np.generic):
            found[name] = f"{value.dtype} {value.item()!r}"
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            found[name] = kind
            for field in dataclasses.fields(value):
                walk(f"{name}.{field.name}", getattr(value, field.name, None))
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            found[name] = kind
            for field in value._fields:  # pyright: ignore[reportAttributeAccessIssue]
                walk(f"{name}.{field}", getattr(value, field))
        elif isinstance(value, list | tuple):
            found[name] = f"{kind} of {len(value)}"
            for index, item in enumerate(value):
                walk(f"{name}[{index}]", item)
        elif isinstance(value, Mapping):
            found[name] = f"{kind} of {len(value)}"
            for key in sorted(value, key=str):
                walk(f"{name}[{key!r}]", value[key])
        elif isinstance(value, functools.partial):
            found[name] = kind
            walk(f"{name}.func", value.func)
            walk(f"{name}.args", value.args)
            walk(f"{name}.keywords", value.keywords)
        else:
            children, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda node: node is not value)
            parts = {jax.tree_util.keystr(path): child for path, child in children if path}
            found[name] = kind if parts or not hasattr(value, "__name__") else value.__name__
            for part, child in parts.items():
                walk(name + part, child)

    walk("", tree)
    return found


def _check_fits(path: Path, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for name in [*wanted, *stored]:
        if stored.get(name) != wanted.get(name):
            there, here = (found.get(name, "nothing") for found in (stored, wanted))
            raise ValueError(
                f"{path} does not fit: {name or 'it'} is {there} there, but {here} in `like`: build `like` as what was "
                "saved was built."
            )


# --- several processes, and Orbax ----------------------------------------------------------------------


def exchange(message: Any) -> list[Any]:
    """The messages of all processes, which JSON holds, by process; all of them must come here."""
    if jax.process_count() == 1:
        return [message]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(message).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(data.size, np.int32))
    padded = np.zeros(np.max(lengths), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths, strict=True)]


def of_first(function: Callable[[], Any]) -> Any:
    """What a function gives in the first process, in all of them, or the `OSError` that it raises there."""

    def answer() -> tuple[Any, tuple[int | None, str] | None]:
        try:
            return function(), None
        except OSError as error:
            return None, (error.errno, error.strerror or str(error))

    value, problem = exchange(answer() if jax.process_index() == 0 else None)[0]
    if problem is not None:
        number, text = problem
        raise OSError(text) if number is None else OSError(number, text)
    return value


def import_orbax() -> Any:
    """`orbax.checkpoint`; raise one sentence if it is not installed."""
    try:
        import orbax.checkpoint as orbax
    except ImportError as error:
        raise ImportError(
            'Checkpoints are written with orbax-checkpoint, which is not installed: pip install "flowsolve[train]".'
        ) from error
    return orbax


@contextlib.contextmanager
def _orbax_silent() -> Iterator[None]:
    """What is said of a failure below, with the traceback of each thread, is in the one sentence as well.

    Orbax logs it, and leaves the arrays that it was writing beside the one that failed: TensorStore then reports them
    to an event loop that is closed, which Python prints, and asyncio logs the errors that nobody asked for.
    """

    before = sys.unraisablehook

    def foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in f"{record.pathname} {record.getMessage()}"

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(foreign)
    sys.unraisablehook = hook
    try:
        yield
    except Exception as error:
        # What was under way is abandoned by Orbax: let it end, and be freed, before anybody listens again.
        time.sleep(0.5)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            traceback.clear_frames(error.__traceback__)
            gc.collect()
        raise
    finally:
        for logger in loggers:
            logger.removeFilter(foreign)
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


@contextlib.contextmanager
def one_sentence(what: str, advice: str) -> Iterator[None]:
    """What the operating system refuses, to Python or to TensorStore, as an `OSError` of one sentence."""
    try:
        yield
    except Exception as error:
        stated = re.search(r"os_error_code='(\d+)'", str(error))
        code = error.errno if isinstance(error, OSError) else int(stated[1]) if stated else None
        if code is None:
            raise
        raise OSError(f"{what} ({os.strerror(code)}): {advice}.") from None
