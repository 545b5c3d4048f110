r"""What all losses share: a batch of examples, of which each gets its time, its noise, its key and its condition.

The loss of a batch is $\sum_i w_i\, \mathrm{loss}_i / \sum_i w_i$ over its examples, with
$\mathrm{loss}_i$ a mean over the elements of one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Real

from .._checks import check, check_key, check_state, check_type, describe, known
from .._features import with_features
from .._numerics import as_scalar
from .._types import Args, Like, PRNGKey, Scalar, ScalarLike, State
from ..couplings import AbstractCoupling, Independent, Pairs
from ..paths import AbstractPath
from ..times import AbstractTimePairs, AbstractTimes

__all__ = ["Aux", "ConditionDropout"]


class Aux(NamedTuple):
    """What a batch's loss is made of.

    - `losses`: the loss of each example, before the mean over them; 0 for one that is masked out;
    - `t`: the time of each example;
    - `weights`: the weight of each example in that mean, None for equal ones;
    - `features`: what the network handed out beside its output (`nn.Features`), an entry an evaluation, each with a
      leading batch axis.
    """

    losses: Float[Array, " batch"]
    t: Float[Array, " batch"]
    weights: Float[Array, " batch"] | None = None
    features: tuple[PyTree, ...] = ()


class ConditionDropout(eqx.Module):
    """The null condition in place of an example's own, now and then: training for classifier-free guidance.

    Each example is drawn for by itself, by the key of the batch and its index; all arrays of its condition go together.

    **Arguments:** `probability`: of the null, from 0 to 1; `null`: the `args` of ONE example that stand for no
    condition, shaped as those of the others.

    **Raises:** `ValueError` for a probability outside of [0, 1], a null without arrays and, when it is called, for
    `args` that are not like it.

    Source: Ho & Salimans (2022), arXiv 2207.12598.
    """

    probability: Scalar
    null: Args

    def __init__(self, probability: ScalarLike, null: Args):
        probability = as_scalar(probability)
        chance = known(probability)
        self.probability = check(
            probability,
            ~((chance >= 0) & (chance <= 1)),
            "ConditionDropout got probability = {}, but wants one from 0 to 1.",
            probability,
        )
        self.null = as_null(null, "ConditionDropout")

    def __call__(self, key: PRNGKey, args: Args) -> Args:
        """The condition of one example, or the null."""
        check_like_null(args, self.null, "ConditionDropout")
        drop = jax.random.bernoulli(key, self.probability)
        return jax.tree.map(lambda null, own: jnp.where(drop, null, own), self.null, args)


def as_null(null: Args, owner: str) -> Args:
    """A null condition as arrays; raise if it has none."""
    if not jax.tree.leaves(null):
        raise ValueError(
            f"{owner} got a null condition without arrays, but wants the args of one example that stand for no "
            "condition, e.g. jnp.asarray(num_classes)."
        )
    return jax.tree.map(jnp.asarray, null)


def check_like_null(args: Args, null: Args, owner: str) -> None:
    """Raise unless the args of one example are like the null condition of `owner`."""
    if describe(jax.tree.map(jnp.asarray, args)) != describe(null):
        raise ValueError(
            f"The args of one example are {describe(args)}, but the null of {owner} is {describe(null)}: give both the "
            "same structure, shapes and dtypes."
        )


def check_pairing(coupling: AbstractCoupling, dropout: ConditionDropout | None) -> None:
    """Raise unless a loss's coupling and dropout are of their kinds."""
    check_type(coupling, AbstractCoupling, "coupling", "an instance such as fs.couplings.Assignment()")
    check_dropout(dropout)


def check_dropout(dropout: ConditionDropout | None) -> None:
    """Raise unless a loss's dropout is of its kind."""
    if dropout is not None:
        check_type(dropout, ConditionDropout, "dropout", "None or a fs.losses.ConditionDropout(0.1, null)")


def over_batch(
    one: Callable[[State, State, Args, Any, PRNGKey, PyTree | None], Scalar],
    path: AbstractPath,
    times: AbstractTimes | AbstractTimePairs,
    coupling: AbstractCoupling,
    draw: Callable[[PRNGKey, Like], State],
    x0: State | Pairs,
    args: Args,
    *,
    key: PRNGKey,
    example_weight: Real[Array, " batch"] | None,
    mask: PyTree[Bool[Array, "..."]] | None,
    dropout: ConditionDropout | None,
) -> tuple[Scalar, Aux]:
    """The weighted mean over a batch of one(x0, noise, args, t, key, mask), and its terms; t is (t, r) from pairs."""
    key = check_key(key, "a training loss")
    x0, args, mask = _without_numpy((x0, args, mask))
    num = batch_size(x0)
    check_batch_axis(args, num)
    x0 = jax.tree.map(_at_least_float32, x0)
    x0, given = (x0.data, x0.noise) if isinstance(x0, Pairs) else (x0, None)
    mask = _mask_like(mask, x0, num)

    key_times, key_examples = jax.random.split(key)
    t = times.sample(path, key_times, num)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key_examples, i)))(jnp.arange(num))
    noise = jax.vmap(draw)(keys[:, 0], x0) if given is None else given
    if not isinstance(coupling, Independent):
        noise = coupling(jax.random.fold_in(key_times, 1), x0, noise, args)
    if dropout is not None:
        key_dropout = jax.random.fold_in(key_times, 2)
        dropped = eqx.filter_vmap(lambda i, args: dropout(jax.random.fold_in(key_dropout, i), args))
        args = dropped(jnp.arange(num), args)
    losses, features = eqx.filter_vmap(lambda *example: with_features(lambda: one(*example)))(
        x0, noise, args, t, keys[:, 1], mask
    )

    weights = _example_weights(example_weight, mask, num, losses.dtype)
    total = jnp.sum(weights)
    value = jnp.sum(weights * losses) / jnp.where(total == 0, 1, total)
    return value, Aux(losses, t[0] if isinstance(t, tuple) else t, weights, features)


def where_finite(scale: Scalar, loss: Scalar) -> Scalar:
    # An infinite scale times an error of 0 is NaN; the loss is infinite there.
    return jnp.where(jnp.isinf(scale), jnp.inf, loss)


def mean_of(
    elementwise: Callable[[Array], Array], scale: Scalar, error: State, mask: PyTree[Bool[Array, "..."]] | None
) -> Scalar:
    """The mean of elementwise(scale * error) over the elements of all leaves that count."""
    errors = jax.tree.leaves(error)
    masks = [jnp.ones(e.shape, bool) for e in errors] if mask is None else jax.tree.leaves(mask)
    total, count = jnp.zeros_like(scale), jnp.zeros_like(scale)
    for e, counts in zip(errors, masks, strict=True):
        # Masked before the loss: its derivative there is not asked for.
        terms = elementwise(scale.astype(e.dtype) * jnp.where(counts, e, 0))
        total = total + jnp.sum(jnp.where(counts, terms, 0)).astype(scale.dtype)
        count = count + jnp.sum(counts).astype(scale.dtype)
    return total / jnp.maximum(count, 1)


def _without_numpy(tree: PyTree) -> PyTree:
    """NumPy arrays as JAX arrays, so that they too are mapped over."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, tree)


def _at_least_float32(leaf: Array) -> Array:
    return leaf if jnp.finfo(leaf.dtype).bits >= 32 else leaf.astype(jnp.float32)


def batch_size(x0: State) -> int:
    """The length of the leading axis of all leaves of a batch of examples."""
    check_state(x0, "x0")
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(x0)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            f"x0 is {describe(x0)}, but wants a batch: one leading axis of the same length on every array."
        )
    num = jax.tree.leaves(x0)[0].shape[0]
    if num == 0:
        raise ValueError("x0 is an empty batch, but a loss wants at least one example.")
    return num


def check_batch_axis(args: Args, num: int) -> None:
    leaves = [leaf for leaf in jax.tree.leaves(args) if eqx.is_array(leaf)]
    if any(leaf.shape[:1] != (num,) for leaf in leaves):
        raise ValueError(
            f"args is {describe(args)}, but x0 has {num} examples: give every array of args a leading axis of {num}."
        )


def _mask_like(mask: PyTree | None, x0: State, num: int) -> PyTree | None:
    """`mask` as booleans of the structure and shapes of `x0`."""
    if mask is None:
        return None
    if not all(eqx.is_array(leaf) and leaf.dtype == jnp.bool_ for leaf in jax.tree.leaves(mask)):
        raise TypeError(
            f"mask is {describe(mask)}, but wants booleans, True where an element counts: compare it with 0."
        )
    if eqx.is_array(mask) and mask.shape == (num,):

        def spread(leaf: Array) -> Array:
            return jnp.broadcast_to(mask.reshape((num,) + (1,) * (leaf.ndim - 1)), leaf.shape)

        return jax.tree.map(spread, x0)
    like_x0 = jax.tree.structure(mask) == jax.tree.structure(x0) and all(
        m.shape == x.shape for m, x in zip(jax.tree.leaves(mask), jax.tree.leaves(x0), strict=True)
    )
    if not like_x0:
        raise ValueError(
            f"mask is {describe(mask)}, but wants booleans like x0, which is {describe(x0)}, or "
            f"[{num}] of them for whole examples."
        )
    return mask


def _example_weights(
    example_weight: Array | None, mask: PyTree | None, num: int, dtype: np.dtype
) -> Float[Array, " {num}"]:
    """The weight of each example in the mean: 0 for one without elements that count."""
    if example_weight is None:
        weights = jnp.ones((num,), dtype)
    else:
        weights = jnp.asarray(example_weight).astype(dtype)
        weights = check(
            weights,
            ~(known(weights) >= 0),
            "example_weight has a negative number or NaN, but wants weights >= 0: leave an example out with 0.",
        )
    if weights.shape != (num,):
        raise ValueError(f"example_weight has shape {list(weights.shape)}, but wants one number per example: [{num}].")
    if mask is None:
        return weights
    counts = [jnp.any(leaf.reshape(num, -1), axis=1) for leaf in jax.tree.leaves(mask)]
    return jnp.where(jnp.any(jnp.stack(counts), axis=0), weights, 0)
