r"""Guidance by conditions: mixtures of what a network predicts with and without them, or a weaker one predicts.

$$u + s\,(c - u), \qquad u = \mathrm{flow}(t, x, \mathrm{null}), \quad c = \mathrm{flow}(t, x, \mathrm{args})$$

Scale s = 0 is unconditional and s = 1 conditional, to the last bit; others write s = 1 + w. Where the scale is known to
be 1, or 0, before anything is traced, one evaluation is made instead of two.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from .._checks import check_type, describe
from .._numerics import as_scalar
from .._types import Args, PRNGKey, Scalar, ScalarLike, State
from ..flow import AbstractFlow, AbstractFlowWrapper, check_flow, differ_in_path
from .rules import AbstractRule, plain
from .schedules import Schedule, as_scale, is_known, scale_at

__all__ = ["Autoguidance", "ClassifierFree", "Composed"]


class ClassifierFree(AbstractFlowWrapper):
    """Classifier-free guidance, u + scale (c - u).

    **Arguments:**

    - `flow`: a flow trained with and without its condition, see `losses.ConditionDropout`;
    - `scale`: 0 unconditional, 1 conditional, larger for more guidance; a number, or a schedule (path, t) -> scale. An
      array inside, so that a new number does not retrace, but for the numbers 0 and 1, which are programs of their own;
    - `null`: the `args` that stand for no condition, shaped as the condition;
    - `rule`: None for that formula, or `Rescaled`, `Projected`, `ZeroStar`;
    - `batched`: whether both come from one network evaluation of twice the size, or from two, in half the memory. Of
      two, the second is left out wherever the scale is 1, if it is known or if all examples of a `vmap` share it.

    **Raises:** `ValueError` for a null condition without arrays and, when it is called, for `args` that are not
    like it.

    Source: Ho & Salimans (2022), arXiv 2207.12598, whose w is scale - 1.
    """

    flow: AbstractFlow
    scale: Scalar | int | Schedule
    null: Args
    rule: AbstractRule | None
    batched: bool = eqx.field(static=True)

    def __init__(
        self,
        flow: AbstractFlow,
        scale: ScalarLike | Schedule,
        null: Args,
        *,
        rule: AbstractRule | None = None,
        batched: bool = True,
    ):
        check_flow(flow, "ClassifierFree's flow")
        _check_rule(rule)
        self.flow = flow
        self.scale = as_scale(scale)
        self.null = _as_null(null, "ClassifierFree")
        self.rule = rule
        self.batched = batched

    @classmethod
    def from_weight(
        cls,
        flow: AbstractFlow,
        weight: ScalarLike,
        null: Args,
        *,
        rule: AbstractRule | None = None,
        batched: bool = True,
    ) -> "ClassifierFree":
        """For those who write (1 + w) c - w u: scale = 1 + weight."""
        if callable(weight):
            raise TypeError(
                "from_weight got a schedule, but wants a number w: give ClassifierFree the schedule of 1 + w itself."
            )
        return cls(flow, 1 + weight, null, rule=rule, batched=batched)

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        _check_like_null(args, self.null, "ClassifierFree", "a condition args")
        t = as_scalar(t)
        scale = scale_at(self.scale, self.path, t)

        def predicted(args: Args) -> State:
            return self.flow.output(t, x, args, key=key)

        if not self.batched or is_known(scale, 1) or (is_known(scale, 0) and self.rule is None):
            return _guided(self.flow, self.rule, scale, t, x, lambda: predicted(args), lambda: predicted(self.null))
        both = jax.tree.map(lambda condition, null: jnp.stack([condition, null]), args, self.null)
        output = eqx.filter_vmap(predicted)(both)
        conditional, unconditional = (jax.tree.map(lambda leaf, i=i: leaf[i], output) for i in (0, 1))
        return _combined(self.flow, self.rule, scale, t, x, conditional, unconditional)


class Autoguidance(AbstractFlowWrapper):
    """A flow guided by a worse version of itself, u + scale (c - u) with c from `flow` and u from `weak`.

    **Arguments:**

    - `flow`: the flow to guide; `weak`: a smaller or less trained one on the same path, which may predict another
      quantity. Both get the same `args`;
    - `scale`: 0 the weak flow, 1 the flow alone, larger for more guidance; a number or a schedule, as in
      `ClassifierFree`;
    - `rule`: as there.

    The weak flow is not evaluated wherever the scale is 1, if it is known or if all examples of a `vmap` share it.

    **Raises:** `ValueError` for flows on different paths.

    Source: Karras et al. (2024), arXiv 2406.02507.
    """

    flow: AbstractFlow
    weak: AbstractFlow
    scale: Scalar | int | Schedule
    rule: AbstractRule | None

    def __init__(
        self,
        flow: AbstractFlow,
        weak: AbstractFlow,
        scale: ScalarLike | Schedule,
        *,
        rule: AbstractRule | None = None,
    ):
        check_flow(flow, "Autoguidance's flow")
        check_flow(weak, "Autoguidance's weak")
        _check_rule(rule)
        self.flow = flow
        self.weak = weak
        self.scale = as_scale(scale)
        self.rule = rule

    def __check_init__(self):
        if differ_in_path(self.flow, self.weak):
            raise ValueError(
                f"Autoguidance got flows on {self.flow.path} and {self.weak.path}, but wants one path: move the weak "
                "one, fs.OnPath(weak, flow.path)."
            )

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        t = as_scalar(t)
        scale = scale_at(self.scale, self.path, t)

        def weak() -> State:
            if self.weak.prediction == self.prediction:
                return self.weak.output(t, x, args, key=key)
            return self.weak.mixture(self.prediction.coefficients(self.path, t), t, x, args, key=key)

        return _guided(self.flow, self.rule, scale, t, x, lambda: self.flow.output(t, x, args, key=key), weak)


class Composed(AbstractFlowWrapper):
    r"""Several conditions at once, $u + \sum_k s_k (c_k - u)$.

    Its score is that of $p_t(x) \prod_k (p_t(x|c_k)/p_t(x))^{s_k}$: with $s_k = 1$ the product of conditions ("and")
    that are independent given x, with $s_k < 0$ the negation of one ("not").

    **Arguments:** `flow`: a flow trained with and without its condition; `scales`: (K,) numbers, one a condition, as an
    array; `null`: the args that stand for no condition; `batched`: whether all come from one network evaluation of
    K + 1 times the size, or one after the other.

    Its `args` are K conditions, each array of `null` with a leading axis of length K.

    **Raises:** `ValueError` for scales that are not (K,), a null condition without arrays and, when it is called, for
    one that is not like each of the conditions.

    Source: Liu et al. (2022), arXiv 2206.01714. The product of the diffused densities is not the diffused product: the
    flow ends in the right density only where the conditions are independent at every t, and else near it.
    """

    flow: AbstractFlow
    scales: Float[Array, " K"]
    null: Args
    batched: bool = eqx.field(static=True)

    def __init__(
        self,
        flow: AbstractFlow,
        scales: Real[Array | np.ndarray, "..."] | Sequence[ScalarLike],
        null: Args,
        *,
        batched: bool = True,
    ):
        check_flow(flow, "Composed's flow")
        self.flow = flow
        self.scales = jnp.asarray(scales).astype(float)
        if self.scales.ndim != 1 or self.scales.size == 0:
            raise ValueError(
                f"Composed got scales of shape {self.scales.shape}, but wants one number a condition, (K,)."
            )
        self.null = _as_null(null, "Composed")
        self.batched = batched

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        like = jax.tree.map(lambda leaf: jnp.stack([leaf] * self.scales.size), self.null)
        _check_like_null(args, like, "Composed", f"{self.scales.size} conditions args")

        def predicted(args: Args) -> State:
            return self.flow.output(t, x, args, key=key)

        all_args = jax.tree.map(lambda c, null: jnp.concatenate([jnp.asarray(c), null[None]]), args, self.null)
        outputs = eqx.filter_vmap(predicted)(all_args) if self.batched else jax.lax.map(predicted, all_args)
        weights = jnp.append(self.scales, 1 - jnp.sum(self.scales))

        def mixed(leaf: Array) -> Array:
            return jnp.sum(jax.vmap(jnp.multiply)(weights.astype(leaf.dtype), leaf), axis=0)

        return jax.tree.map(mixed, outputs)


def _guided(
    flow: AbstractFlow,
    rule: AbstractRule | None,
    scale: Scalar,
    t: Scalar,
    x: State,
    conditional: Callable[[], State],
    unconditional: Callable[[], State],
) -> State:
    """The guided output, from evaluations one after the other, without those that have no say."""
    if is_known(scale, 0) and rule is None:
        return unconditional()
    above = conditional()
    if is_known(scale, 1):
        below = above
    else:
        below = jax.lax.cond(scale == 1, lambda: above, unconditional)
    return _combined(flow, rule, scale, t, x, above, below)


def _combined(
    flow: AbstractFlow,
    rule: AbstractRule | None,
    scale: Scalar,
    t: Scalar,
    x: State,
    conditional: State,
    unconditional: State,
) -> State:
    if rule is None:
        return plain(scale, conditional, unconditional)
    return rule.combine(flow, t, x, scale, conditional, unconditional)


def _check_rule(rule: Any) -> None:
    if rule is not None:
        check_type(rule, AbstractRule, "rule", "an instance such as fs.guidance.Rescaled(), or None")


def _as_null(null: Args, name: str) -> Args:
    if not jax.tree.leaves(null):
        raise ValueError(
            f"{name} got a null condition without arrays, but wants the args that stand for no condition, "
            "e.g. null=jnp.asarray(num_classes)."
        )
    return jax.tree.map(jnp.asarray, null)


def _check_like_null(args: Args, null: Args, name: str, what: str) -> None:
    if describe(jax.tree.map(jnp.asarray, args)) != describe(null):
        raise ValueError(
            f"{name} got {what} of {describe(args)}, but its null is {describe(null)}: give both the same structure, "
            "shapes and dtypes."
        )
