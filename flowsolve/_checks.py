"""Checks of a user's input: one sentence that says what was given, what was wanted, what to do.

A concrete value is checked in Python and raises a plain `ValueError`; inside a transformation the same
check becomes `eqx.error_if`, whose returned value must be used. `checked` runs many of them at once.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state, take_current_trace
from jaxtyping import Array, Bool, PyTree

from ._types import Like, PRNGKey, Scalar

_T = TypeVar("_T")


def is_concrete(tree: object) -> bool:
    """Whether no leaf of `tree` is being traced."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def known(value: Any) -> Any:
    """`value` as NumPy has it unless it is being traced: comparing it then compiles nothing."""
    return np.asarray(value) if is_concrete(value) else value


def check(value: _T, bad: bool | np.bool_ | Bool[np.ndarray | Array, "..."], message: str, *numbers: Scalar) -> _T:
    """Return `value`; raise `message` if any of `bad` holds (at run time where it is traced).

    With `numbers` the message is a format string for them.
    """
    if is_concrete(bad):
        if bool(np.any(np.asarray(bad))):
            raise ValueError(_filled(message, numbers))
        return value
    checks = _CHECKS.found()
    if checks is not None:
        checks.append((jnp.any(bad), message, numbers))
        return value
    return eqx.error_if(value, bad, _filled(message, numbers))


def checked(function: Callable[..., _T], *arguments: Any) -> _T:
    """function(*arguments) as one compiled program, after which its checks raise.

    Where all arguments are known so is the answer, also while something else is traced: then a check raises in Python.
    What is no array in arguments and answer is static, so that a changing number must be an array.
    """
    concrete = is_concrete(arguments)
    program = _collected_once() if concrete else _collected_while_tracing
    with take_current_trace() if concrete else contextlib.nullcontext():
        value, bad, numbers, messages = program(function, arguments)
    if not messages:
        return value
    if not concrete:
        texts = [_filled(message, row) for message, row in zip(messages, numbers, strict=True)]
        return eqx.branched_error_if(value, jnp.any(bad), jnp.argmax(bad), texts)
    failed = np.flatnonzero(np.asarray(bad))
    if failed.size:
        raise ValueError(_filled(messages[failed[0]], numbers[failed[0]]))
    return value


class Collector:
    """What a function that is being traced hands out beside its value, in the order in which it comes."""

    def __init__(self):
        self._local = threading.local()

    def collect(self, function: Callable[[], _T]) -> tuple[_T, list[Any]]:
        """function() and what was put into `found()` meanwhile."""
        before = getattr(self._local, "open", None)
        self._local.open = _, found = get_opaque_trace_state(convention="flax"), []
        try:
            return function(), found
        finally:
            self._local.open = before

    def found(self) -> list[Any] | None:
        """The list to put into; None outside of `collect`.

        None as well where a transformation inside the function traces: what that traces cannot leave it as a value.
        """
        trace, found = getattr(self._local, "open", None) or (None, None)
        return found if trace == get_opaque_trace_state(convention="flax") else None


#: (Whether it failed, its message, the numbers of that) of each check.
_CHECKS = Collector()


def _collected(function: Callable[..., Any], arguments: Any) -> Any:
    """(value, whether each check failed, the numbers of its message, its message)."""
    value, checks = _CHECKS.collect(lambda: function(*arguments))
    bad = [check[0] for check in checks]
    messages = tuple(check[1] for check in checks)
    return value, jnp.stack(bad) if bad else None, [check[2] for check in checks], messages


_collected_while_tracing = eqx.filter_jit(_collected)


@functools.cache
def _collected_once() -> Callable[..., Any]:
    """The same for a run by itself, which takes microseconds: compiled with the options that make compiling quick."""
    options: dict[str, Any] = {}
    for name, value in _QUICK_TO_COMPILE.get(jax.default_backend(), {}).items():
        # What XLA calls them changes; one that it does not know is an error.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda x: x, compiler_options={name: value}).lower(np.zeros(())).compile()
            options[name] = value
    return eqx.filter_jit(_collected, compiler_options=options)  # pyright: ignore[reportCallIssue]


_QUICK_TO_COMPILE = {
    "cpu": {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
}


def _filled(message: str, numbers: tuple[Scalar, ...]) -> str:
    if not numbers:
        return message
    shown = [f"{float(number):g}" if is_concrete(number) else "a traced value" for number in numbers]
    return message.format(*shown)


def check_count(count: Any, what: str, *, least: int = 1, most: int | None = None) -> int:
    """`count` as an int; raise unless it is an integer, at least `least` and at most `most`."""
    integer = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if not integer or count < least or (most is not None and count > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{what} = {count!r}, but wants an integer {span}.")
    return int(count)


def check_positive(owner: eqx.Module, *names: str) -> None:
    """Raise unless the fields of these names are positive and finite, where they are known."""
    for name in names:
        value = getattr(owner, name)
        if is_concrete(value) and not 0 < float(value) < math.inf:
            raise ValueError(f"{type(owner).__name__} got {name} = {float(value):g}, but wants it positive and finite.")


def check_type(value: object, wanted: type, name: str, example: str) -> None:
    """Raise unless `value` is an instance of `wanted`; a class given in its place is named."""
    if not isinstance(value, wanted):
        given = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {given}, but wants {example}.")


def check_callable(value: object, what: str, wanted: str) -> None:
    """Raise unless `value` is callable."""
    if not callable(value):
        raise TypeError(f"{what} of type {type(value).__name__}, but wants a callable {wanted}")


def check_state(x: Like, name: str) -> None:
    """Raise unless `x` is a non-empty pytree of floating-point arrays (or their shapes)."""
    leaves = jax.tree.leaves(x)
    if not leaves:
        raise ValueError(f"{name} has no arrays: give one example, a pytree of floating-point arrays.")
    for leaf in leaves:
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(f"{name} holds a {type(leaf).__name__}, but wants arrays: wrap it in jnp.asarray.")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{name} has dtype {leaf.dtype}, but a state must be floating point: "
                "convert it, e.g. x.astype(jnp.float32)."
            )


def check_batch(args: PyTree, num: int) -> None:
    """Raise unless every array of `args` has a leading axis of length `num`."""
    for leaf in jax.tree.leaves(eqx.filter(args, eqx.is_array_like)):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != num:
            raise ValueError(
                f"args holds {describe(leaf)} for num = {num} samples, but wants a leading axis of length {num}: one "
                "entry an example (repeat what they share)."
            )


def check_key(key: PRNGKey | None, why: str) -> PRNGKey:
    """Return `key`, or raise if it is missing or not one typed key."""
    if key is None:
        raise ValueError(f"key is missing: {why} draws random numbers; pass key=jax.random.key(seed).")
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"key is {type(key).__name__} of dtype {dtype}, but a typed key is wanted: "
            "use jax.random.key(seed), or jax.random.wrap_key_data for an old raw key."
        )
    if key.shape != ():
        raise ValueError(f"key has shape {key.shape}, but one key is wanted, of shape ().")
    return key


def describe(tree: Like) -> str:
    """The shapes and dtypes of a pytree in one line, for messages."""

    def leaf_text(leaf: object) -> str:
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            return f"{leaf.dtype.name}{list(leaf.shape)}"  # pyright: ignore
        return type(leaf).__name__

    return str(jax.tree.map(leaf_text, tree)).replace("'", "")
