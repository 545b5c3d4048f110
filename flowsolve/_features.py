"""What a network hands out beside its output, to a loss that asks for it while it evaluates one example.

A network computes more than it returns: hidden tokens, or what a head makes of them. Through `hand_out` they reach the
loss, at the same level of tracing, without a place in any signature between the two. Where nobody asks, nothing is
computed.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jaxtyping import PyTree

from ._checks import Collector

_T = TypeVar("_T")

_FEATURES = Collector()


def hand_out(features: Callable[[], PyTree]) -> None:
    """Give features() to whoever asks around this call; it is not called where nobody does."""
    found = _FEATURES.found()
    if found is not None:
        found.append(features())


def with_features(function: Callable[[], _T]) -> tuple[_T, tuple[PyTree, ...]]:
    """function(), and what was handed out in it, in order."""
    value, found = _FEATURES.collect(function)
    return value, tuple(found)


def without_features(function: Callable[[], _T]) -> _T:
    """function(), of which nothing is handed out further: an evaluation that is not trained."""
    return with_features(function)[0]


def jvp(function: Callable[..., _T], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[_T, _T]:
    """`jax.jvp`, which hands on what is handed out in it: a derivative is a level of tracing of its own."""

    def with_theirs(*primals: Any) -> tuple[_T, tuple[PyTree, ...]]:
        return with_features(lambda: function(*primals))

    value, tangent, features = jax.jvp(with_theirs, primals, tangents, has_aux=True)
    for feature in features:
        hand_out(lambda feature=feature: feature)
    return value, tangent
