r"""Noise, data and velocity from one another, as plain functions: what a training loop of your own needs of a path.

On $x_t = \alpha x_0 + \sigma \epsilon$, for ONE example at one time t (batch with `jax.vmap`),

| function | value |
|---|---|
| `add_noise` | $\alpha x_0 + \sigma\epsilon$ |
| `data_from_noise` | $(x_t - \sigma\epsilon)/\alpha$ |
| `noise_from_data` | $(x_t - \alpha x_0)/\sigma$ |
| `data_from_velocity` | $(\sigma' x_t - \sigma v)/(\alpha\sigma' - \alpha'\sigma)$ |
| `velocity_from_data` | $\alpha' x_0 + \sigma' (x_t - \alpha x_0)/\sigma$ |

They compute in float64 where x64 is on and in float32 otherwise, and give back the dtype of the state. Any other pair
of predictions: `predictions.convert`.

    ts = fs.conversions.times_from_list(path, (1.0, 0.75, 0.5, 0.0), num=256, key=key)
    x_t = jax.vmap(fs.conversions.add_noise, (None, 0, 0, 0))(path, ts, x0, noise)
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float

from ._checks import check, check_state, check_type, describe
from ._numerics import as_scalar, as_state
from ._types import PRNGKey, ScalarLike, State
from .paths import AbstractPath
from .predictions import AbstractPrediction, Data, Noise, Velocity, convert
from .times import AbstractTimes, Given

__all__ = [
    "add_noise",
    "data_from_noise",
    "data_from_velocity",
    "noise_from_data",
    "times_from",
    "times_from_list",
    "velocity_from_data",
]


def add_noise(path: AbstractPath, t: ScalarLike, data: State, noise: State) -> State:
    """x_t = alpha data + sigma noise.

    **Arguments:** `path`; `t`: a time of it; `data`, `noise`: one example and its noise, of the same structure and
    shapes.

    **Returns:** the state at t, in the dtypes of `data`.
    """
    _check_alike(path, data, noise)
    return _like(path.interpolate(t, as_state(data), as_state(noise)), data)


def data_from_noise(path: AbstractPath, t: ScalarLike, x_t: State, noise: State) -> State:
    """x_0 = (x_t - sigma noise)/alpha.

    **Arguments:** `path`; `t`: a time of it; `x_t`, `noise`: one example, alike.

    **Raises:** `ValueError` at alpha = 0, where the noise says nothing about the data; inf if t is traced.
    """
    return _convert(path, t, x_t, noise, Noise(), Data())


def data_from_velocity(path: AbstractPath, t: ScalarLike, x_t: State, velocity: State) -> State:
    """x_0 = (sigma' x_t - sigma velocity)/(alpha sigma' - alpha' sigma).

    **Arguments:** `path`; `t`: a time of it; `x_t`, `velocity` = dx_t/dt: one example, alike.

    **Raises:** `ValueError` where alpha' and sigma' are in the proportion of alpha and sigma, so that the velocity says
    nothing about the data; inf if t is traced.
    """
    return _convert(path, t, x_t, velocity, Velocity(), Data())


def noise_from_data(path: AbstractPath, t: ScalarLike, x_t: State, data: State) -> State:
    """eps = (x_t - alpha data)/sigma.

    **Arguments:** `path`; `t`: a time of it; `x_t`, `data`: one example, alike.

    **Raises:** `ValueError` at sigma = 0, where the data say nothing about the noise; inf if t is traced.
    """
    return _convert(path, t, x_t, data, Data(), Noise())


def velocity_from_data(path: AbstractPath, t: ScalarLike, x_t: State, data: State) -> State:
    """dx_t/dt = alpha' data + sigma' (x_t - alpha data)/sigma.

    **Arguments:** `path`; `t`: a time of it; `x_t`, `data`: one example, alike.

    **Raises:** `ValueError` at sigma = 0, as `noise_from_data`.
    """
    return _convert(path, t, x_t, data, Data(), Velocity())


def times_from(path: AbstractPath, times: AbstractTimes, *, num: int, key: PRNGKey) -> Float[Array, " {num}"]:
    """`num` times of a distribution, such as `times.LogitNormal()`, for a batch.

    **Raises:** `TypeError` for what is no distribution, `ValueError` for bounds outside the path or a wrong key.
    """
    check_type(times, AbstractTimes, "times", "an instance such as fs.times.Uniform()")
    return times.sample(path, key, num)


def times_from_list(
    path: AbstractPath, ts: Sequence[ScalarLike] | np.ndarray | Array, *, num: int, key: PRNGKey
) -> Float[Array, " {num}"]:
    """`num` times of a falling list without its last, each as likely as another: the last is the clean end.

    Each example draws for itself: the first m of num are those of a batch of m.

    **Raises:** `ValueError` for times that do not fall or lie outside the path.
    """
    given = Given(ts)
    inside = jax.vmap(path.contains)(given.ts)
    points = check(
        given.ts,
        ~inside,
        f"times_from_list got times outside {type(path).__name__}: take them from t_noise down to t_data, or to the "
        "clean end below it, where sigma = 0.",
    )
    return eqx.tree_at(lambda g: g.ts, given, points).sample(path, key, num)


def _convert(
    path: AbstractPath,
    t: ScalarLike,
    x_t: State,
    given: State,
    source: AbstractPrediction,
    target: AbstractPrediction,
) -> State:
    _check_alike(path, x_t, given)
    return _like(convert(path, as_scalar(t), as_state(x_t), as_state(given), source, target), x_t)


def _like(x: State, like: State) -> State:
    """`x` in the dtypes of `like`."""
    return jax.tree.map(lambda leaf, own: leaf.astype(own.dtype), x, like)


def _check_alike(path: AbstractPath, first: State, second: State) -> None:
    check_type(path, AbstractPath, "path", "an instance such as fs.paths.Linear()")
    check_state(first, "The state")
    check_state(second, "What belongs to it")
    shapes = [jax.tree.map(lambda leaf: leaf.shape, x) for x in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"One example is {describe(first)} and what belongs to it {describe(second)}, but both want the same "
            "structure and shapes."
        )
