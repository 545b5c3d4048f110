"""The UNet and the autoencoders against plain NumPy in float64; what they start as, and what they must tell apart.

The references are written channels first, with loops over pixels. They are analytic in all they compute, so that a
complex step gives their derivatives to the last digits.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowsolve import nn
from flowsolve.nn.conditions import Condition
from flowsolve.nn.convolution import GroupNorm, upsampled

SHAPE = (2, 7, 5)
KEY = jax.random.key(0, impl="unsafe_rbg")  # which compiles in a tenth of the time
GROUPS = {8: 2, 16: 4, 24: 6, 32: 8}  # at least four channels a group


def random_like(tree, scale=0.3, seed=9):
    """The tree with random parameters, by NumPy: the zeros of the start hide most of a network."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32) if hasattr(leaf, "shape") else leaf

    return jax.tree.map(draw, tree)


def build(**options):
    settings = dict(width=8, multipliers=(1, 2), blocks=1, attention=(), heads=2, embedding_dim=8)
    settings |= dict(num_classes=3, context_dim=5, time_embedding=nn.SinusoidalEmbedding(6))
    return nn.UNet(SHAPE[0], key=KEY, **(settings | options))


@pytest.fixture(scope="module")
def fresh():
    return eqx.filter_jit(build)()


@pytest.fixture(scope="module")
def network():
    return random_like(eqx.filter_eval_shape(build))


@pytest.fixture(scope="module")
def lean():
    return random_like(eqx.filter_eval_shape(build, remat=True))


@eqx.filter_jit
def call(network, t, x, args, key=None):
    return network(t, x, args, key=key)


RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)
T = jnp.float32(0.3)
CONTEXT = jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32)
CONDITION = Condition(jnp.asarray(2), CONTEXT, jnp.asarray([True, False, True]))


# --- the references -------------------------------------------------------------------------------------------------


def silu(x):
    return x / (1 + np.exp(-x))


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def convolve(layer, x, stride=1):
    """The sum over the kernel at every pixel, zeros outside of the image."""
    outputs, inputs, size, _ = layer.weight.shape
    assert x.shape[0] == inputs
    _, height, width = x.shape
    out = np.zeros((outputs, -(-height // stride), -(-width // stride)), np.result_type(x, layer.weight))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            for k in range(size):
                for m in range(size):
                    row, column = stride * i + k - size // 2, stride * j + m - size // 2
                    if 0 <= row < height and 0 <= column < width:
                        out[:, i, j] += layer.weight[:, :, k, m] @ x[:, row, column]
    return out + layer.bias[:, None, None]


def group_norm(layer, x, groups):
    parts = x.reshape(groups, -1)
    parts = parts - parts.mean(1, keepdims=True)
    parts = parts / np.sqrt((parts**2).mean(1, keepdims=True) + 1e-5)
    return layer.weight[:, None, None] * parts.reshape(x.shape) + layer.bias[:, None, None]


def norm(layer, x):
    return group_norm(layer, x, GROUPS[len(x)])


def residual(block, x, embedding=None):
    h = norm(block.second_norm, convolve(block.first, silu(norm(block.norm, x))))
    if embedding is not None:
        scale, shift = np.split(linear(block.modulation, embedding), 2)
        h = (1 + scale)[:, None, None] * h + shift[:, None, None]
    if block.skip is not None:
        x = np.moveaxis(linear(block.skip, np.moveaxis(x, 0, -1)), -1, 0)
    return x + convolve(block.second, silu(h))


def attend(layer, tokens, context=None, mask=None):
    if context is None:
        query, key, value = np.split(linear(layer.query_key_value, tokens), 3, axis=-1)
    else:
        query = linear(layer.query, tokens)
        key, value = np.split(linear(layer.key_value, context), 2, axis=-1)
    out = []
    for q, k, v in zip(*(np.split(part, layer.heads, axis=-1) for part in (query, key, value)), strict=True):
        weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
        weights = weights if mask is None else weights * mask
        out.append(weights / weights.sum(-1, keepdims=True) @ v)
    return linear(layer.out, np.concatenate(out, axis=-1))


def stage(part, x, embedding, context, mask):
    x = residual(part.residual, x, embedding)
    for layer, normed, told in (
        (part.attention and part.attention.attention, part.attention and part.attention.norm, ()),
        (part.attention and part.attention.cross, part.attention and part.attention.cross_norm, (context, mask)),
    ):
        if layer is not None:
            tokens = norm(normed, x).reshape(len(x), -1).T
            x = x + attend(layer, tokens, *told).T.reshape(x.shape)
    return x


def upsample(layer, x, shape):
    return convolve(layer, x.repeat(2, 1).repeat(2, 2))[:, : shape[0], : shape[1]]


def unet(network, t, x, condition):
    """The UNet with levels, a skip from each of its images on the way down."""
    label, context, mask = condition
    angles = 2 * np.pi / np.geomspace(10.0, 0.1, 3) * t
    waves = np.concatenate([np.cos(angles), np.sin(angles)])
    first, second = network.embed.layers
    embedding = silu(linear(second, silu(linear(first, waves))) + network.label_embedding.table[label])
    told = embedding, context, mask
    h = convolve(network.first, x)
    skips = [h]
    for level, stages in enumerate(network.down):
        if level:
            h = convolve(network.downsample[level - 1], h, stride=2)
            skips.append(h)
        for part in stages:
            h = stage(part, h, *told)
            skips.append(h)
    for part in network.middle:
        h = stage(part, h, *told)
    for level, stages in enumerate(network.up):
        if level:
            h = upsample(network.upsample[level - 1], h, skips[-1].shape[1:])
        for part in stages:
            h = stage(part, np.concatenate([h, skips.pop()]), *told)
    assert not skips
    return convolve(network.last, silu(norm(network.last_norm, h)))


def wide(tree):
    """The arrays of a tree in float64, by NumPy."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, float) if eqx.is_inexact_array(leaf) else leaf, tree)


# --- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (5, 1), (3, 2), (1, 2), (3, 3)])
def test_convolution_equals_the_loop(size, stride):
    layer = nn.Convolution(2, 3, size, stride=stride, key=jax.random.key(size))
    got = layer(jnp.moveaxis(X, 0, -1))
    np.testing.assert_allclose(jnp.moveaxis(got, -1, 0), convolve(wide(layer), wide(X), stride), atol=1e-5)


@pytest.mark.parametrize("shape", [(14, 10), (13, 10), (13, 9)])
def test_upsampled_convolution_equals_the_convolution_of_the_upsampled_image(shape):
    layer = nn.Convolution(2, 3, key=jax.random.key(1))
    got = upsampled(layer, jnp.moveaxis(X, 0, -1), shape)
    np.testing.assert_allclose(jnp.moveaxis(got, -1, 0), upsample(wide(layer), wide(X), shape), atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (6, 1), (8, 2), (53, 1), (50, 10), (144, 24), (256, 32)])
def test_group_norm_equals_its_formula(channels, groups):
    """Also far from zero, where a mean of squares less the square of a mean has lost its digits."""
    layer = random_like(eqx.filter_eval_shape(GroupNorm, channels))
    x = RNG.normal(size=(channels, 3, 2)) + 100
    x = np.asarray(jnp.asarray(x, jnp.float32), float)
    got = jnp.moveaxis(layer(jnp.moveaxis(jnp.asarray(x, jnp.float32), 0, -1)), -1, 0)
    np.testing.assert_allclose(got, group_norm(wide(layer), x, groups), atol=1e-4)


def test_statistics_of_a_group_are_not_rounded_to_half_precision():
    layer = eqx.filter_eval_shape(GroupNorm, 8)
    layer = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, jnp.bfloat16), layer)
    h = jnp.asarray(20 + RNG.normal(size=(8, 8, 8)), jnp.bfloat16)
    want = group_norm(wide(layer), np.moveaxis(np.asarray(h, float), -1, 0), 2)
    got = np.moveaxis(np.asarray(layer(h), float), -1, 0)
    # One rounding at the end: half a unit of the last place of bfloat16.
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-4)


# --- the UNet -------------------------------------------------------------------------------------------------------


def reference_condition():
    return 2, np.asarray(CONTEXT, float), np.asarray(CONDITION.mask)


def test_unet_equals_the_reference(network):
    want = unet(wide(network), float(T), wide(X), reference_condition())
    got = call(network, T, X, CONDITION)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


WEIGHTS = jnp.asarray(RNG.normal(size=SHAPE), jnp.float32)


@eqx.filter_jit
def gradient(network, t, x, condition):
    """Of the outputs' weighted sum, by parameters, time, image and context."""

    def value(parts):
        network, t, x, context = parts
        condition_now = Condition(condition.label, context, condition.mask)
        return jnp.sum(WEIGHTS * network(t, x, condition_now))

    return eqx.filter_grad(value)((network, t, x, condition.context))


@pytest.fixture(scope="module")
def gradients(network):
    return gradient(network, T, X, CONDITION)


def test_gradient_equals_the_complex_step_of_the_reference(network, gradients):
    """Along random directions of all parameters, the time, the image and the context together, and one by one."""
    parts = wide((network, T, X, CONTEXT))
    label, _, mask = reference_condition()
    flat, structure = jax.tree.flatten(eqx.filter(parts, lambda leaf: isinstance(leaf, np.ndarray)))
    found = [np.asarray(leaf, float) for leaf in jax.tree.leaves(gradients)]
    rng = np.random.default_rng(5)
    # By the time alone there is no sum over many directions in which roundings are small.
    for chosen, tolerance in [*[(range(len(flat)), 1e-5)] * 3, *[([len(flat) - i], 1e-4) for i in (1, 2, 3)]]:
        drawn = [rng.normal(size=leaf.shape) if i in chosen else np.zeros(leaf.shape) for i, leaf in enumerate(flat)]
        changed, t, x, context = eqx.combine(
            jax.tree.unflatten(structure, [leaf + 1e-30j * d for leaf, d in zip(flat, drawn, strict=True)]), parts
        )
        out = unet(changed, t, x, (label, context, mask))
        want = np.sum(np.asarray(WEIGHTS, float) * out.imag) / 1e-30
        terms = np.concatenate([(g * d).ravel() for g, d in zip(found, drawn, strict=True)])
        assert abs(terms.sum() - want) < tolerance * np.abs(terms).sum()


def test_gradient_reaches_every_parameter(gradients):
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients[0]):
        assert jnp.all(jnp.isfinite(leaf)), path
        assert jnp.any(leaf != 0), path


def test_unet_starts_at_zero_and_its_blocks_as_nothing(fresh):
    assert jnp.array_equal(call(fresh, T, X, CONDITION), jnp.zeros(SHAPE))
    visible = eqx.tree_at(lambda n: n.last.weight, fresh, jnp.ones_like(fresh.last.weight))
    base = call(visible, T, X, CONDITION)
    assert jnp.any(base != 0)
    other = Condition(jnp.asarray(1), 2 * CONTEXT, CONDITION.mask)
    assert jnp.array_equal(base, call(visible, jnp.float32(0.7), X, other))


def test_time_label_context_and_image_all_matter(network):
    base = call(network, T, X, CONDITION)
    label, context, mask = CONDITION.label, CONDITION.context, CONDITION.mask
    for t, x, condition in (
        (jnp.float32(0.31), X, CONDITION),
        (T, X + 0.1, CONDITION),
        (T, X, Condition(label - 1, context, mask)),
        (T, X, Condition(label, context.at[2].add(0.1), mask)),
        (T, X, Condition(label, context, ~mask)),
    ):
        assert jnp.max(jnp.abs(call(network, t, x, condition) - base)) > 1e-3
    # What the mask hides is not seen.
    hidden = Condition(label, context.at[1].add(10.0), mask)
    assert jnp.array_equal(call(network, T, X, hidden), base)


def test_nothing_said_is_the_null_condition(network):
    assert network.null_label == 3
    nothing = call(network, T, X, None)
    np.testing.assert_allclose(call(network, T, X, network.null(CONDITION)), nothing, atol=1e-5)
    assert jnp.max(jnp.abs(call(network, T, X, CONDITION) - nothing)) > 1e-3


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 4), (32, 31)])
def test_any_size_comes_back(size):
    network = eqx.filter_eval_shape(build, multipliers=(1, 1, 2))
    x = jax.ShapeDtypeStruct((2, *size), jnp.float32)
    out = eqx.filter_eval_shape(lambda n, x: n(T, x, CONDITION), network, x)
    assert out.shape == x.shape and out.dtype == x.dtype
    doubled = eqx.filter_eval_shape(build, multipliers=(1, 1, 2), out_channels=4)
    assert eqx.filter_eval_shape(lambda n, x: n(T, x, CONDITION), doubled, x).shape == (4, *size)


def test_parameters_of_the_published_size():
    """Ho et al.'s network for CIFAR-10 has 35.7 million; theirs adds the embedding, ours shifts and scales by it."""
    network = eqx.filter_eval_shape(
        lambda: nn.UNet(
            3,
            width=128,
            multipliers=(1, 2, 2, 2),
            attention=(-3,),
            heads=1,
            time_embedding=nn.SinusoidalEmbedding(128),
            key=jax.random.key(0),
        )
    )
    stages = [*[part for level in (*network.down, *network.up) for part in level], *network.middle]
    scales = sum(513 * part.residual.second.weight.shape[0] for part in stages)
    count = sum(leaf.size for leaf in jax.tree.leaves(network) if hasattr(leaf, "size"))
    assert count - scales == 35_746_307


def test_half_precision_has_finite_gradients_and_does_not_round_the_time(network, lean, gradients):
    """With the backward pass that computes blocks anew."""

    @eqx.filter_jit
    def outputs(half, t):
        def value(half):
            out = half(t, X, CONDITION)
            return jnp.sum(WEIGHTS * out), out

        return eqx.filter_grad(value, has_aux=True)(half)

    half = nn.Precision(lean, jnp.bfloat16)
    # JAX's attention promotes inside its backward pass. The two times are the same number in bfloat16.
    with jax.numpy_dtype_promotion("standard"):
        rounded, out = outputs(half, T)
        _, later = outputs(half, T + 0.0005)
    assert out.dtype == jnp.float32
    assert not jnp.array_equal(out, later)
    base = call(network, T, X, CONDITION)
    assert 1e-5 < jnp.linalg.norm(out - base) / jnp.linalg.norm(base) < 0.1
    leaves = list(zip(jax.tree.leaves(rounded), jax.tree.leaves(gradients[0]), strict=True))
    assert all(a.dtype == jnp.float32 and bool(jnp.all(jnp.isfinite(a))) for a, _ in leaves)
    error, size = (
        np.sqrt(sum(float(jnp.sum(part(*pair) ** 2)) for pair in leaves)) for part in (jnp.subtract, lambda _, b: b)
    )
    assert 1e-5 < error / size < 0.1


def test_dropout_is_off_without_a_key(network):
    dropping = eqx.tree_at(lambda n: n.dropout, network, 0.5)
    program, same = (str(eqx.filter_make_jaxpr(lambda n: n(T, X, CONDITION))(n)[0]) for n in (dropping, network))
    assert program == same
    base = call(network, T, X, CONDITION)
    one, two = (call(dropping, T, X, CONDITION, jax.random.key(seed)) for seed in (0, 1))
    assert jnp.max(jnp.abs(one - base)) > 1e-3
    assert jnp.max(jnp.abs(one - two)) > 1e-3
    assert jnp.array_equal(one, call(dropping, T, X, CONDITION, jax.random.key(0)))


def test_remat_holds_less_for_the_backward_pass(network, lean):
    def held(network):
        parameters, static = eqx.partition(network, eqx.is_inexact_array)
        pullback = jax.eval_shape(
            lambda p: jax.vjp(lambda p: eqx.combine(p, static)(T, X, CONDITION), p)[1], parameters
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pullback)) - sum(
            leaf.size for leaf in jax.tree.leaves(parameters)
        )

    assert 0 < held(lean) < 0.5 * held(network)


# --- autoencoders ---------------------------------------------------------------------------------------------------


def up_and_down(part, h, between):
    """An encoder or a decoder of the convolutional VAE; `between` takes it from level to level."""
    h = convolve(part.first, h)
    for level, blocks in enumerate(part.levels):
        h = between(level - 1, h) if level else h
        for block in blocks:
            h = residual(block, h)
    return convolve(part.last, silu(norm(part.last_norm, h)))


def build_vae(**options):
    like = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    settings = dict(latent_channels=3, width=8, multipliers=(1, 2, 2), blocks=1)
    return nn.ConvolutionalVAE(like, key=KEY, **(settings | options))


@eqx.filter_jit
def there_and_back(vae, x, z):
    return vae.encode(x), vae.decode(z)


def test_convolutional_vae_equals_the_reference():
    vae = random_like(eqx.filter_eval_shape(build_vae))
    assert vae.latent == jax.ShapeDtypeStruct((3, 2, 2), jnp.float32)
    z = jnp.asarray(RNG.normal(size=(3, 2, 2)), jnp.float32)
    (mean, log_std), x = there_and_back(vae, X, z)
    plain, sizes = wide(vae), [(4, 3), (7, 5)]
    encoder, decoder = plain.encoder, plain.decoder
    encoded = up_and_down(encoder, wide(X), lambda i, h: convolve(encoder.downsample[i], h, stride=2))
    decoded = up_and_down(decoder, wide(z), lambda i, h: upsample(decoder.upsample[i], h, sizes[i]))
    for got, want in ((mean, encoded[:3]), (log_std, encoded[3:]), (x, decoded)):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_linear_vae_at_its_optimum_has_the_exact_likelihood():
    """Probabilistic PCA: the bound is tight where the encoder is the posterior of x = W z + noise."""
    rng = np.random.default_rng(3)
    noise, scales = 0.7, np.array([2.0, 0.8])
    weight = np.linalg.qr(rng.normal(size=(5, 2)))[0] * scales
    like = {"a": jax.ShapeDtypeStruct((3,), jnp.float32), "b": jax.ShapeDtypeStruct((1, 2), jnp.float32)}
    vae = nn.MLPVAE(like, latent_dim=2, depth=0, key=jax.random.key(0))
    assert vae.latent == jax.ShapeDtypeStruct((2,), jnp.float32)
    precision = scales**2 + noise**2  # of the latents given x, times noise^2
    log_std = np.log(noise / np.sqrt(precision))
    vae = eqx.tree_at(
        lambda v: [part.layers[0] for part in (v.encoder, v.decoder)],
        vae,
        [
            linear_layer(np.concatenate([weight.T / precision[:, None], np.zeros((2, 5))]), np.append([0, 0], log_std)),
            linear_layer(weight, np.zeros(5)),
        ],
    )
    x = rng.normal(size=5)
    mean, log_std = vae.encode({"a": jnp.asarray(x[:3], jnp.float32), "b": jnp.asarray(x[None, 3:], jnp.float32)})

    def flat(z):
        out = vae.decode(z)
        assert jax.tree.map(jnp.shape, out) == {"a": (3,), "b": (1, 2)}
        return np.concatenate([np.ravel(out["a"]), np.ravel(out["b"])])

    columns = np.stack([flat(row) for row in jnp.eye(2)], axis=-1)
    variance = np.exp(2 * np.asarray(log_std, float))
    errors = np.sum((x - flat(mean)) ** 2) + np.sum(columns**2 * variance)
    divergence = 0.5 * np.sum(variance + np.square(mean) - 1 - np.log(variance))
    bound = -0.5 * errors / noise**2 - 2.5 * np.log(2 * np.pi * noise**2) - divergence
    covariance = weight @ weight.T + noise**2 * np.eye(5)
    exact = -0.5 * (x @ np.linalg.solve(covariance, x) + np.linalg.slogdet(2 * np.pi * covariance)[1])
    np.testing.assert_allclose(bound, exact, atol=1e-5)


def linear_layer(weight, bias):
    layer = eqx.nn.Linear(*weight.shape[::-1], key=jax.random.key(0))
    return eqx.tree_at(lambda n: (n.weight, n.bias), layer, tuple(jnp.asarray(a, jnp.float32) for a in (weight, bias)))


def test_autoencoders_compute_in_the_dtype_of_their_parameters():
    vae = random_like(
        eqx.filter_eval_shape(lambda: nn.MLPVAE(X, latent_dim=2, width=4, depth=1, key=jax.random.key(0)))
    )
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf, vae)
    (mean, _), x = there_and_back(half, X, jnp.ones(2))
    (want, _), exact = there_and_back(vae, X, jnp.ones(2))
    for rounded, full in ((mean, want), (x, exact)):
        assert rounded.dtype == jnp.float32
        assert 1e-5 < jnp.linalg.norm(rounded - full) / jnp.linalg.norm(full) < 0.1


# --- what is refused ------------------------------------------------------------------------------------------------


def test_wrong_calls_are_refused(fresh, untyped):
    for x in (jnp.ones((3, 7, 5)), jnp.ones((2, 0, 3))):
        with pytest.raises(ValueError, match="UNet got"):
            fresh(T, x, CONDITION)
    with pytest.raises(ValueError, match="labels run from 0 to 3"):
        fresh(T, X, 4)
    with pytest.raises(ValueError, match=r"context of float32\[3, 4\], but was built for \(tokens, 5\)"):
        fresh(T, X, Condition(0, jnp.ones((3, 4))))
    with pytest.raises(TypeError, match="integer label"):
        fresh(T, X, 0.5)
    plain = eqx.filter_eval_shape(build, num_classes=None, context_dim=None)
    with pytest.raises(ValueError, match="build it with num_classes"):
        plain(T, X, 1)
    with pytest.raises(ValueError, match="build it with context_dim"):
        plain(T, X, Condition(None, CONTEXT))
    with pytest.raises(ValueError, match="build it with num_classes"):
        _ = plain.null_label
    convolution = nn.Convolution(2, 3, key=jax.random.key(0))
    with pytest.raises(ValueError, match="channels last"):
        convolution(X)
    vae = eqx.filter_eval_shape(build_vae)
    with pytest.raises(ValueError, match=r"ONE image of shape \(2, 7, 5\)"):
        vae.encode(jnp.ones((2, 7, 6)))
    with pytest.raises(ValueError, match=r"ONE of shape \(3, 2, 2\)"):
        vae.decode(jnp.ones((1, 3, 2, 2)))
    # Of integers, such as an image of bytes, the latent would be rounded to integers as well.
    image = jnp.ones((2, 7, 5), jnp.uint8)
    vector = nn.MLPVAE(jnp.ones(3), latent_dim=2, width=4, key=jax.random.key(0))
    for call in (
        lambda: vae.encode(image),
        lambda: vae.decode(jnp.ones((3, 2, 2), int)),
        lambda: vector.encode(jnp.ones(3, int)),
        lambda: vector.decode(jnp.ones(2, int)),
    ):
        with pytest.raises(TypeError, match="must be floating point"):
            call()
    with pytest.raises(ValueError, match="70 elements"):
        nn.MLPVAE(jnp.ones(3), latent_dim=2, width=4, key=jax.random.key(0)).encode(X)


@pytest.mark.parametrize(
    "make",
    [
        lambda: build(width=0),
        lambda: build(multipliers=()),
        lambda: build(attention=(2,)),
        lambda: build(heads=3),
        lambda: build(dropout=1.0),
        lambda: nn.Convolution(2, 3, 2, key=jax.random.key(0)),
        lambda: build_vae(multipliers=(1, 0)),
        lambda: nn.ConvolutionalVAE(jnp.ones((8, 8)), key=jax.random.key(0)),
        lambda: nn.MLPVAE(jnp.ones(3), latent_dim=0, key=jax.random.key(0)),
    ],
)
def test_bad_sizes_are_refused(make):
    with pytest.raises(ValueError, match=r"wants|levels"):
        eqx.filter_eval_shape(make)
