r"""A flow in the latent space of an autoencoder: sampling, encoding, a bound on the likelihood, and training.

An autoencoder is any module that has, for ONE example, `encode(x)` -> (mean, log_std) of $q(u|x) = N(\mathrm{mean},
\mathrm{std}^2)$, `decode(u)` -> x, and `latent`, the `jax.ShapeDtypeStruct` of u. The flow lives on the scaled latents
$z = (u - \mathrm{shift}) \cdot \mathrm{scale}$, and with a Gaussian decoder, $p(x|u) = N(\mathrm{decode}(u), s^2 I)$,

$$\ln p(x) \;\ge\; E_{q(u|x)}\big[\ln p(x|u) + \ln p_\mathrm{flow}(z) + k \ln|\mathrm{scale}| - \ln q(u|x)\big]$$

where k is the number of elements of a latent, and d below that of the data.

Trained apart, first the autoencoder and then the flow on its latents:

    model = fs.latent.LatentFlow(flow, autoencoder)
    optimiser = optax.partition({"autoencoder": optax.adamw(1e-3), "flow": optax.set_to_zero()}, fs.latent.labels)
    for state in fs.training.fit(fs.latent.Autoencoding(0.1), model, batches, optimiser, steps=2_000, key=key): ...
    model = fs.latent.standardised(state.ema_flow, x)

    batches = fs.data.Batches(x, batch_size=256, key=key, transform=model.encode_batch)
    for state in fs.training.fit(fs.losses.Regression(), model, batches, optimiser, steps=2_000, key=key): ...

(with an optimiser that leaves the autoencoder alone); or at once, with `Joint`. Then, as with any flow,

    x = jax.vmap(model.decode)(fs.sample(model, model.like, num=64, key=key))
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ._checks import check, check_key, check_positive, check_state, check_type, describe, is_concrete, known
from ._numerics import as_scalar, as_state, frozen, normal_like, state_like, tree_dot, tree_size
from ._types import Args, Like, PRNGKey, Scalar, ScalarLike, State
from .flow import AbstractFlow, AbstractFlowWrapper, check_flow
from .likelihood import log_prob
from .losses import Regression
from .predictions import Noise
from .times import LogSNRUniform

__all__ = ["Autoencoding", "Joint", "LatentFlow", "Terms", "labels", "likelihood_bound", "standardised"]

Latent = Float[Array, "..."]


class LatentFlow(AbstractFlowWrapper):
    """A flow on the latents of an autoencoder, which it carries with it.

    It is the flow of the latents z itself, so that `sample`, `solve`, `encode`, guidance, training and checkpoints take
    it as it is; `encode` and `decode` of its own lead from the data to z and back.

    **Arguments:**

    - `flow`: any flow on latents;
    - `autoencoder`: any module as at the top of this page;
    - `shift`, `scale`: z = (u - shift) scale; plain numbers, which training leaves alone, see `standardised`.

    **Raises:** `TypeError` for an autoencoder without these, `ValueError` for a shift or a scale that is not finite and
    for a scale of 0.
    """

    flow: AbstractFlow
    autoencoder: Any
    shift: ScalarLike
    scale: ScalarLike

    def __init__(self, flow: AbstractFlow, autoencoder: Any, *, shift: ScalarLike = 0.0, scale: ScalarLike = 1.0):
        check_flow(flow, "flow")
        missing = [name for name in ("encode", "decode", "latent") if not hasattr(autoencoder, name)]
        if missing:
            raise TypeError(
                f"LatentFlow got a {type(autoencoder).__name__} without {' and '.join(missing)}, but wants an "
                "autoencoder with encode(x) -> (mean, log_std), decode(u) -> x and latent, the shape of u."
            )
        check_state(autoencoder.latent, "The autoencoder's latent")
        for name, number in (("shift", shift), ("scale", scale)):
            value = known(number)
            if is_concrete(number) and not (value.ndim == 0 and np.isfinite(value) and (value != 0 or name == "shift")):
                wanted = "one finite number" if name == "shift" else "one finite number, not 0"
                raise ValueError(f"LatentFlow got {name} = {number}, but wants {wanted}.")
        self.flow, self.autoencoder, self.shift, self.scale = flow, autoencoder, shift, scale

    @property
    def like(self) -> Like:
        """The shape and dtype of one latent, for `sample`."""
        return state_like(self.autoencoder.latent)

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        return self.flow.output(t, x, args, key=key)

    def posterior(self, x: State) -> tuple[Latent, Latent]:
        """(mean, log_std) of q(u|x) for ONE example, before shift and scale.

        **Raises:** `ValueError` if the autoencoder gives another shape than its `latent`.
        """
        mean, log_std = as_state(self.autoencoder.encode(x))
        wanted = self.autoencoder.latent.shape
        if jnp.shape(mean) != wanted or jnp.shape(log_std) != wanted:
            raise ValueError(
                f"The autoencoder encoded one example {describe(x)} as {describe((mean, log_std))}, but wants mean and "
                f"log_std each of the shape {list(wanted)} of its latent: give it one example, without a batch axis."
            )
        return mean, log_std

    def encode(self, x: State, *, key: PRNGKey | None = None) -> Latent:
        """ONE example to its latent z: the posterior's mean or, with a key, a draw from it."""
        mean, log_std = self.posterior(x)
        return self.scaled(mean if key is None else _draw(check_key(key, "a latent"), mean, log_std))

    def decode(self, z: Latent) -> State:
        """A latent z to ONE example."""
        return self.autoencoder.decode(z / _like(self.scale, z) + _like(self.shift, z))

    def scaled(self, u: Latent) -> Latent:
        """z = (u - shift) scale."""
        return (u - _like(self.shift, u)) * _like(self.scale, u)

    def encode_batch(self, key: PRNGKey, batch: tuple[State, Args]) -> tuple[Latent, Args]:
        """A batch (x, args) to (z, args) with draws from the posterior: a `transform` of `data.Batches`."""
        x, args = batch
        keys = jax.random.split(key, len(jax.tree.leaves(x)[0]))
        return jax.vmap(lambda x, key: self.encode(x, key=key))(x, keys), args


def _like(value: ScalarLike, u: Latent) -> Array:
    return as_scalar(value).astype(u.dtype)


def _draw(key: PRNGKey, mean: Latent, log_std: Latent) -> Latent:
    return mean + jnp.exp(log_std) * normal_like(key, mean)


def standardised(model: LatentFlow, x: State) -> LatentFlow:
    """The model with shift and scale at which the latents of `x` have mean 0 and standard deviation 1.

    Moments over all elements of the posteriors of all examples, E[u] = E[mean] and Var[u] = Var[mean] + E[std^2].

    **Arguments:** `model`: with its trained autoencoder; its flow is to be trained afterwards; `x`: a batch, a
    thousand examples will do.

    **Returns:** the model with other numbers. Not inside of a jit, as the numbers are plain ones.

    **Raises:** `ValueError` inside of a jit, or for latents that are all the same or not finite.

    Source: Rombach et al. (2021), arXiv 2112.10752, whose factor is the scale, without a shift.
    """
    check_type(model, LatentFlow, "model", "fs.latent.LatentFlow(flow, autoencoder)")
    means, log_stds = _posteriors(model, x)
    if not is_concrete(means):
        raise ValueError("standardised was called inside of a jit, but makes plain numbers: call it outside.")
    shift = jnp.mean(means)
    std = jnp.sqrt(jnp.mean((means - shift) ** 2) + jnp.mean(jnp.exp(2 * log_stds)))
    # Of equal numbers rounding leaves a deviation as well.
    if not 4 * jnp.finfo(means.dtype).eps * abs(float(shift)) < float(std) < math.inf:
        raise ValueError(
            f"The latents of {len(means)} examples have the standard deviation {float(std):g}, which no scale brings "
            "to 1: give standardised examples that differ, and an autoencoder whose latents are finite."
        )
    return LatentFlow(model.flow, model.autoencoder, shift=float(shift), scale=1 / float(std))


@eqx.filter_jit
def _posteriors(model: LatentFlow, x: State) -> tuple[Latent, Latent]:
    return jax.vmap(model.posterior)(x)


def labels(parameters: PyTree) -> PyTree:
    """The parameters of a `LatentFlow`, each replaced by "autoencoder" or "flow": for `optax.partition`.

    One optimiser for each part, or `optax.set_to_zero()` for one that is not to be trained, which a weight decay would
    otherwise move.

    **Raises:** `TypeError` for the parameters of anything else.
    """

    missing = [name for name in ("flow", "autoencoder") if not hasattr(parameters, name)]
    if missing:
        raise TypeError(
            f"labels got a {type(parameters).__name__} without {' and '.join(missing)}, but wants the parameters of a "
            "LatentFlow: train that, and guide or wrap it afterwards."
        )

    def mark(name: str) -> PyTree:
        return jax.tree.map(lambda _: name, getattr(parameters, name))

    parts = mark("flow"), mark("autoencoder")
    return eqx.tree_at(lambda p: (p.flow, p.autoencoder), parameters, parts, is_leaf=lambda leaf: leaf is None)


# --- the likelihood -------------------------------------------------------------------------------------------------


def likelihood_bound(
    model: LatentFlow,
    x: State,
    args: Args = None,
    *,
    std: ScalarLike,
    key: PRNGKey,
    density: Callable[..., Scalar] = log_prob,
) -> Scalar:
    """A draw of the lower bound on ln p(x) of ONE example, in nats; batch with `batched`, average over keys.

    From one u ~ q(u|x): ln p(x|u) + ln p_flow(z) + k ln|scale| - ln q(u|x). Its mean is at most ln p(x), by the
    divergence of q from the model's own posterior.

    **Arguments:** `model`, `args`: the condition of its flow; `x`: one example; `std`: s of the decoder p(x|u) =
    N(decode(u), s^2), in units of x; `key`: for u, and for a divergence that draws; `density`: (flow, z, args, key=) ->
    ln p(z), such as `eqx.Partial(fs.log_prob, divergence=fs.divergence.Hutchinson())`.

    **Returns:** a scalar. Over several keys, the logarithm of the mean exponential is a tighter bound (Burda et al.,
    2015, arXiv 1509.00519).

    Source: Kingma & Welling (2013), arXiv 1312.6114; with a flow as the prior Vahdat, Kreis & Kautz (2021), arXiv
    2106.05931.
    """
    check_type(model, LatentFlow, "model", "fs.latent.LatentFlow(flow, autoencoder)")
    std = as_scalar(std)
    std = check(std, ~(known(std) > 0), "likelihood_bound got std = {}, but wants a deviation > 0.", std)
    draw_key, density_key = jax.random.split(check_key(key, "a latent"))
    x = as_state(x)
    mean, log_std = model.posterior(x)
    u = _draw(draw_key, mean, log_std)
    # (u - mean)/std is the draw itself.
    log_q = _log_normal(normal_like(draw_key, mean), 1.0) - as_scalar(jnp.sum(log_std))
    log_p = density(model.flow, model.scaled(u), args, key=density_key)
    log_scale = u.size * jnp.log(jnp.abs(as_scalar(model.scale)))
    return _log_decoder(model, x, u, std) + log_p + log_scale - log_q


def _log_normal(error: State, std: ScalarLike) -> Scalar:
    """ln N(error; 0, std^2 I)."""
    std = as_scalar(std)
    size = tree_size(error)
    return -0.5 * (as_scalar(tree_dot(error, error)) / std**2 + size * math.log(2 * math.pi)) - size * jnp.log(std)


def _log_decoder(model: LatentFlow, x: State, u: Latent, std: ScalarLike) -> Scalar:
    """ln p(x|u)."""
    decoded = as_state(model.autoencoder.decode(u))
    if describe(decoded) != describe(x):
        raise ValueError(f"The autoencoder decoded a latent as {describe(decoded)} for data {describe(x)}.")
    return _log_normal(jax.tree.map(jnp.subtract, x, decoded), std)


# --- training -------------------------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """What the loss of a batch is made of, each example by itself.

    - `reconstruction`: -ln p(x|u)/d, nats per element of the data;
    - `prior`: per element of the data as well, KL(q(u|x) || N(0, I))/d of `Autoencoding`; of `Joint` -ln p_flow(z) +
      ln q(u|x) in its place, up to a constant.
    """

    reconstruction: Float[Array, " batch"]
    prior: Float[Array, " batch"]


class Autoencoding(eqx.Module):
    r"""The loss of a variational autoencoder, -ELBO with the prior N(0, I), in nats per element of the data:

    $$\frac1d\big(-\ln p(x|u) + \beta\, KL(q(u|x)\,\|\,N(0, I))\big), \qquad u \sim q(u|x)$$

    It trains a `LatentFlow`'s autoencoder; its flow gets no gradient, see `labels`.

    **Arguments:** `std`: s of the decoder p(x|u) = N(decode(u), s^2), in units of x; `beta`: the weight of the prior, 1
    for the bound itself; small for latents that a flow is to model, which need regularity, not normality.

    Source: Kingma & Welling (2013), arXiv 1312.6114; Higgins et al. (2017), beta-VAE. Deviation: per element.
    """

    std: Scalar = eqx.field(converter=as_scalar)
    beta: Scalar = eqx.field(default=1.0, converter=as_scalar)

    def __check_init__(self):
        check_positive(self, "std")
        if is_concrete(self.beta) and not float(self.beta) >= 0:
            raise ValueError(f"Autoencoding got beta = {float(self.beta):g}, but wants a weight >= 0.")

    def __call__(self, model: LatentFlow, x: State, args: Args = None, *, key: PRNGKey) -> tuple[Scalar, Terms]:
        """The mean over a batch, and its terms; `args` is not used. Example i depends on `key` and i alone."""
        del args

        def prior(mean: Latent, log_std: Latent) -> Scalar:
            return as_scalar(0.5 * jnp.sum(mean**2 + jnp.exp(2 * log_std) - 1 - 2 * log_std))

        _, reconstruction, (means, log_stds), sizes = _autoencoded(self, model, x, key)
        terms = Terms(reconstruction, jax.vmap(prior)(means, log_stds) / sizes)
        return jnp.mean(terms.reconstruction + self.beta * terms.prior), terms


class Joint(eqx.Module):
    r"""Autoencoder and flow trained at once, the flow as the autoencoder's prior.

    $$\frac1d\big(-\ln p(x|u) + \beta\,[\ln q(u|x) + CE(\bar\theta, z)]\big) + \mathrm{matching}(\theta, \bar z)$$

    with theta the flow's parameters and a bar where the gradient stops. So the encoder is moved by the first term and,
    as beta says, towards latents that the flow finds likely; the decoder by the first alone; the flow by `matching`
    alone, as if the latents were data. For the cross-entropy stands its bound by the noise that the flow predicts, over
    all levels of noise between the bounds of `times`,

    $$CE(z) = \frac{\lambda_\max - \lambda_\min}{2}\; E_{\lambda, \epsilon} |\epsilon - \hat\epsilon(z_\lambda)|^2
      \quad\text{(+ const.)}, \qquad \lambda = \ln(\alpha^2/\sigma^2) \text{ uniform,}$$

    which for an exact flow is -ln p(z) up to a constant.

    **Arguments:** `autoencoding`: the decoder's std and beta; `matching`: the flow's own loss; `times`: the levels of
    the cross-entropy, on `Linear` from t = 0.01 to 0.99 or so. Two evaluations of the flow an example.

    Source: Vahdat, Kreis & Kautz (2021), arXiv 2106.05931 (LSGM, with importance sampling of the likelihood weighting
    for the encoder, which uniform log-SNR is, and a weighting of its own for the flow). Deviation: no mixed normal
    component in the score.
    """

    autoencoding: Autoencoding
    matching: Regression = Regression()
    times: LogSNRUniform = eqx.field(default_factory=lambda: LogSNRUniform(t_min=0.01, t_max=0.99))

    def __check_init__(self):
        check_type(self.autoencoding, Autoencoding, "autoencoding", "an instance such as fs.latent.Autoencoding(0.1)")
        check_type(self.matching, Regression, "matching", "an instance such as fs.losses.Regression()")
        check_type(self.times, LogSNRUniform, "times", "an instance such as fs.times.LogSNRUniform(t_min=0.01)")

    def __call__(self, model: LatentFlow, x: State, args: Args = None, *, key: PRNGKey) -> tuple[Scalar, Terms]:
        """The mean over a batch, and its terms; `args`: the flow's condition, with the same leading axis."""
        draw_key, prior_key, matching_key = jax.random.split(check_key(key, "a training loss"), 3)
        u, reconstruction, (_, log_stds), sizes = _autoencoded(self.autoencoding, model, x, draw_key)
        z = jax.vmap(model.scaled)(u)
        entropy = jnp.sum(log_stds.reshape(len(u), -1), axis=1).astype(reconstruction.dtype)

        path = model.path
        low, high = self.times.bounds(path)
        span = 0.5 * (path.log_snr(low) - path.log_snr(high)) * u[0].size
        noise = Regression(times=self.times, target=Noise())
        cross_entropy = span * noise(frozen(model.flow), z, args, key=prior_key)[1].losses

        terms = Terms(reconstruction, (cross_entropy - entropy) / sizes)
        matching, _ = self.matching(model.flow, jax.lax.stop_gradient(z), args, key=matching_key)
        return jnp.mean(terms.reconstruction + self.autoencoding.beta * terms.prior) + matching, terms


def _autoencoded(
    loss: Autoencoding, model: LatentFlow, x: State, key: PRNGKey
) -> tuple[Latent, Float[Array, " batch"], tuple[Latent, Latent], int]:
    """Of a batch: draws u, -ln p(x|u)/d, the posteriors and d."""
    check_type(model, LatentFlow, "model", "fs.latent.LatentFlow(flow, autoencoder)")
    key = check_key(key, "a training loss")
    x = as_state(jax.tree.map(jnp.asarray, x))
    if not all(jnp.shape(leaf)[:1] > (0,) for leaf in jax.tree.leaves(x)):
        raise ValueError(f"x is {describe(x)}, but a loss wants a batch: a leading axis of at least one example.")
    size = tree_size(jax.tree.map(lambda leaf: leaf[0], x))

    def one(index: Array, x: State) -> tuple[Latent, Scalar, tuple[Latent, Latent]]:
        mean, log_std = model.posterior(x)
        u = _draw(jax.random.fold_in(key, index), mean, log_std)
        return u, -_log_decoder(model, x, u, loss.std) / size, (mean, log_std)

    return *jax.vmap(one)(jnp.arange(len(jax.tree.leaves(x)[0])), x), size
