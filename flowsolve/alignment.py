r"""Representation alignment: a loss by which hidden tokens of a network learn what a pretrained encoder sees.

With $h_1, \ldots, h_N$ the tokens of $x_t$ after some block of the network, P a projector that trains with it, and
$y_1, \ldots, y_N$ the features that the encoder gives of the clean $x_0$,

$$L = L_\mathrm{flow} - \lambda\, \frac1N \sum_n \cos\big(P(h_n), y_n\big), \qquad
  \cos(a, b) = \frac{a \cdot b}{|a|\,|b|} .$$

The network hands out $P(h_n)$, and the features come with the batch:

    projector = fs.nn.Projector(width, dim, key=key)
    network = fs.nn.Features(eqx.Partial(dit.hidden, block=8), projector)
    flow = fs.Flow(network, path, prediction)
    loss = fs.alignment.REPA(fs.losses.Regression(), weight=0.5)
    batches = fs.data.Batches(x, fs.alignment.Featured(features, labels), batch_size=256, key=key)
    for state in fs.training.fit(loss, flow, batches, optimiser, steps=2_000, key=key):
        ...

In sampling nobody asks for the tokens: the projector is not computed.

Source: Yu et al. (2024), arXiv 2410.06940.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Real

from ._checks import check_callable, check_type, describe, is_concrete, known
from ._numerics import as_scalar
from ._types import Args, PRNGKey, Scalar, State
from .flow import AbstractFlow
from .losses import Aux

__all__ = ["REPA", "Featured", "cosine_similarity"]


class Featured(eqx.Module):
    """The args of a batch, with the features that its examples are to be aligned with.

    **Arguments:** `features`: (batch, tokens, dim), those of each example's clean data, on the grid of the network's
    tokens; `args`: the network's own, or None.
    """

    features: Float[Array | np.ndarray, "..."]
    args: Args = None


def cosine_similarity(tokens: Float[Array, "*tokens dim"], features: Float[Array, "*tokens dim"]) -> Scalar:
    """The mean over the tokens of one example of cos(token, feature), in float32 at least.

    Where one of the two is zero the cosine is 0.

    **Raises:** `ValueError` if the shapes differ.
    """
    if tokens.shape != features.shape or tokens.ndim == 0:
        raise ValueError(
            f"One example has tokens of {describe(tokens)} and features of {describe(features)}, but an alignment "
            "wants a feature for each token, both of the same width: bring the features to the grid of the tokens, and "
            "the tokens to their width by nn.Projector(width, dim) as the head of nn.Features."
        )
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(tokens.dtype, features.dtype, jnp.float32)
    return jnp.mean(jnp.sum(_unit(tokens.astype(dtype)) * _unit(features.astype(dtype)), axis=-1))


def _unit(x: Float[Array, "*tokens dim"]) -> Float[Array, "*tokens dim"]:
    """Vectors of length 1 along the last axis, 0 for 0."""
    # The scale cancels, so that it needs no derivative; with it no square overflows or vanishes.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(largest == 0, 1, largest)
    return x * jax.lax.rsqrt(jnp.where(largest == 0, 1, jnp.sum(x * x, axis=-1, keepdims=True)))


class REPA(eqx.Module):
    r"""Any loss with the alignment of the tokens that the network hands out: L = loss - weight * mean cosine.

    The cosine is `cosine_similarity` of what the network handed out and the features of the example; where the loss
    evaluates the network several times, the mean over these. Its mean over the batch has the weights of the loss: an
    example that is left out of one is left out of the other. A mask of elements does not reach the tokens.

    **Arguments:**

    - `loss`: called as `losses.Regression` is, gives `losses.Aux` with a term for each example. It gets the network's
      args alone;
    - `weight`: lambda >= 0, 0.5 by default.

    Called on a flow whose network is a `nn.Features`, a batch, and `Featured(features, args)`. Returns L and the `Aux`
    of the loss as it is: its `losses` are without the alignment, so that what `fit` measures by the time compares with
    a run without, and the mean cosine of the batch is (mean of the losses - L) / weight.

    **Raises:** `TypeError` for args that are no `Featured`, or a loss that gives no `Aux`; `ValueError` if the network
    hands nothing out, for features of another shape than what it hands out, and for a weight below 0.

    Source: Yu et al. (2024), arXiv 2410.06940. Deviations: the loss of the flow is a mean over elements, as everywhere
    here; nothing is added to the norms.
    """

    loss: Callable[..., tuple[Scalar, Any]]
    weight: Scalar = eqx.field(default=0.5, converter=as_scalar)

    def __check_init__(self):
        check_callable(self.loss, "REPA got a loss", "such as fs.losses.Regression().")
        if is_concrete(self.weight) and not float(known(self.weight)) >= 0:
            raise ValueError(f"REPA got weight = {float(self.weight):g}, but wants it >= 0.")

    def __call__(
        self,
        flow: AbstractFlow,
        x0: State,
        args: Featured,
        *,
        key: PRNGKey,
        example_weight: Real[Array, " batch"] | None = None,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> tuple[Scalar, Aux]:
        """The loss of a batch with its alignment, and the terms of the loss without."""
        check_type(
            args, Featured, "The args of REPA", "fs.alignment.Featured(features, args), with those of the network in it"
        )
        # Losses that compare examples have neither.
        given = {"example_weight": example_weight, "mask": mask}
        given = {name: value for name, value in given.items() if value is not None}
        value, aux = self.loss(flow, x0, args.args, key=key, **given)
        if not isinstance(aux, Aux):
            raise TypeError(
                f"The loss in REPA gave {type(aux).__name__} beside its value, but wants losses.Aux, which holds what "
                "the network handed out: take one such as fs.losses.Regression()."
            )
        if not aux.features:
            raise ValueError(
                f"Nothing that a network handed out came through {type(self.loss).__name__}, but REPA wants the tokens "
                "to align: wrap the network as fs.nn.Features(eqx.Partial(network.hidden, block=...), "
                "fs.nn.Projector(width, dim, key=key)), in a loss such as fs.losses.Regression()."
            )
        num, features = len(aux.losses), jnp.asarray(args.features)
        for tokens in aux.features:
            if not (eqx.is_array(tokens) and jnp.issubdtype(tokens.dtype, jnp.floating)):
                raise TypeError(f"The network handed out {describe(tokens)}, but REPA wants one array of tokens.")
        if features.ndim == 0 or len(features) != num or not jnp.issubdtype(features.dtype, jnp.floating):
            raise ValueError(
                f"Featured has features of {describe(features)} for {num} examples, but wants floating-point numbers "
                f"of shape ({num}, tokens, dim)."
            )
        cosines = jnp.stack([jax.vmap(cosine_similarity)(tokens, features) for tokens in aux.features])
        weights = jnp.ones_like(aux.losses) if aux.weights is None else aux.weights
        total = jnp.sum(weights)
        cosine = jnp.sum(weights * jnp.mean(cosines, axis=0).astype(weights.dtype)) / jnp.where(total == 0, 1, total)
        return value - self.weight.astype(value.dtype) * cosine.astype(value.dtype), aux
