r"""Regression losses: flow matching, denoising score matching, DDPM and EDM are settings of one.

For one example $x_0$, a time t and noise $\epsilon$, with $x_t = \alpha x_0 + \sigma \epsilon$, the
loss in a prediction $o = (a x_0 + b \epsilon)/c$ (see `flowsolve.predictions`) is

$$w(t) \; \mathrm{mean}_i\; \ell\big(o_\theta(t, x_t)_i - o_i\big)$$

and that of a batch the (weighted) mean over its examples.

Given $x_t$, the errors of all predictions are multiples of one another: an error e of
$a x_0 + b\epsilon$ is an error

$$\frac{a_2 \sigma - b_2 \alpha}{c_2\,(a \sigma - b \alpha)}\; e$$

of $(a_2 x_0 + b_2 \epsilon)/c_2$. So the error is taken once, of the network's own prediction, and
multiplied by a number: nothing is converted, nothing cancels, and what is finite at an end of the
path is computed there.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Real

from ._checks import check, check_key, check_positive, check_state, check_type, describe, is_concrete, known
from ._numerics import as_scalar, linear_combination, normal_like
from ._types import Args, Like, PRNGKey, Scalar, ScalarLike, State
from .bridges import BridgeFlow
from .couplings import AbstractCoupling, Independent, Pairs
from .flow import AbstractFlow
from .paths import AbstractPath
from .predictions import AbstractPrediction, error_scale
from .times import AbstractTimes, Uniform
from .weights import AbstractWeight

__all__ = [
    "Aux",
    "BridgeRegression",
    "Huber",
    "NormalNoise",
    "PseudoHuber",
    "Regression",
    "absolute",
    "squared",
]


def squared(error: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The squared error e^2, whose optimum is the conditional mean."""
    return error**2


def absolute(error: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The absolute error |e|, whose optimum is the conditional median, element by element."""
    return jnp.abs(error)


class Huber(eqx.Module):
    """Huber's loss: e^2/2 up to |e| = delta, delta (|e| - delta/2) beyond.

    **Arguments:** `delta`: where it turns linear, in units of the target.
    """

    delta: Scalar = eqx.field(default=1.0, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "delta")

    def __call__(self, error: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The loss of each element."""
        delta = self.delta.astype(error.dtype)
        size = jnp.abs(error)
        near = jnp.minimum(size, delta)
        return near * (size - 0.5 * near)


class PseudoHuber(eqx.Module):
    """The pseudo-Huber loss c^2 (sqrt(1 + (e/c)^2) - 1): e^2/2 near 0, c |e| far away.

    **Arguments:** `c`: where it turns linear, in units of the target.
    """

    c: Scalar = eqx.field(default=1.0, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "c")

    def __call__(self, error: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The loss of each element, in the form that does not cancel near 0."""
        scaled = error / self.c.astype(error.dtype)
        return error**2 / (1 + jnp.sqrt(1 + scaled**2))


class NormalNoise(eqx.Module):
    """The noise of a loss: independent elements of N(mean, scale^2).

    Other moments than (0, 1) move the marginals away from those of the path.

    **Arguments:** `mean`, `scale`: of every element.
    """

    mean: Scalar = eqx.field(default=0.0, converter=as_scalar)
    scale: Scalar = eqx.field(default=1.0, converter=as_scalar)

    def __call__(self, key: PRNGKey, like: Like) -> State:
        """Noise for one example, of the structure, shapes and dtypes of `like`."""

        def scaled(z: Array) -> Array:
            return self.mean.astype(z.dtype) + self.scale.astype(z.dtype) * z

        return jax.tree.map(scaled, normal_like(key, like))


class Aux(NamedTuple):
    """What a batch's loss is made of.

    - `losses`: the loss of each example, before the mean over them; 0 for one that is masked out;
    - `t`: the time of each example;
    - `weights`: the weight of each example in that mean, None for equal ones.
    """

    losses: Float[Array, " batch"]
    t: Float[Array, " batch"]
    weights: Float[Array, " batch"] | None = None


class Regression(eqx.Module):
    r"""Regression of a flow's prediction on that of a pair (x_0, eps).

    Per example: $t$ from `times`, $\epsilon$ from `noise`, $x_t = \alpha x_0 + \sigma\epsilon$, and
    the loss

        w(t) * mean over elements of elementwise(prediction - (a x_0 + b eps)/c)

    in the prediction `target`. Published losses are settings of it:

    | published loss | path, prediction of the flow | loss |
    |---|---|---|
    | flow matching | `Linear()`, `Velocity()` | `Regression()` |
    | score matching, weight sigma^2 | `VP()`, `Score()` | `Regression(weight=weights.SNR())` |
    | DDPM | `VP()`, `Noise()` | `Regression()` |
    | EDM | `EDM()`, `Data()`, `EDMPreconditioner(s)` | `Regression(LogNormal(), weight=weights.EDM(s))` |

    **Arguments:**

    - `times`: the distribution of t; uniform between the path's ends by default;
    - `target`: the prediction whose error is taken. None: what the flow itself predicts;
    - `weight`: None: unweighted in `target`. Otherwise one of `weights`, stated on the x_0 loss and
      converted to `target`, so that the squared loss is the same number for every target;
    - `elementwise`: error -> loss of each element: `squared`, `absolute`, `Huber(delta)`,
      `PseudoHuber(c)` or any function;
    - `noise`: (key, like) -> noise like one example, in place of the flow's own source;
    - `coupling`: which noise goes with which example of the batch, `couplings.Independent()` by default. With any other
      the flow's source is no `sources.Normal`, as it then has no score.

    Where the data are `couplings.Pairs`, no noise is drawn: the coupling pairs the noise that was given.

    Data in half precision is brought to float32 first: times, states and losses are float32, and a
    network that computes in another dtype casts its output back.

    Source: Lipman et al. (2022), arXiv 2210.02747 (flow matching); Vincent (2011) and Song et al.
    (2020), arXiv 2011.13456 (score matching); Ho, Jain & Abbeel (2020), arXiv 2006.11239 (DDPM);
    Karras et al. (2022), arXiv 2206.00364 (EDM). Deviation: the mean over elements, where papers
    write the sum.
    """

    times: AbstractTimes = Uniform()
    target: AbstractPrediction | None = None
    weight: AbstractWeight | None = None
    elementwise: Callable[[Array], Array] = squared
    noise: Callable[[PRNGKey, Like], State] | None = None
    coupling: AbstractCoupling = Independent()

    def __check_init__(self):
        wanted = {
            "times": AbstractTimes,
            "target": AbstractPrediction | None,
            "weight": AbstractWeight | None,
            "coupling": AbstractCoupling,
        }
        for name, kind in wanted.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(
                    f"Regression got {name} = {value!r}, but wants an instance, for instance "
                    "times=times.LogitNormal(), target=predictions.Velocity() or "
                    "weight=weights.MinSNR()."
                )

    def one(
        self,
        flow: AbstractFlow,
        x0: State,
        args: Args = None,
        *,
        t: ScalarLike,
        noise: State,
        key: PRNGKey | None = None,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> Scalar:
        """The loss of one example at a given time and noise: the equation.

        **Arguments:** `flow`; `x0`, `noise`: one example and its noise, alike; `args`: the
        network's; `t`: the time; `key`: the network's, e.g. for dropout; `mask`: booleans like x0,
        False where an element does not count.

        **Returns:** a scalar; 0 if no element counts; inf where the target cannot be had from the
        flow's prediction (for instance the data from the noise at alpha = 0).
        """
        t = as_scalar(t)
        path = flow.path
        a, b, c = flow.prediction.coefficients(path, t)
        target = (a, b, c) if self.target is None else self.target.coefficients(path, t)
        scale = error_scale(path, t, (a, b), target)

        output = flow.output(t, path.interpolate(t, x0, noise), args, key=key)
        error = linear_combination((c, -a, -b), (output, x0, noise))
        if self.weight is None:
            return _where_finite(scale, _mean(self.elementwise, scale, error, mask))
        weighted = error_scale(path, t, (a, b), self.weight.coefficients(path, t))
        # At an end the target's scale may be 0 or infinite and the weighted loss finite all the same. A power of 2
        # far out gives its limit, to the last bit if the loss is squared.
        scale = jnp.where(scale == 0, 2.0**-20, jnp.where(jnp.isinf(scale), 2.0**20, scale))
        loss = (weighted / scale) ** 2 * _mean(self.elementwise, scale, error, mask)
        return _where_finite(weighted, loss)

    def __call__(
        self,
        flow: AbstractFlow,
        x0: State,
        args: Args = None,
        *,
        key: PRNGKey,
        example_weight: Real[Array, " batch"] | None = None,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> tuple[Scalar, Aux]:
        """The loss of a batch and the terms it is made of.

        The noise of example i depends on `key` and i alone, whatever the batch's size; so does its
        time, unless `times` is stratified, which belongs to a batch.

        **Arguments:**

        - `flow`: the flow to train;
        - `x0`: a batch of data, a pytree of floating-point arrays with a leading batch axis, or `couplings.Pairs` of
          such a batch and its noise;
        - `args`: the network's, a pytree whose arrays have the same leading axis, or None;
        - `key`: one typed key, for times, noise and the network;
        - `example_weight`: (batch,) numbers >= 0 for the mean over examples, None for equal ones;
        - `mask`: True where it counts: booleans like x0, or (batch,) booleans for whole examples.
          Masked elements do not count in an example's mean; an example without elements does not
          count in the batch's.

        **Returns:** the scalar sum_i w_i loss_i / sum_i w_i, 0 if nothing counts, and `Aux`.

        **Raises:** `ValueError` or `TypeError` for data that is not floating point, batch axes that
        disagree, an empty batch, a missing or wrong key, or noise that depends on the data for a flow whose source
        says that it does not.
        """
        check_type(flow, AbstractFlow, "flow", "a fs.Flow: for a BridgeFlow take BridgeRegression")

        def one(x0: State, noise: State, args: Args, t: Scalar, key: PRNGKey, mask: PyTree | None) -> Scalar:
            return self.one(flow, x0, args, t=t, noise=noise, key=key, mask=mask)

        if (isinstance(x0, Pairs) or not self.coupling.independent) and flow.source.has_score:
            what = "Pairs" if isinstance(x0, Pairs) else type(self.coupling).__name__
            raise TypeError(
                f"{what} made the noise depend on the data, but the flow's source is Normal, from which it would take "
                "a score: make it with source=fs.sources.CoupledNormal(), or fs.sources.Source(draw) for noise of "
                "another law."
            )
        draw = flow.source.sample if self.noise is None else self.noise
        return _over_batch(
            one,
            flow.path,
            self.times,
            self.coupling,
            draw,
            x0,
            args,
            key=key,
            example_weight=example_weight,
            mask=mask,
        )


class BridgeRegression(eqx.Module):
    r"""Regression of a `BridgeFlow`'s velocity and, if it has one, of its score.

    Per example, with x_1 the noise that the coupling gave it, z ~ N(0, I) and $x_t$ on the bridge between them,

        mean |velocity - (x_1 - x_0 + gamma' z)|^2 + score_weight * mean |gamma score + z|^2

    **Arguments:**

    - `coupling`: `couplings.Sinkhorn(2 * sigma**2, replace=True)` for the Schroedinger bridge;
    - `times`: inside of 0 and 1, at which gamma' is infinite; uniform from 0.001 to 0.999 by default;
    - `score_weight`: >= 0.

    Source: Tong et al. (2023), arXiv 2307.03672. Deviation: the score's weight is gamma^2, with which its target has
    unit variance, up to a constant that of the paper.
    """

    coupling: AbstractCoupling
    times: AbstractTimes = eqx.field(default_factory=lambda: Uniform(t_min=1e-3, t_max=1 - 1e-3))
    score_weight: Scalar = eqx.field(default=1.0, converter=as_scalar)

    def __check_init__(self):
        check_type(self.coupling, AbstractCoupling, "coupling", "an instance such as fs.couplings.Assignment()")
        check_type(self.times, AbstractTimes, "times", "an instance such as fs.times.Uniform()")
        if is_concrete(self.score_weight) and not float(self.score_weight) >= 0:
            raise ValueError(f"BridgeRegression got score_weight = {float(self.score_weight):g}, but wants it >= 0.")

    def one(
        self,
        flow: BridgeFlow,
        x0: State,
        args: Args = None,
        *,
        t: ScalarLike,
        source: State,
        noise: State,
        key: PRNGKey | None = None,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> Scalar:
        """The loss of one example with x_1 = `source` and z = `noise`; the rest as in `Regression.one`."""
        t = as_scalar(t)
        gamma, d_gamma = flow.width(t)
        velocity, score = flow.output(t, flow.interpolate(t, x0, source, noise), args, key=key)
        error = linear_combination((1, -1, 1, -d_gamma), (velocity, source, x0, noise))
        loss = _mean(squared, jnp.ones_like(t), error, mask)
        if score is None:
            return loss
        error = linear_combination((gamma, 1), (score, noise))
        return loss + self.score_weight * _mean(squared, jnp.ones_like(t), error, mask)

    def __call__(
        self,
        flow: BridgeFlow,
        x0: State,
        args: Args = None,
        *,
        key: PRNGKey,
        example_weight: Real[Array, " batch"] | None = None,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> tuple[Scalar, Aux]:
        """The loss of a batch and the terms it is made of, as in `Regression`.

        **Raises:** as there; `TypeError` for a flow that is no `BridgeFlow`.
        """
        check_type(flow, BridgeFlow, "flow", "a fs.BridgeFlow: for another flow take Regression")

        def one(x0: State, source: State, args: Args, t: Scalar, key: PRNGKey, mask: PyTree | None) -> Scalar:
            noise_key, key = jax.random.split(key)
            noise = normal_like(noise_key, x0)
            return self.one(flow, x0, args, t=t, source=source, noise=noise, key=key, mask=mask)

        return _over_batch(
            one,
            flow.path,
            self.times,
            self.coupling,
            flow.source.sample,
            x0,
            args,
            key=key,
            example_weight=example_weight,
            mask=mask,
        )


def _over_batch(
    one: Callable[[State, State, Args, Scalar, PRNGKey, PyTree | None], Scalar],
    path: AbstractPath,
    times: AbstractTimes,
    coupling: AbstractCoupling,
    draw: Callable[[PRNGKey, Like], State],
    x0: State | Pairs,
    args: Args,
    *,
    key: PRNGKey,
    example_weight: Real[Array, " batch"] | None,
    mask: PyTree[Bool[Array, "..."]] | None,
) -> tuple[Scalar, Aux]:
    """The weighted mean over a batch of one(x0, noise, args, t, key, mask), and its terms."""
    key = check_key(key, "a training loss")
    x0, args, mask = _without_numpy((x0, args, mask))
    num = _batch_size(x0)
    _check_batch_axis(args, num)
    x0 = jax.tree.map(_at_least_float32, x0)
    x0, given = (x0.data, x0.noise) if isinstance(x0, Pairs) else (x0, None)
    mask = _mask_like(mask, x0, num)

    key_times, key_examples = jax.random.split(key)
    t = times.sample(path, key_times, num)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key_examples, i)))(jnp.arange(num))
    noise = jax.vmap(draw)(keys[:, 0], x0) if given is None else given
    if not isinstance(coupling, Independent):
        noise = coupling(jax.random.fold_in(key_times, 1), x0, noise, args)
    losses = eqx.filter_vmap(one)(x0, noise, args, t, keys[:, 1], mask)

    weights = _example_weights(example_weight, mask, num, losses.dtype)
    total = jnp.sum(weights)
    value = jnp.sum(weights * losses) / jnp.where(total == 0, 1, total)
    return value, Aux(losses, t, weights)


def _where_finite(scale: Scalar, loss: Scalar) -> Scalar:
    # An infinite scale times an error of 0 is NaN; the loss is infinite there.
    return jnp.where(jnp.isinf(scale), jnp.inf, loss)


def _mean(
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


def _batch_size(x0: State) -> int:
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


def _check_batch_axis(args: Args, num: int) -> None:
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
