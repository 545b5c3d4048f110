r"""Embeddings of what a network is told beside the state: the time and the class.

A time embedding is $(\cos 2\pi f_i t, \sin 2\pi f_i t)_i$ with fixed frequencies $f_i$, in cycles per unit of t. It is
computed in the dtype of t, which stays float32 whatever the network computes in, and holds no arrays: nothing in it
trains, and no weight decay shrinks it. A label embedding is a trained table.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from .._checks import check, check_callable, check_key, is_concrete, known
from .._numerics import as_scalar
from .._types import PRNGKey, Scalar, TimeLike

__all__ = ["FourierEmbedding", "IntervalEmbedding", "LabelEmbedding", "SinusoidalEmbedding"]


def as_times(t: TimeLike) -> Any:
    """A time, or both times of a flow map, as scalars."""
    return (as_scalar(t[0]), as_scalar(t[1])) if isinstance(t, tuple) else as_scalar(t)


def _one_time(t: TimeLike) -> Scalar:
    if isinstance(t, tuple):
        raise ValueError(
            "A network of one time got two, (t, r): build it with time_embedding=fs.nn.IntervalEmbedding(...) for a "
            "flow map."
        )
    return as_scalar(t)


def _check_dim(name: str, dim: int) -> None:
    if dim < 2 or dim % 2:
        raise ValueError(f"{name} got dim = {dim}, but wants an even number >= 2: half cosines, half sines.")


def _cos_sin(frequencies: np.ndarray, t: Scalar) -> Float[Array, " dim"]:
    """(cos 2 pi f t, sin 2 pi f t), one after the other."""
    angles = jnp.asarray(2 * np.pi * frequencies, t.dtype) * t
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


class SinusoidalEmbedding(eqx.Module):
    r"""Sines and cosines of t with periods in geometric progression.

    $$e(t) = (\cos 2\pi f_i t,\ \sin 2\pi f_i t)_{i}, \qquad 1/f_i = p_\max (p_\min/p_\max)^{i/(d/2 - 1)}$$

    The default periods suit a t in [0, 1] as well as the log-ratios of a preconditioner, from about -2 to 2: the
    longest is beyond either range, so that no two times look alike, and the shortest tells times 0.01 apart. Shorter
    periods than the flow needs make it rougher in t, which costs an adaptive solver steps.

    **Arguments:** `dim`: length of the embedding, even; `max_period` and `min_period`: the longest and the shortest
    period, in units of t.

    **Returns:** for a scalar t, an array of shape (dim,) of the dtype of t.

    Source: Vaswani et al. (2017), arXiv 1706.03762, whose positions are 0 to some thousand, with periods
    from 2 pi to 2 pi 10,000; diffusion models multiply t by 1,000 to fit, here the periods are those of t itself.
    """

    dim: int = eqx.field(static=True)
    max_period: float = eqx.field(static=True, default=10.0)
    min_period: float = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        _check_dim("SinusoidalEmbedding", self.dim)
        if not 0 < self.min_period <= self.max_period:
            raise ValueError(
                f"SinusoidalEmbedding got min_period = {self.min_period} and max_period = {self.max_period}, but wants "
                "0 < min_period <= max_period."
            )

    def __call__(self, t: TimeLike) -> Float[Array, " dim"]:
        """The embedding of one time."""
        return _cos_sin(1 / np.geomspace(self.max_period, self.min_period, self.dim // 2), _one_time(t))


class FourierEmbedding(eqx.Module):
    r"""Sines and cosines of t with random frequencies, drawn once and then fixed.

    $$e(t) = \sqrt 2\,(\cos 2\pi f_i t,\ \sin 2\pi f_i t)_{i}, \qquad f_i \sim N(0, \mathrm{scale}^2)$$

    Elements have unit mean square. The frequencies follow from `seed` alone and are no leaves: a gradient, an
    optimiser's weight decay or a moving average cannot touch them, and a saved network finds them again.

    **Arguments:** `dim`: length of the embedding, even; `scale`: standard deviation of the frequencies, in cycles per
    unit of t (16 for EDM's and score-SDE's networks of ln(sigma)/4, 1 for EDM2's); `seed`: picks the frequencies.

    **Returns:** for a scalar t, an array of shape (dim,) of the dtype of t.

    Source: Tancik et al. (2020), arXiv 2006.10739; in diffusion models Song et al. (2020), arXiv 2011.13456.
    """

    dim: int = eqx.field(static=True)
    scale: float = eqx.field(static=True, default=1.0)
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        _check_dim("FourierEmbedding", self.dim)
        if not self.scale > 0:
            raise ValueError(f"FourierEmbedding got scale = {self.scale}, but wants a standard deviation > 0.")

    def __call__(self, t: TimeLike) -> Float[Array, " dim"]:
        """The embedding of one time."""
        # NumPy's legacy generator is frozen for good, where JAX's bits depend on its configuration.
        normal = np.random.RandomState(self.seed).standard_normal(self.dim // 2)
        embedding = _cos_sin(self.scale * normal, _one_time(t))
        return jnp.asarray(np.sqrt(2), embedding.dtype) * embedding


class IntervalEmbedding(eqx.Module):
    """The two times (t, r) of a flow map: the embedding of t, and that of the interval t - r.

        network = fs.nn.ResidualMLP(like, time_embedding=fs.nn.IntervalEmbedding(), key=key)
        flow_map = fs.flowmaps.FlowMap(network, path)

    **Arguments:** `time`, `interval`: embeddings of a number, for t and for t - r.

    **Returns:** for (t, r), or a single t for an interval of 0, both one after the other.

    Source: Geng et al. (2025), arXiv 2505.13447, who found (t, t - r) better than (t, r).
    """

    time: Callable[[Scalar], Array] = SinusoidalEmbedding(64)
    interval: Callable[[Scalar], Array] = SinusoidalEmbedding(64)

    def __check_init__(self):
        for embedding in (self.time, self.interval):
            check_callable(embedding, "IntervalEmbedding got an embedding", "such as SinusoidalEmbedding(64).")

    def __call__(self, t: TimeLike) -> Float[Array, " dim"]:
        """The embedding of (t, r)."""
        t, r = t if isinstance(t, tuple) else (t, t)
        t, r = as_scalar(t), as_scalar(r)
        return jnp.concatenate([self.time(t), self.interval(t - r)])


class LabelEmbedding(eqx.Module):
    """A trained vector per class, and one more for "no class", as classifier-free guidance wants it.

    **Arguments:** `num_classes`: labels run from 0 to num_classes - 1; `dim`: length of the embedding; `null`: whether
    there is the extra label `null_label` = num_classes; `key`: for the initial table, N(0, 1).

    **Returns:** for an integer label, an array of shape (dim,). A label out of range raises where it is concrete and
    gives NaN where it is traced, never another class's vector.

    **Raises:** `TypeError` for a label that is no integer scalar.

    Source: Ho & Salimans (2022), arXiv 2207.12598.
    """

    table: Float[Array, "labels dim"]
    num_classes: int = eqx.field(static=True)
    null: bool = eqx.field(static=True)

    def __init__(self, num_classes: int, dim: int, null: bool = True, *, key: PRNGKey):
        if num_classes < 1 or dim < 1:
            raise ValueError(f"LabelEmbedding got num_classes = {num_classes} and dim = {dim}, but wants both >= 1.")
        key = check_key(key, "LabelEmbedding")
        self.num_classes = num_classes
        self.null = null
        self.table = jax.random.normal(key, (num_classes + null, dim))

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        if not self.null:
            raise ValueError("This LabelEmbedding has no null label: build it with null=True.")
        return self.num_classes

    def __call__(self, label: ArrayLike) -> Float[Array, " dim"]:
        """The embedding of one label."""
        label = jnp.asarray(label)
        if label.shape != () or not jnp.issubdtype(label.dtype, jnp.integer):
            raise TypeError(
                f"A label has shape {label.shape} and dtype {label.dtype}, but wants to be ONE integer: "
                "batch with jax.vmap, and convert one-hot vectors by jnp.argmax."
            )
        if is_concrete(label):
            last = self.table.shape[0] - 1
            given = known(label)
            check(label, (given < 0) | (given > last), f"Label {label} is out of range: labels run from 0 to {last}.")
        # A check inside a compiled network would cost a host callback per evaluation: out of range gives NaN.
        return self.table.at[label].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def time_mlp(time_embedding: Callable[[Scalar], Array], dim: int, owner: str, *, key: PRNGKey) -> eqx.nn.MLP:
    """Two layers from the embedding of the time to `dim` numbers; raise if it is not an array with one axis."""
    shape = jax.eval_shape(time_embedding, as_scalar(0.0)).shape
    if len(shape) != 1:
        raise ValueError(
            f"{owner} got a time_embedding of shape {shape}, but wants an array with one axis: "
            "SinusoidalEmbedding(64), or lambda t: t[None]."
        )
    return eqx.nn.MLP(shape[0], dim, dim, depth=1, activation=jax.nn.silu, key=key)


def null_label_of(embedding: LabelEmbedding | None, owner: str) -> int:
    """The label that stands for no class in the network called `owner`; raises if that has no labels."""
    if embedding is None:
        raise ValueError(f"This {owner} has no labels: build it with num_classes.")
    return embedding.null_label
