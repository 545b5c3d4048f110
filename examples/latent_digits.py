"""Handwritten digits through a latent space: an autoencoder, a flow on its latents, samples, a bound on the density.

    python examples/latent_digits.py            # about 3 minutes on 2 CPU cores
    python examples/latent_digits.py --smoke    # everything tiny: a check that it runs

Needs `pip install "flowsolve[examples]"`. Data, classifier and distances are those of `digits.py` beside it. A
variational autoencoder takes the 64 pixels to 16 numbers. Its own prior N(0, I) fits them badly; a flow, given the
label, fits them well, whether it is trained after the autoencoder (apart) or with it (jointly). Expect about:

    images                           Frechet  accuracy  RMS error      bits per pixel
    apart: held-out, reconstructed      0.73     0.975       1.22
    decoded from N(0, I)               43.56
    apart: samples of the flow          2.57     0.994                 2.975 +- 0.053
    jointly: held-out, reconstructed    1.23     0.983       1.35
    jointly: samples of the flow        3.61     0.995                 3.099 +- 0.044
    real, training                      1.56     1.000

(On the pixels themselves the flow of `digits.py` has 2.2 to 2.6, and 2.507 bits.)

Written to `outputs/latent_digits/`: digits.png, for each class two held-out digits with what the autoencoder makes of
them, and eight samples of the flow.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import CLASSES, LEVELS, Split, dequantise, draw_picture, frechet_distance, load, quantise, train_classifier

import flowsolve as fs

LIKE = jax.ShapeDtypeStruct((8, 8), jnp.float32)  # one example
STD = 0.15  # of the decoder, in [-1, 1]: about one of the 17 levels


class Size(NamedTuple):
    """How much of everything."""

    steps: int  # of each training
    batch: int
    latent_dim: int
    width: int
    classifier_steps: int
    samples: int  # a multiple of 10
    likelihoods: int  # held-out images


FULL = Size(steps=2_000, batch=256, latent_dim=16, width=256, classifier_steps=1_500, samples=1_000, likelihoods=100)
SMOKE = Size(steps=4, batch=32, latent_dim=4, width=16, classifier_steps=4, samples=20, likelihoods=2)


def training_batches(train: Split, size: Size, key: jax.Array) -> fs.data.Batches:
    """Batches (x, labels) without end, with fresh noise inside the bins each time."""

    def noisy(key: jax.Array, batch: tuple) -> tuple:
        levels, labels = batch
        return dequantise(levels, key), labels

    return fs.data.Batches(train.images, train.labels, batch_size=size.batch, key=key, transform=noisy)


@eqx.filter_jit
def make_model(size: Size, key: jax.Array) -> fs.latent.LatentFlow:
    """An untrained autoencoder with an untrained flow on its latents."""
    encoder_key, network_key = jax.random.split(key)
    autoencoder = fs.nn.MLPVAE(LIKE, latent_dim=size.latent_dim, width=size.width, depth=2, key=encoder_key)
    network = fs.nn.ResidualMLP(
        autoencoder.latent, width=size.width, depth=3, num_classes=CLASSES, dropout=0.1, key=network_key
    )
    return fs.latent.LatentFlow(fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity()), autoencoder)


def fitted(
    loss: eqx.Module, model: fs.latent.LatentFlow, batches: Iterator, parts: tuple[str, ...], size: Size, key: jax.Array
) -> fs.latent.LatentFlow:
    """The model with the averaged weights of a training of some of its parts."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, size.steps // 20, size.steps)
    optimisers = {
        part: optax.adamw(rate, weight_decay=0.01) if part in parts else optax.set_to_zero()
        for part in ("autoencoder", "flow")
    }
    *_, state = fs.training.fit(
        loss,
        model,
        batches,
        optax.partition(optimisers, fs.latent.labels),
        steps=size.steps,
        key=key,
        ema=0.99,
    )
    return state.ema_flow


def trained_apart(model: fs.latent.LatentFlow, train: Split, size: Size, key: jax.Array) -> fs.latent.LatentFlow:
    """First the autoencoder by its bound, then the flow on its latents, brought to unit variance."""
    key, flow_key = jax.random.split(key)
    loss = fs.latent.Autoencoding(STD)
    model = fitted(loss, model, training_batches(train, size, key), ("autoencoder",), size, key)
    model = fs.latent.standardised(model, dequantise(train.images, key))

    def latents(key: jax.Array, batch: tuple) -> tuple:
        levels, labels = batch
        noise_key, draw_key = jax.random.split(key)
        return model.encode_batch(draw_key, (dequantise(levels, noise_key), labels))

    batches = fs.data.Batches(train.images, train.labels, batch_size=size.batch, key=flow_key, transform=latents)
    return fitted(fs.losses.Regression(fs.times.LogitNormal()), model, batches, ("flow",), size, flow_key)


def trained_jointly(model: fs.latent.LatentFlow, train: Split, size: Size, key: jax.Array) -> fs.latent.LatentFlow:
    """Both at once, the flow as the autoencoder's prior."""
    loss = fs.latent.Joint(fs.latent.Autoencoding(STD), matching=fs.losses.Regression(fs.times.LogitNormal()))
    return fitted(loss, model, training_batches(train, size, key), ("autoencoder", "flow"), size, key)


def bits_per_pixel(model: fs.latent.LatentFlow, split: Split, key: jax.Array) -> tuple[float, float]:
    """The bound on real images, mean and standard error: an upper bound on the model's bits."""
    noise_key, draw_key = jax.random.split(key)
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    density = eqx.Partial(fs.log_prob, solver=diffrax.Tsit5(), controller=controller)
    bound = eqx.Partial(fs.latent.likelihood_bound, std=STD, density=density)
    values = fs.batched(bound)(model, dequantise(split.images, noise_key), split.labels, key=draw_key)
    bits = np.asarray(fs.bits_per_dim(values, 64, bin_width=2 / LEVELS))
    return bits.mean(), bits.std() / np.sqrt(len(bits))


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="everything tiny: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/latent_digits"), help="folder for what is written")
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL
    jax.config.update("jax_disable_most_optimizations", options.smoke)
    options.out.mkdir(parents=True, exist_ok=True)
    model_key, train_key, classifier_key, sample_key, bound_key = jax.random.split(jax.random.key(0), 5)
    train, held_out = load()
    judged = Split(held_out.images[: size.likelihoods], held_out.labels[: size.likelihoods])

    classifier = train_classifier(train, size.classifier_steps, classifier_key)
    classify = jax.jit(jax.vmap(lambda image: (classifier.features(image), jnp.argmax(classifier(image)))))
    real_features = np.asarray(classify(held_out.images)[0])
    start = make_model(size, model_key)
    apart, jointly = (train_model(start, train, size, train_key) for train_model in (trained_apart, trained_jointly))

    # Labels 0, ..., 9, 0, ..., 9, ...
    labels = jnp.arange(size.samples) % CLASSES

    def row(name: str, images: jax.Array, wanted: jax.Array | None, rest: str = "") -> None:
        features, guesses = classify(images)
        accuracy = "" if wanted is None else f"{float(jnp.mean(guesses == wanted)):.3f}"
        print(f"{name:<32}{frechet_distance(np.asarray(features), real_features):>8.2f}{accuracy:>10}{rest}")

    print(f"\n{'images':<32}{'Frechet':>8}{'accuracy':>10}{'RMS error':>11}{'bits per pixel':>20}")
    pictures = {}
    for name, model in (("apart", apart), ("jointly", jointly)):
        decode = eqx.filter_jit(lambda model, z: quantise(jax.vmap(model.decode)(z)))
        x = dequantise(held_out.images, bound_key)
        back = decode(model, eqx.filter_jit(jax.vmap(lambda x, model=model: model.encode(x)))(x))
        error = float(jnp.sqrt(jnp.mean((back - held_out.images) ** 2)))
        row(f"{name}: held-out, reconstructed", back, held_out.labels, f"{error:>11.2f}")
        if name == "apart":
            u = jax.random.normal(sample_key, (size.samples, size.latent_dim))
            row("decoded from N(0, I)", quantise(jax.vmap(model.autoencoder.decode)(u)), None)
        settings = {"solver": fs.solvers.UniPC(2), "grid": fs.grids.Uniform(20)}
        z = fs.sample(model, model.like, num=size.samples, key=sample_key, args=labels, **settings)
        images = decode(model, z)
        bits, deviation = bits_per_pixel(model, judged, bound_key)
        row(f"{name}: samples of the flow", images, labels, f"{'':>11}{f'{bits:.3f} +- {deviation:.3f}':>20}")
        pictures[name] = back, images
    row("real, training", train.images, train.labels)
    print(
        "\nFrechet: distance to held-out digits in the classifier's features\n"
        "accuracy: of the classifier on the wanted labels\n"
        "RMS error: of the reconstruction, in levels of 0 to 16\n"
        f"bits per pixel: an upper bound, of {size.likelihoods} held-out digits (uniform: {np.log2(LEVELS):.3f})"
    )

    back, images = map(np.asarray, pictures["jointly"])
    of_class = [np.flatnonzero(np.asarray(held_out.labels) == label)[:2] for label in range(CLASSES)]
    rows = [
        np.concatenate([np.stack([held_out.images[chosen], back[chosen]], axis=1).reshape(4, 8, 8), drawn])
        for chosen, drawn in zip(of_class, images.reshape(-1, CLASSES, 8, 8).swapaxes(0, 1)[:, :8], strict=True)
    ]
    file = options.out / "digits.png"
    draw_picture(np.stack(rows), file)
    print(f"picture: {file}\ntotal {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
