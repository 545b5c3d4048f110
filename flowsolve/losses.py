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

import abc
import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Real

from ._checks import check_key, check_state, describe, is_concrete
from ._numerics import as_scalar, linear_combination, normal_like
from ._types import Args, Like, PRNGKey, Scalar, ScalarLike, State
from .flow import AbstractFlow
from .paths import AbstractPath
from .predictions import AbstractPrediction, Triple
from .times import AbstractTimes, Uniform

__all__ = [
    "AbstractWeight",
    "Aux",
    "EDMWeight",
    "Huber",
    "NormalNoise",
    "PseudoHuber",
    "Regression",
    "SNRWeight",
    "Weight",
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
        _check_positive(self, "delta", self.delta)

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
        _check_positive(self, "c", self.c)

    def __call__(self, error: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The loss of each element, in the form that does not cancel near 0."""
        scaled = error / self.c.astype(error.dtype)
        return error**2 / (1 + jnp.sqrt(1 + scaled**2))


class AbstractWeight(eqx.Module):
    r"""A weight w(t), stated on the $x_0$ loss: w |error of the data prediction|^2.

    It is given by the combination $(a x_0 + b \epsilon)/c$ whose plain squared error is the
    weighted $x_0$ loss,

    $$w = \left(\frac{a\sigma - b\alpha}{c\,\sigma}\right)^2 ,$$

    because a, b and c are finite at both ends of a path, where w itself often is not. A loss in
    another prediction has the weight that makes its squared loss the same.
    """

    @abc.abstractmethod
    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        """(a, b, c) at time t."""

    def __call__(self, path: AbstractPath, t: ScalarLike) -> Scalar:
        """w(t) on the x_0 loss, a scalar; infinite where it is."""
        t = as_scalar(t)
        return _error_scale(path, t, (jnp.ones_like(t), jnp.zeros_like(t)), self.coefficients(path, t)) ** 2


class Weight(AbstractWeight):
    """The user's weight on the x_0 loss.

    **Arguments:** `function`: (path, t) -> w, a scalar >= 0.
    """

    function: Callable[[AbstractPath, Scalar], Scalar]

    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        root = jnp.sqrt(as_scalar(self.function(path, t)))
        return root, jnp.zeros_like(t), jnp.ones_like(t)


class SNRWeight(AbstractWeight):
    """w = alpha^2/sigma^2: the unweighted loss of the noise, and the score loss weighted by sigma^2.

    Source: Song et al. (2020), arXiv 2011.13456; Ho, Jain & Abbeel (2020), arXiv 2006.11239.
    """

    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        del path
        return jnp.zeros_like(t), jnp.ones_like(t), jnp.ones_like(t)


class EDMWeight(AbstractWeight):
    r"""EDM's weight on any path: w = (r^2 + s^2)/(r s)^2 with r = sigma/alpha and s = `data_std`.

    It is 1/c_out^2 of `EDMPreconditioner` at the same s, so that the network's own loss is
    unweighted and its target $(\sigma x_0 - \alpha s^2 \epsilon)/(s \sqrt{\sigma^2 + \alpha^2
    s^2})$ has unit variance at every t.

    **Arguments:** `data_std`: standard deviation of the data's elements, the preconditioner's.

    Source: Karras et al. (2022), arXiv 2206.00364, where alpha = 1.
    """

    data_std: Scalar = eqx.field(default=0.5, converter=as_scalar)

    def __check_init__(self):
        _check_positive(self, "data_std", self.data_std)

    def coefficients(self, path: AbstractPath, t: Scalar) -> Triple:
        alpha, sigma = path.coefficients(t)
        norm = self.data_std * jnp.sqrt(sigma**2 + (alpha * self.data_std) ** 2)
        return sigma, -alpha * self.data_std**2, norm


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
    - `t`: the time of each example.
    """

    losses: Float[Array, " batch"]
    t: Float[Array, " batch"]


class Regression(eqx.Module):
    r"""Regression of a flow's prediction on that of a pair (x_0, eps).

    Per example: $t$ from `times`, $\epsilon$ from `noise`, $x_t = \alpha x_0 + \sigma\epsilon$, and
    the loss

        w(t) * mean over elements of elementwise(prediction - (a x_0 + b eps)/c)

    in the prediction `target`. Published losses are settings of it:

    | published loss | path, prediction of the flow | loss |
    |---|---|---|
    | flow matching | `Linear()`, `Velocity()` | `Regression()` |
    | score matching, weight sigma^2 | `VP()`, `Score()` | `Regression(weight=SNRWeight())` |
    | DDPM | `VP()`, `Noise()` | `Regression()` |
    | EDM | `EDM()`, `Data()`, `EDMPreconditioner(s)` | `Regression(LogNormal(), weight=EDMWeight(s))` |

    **Arguments:**

    - `times`: the distribution of t; uniform between the path's ends by default;
    - `target`: the prediction whose error is taken. None: what the flow itself predicts;
    - `weight`: None: unweighted in `target`. Otherwise a weight on the x_0 loss, which is converted
      to `target`, so that the squared loss is the same number for every target;
    - `elementwise`: error -> loss of each element: `squared`, `absolute`, `Huber(delta)`,
      `PseudoHuber(c)` or any function;
    - `noise`: (key, like) -> noise like one example; standard normal by default.

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
    noise: Callable[[PRNGKey, Like], State] = normal_like

    def __check_init__(self):
        wanted = {
            "times": AbstractTimes,
            "target": AbstractPrediction | None,
            "weight": AbstractWeight | None,
        }
        for name, kind in wanted.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(
                    f"Regression got {name} = {value!r}, but wants an instance, for instance "
                    "times=times.LogitNormal(), target=predictions.Velocity() or "
                    "weight=losses.Weight(function)."
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
        scale = _error_scale(path, t, (a, b), target)

        output = flow.output(t, path.interpolate(t, x0, noise), args, key=key)
        error = linear_combination((c, -a, -b), (output, x0, noise))
        if self.weight is None:
            return _where_finite(scale, _mean(self.elementwise, scale, error, mask))
        weighted = _error_scale(path, t, (a, b), self.weight.coefficients(path, t))
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
        - `x0`: a batch of data, a pytree of floating-point arrays with a leading batch axis;
        - `args`: the network's, a pytree whose arrays have the same leading axis, or None;
        - `key`: one typed key, for times, noise and the network;
        - `example_weight`: (batch,) numbers >= 0 for the mean over examples, None for equal ones;
        - `mask`: True where it counts: booleans like x0, or (batch,) booleans for whole examples.
          Masked elements do not count in an example's mean; an example without elements does not
          count in the batch's.

        **Returns:** the scalar sum_i w_i loss_i / sum_i w_i, 0 if nothing counts, and `Aux(losses,
        t)`.

        **Raises:** `ValueError` or `TypeError` for data that is not floating point, batch axes that
        disagree, an empty batch, or a missing or wrong key.
        """
        key = check_key(key, "a training loss")
        x0, args, mask = _without_numpy((x0, args, mask))
        num = _batch_size(x0)
        _check_batch_axis(args, num)
        x0 = jax.tree.map(_at_least_float32, x0)
        mask = _mask_like(mask, x0, num)

        key_times, key_examples = jax.random.split(key)
        t = self.times.sample(flow.path, key_times, num)
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key_examples, i)))(jnp.arange(num))
        noise = jax.vmap(self.noise)(keys[:, 0], x0)

        def one(x0, args, t, noise, key, mask):
            return self.one(flow, x0, args, t=t, noise=noise, key=key, mask=mask)

        losses = eqx.filter_vmap(one)(x0, args, t, noise, keys[:, 1], mask)

        weights = _example_weights(example_weight, mask, num, losses.dtype)
        total = jnp.sum(weights)
        value = jnp.sum(weights * losses) / jnp.where(total == 0, 1, total)
        return value, Aux(losses, t)


def _error_scale(path: AbstractPath, t: Scalar, source: tuple[Scalar, Scalar], target: Triple) -> Scalar:
    """The factor from an error of a x_0 + b eps, source = (a, b), to one of the target (a2 x_0 + b2 eps)/c2."""
    (a, b), (a2, b2, c2) = source, target
    alpha, sigma = path.coefficients(t)
    # Parallel combinations differ by a number, also where the source says nothing about any other.
    parallel = a * b2 == a2 * b
    on_data = jnp.abs(a) > jnp.abs(b)
    numerator = jnp.where(parallel, jnp.where(on_data, a2, b2), a2 * sigma - b2 * alpha)
    denominator = c2 * jnp.where(parallel, jnp.where(on_data, a, b), a * sigma - b * alpha)
    singular = denominator == 0
    return jnp.where(singular, jnp.inf, numerator / jnp.where(singular, 1, denominator))


def _where_finite(scale: Scalar, loss: Scalar) -> Scalar:
    # An infinite scale times an error of 0 is NaN; the loss is infinite there.
    return jnp.where(jnp.isfinite(scale), loss, jnp.inf)


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


def _check_positive(owner: eqx.Module, name: str, value: Scalar) -> None:
    if is_concrete(value) and not 0 < float(value) < math.inf:
        raise ValueError(f"{type(owner).__name__} got {name} = {float(value):g}, but wants it positive and finite.")


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
    if weights.shape != (num,):
        raise ValueError(f"example_weight has shape {list(weights.shape)}, but wants one number per example: [{num}].")
    if mask is None:
        return weights
    counts = [jnp.any(leaf.reshape(num, -1), axis=1) for leaf in jax.tree.leaves(mask)]
    return jnp.where(jnp.any(jnp.stack(counts), axis=0), weights, 0)
