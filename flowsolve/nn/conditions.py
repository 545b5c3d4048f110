"""What a network is told beside time and state: a label, a context of tokens, or both.

Every network for images is called as `network(t, x, args)`, with `args` None for nothing, an integer for a label, or a
`Condition`. Nothing said is said in one way: no label is the null label, and no context is a context of which no
token exists. So `guidance.ClassifierFree(flow, scale, null=network.null(condition))` works for each of them, and a loss
that drops conditions at random puts the same in their place.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from .._checks import describe
from .embeddings import LabelEmbedding

__all__ = ["Condition"]


class Condition(eqx.Module):
    """A label and a context, either of them or both, of one example or with a leading axis of a batch.

    **Arguments:**

    - `label`: an integer of shape (), or None;
    - `context`: embedded text or any other sequence, of shape (tokens, width), or None;
    - `mask`: which tokens of the context exist, bools of shape (tokens,); all by default. What a token that does not
      exist holds is not seen.

    **Raises:** `ValueError` for a mask without a context or of another length, `TypeError` for one of numbers.
    """

    label: Int[Array, "..."] | None
    context: Float[Array, "... tokens width"] | None
    mask: Bool[Array, "... tokens"] | None

    def __init__(
        self,
        label: ArrayLike | None = None,
        context: Float[ArrayLike, "... tokens width"] | None = None,
        mask: Bool[ArrayLike, "..."] | None = None,
    ):
        self.label = None if label is None else jnp.asarray(label)
        self.context = None if context is None else jnp.asarray(context)
        if self.context is not None and mask is None:
            mask = jnp.ones(self.context.shape[:-1], bool)
        self.mask = None if mask is None else jnp.asarray(mask)
        if self.mask is not None and self.mask.dtype != bool:
            raise TypeError(
                f"Condition got a mask of {describe(self.mask)}, but wants bools, True where a token exists: compare "
                "it with 0."
            )
        tokens = None if self.context is None else self.context.shape[:-1]
        if self.mask is not None and self.mask.shape != tokens:
            raise ValueError(
                f"Condition got a mask of {describe(self.mask)} for a context of {describe(self.context)}, but wants a "
                "bool for each of its tokens."
            )


def as_condition(
    args: object, labels: LabelEmbedding | None, context_dim: int | None, owner: str, option: str = "context_dim"
) -> Condition:
    """`args` as the condition of one example, with a label and a context exactly where the network takes them.

    A missing label is the null label, a missing context one token that does not exist. `option` is the argument of the
    owner that builds it with a context.

    **Raises:** `ValueError` for what the network does not take, or takes in another width; `TypeError` for `args` that
    are no condition.
    """
    condition = _condition(args)
    label, context, mask = condition.label, condition.context, condition.mask
    if labels is None and label is not None:
        raise ValueError(
            f"This {owner} has no labels, but got one of {describe(label)}: build it with num_classes, or pass none."
        )
    if context_dim is None and context is not None:
        raise ValueError(
            f"This {owner} takes no context, but got one of {describe(context)}: build it with {option}, or pass none."
        )
    if context is not None and (context.ndim != 2 or context.shape[-1] != context_dim):
        raise ValueError(
            f"{owner} got a context of {describe(context)}, but was built for (tokens, {context_dim}), ONE example's: "
            "pass one of that width, batch with jax.vmap."
        )
    if labels is not None and label is None:
        label = jnp.asarray(labels.null_label)
    if context_dim is not None and context is None:
        context, mask = jnp.zeros((1, context_dim)), jnp.zeros(1, bool)
    return Condition(label, context, mask)


def null_condition(args: object, labels: LabelEmbedding | None) -> ArrayLike | Condition:
    """The condition of the structure, shapes and dtypes of `args` that says nothing."""
    condition = _condition(args)
    label = condition.label
    if label is not None:
        if labels is None:
            raise ValueError(
                f"This network has no labels, but got one of {describe(label)}: build it with num_classes."
            )
        label = jnp.full_like(label, labels.null_label)
        if not isinstance(args, Condition):
            return label
    return Condition(
        label,
        None if condition.context is None else jnp.zeros_like(condition.context),
        None if condition.mask is None else jnp.zeros_like(condition.mask),
    )


def _condition(args: object) -> Condition:
    if isinstance(args, Condition):
        return args
    if args is None:
        return Condition()
    array = jnp.asarray(args) if eqx.is_array_like(args) else None
    if array is None or not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"A network got args of {describe(args)}, but wants None, an integer label, or a Condition(label, context)."
        )
    return Condition(array)
