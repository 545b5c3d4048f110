"""Type aliases shared by every module.

`State` is one example: any pytree of floating-point arrays. `Scalar` is a float32 scalar array
(float64 under x64), `ScalarLike` anything that becomes one. `TimeLike` is what a network is told of the time: t, or
the two times (t, r) of a flow map.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Float, Key, PyTree, Real

Scalar: TypeAlias = Float[Array, ""]
ScalarLike: TypeAlias = float | int | np.number | Real[Array, ""] | Real[np.ndarray, ""]
TimeLike: TypeAlias = ScalarLike | tuple[ScalarLike, ScalarLike]
State: TypeAlias = PyTree[Float[Array, "..."]]
Like: TypeAlias = PyTree
Args: TypeAlias = Any
PRNGKey: TypeAlias = Key[Array, ""]
Network: TypeAlias = Callable[..., State]
