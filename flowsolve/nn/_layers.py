r"""What the larger networks are made of: linear maps of tokens, how they start, adaptive norms, stacks of blocks.

A sequence of tokens is an array of shape (tokens, width). An adaptive norm is

$$(1 + \mathrm{scale}) \cdot \mathrm{LN}(h) + \mathrm{shift}$$

with LN a layer norm over the last axis without parameters, computed in float32 at least.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import PRNGKey

_M = TypeVar("_M", bound=eqx.Module)


def over_tokens(linear: eqx.nn.Linear, tokens: Float[Array, "*tokens inputs"]) -> Float[Array, "*tokens outputs"]:
    """The linear map of every token: one matrix product over all of them, also under vmap."""
    mapped = tokens @ linear.weight.T
    return mapped if linear.bias is None else mapped + linear.bias.reshape((1,) * (tokens.ndim - 1) + (-1,))


def zeroed(module: _M) -> _M:
    """A linear map or a convolution with weights and bias zero."""
    return jax.tree.map(jnp.zeros_like, module)


def redrawn(module: _M, initializer: Callable[..., Array], *, key: PRNGKey) -> _M:
    """The module with the weights of its linear maps drawn by an initialiser of (outputs, inputs), biases zero."""

    def is_linear(node: object) -> bool:
        return isinstance(node, eqx.nn.Linear)

    nodes, structure = jax.tree.flatten(module, is_leaf=is_linear)
    for i, node in enumerate(nodes):
        if is_linear(node):
            key, key_weight = jax.random.split(key)
            weight = initializer(key_weight, node.weight.shape, node.weight.dtype)
            nodes[i] = eqx.tree_at(lambda n: n.weight, zeroed(node), weight)
    return jax.tree.unflatten(structure, nodes)


def layer_norm(h: Float[Array, "*tokens width"], *, eps: float = 1e-5) -> Float[Array, "*tokens width"]:
    """Mean 0 and variance 1 over the last axis."""
    with jax.numpy_dtype_promotion("standard"):
        wide = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + eps)).astype(h.dtype)


def adaptive_norm(
    h: Float[Array, "*tokens width"], scale: Float[Array, " width"], shift: Float[Array, " width"], *, eps: float = 1e-5
) -> Float[Array, "*tokens width"]:
    """(1 + scale) LN(h) + shift, with the same scale and shift for all tokens."""
    row = (1,) * (h.ndim - 1) + (-1,)
    return (1 + scale).reshape(row) * layer_norm(h, eps=eps) + shift.reshape(row)


def stacked(make: Callable[[PRNGKey], _M], depth: int, *, key: PRNGKey) -> _M:
    """`depth` modules as one with stacked parameters."""
    return eqx.filter_vmap(make)(jax.random.split(key, depth))


def held(remat: bool) -> Callable[..., Any]:
    """What the backward pass holds of a block's forward pass: nothing, or the outputs of linear maps.

    It computes the rest anew, norms, activations and attention: cheaper than to write and read stacks of them.
    """
    policies = jax.checkpoint_policies
    return policies.nothing_saveable if remat else policies.dots_with_no_batch_dims_saveable


def scan_blocks(
    apply: Callable[[Any, Any, Any, PRNGKey | None], tuple[Any, Any]],
    blocks: eqx.Module,
    carry: Any,
    inputs: Any = None,
    *,
    depth: int,
    key: PRNGKey | None,
    policy: Callable[..., Any] | None = None,
) -> tuple[Any, Any]:
    """(carry, out) = apply(block, carry, input, key) from block to block of a stack; the last carry, and the outs.

    The backward pass holds the carries and what `policy` says, everything without one.
    """
    parameters, static = eqx.partition(blocks, eqx.is_array)
    keys = None if key is None else jax.random.split(key, depth)

    def step(carry: Any, scanned: Any) -> tuple[Any, Any]:
        one, given, block_key = scanned
        return apply(eqx.combine(one, static), carry, given, block_key)

    if policy is not None:
        # Within a scan nothing merges the two passes, so that no barrier need keep them apart.
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    return jax.lax.scan(step, carry, (parameters, inputs, keys))


def scan_keeping(
    apply: Callable[[Any, Array, Any, PRNGKey | None], tuple[Array, Any]],
    blocks: eqx.Module,
    h: Array,
    inputs: Any = None,
    *,
    kept: int,
    depth: int,
    key: PRNGKey | None,
    policy: Callable[..., Any] | None = None,
) -> tuple[Array, Array]:
    """The last h of `scan_blocks` with the outs left away, and h after `kept` blocks, from 1 to the depth.

    No gradient of what is kept reaches the later blocks, and no stack of all h is written.
    """

    def step(block: Any, carry: tuple[Array, Array], scanned: Any, key: PRNGKey | None) -> tuple[Any, None]:
        h, before = carry
        number, given = scanned
        h, _ = apply(block, h, given, key)
        return (h, jnp.where(number == kept, h, before)), None

    numbered = (jnp.arange(1, depth + 1), inputs)
    both, _ = scan_blocks(step, blocks, (h, h), numbered, depth=depth, key=key, policy=policy)
    return both
