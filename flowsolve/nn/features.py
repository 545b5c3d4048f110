r"""A network that hands out what it has seen on the way: the hidden tokens of a block, or what a head makes of them.

An alignment loss (`alignment.REPA`) compares them with given features, an adversarial one (`distillation`) tells real
from made by them. Whoever does not ask pays nothing: the head is not computed.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PyTree

from .._checks import check_callable, check_key, describe
from .._features import hand_out
from .._types import Args, PRNGKey, State, TimeLike
from ._layers import over_tokens, redrawn

__all__ = ["Features", "Projector"]

_XAVIER = jax.nn.initializers.xavier_uniform(in_axis=-1, out_axis=-2)


class Features(eqx.Module):
    """A network of two answers, (output, features), as a network of one that hands its features out to the loss.

        network = fs.nn.Features(eqx.Partial(dit.hidden, block=8), head)
        flow = fs.Flow(network, path, prediction)

    **Arguments:** `network`: `network(t, x, args, *, key=None)` -> (output, features), one example; `head`: None, or a
    module with parameters of its own, features -> what is handed out: a `Projector`, a discriminator. It trains with
    the network.

    **Raises:** `ValueError` if the network does not return a pair.
    """

    network: Callable[..., tuple[State, PyTree]]
    head: Callable[[Any], PyTree] | None = None

    def __check_init__(self):
        check_callable(
            self.network, "Features got a network", "network(t, x, args, *, key=None) -> (output, features)."
        )
        if self.head is not None:
            check_callable(self.head, "Features got a head", "head(features), or None.")

    def __call__(self, t: TimeLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """The output at (t, x), one example."""
        both = self.network(t, x, args, key=key)
        if not (isinstance(both, tuple) and len(both) == 2):
            raise ValueError(f"The network of Features returned {describe(both)}, but wants (output, features).")
        output, features = both
        hand_out(lambda: features if self.head is None else self.head(features))
        return output


class Projector(eqx.Module):
    r"""The head of an alignment loss, from the width of a token to that of a feature, the same map for every token.

    $$P(h) = W_3\, \mathrm{silu}(W_2\, \mathrm{silu}(W_1 h + b_1) + b_2) + b_3$$

    **Arguments:** `width`: of a token; `dim`: of a feature; `hidden`: width of the two layers between; `key`: for the
    initial parameters, Xavier-uniform and zero.

    Called with tokens of shape (tokens, width) or one of shape (width,), returns as many of width `dim`.

    **Raises:** `ValueError` for sizes below 1 and, when it is called, for tokens of another width.

    Source: Yu et al. (2024), arXiv 2410.06940, with their hidden width and initial parameters.
    """

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, width: int, dim: int, *, hidden: int = 2048, key: PRNGKey):
        key = check_key(key, "Projector")
        if min(width, dim, hidden) < 1:
            raise ValueError(f"Projector got width = {width}, dim = {dim}, hidden = {hidden}, but wants sizes >= 1.")
        sizes = (width, hidden), (hidden, hidden), (hidden, dim)
        self.first, self.second, self.last = (
            redrawn(eqx.nn.Linear(inputs, outputs, key=k), _XAVIER, key=k)
            for (inputs, outputs), k in zip(sizes, jax.random.split(key, 3), strict=True)
        )

    def __call__(self, tokens: Float[Array, "*tokens _width"]) -> Float[Array, "*tokens _dim"]:
        """The projected tokens."""
        if tokens.ndim == 0 or tokens.shape[-1] != self.first.in_features:
            raise ValueError(
                f"Projector got tokens of {describe(tokens)}, but was built for a width of {self.first.in_features}."
            )
        h = jax.nn.silu(over_tokens(self.first, tokens))
        h = jax.nn.silu(over_tokens(self.second, h))
        return over_tokens(self.last, h)
