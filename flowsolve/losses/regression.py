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

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Real

from .._checks import check_type, is_concrete
from .._numerics import as_scalar, linear_combination, normal_like
from .._types import Args, Like, PRNGKey, Scalar, ScalarLike, State
from ..bridges import BridgeFlow
from ..couplings import AbstractCoupling, Independent, Pairs
from ..flow import AbstractFlow
from ..predictions import AbstractPrediction, error_scale
from ..times import AbstractTimes, Uniform
from ..weights import AbstractWeight
from .batch import Aux, ConditionDropout, check_pairing, mean_of, over_batch, where_finite
from .elementwise import squared

__all__ = ["BridgeRegression", "NormalNoise", "Regression"]


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
      the flow's source is no `sources.Normal`, as it then has no score;
    - `dropout`: None, or `ConditionDropout(probability, null)`: which examples train without their condition.

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
    dropout: ConditionDropout | None = None

    def __check_init__(self):
        wanted = {
            "times": AbstractTimes,
            "target": AbstractPrediction | None,
            "weight": AbstractWeight | None,
            "coupling": AbstractCoupling,
            "dropout": ConditionDropout | None,
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
        output = flow.output(t, flow.path.interpolate(t, x0, noise), args, key=key)
        return self.of_output(flow, output, x0, t=t, noise=noise, mask=mask)

    def of_output(
        self,
        flow: AbstractFlow,
        output: State,
        x0: State,
        *,
        t: ScalarLike,
        noise: State,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> Scalar:
        """The same, from the flow's output at x_t."""
        t = as_scalar(t)
        path = flow.path
        a, b, c = flow.prediction.coefficients(path, t)
        target = (a, b, c) if self.target is None else self.target.coefficients(path, t)
        scale = error_scale(path, t, (a, b), target)

        error = linear_combination((c, -a, -b), (output, x0, noise))
        if self.weight is None:
            return where_finite(scale, mean_of(self.elementwise, scale, error, mask))
        weighted = error_scale(path, t, (a, b), self.weight.coefficients(path, t))
        # At an end the target's scale may be 0 or infinite and the weighted loss finite all the same. A power of 2
        # far out gives its limit, to the last bit if the loss is squared.
        scale = jnp.where(scale == 0, 2.0**-20, jnp.where(jnp.isinf(scale), 2.0**20, scale))
        loss = (weighted / scale) ** 2 * mean_of(self.elementwise, scale, error, mask)
        return where_finite(weighted, loss)

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

        check_source(flow, x0, self.coupling)
        draw = flow.source.sample if self.noise is None else self.noise
        return over_batch(
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
            dropout=self.dropout,
        )


class BridgeRegression(eqx.Module):
    r"""Regression of a `BridgeFlow`'s velocity and, if it has one, of its score.

    Per example, with x_1 the noise that the coupling gave it, z ~ N(0, I) and $x_t$ on the bridge between them,

        mean |velocity - (x_1 - x_0 + gamma' z)|^2 + score_weight * mean |gamma score + z|^2

    **Arguments:**

    - `coupling`: `couplings.Sinkhorn(2 * sigma**2, replace=True)` for the Schroedinger bridge;
    - `times`: inside of 0 and 1, at which gamma' is infinite; uniform from 0.001 to 0.999 by default;
    - `score_weight`: >= 0;
    - `dropout`: as in `Regression`.

    Source: Tong et al. (2023), arXiv 2307.03672. Deviation: the score's weight is gamma^2, with which its target has
    unit variance, up to a constant that of the paper.
    """

    coupling: AbstractCoupling
    times: AbstractTimes = eqx.field(default_factory=lambda: Uniform(t_min=1e-3, t_max=1 - 1e-3))
    score_weight: Scalar = eqx.field(default=1.0, converter=as_scalar)
    dropout: ConditionDropout | None = None

    def __check_init__(self):
        check_type(self.times, AbstractTimes, "times", "an instance such as fs.times.Uniform()")
        check_pairing(self.coupling, self.dropout)
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
        loss = mean_of(squared, jnp.ones_like(t), error, mask)
        if score is None:
            return loss
        error = linear_combination((gamma, 1), (score, noise))
        return loss + self.score_weight * mean_of(squared, jnp.ones_like(t), error, mask)

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

        return over_batch(
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
            dropout=self.dropout,
        )


def check_source(flow: AbstractFlow, x0: State | Pairs, coupling: AbstractCoupling) -> None:
    """Raise where the noise depends on the data and the flow's source says that it does not."""
    if (isinstance(x0, Pairs) or not coupling.independent) and flow.source.has_score:
        what = "Pairs" if isinstance(x0, Pairs) else type(coupling).__name__
        raise TypeError(
            f"{what} made the noise depend on the data, but the flow's source is Normal, from which it would take "
            "a score: make it with source=fs.sources.CoupledNormal(), or fs.sources.Source(draw) for noise of "
            "another law."
        )
