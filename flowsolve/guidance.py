r"""Guidance: a flow in, a flow out, so that every solver takes it and wrappers nest.

Classifier-free guidance mixes a conditional and an unconditional prediction of the same network,

$$u + s\,(c - u), \qquad u = \mathrm{flow}(t, x, \mathrm{null}), \quad c = \mathrm{flow}(t, x, \mathrm{args})$$

so that scale s = 0 is unconditional and s = 1 conditional.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from ._checks import describe
from ._numerics import as_scalar, linear_combination
from ._types import Args, PRNGKey, Scalar, ScalarLike, State
from .flow import AbstractFlow
from .paths import AbstractPath
from .predictions import AbstractPrediction
from .sources import AbstractSource

__all__ = ["ClassifierFree"]


class ClassifierFree(AbstractFlow):
    """Classifier-free guidance, u + scale (c - u), both from one batched network evaluation.

    **Arguments:** `flow`: a flow trained with and without its condition; `scale`: 0 unconditional, 1 conditional,
    larger for more guidance (the convention 1 + w has w = scale - 1), an array, so a new value does not retrace;
    `null`: the `args` that stand for no condition, shaped as the condition.

    Source: Ho & Salimans (2022), arXiv 2207.12598.
    """

    flow: AbstractFlow
    scale: Scalar
    null: Args

    def __init__(self, flow: AbstractFlow, scale: ScalarLike, null: Args):
        self.flow = flow
        self.scale = as_scalar(scale)
        if not jax.tree.leaves(null):
            raise ValueError(
                "ClassifierFree got a null condition without arrays, but wants the args that stand for no condition, "
                "e.g. null=jnp.asarray(num_classes)."
            )
        self.null = jax.tree.map(jnp.asarray, null)

    @property
    def path(self) -> AbstractPath:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The guided flow's path."""
        return self.flow.path

    @property
    def prediction(self) -> AbstractPrediction:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the guided flow predicts."""
        return self.flow.prediction

    @property
    def source(self) -> AbstractSource:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The guided flow's source."""
        return self.flow.source

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        if describe(jax.tree.map(jnp.asarray, args)) != describe(self.null):
            raise ValueError(
                f"ClassifierFree got a condition args of {describe(args)}, but its null is {describe(self.null)}: give "
                "both the same structure, shapes and dtypes."
            )
        both = jax.tree.map(lambda condition, null: jnp.stack([condition, null]), args, self.null)
        output = eqx.filter_vmap(lambda args: self.flow.output(t, x, args, key=key))(both)
        conditional, unconditional = (jax.tree.map(lambda leaf, i=i: leaf[i], output) for i in (0, 1))
        return linear_combination((self.scale, 1 - self.scale), (conditional, unconditional))
