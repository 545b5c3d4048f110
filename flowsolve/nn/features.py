r"""A network that hands out what it has seen on the way: the hidden tokens of a block, or what a head makes of them.

An alignment loss (`alignment.REPA`) compares them with given features, an adversarial one (`distillation`) tells real
from made by them. Whoever does not ask pays nothing: the head is not computed.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from .._checks import check_callable, describe
from .._features import hand_out
from .._types import Args, PRNGKey, State, TimeLike

__all__ = ["Features"]


class Features(eqx.Module):
    """A network of two answers, (output, features), as a network of one that hands its features out to the loss.

        network = fs.nn.Features(eqx.Partial(dit.hidden, block=8), head)
        flow = fs.Flow(network, path, prediction)

    **Arguments:** `network`: `network(t, x, args, *, key=None)` -> (output, features), one example; `head`: None, or a
    module with parameters of its own, features -> what is handed out: a projector, a discriminator. It trains with the
    network.

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
