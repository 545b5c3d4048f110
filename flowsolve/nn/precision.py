"""A network that computes in half precision inside a flow of float32.

With h the rounding to `compute_dtype` of floating-point arrays, parameters included, and f the way back to x's dtype:

    f(h(network)(t, h(x), h(args)))

The time stays as it is, as half precision cannot tell neighbouring times apart: a network embeds it in float32 and
rounds the embedding to `x.dtype`, as all of `nn` do. (One that mixes t with x as it is computes in float32.) Gradients
arrive in the dtype of the parameters, float32, as mixed-precision training wants them.

Source: Micikevicius et al. (2017), arXiv 1710.03740.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from .._types import Args, Network, PRNGKey, State, TimeLike

__all__ = ["Precision"]


def _as_floating(dtype: DTypeLike) -> jnp.dtype:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"Precision got the dtype {jnp.dtype(dtype)}, but wants a floating one such as jnp.bfloat16.")
    return jnp.dtype(dtype)


class Precision(eqx.Module):
    """A network that computes in `compute_dtype`, and takes and returns what the flow around it has.

        flow = fs.Flow(fs.nn.Precision(network, jnp.bfloat16), path, prediction)

    **Arguments:** `network`: any network; `compute_dtype`: `jnp.bfloat16`, or another floating dtype.

    **Raises:** `TypeError` for a dtype that is not floating.

    An adaptive solve warns of a tolerance that this dtype cannot resolve.
    """

    network: Network
    compute_dtype: jnp.dtype = eqx.field(static=True, converter=_as_floating)

    def __call__(self, t: TimeLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """The output at (t, x), one example, of the dtypes of x."""
        network, rounded, args = (_cast(tree, self.compute_dtype) for tree in (self.network, x, args))
        return jax.tree.map(lambda out, like: out.astype(like.dtype), network(t, rounded, args, key=key), x)


def _cast(tree: PyTree, dtype: jnp.dtype) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, tree)
