"""Latent flows on a linear Gaussian model, where the bound, its gap and the marginal are known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowsolve as fs
from flowsolve import latent

KEY = jax.random.key(2)
STD, SHIFT, SCALE = 0.3, 0.4, 1.7
# Orthogonal columns, so that the posterior of independent latents is independent.
WEIGHT = np.array([[1.0, 0.5], [-2.0, 0.5], [0.5, 1.0]])
OFFSET = np.array([0.2, -0.1, 0.5])
MEAN, VARIANCES = np.array([0.3, -0.6]), np.array([0.5, 1.2])  # of u
POSTERIOR_VARIANCES = 1 / (1 / VARIANCES + (WEIGHT**2).sum(axis=0) / STD**2)
X = np.array([[0.5, -1.0, 0.3], [1.5, 0.2, -2.0]])


class LinearAutoencoder(eqx.Module):
    """Encodes x as N(gain x + offset, std^2), decodes u as weight u + bias."""

    gain: jax.Array
    offset: jax.Array
    log_std: jax.Array
    weight: jax.Array
    bias: jax.Array
    latent: jax.ShapeDtypeStruct = jax.ShapeDtypeStruct((2,), jnp.float32)

    def encode(self, x):
        return self.gain @ x + self.offset, self.log_std

    def decode(self, u):
        return self.weight @ u + self.bias


class LinearNetwork(eqx.Module):
    """A velocity linear in x and t."""

    weight: jax.Array

    def __call__(self, t, x, args, *, key=None):
        return self.weight @ jnp.append(x, t.astype(x.dtype))


def exact_autoencoder(error=0.0, widening=1.0):
    """With the exact posterior, or one whose mean is off by `error` and whose deviation by a factor."""
    gain = POSTERIOR_VARIANCES[:, None] * WEIGHT.T / STD**2
    offset = POSTERIOR_VARIANCES * MEAN / VARIANCES - gain @ OFFSET + error
    log_std = 0.5 * np.log(POSTERIOR_VARIANCES) + np.log(widening)
    return LinearAutoencoder(*(jnp.asarray(v, jnp.float32) for v in (gain, offset, log_std, WEIGHT, OFFSET)))


PRIOR = fs.testing.Gaussian(jnp.asarray((MEAN - SHIFT) * SCALE, jnp.float32), VARIANCES * SCALE**2)
FLOW = PRIOR.flow(fs.paths.Linear(), fs.predictions.Velocity())
MODEL = latent.LatentFlow(FLOW, exact_autoencoder(), shift=SHIFT, scale=SCALE)
MARGINAL_MEAN = WEIGHT @ MEAN + OFFSET
MARGINAL = WEIGHT @ np.diag(VARIANCES) @ WEIGHT.T + STD**2 * np.eye(3)


def log_normal(x, mean, covariance):
    error = x - mean
    quadratic = np.einsum("...i,ij,...j->...", error, np.linalg.inv(covariance), error)
    return -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1])


def trainable(key=KEY):
    """A small network and an autoencoder to be trained with it."""
    gain, weight, network = (0.3 * jax.random.normal(k, (2, 3)) for k in jax.random.split(key, 3))
    autoencoder = LinearAutoencoder(gain, jnp.zeros(2), jnp.full(2, -1.0), weight.T, jnp.zeros(3))
    flow = fs.Flow(LinearNetwork(network), fs.paths.Linear(), fs.predictions.Velocity())
    return latent.LatentFlow(flow, autoencoder, shift=SHIFT, scale=SCALE)


def examples(num, key=KEY):
    u_key, noise_key = jax.random.split(key)
    u = MEAN + np.sqrt(VARIANCES) * np.asarray(jax.random.normal(u_key, (num, 2)))
    noise = STD * np.asarray(jax.random.normal(noise_key, (num, 3)))
    return jnp.asarray(u @ WEIGHT.T + OFFSET + noise, jnp.float32)


# --- there and back -------------------------------------------------------------------------------------------------


def test_samples_are_decoded_latents():
    """Moments of W u + b, u ~ N(m, C), in standard errors: the scale and the shift are undone."""
    num = 8_000
    z = fs.sample(MODEL, MODEL.like, num=num, key=KEY, solver=fs.solvers.UniPC(2), grid=fs.grids.Uniform(20))
    x = np.asarray(jax.vmap(MODEL.decode)(z), np.float64)
    covariance = WEIGHT @ np.diag(VARIANCES) @ WEIGHT.T
    variances = np.diag(covariance)
    assert np.all(np.abs(x.mean(axis=0) - MARGINAL_MEAN) < 4.5 * np.sqrt(variances / num))
    error = np.sqrt((np.outer(variances, variances) + covariance**2) / num)
    assert np.all(np.abs(np.cov(x, rowvar=False) - covariance) < 4.5 * error)


def test_encode_is_the_mean_or_a_draw():
    x = jnp.asarray(X[0], jnp.float32)
    precise = np.diag(1 / VARIANCES) + WEIGHT.T @ WEIGHT / STD**2
    mean = np.linalg.solve(precise, MEAN / VARIANCES + WEIGHT.T @ (X[0] - OFFSET) / STD**2)
    np.testing.assert_allclose(MODEL.encode(x), (mean - SHIFT) * SCALE, rtol=1e-4)
    z, _ = eqx.filter_jit(MODEL.encode_batch)(KEY, (jnp.broadcast_to(x, (8_000, 3)), None))
    deviations = SCALE * np.sqrt(POSTERIOR_VARIANCES)
    assert np.all(np.abs(z.mean(axis=0) - (mean - SHIFT) * SCALE) < 4.5 * deviations / np.sqrt(8_000))
    np.testing.assert_allclose(z.std(axis=0), deviations, rtol=4.5 / np.sqrt(16_000))
    np.testing.assert_allclose(MODEL.decode(MODEL.encode(x)), WEIGHT @ mean + OFFSET, rtol=1e-4)


def test_standardised_latents_have_mean_zero_and_unit_variance():
    x = examples(6_000)
    # Of a posterior so wide that its own variance counts.
    wide = latent.LatentFlow(FLOW, exact_autoencoder(widening=5.0))
    z, _ = eqx.filter_jit(latent.standardised(wide, x).encode_batch)(KEY, (x, None))
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    # Of the model's own data the aggregated posterior is the prior.
    model = latent.standardised(MODEL, x)
    np.testing.assert_allclose(model.shift, MEAN.mean(), atol=0.03)
    np.testing.assert_allclose(1 / model.scale**2, VARIANCES.mean() + MEAN.var(), rtol=0.05)


# --- the bound ------------------------------------------------------------------------------------------------------


def test_the_bound_is_tight_with_the_exact_posterior():
    """Then each single draw is ln p(x), whatever u is."""
    keys = jax.random.split(KEY, 4)
    bound = jax.vmap(lambda x, key: latent.likelihood_bound(MODEL, x, std=STD, key=key))
    x = np.concatenate([X, X])
    np.testing.assert_allclose(
        bound(jnp.asarray(x, jnp.float32), keys), log_normal(x, MARGINAL_MEAN, MARGINAL), rtol=1e-4
    )


def test_the_gap_of_the_bound_is_a_divergence():
    """E_q = ln p(x) - KL(q || posterior), with q off by a shift and 1.5 times as wide; over 4,000 draws."""
    error, widening, num = 0.1, 1.5, 4_000
    model = latent.LatentFlow(FLOW, exact_autoencoder(error, widening), shift=SHIFT, scale=SCALE)

    def density(flow, z, args, *, key):
        del args, key
        return flow.oracle.log_prob(flow.path, 0.0, z)

    @jax.jit
    @jax.vmap
    def bound(key):
        return latent.likelihood_bound(model, jnp.asarray(X[0], jnp.float32), std=STD, key=key, density=density)

    found = np.asarray(bound(jax.random.split(KEY, num)), np.float64)
    divergence = 0.5 * np.sum(error**2 / POSTERIOR_VARIANCES + widening**2 - 1 - 2 * np.log(widening))
    want = log_normal(X[0], MARGINAL_MEAN, MARGINAL) - divergence
    assert divergence > 0.5
    assert abs(found.mean() - want) < 4.5 * found.std() / np.sqrt(num)


# --- training -------------------------------------------------------------------------------------------------------


def test_autoencoding_is_the_negative_bound_in_closed_form():
    """E |x - W u - b|^2 and KL of N(mean, std^2) from N(0, I), by NumPy, over 4,000 copies of one example."""
    num, beta = 4_000, 0.7
    value, terms = eqx.filter_jit(latent.Autoencoding(STD, beta=beta))(
        MODEL, jnp.broadcast_to(jnp.asarray(X[1], jnp.float32), (num, 3)), key=KEY
    )
    mean = POSTERIOR_VARIANCES * (MEAN / VARIANCES + WEIGHT.T @ (X[1] - OFFSET) / STD**2)
    square = np.sum((X[1] - WEIGHT @ mean - OFFSET) ** 2) + np.sum(WEIGHT**2 @ POSTERIOR_VARIANCES)
    reconstruction = 0.5 * square / STD**2 + 1.5 * np.log(2 * np.pi * STD**2)
    divergence = 0.5 * np.sum(mean**2 + POSTERIOR_VARIANCES - 1 - np.log(POSTERIOR_VARIANCES))
    error = 4.5 * np.std(np.asarray(terms.reconstruction)) / np.sqrt(num)
    assert abs(terms.reconstruction.mean() - reconstruction / 3) < error
    np.testing.assert_allclose(terms.prior, divergence / 3, rtol=1e-4)
    assert abs(value - (reconstruction + beta * divergence) / 3) < error


def test_an_autoencoder_trained_by_itself_reaches_the_entropy():
    """Data of a linear Gaussian model with the prior N(0, I): the optimum is E[-ln p(x)]/d. The flow stays as it is."""
    covariance = WEIGHT @ WEIGHT.T + STD**2 * np.eye(3)
    u, noise = jax.random.normal(KEY, (4_000, 2)), jax.random.normal(jax.random.key(9), (4_000, 3))
    x = u @ jnp.asarray(WEIGHT.T, jnp.float32) + STD * noise
    model = trainable()
    optimiser = optax.partition(
        {"autoencoder": optax.adam(optax.cosine_decay_schedule(3e-2, 400)), "flow": optax.set_to_zero()}, latent.labels
    )
    batches = fs.data.Batches(x, batch_size=256, key=KEY)
    loss = latent.Autoencoding(STD)
    *_, state = fs.training.fit(loss, model, batches, optimiser, steps=400, key=KEY, ema=None, progress=False)
    value, _ = eqx.filter_jit(loss)(state.flow, x, key=KEY)
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1] / 3
    assert entropy - 0.03 < value < entropy + 0.05
    np.testing.assert_array_equal(state.flow.flow.network.weight, model.flow.network.weight)
    assert (state.flow.shift, state.flow.scale) == (SHIFT, SCALE)
    # Then a flow on its latents, by the loss of any flow.
    model = latent.standardised(state.flow, x)
    batches = fs.data.Batches(x, batch_size=256, key=KEY, transform=model.encode_batch)
    optimiser = optax.partition({"autoencoder": optax.set_to_zero(), "flow": optax.adamw(3e-3)}, latent.labels)
    *_, after = fs.training.fit(
        fs.losses.Regression(), model, batches, optimiser, steps=20, key=KEY, ema=None, progress=False
    )
    np.testing.assert_array_equal(after.flow.autoencoder.gain, model.autoencoder.gain)
    assert not np.array_equal(after.flow.flow.network.weight, model.flow.network.weight)


def test_cross_entropy_of_an_exact_flow_is_its_density():
    """The `prior` of `Joint` at two latents differs by ln p(z), as the encoder's entropy is the same."""
    num = 20_000
    encoder = eqx.tree_at(lambda e: (e.gain, e.log_std), exact_autoencoder(), (jnp.eye(2, 3), jnp.full(2, -8.0)))
    model = latent.LatentFlow(FLOW, encoder, shift=SHIFT, scale=SCALE)
    loss = eqx.filter_jit(latent.Joint(latent.Autoencoding(STD)))
    x = jnp.asarray([[2.0, 1.0, 0.0], [-0.3, 0.2, 0.0]])
    z = jax.vmap(model.encode)(x)
    priors = [3 * np.asarray(loss(model, jnp.broadcast_to(row, (num, 3)), key=KEY)[1].prior) for row in x]
    difference = np.asarray(priors[0] - priors[1], np.float64)
    density = [float(PRIOR.log_prob(FLOW.path, 0.0, row)) for row in z]
    assert abs(density[1] - density[0]) > 2
    # Two sets of the same draws: the standard error is that of their difference.
    assert abs(difference.mean() - (density[1] - density[0])) < 4.5 * difference.std() / np.sqrt(num)


def test_joint_training_sends_each_gradient_where_it_says(x64):
    """Flow: that of `matching` on the latents as data. Decoder: that of the reconstruction. Encoder: both its terms."""
    model, x, beta = trainable(), examples(16).astype(float), 0.5
    joint = latent.Joint(latent.Autoencoding(STD, beta=beta), times=fs.times.LogSNRUniform(t_min=0.05, t_max=0.9))
    draw_key, prior_key, matching_key = jax.random.split(KEY, 3)

    def parts(model):
        """The three terms written out, for an encoder of the test's own draws."""
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(draw_key, i), 1)[0])(jnp.arange(16))
        means, log_stds = jax.vmap(model.autoencoder.encode)(x)
        u = means + jnp.exp(log_stds) * jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
        square = jnp.sum((x - jax.vmap(model.autoencoder.decode)(u)) ** 2)
        z = (u - SHIFT) * SCALE
        ratio = jnp.log(0.95 / 0.05) - jnp.log(0.1 / 0.9)
        regression = fs.losses.Regression(times=joint.times, target=fs.predictions.Noise())
        cross_entropy = 2 * ratio * regression(model.flow, z, key=prior_key)[0]
        matching = fs.losses.Regression()(model.flow, z, key=matching_key)[0]
        return square / 16 / 3 / (2 * STD**2), (cross_entropy - jnp.sum(log_stds) / 16) / 3, matching

    @eqx.filter_jit
    def gradients(model):
        whole = eqx.filter_grad(lambda model: joint(model, x, key=KEY)[0])(model)
        return whole, *(eqx.filter_grad(lambda model, i=i: parts(model)[i])(model) for i in range(3))

    whole, reconstruction, prior, matching = gradients(model)

    def same(a, b):
        for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)

    same(whole.flow, matching.flow)
    same(whole.autoencoder.weight, reconstruction.autoencoder.weight)
    for name in ("gain", "offset", "log_std"):
        first, second = (getattr(part.autoencoder, name) for part in (reconstruction, prior))
        same(getattr(whole.autoencoder, name), first + beta * second)
        assert jnp.abs(second).max() > 1e-3
    # `Autoencoding` leaves the flow alone.
    alone = eqx.filter_grad(lambda model: joint.autoencoding(model, x, key=KEY)[0])(model)
    assert all(not leaf.any() for leaf in jax.tree.leaves(alone.flow))


def test_a_loss_of_an_example_depends_on_its_place_and_key_alone():
    model, x = trainable(), examples(8)
    for loss in (latent.Autoencoding(STD), latent.Joint(latent.Autoencoding(STD))):
        whole, part = (eqx.filter_jit(loss)(model, some, key=KEY)[1] for some in (x, x[:3]))
        for a, b in zip(whole, part, strict=True):
            np.testing.assert_allclose(a[:3], b, rtol=1e-4)


@pytest.mark.quick
def test_bad_input_is_named(untyped):
    x = jnp.zeros(3)
    with pytest.raises(TypeError, match="without encode and latent"):
        latent.LatentFlow(FLOW, type("Half", (), {"decode": None})())
    with pytest.raises(ValueError, match="scale = 0"):
        latent.LatentFlow(FLOW, exact_autoencoder(), scale=0.0)
    for scale in (np.float32(0), jnp.asarray(jnp.inf), jnp.ones(2)):
        with pytest.raises(ValueError, match=r"scale = .*wants one finite number, not 0"):
            latent.LatentFlow(FLOW, exact_autoencoder(), scale=scale)
    with pytest.raises(TypeError, match="autoencoder's latent holds a int"):
        latent.LatentFlow(FLOW, eqx.tree_at(lambda e: e.latent, exact_autoencoder(), (2,)))
    with pytest.raises(ValueError, match="shift = nan"):
        latent.LatentFlow(FLOW, exact_autoencoder(), shift=jnp.nan)
    with pytest.raises(ValueError, match="wants mean and log_std each of the shape"):
        wrong = eqx.tree_at(lambda e: e.log_std, exact_autoencoder(), jnp.zeros(3))
        latent.LatentFlow(FLOW, wrong).encode(x)
    with pytest.raises(ValueError, match="decoded a latent as"):
        wrong = eqx.tree_at(lambda e: (e.weight, e.bias), exact_autoencoder(), (jnp.ones((4, 2)), jnp.ones(4)))
        latent.Autoencoding(STD)(latent.LatentFlow(FLOW, wrong), x[None], key=KEY)
    with pytest.raises(ValueError, match="std = 0"):
        latent.Autoencoding(0.0)
    for batch in (jnp.zeros((0, 3)), jnp.zeros(())):
        with pytest.raises(ValueError, match="a leading axis of at least one example"):
            latent.Autoencoding(STD)(MODEL, batch, key=KEY)
    with pytest.raises(ValueError, match="weight >= 0"):
        latent.Autoencoding(STD, beta=-1.0)
    with pytest.raises(ValueError, match="inside of a jit"):
        eqx.filter_jit(latent.standardised)(MODEL, x[None])
    with pytest.raises(ValueError, match=r"standard deviation .*, which no scale brings to 1"):
        values = jnp.zeros((2, 3)), jnp.full(2, 0.3), jnp.full(2, -jnp.inf)
        constant = eqx.tree_at(lambda e: (e.gain, e.offset, e.log_std), exact_autoencoder(), values)
        latent.standardised(latent.LatentFlow(FLOW, constant), jnp.zeros((4, 3)))
    for std in (0.0, -1.0, jnp.nan):
        with pytest.raises(ValueError, match=r"std = .*wants a deviation > 0"):
            latent.likelihood_bound(MODEL, x, std=std, key=KEY)
    for call in (
        lambda: latent.likelihood_bound(FLOW, x, std=STD, key=KEY),
        lambda: latent.standardised(FLOW, x[None]),
    ):
        with pytest.raises(TypeError, match=r"model is a OracleFlow, but wants fs\.latent\.LatentFlow"):
            call()
    with pytest.raises(TypeError, match="labels got a Thresholded without autoencoder"):
        latent.labels(eqx.filter(fs.guidance.Thresholded(MODEL, fs.guidance.Clip()), eqx.is_array))
