"""Networks and embeddings: shapes, starts, and what they must be able to tell apart."""

import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowsolve as fs
from flowsolve import nn

LIKE = jax.ShapeDtypeStruct((3, 2), jnp.float32)
WIDTH, HIDDEN, DEPTH, CLASSES, EMBEDDING, SIZE = 16, 12, 3, 4, 8, 6


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


def random_like(tree, scale=0.3):
    """The tree with random parameters, by NumPy: the zeros of the start hide most of a network."""
    rng = np.random.default_rng(9)

    def draw(leaf):
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32) if hasattr(leaf, "shape") else leaf

    return jax.tree.map(draw, tree)


def build(like, labels):
    return nn.ResidualMLP(
        like,
        width=WIDTH,
        hidden=HIDDEN,
        depth=DEPTH,
        num_classes=labels,
        embedding_dim=EMBEDDING,
        time_embedding=nn.SinusoidalEmbedding(10),
        key=jax.random.key(0),
    )


def with_dropout(network, dropout=0.5):
    return eqx.tree_at(lambda n: n.dropout, network, dropout)


@pytest.fixture(scope="module")
def fresh():
    return eqx.filter_jit(build)(LIKE, CLASSES)


@pytest.fixture(scope="module")
def network():
    return random_like(eqx.filter_eval_shape(build, LIKE, CLASSES))


@pytest.fixture(scope="module")
def plain():
    """A network without labels, for a state that is a dictionary."""
    like = {"a": jax.ShapeDtypeStruct((2, 2), jnp.float32), "b": jax.ShapeDtypeStruct((3,), jnp.float32)}
    return random_like(eqx.filter_eval_shape(build, like, None))


@eqx.filter_jit
def call(network, t, x, label, key=None):
    return network(t, x, label, key=key)


X = jax.random.normal(jax.random.key(1), LIKE.shape)
T = jnp.float32(0.3)
LABEL = jnp.asarray(2)


# --- embeddings ----------------------------------------------------------------------------------


def test_sinusoidal_equals_its_formula():
    embedding = nn.SinusoidalEmbedding(6, max_period=8.0, min_period=0.5)
    frequencies = 1 / np.array([8.0, 2.0, 0.5])
    angles = 2 * np.pi * frequencies * 0.3
    want = np.concatenate([np.cos(angles), np.sin(angles)])
    np.testing.assert_allclose(embedding(0.3), want, atol=1e-6)


def test_fourier_equals_its_formula_and_has_unit_mean_square():
    embedding = nn.FourierEmbedding(2_000, scale=1.5, seed=3)
    values = np.asarray(embedding(0.3))
    np.testing.assert_allclose(np.mean(values**2), 1.0, rtol=1e-5)
    # E cos(2 pi f t) = exp(-(2 pi scale t)^2 / 2) over the frequencies.
    cosines = np.asarray(embedding(0.1))[:1_000] / np.sqrt(2)
    want = np.exp(-((2 * np.pi * 1.5 * 0.1) ** 2) / 2)
    assert abs(cosines.mean() - want) < 4 * cosines.std() / np.sqrt(1_000)


@pytest.mark.parametrize(
    "embedding", [nn.SinusoidalEmbedding(16), nn.FourierEmbedding(16)], ids=["sinusoidal", "fourier"]
)
@pytest.mark.parametrize("span", [(0.0, 1.0), (-2.0, 2.0)], ids=["unit time", "log-ratio"])
def test_time_embedding_tells_times_apart(embedding, span):
    """No two of 101 times look alike, and near ones look more alike than far ones."""
    t = jnp.linspace(*span, 101)
    e = np.asarray(jax.vmap(embedding)(t))
    distance = np.linalg.norm(e[:, None] - e[None], axis=-1)
    neighbours = np.diag(distance, 1)
    assert neighbours.min() > 1e-2
    assert (distance + 10 * np.eye(101)).min() > 0.5 * neighbours.min()
    assert neighbours.max() < 0.5 * distance.max()


@pytest.mark.parametrize(
    "embedding", [nn.SinusoidalEmbedding(16), nn.FourierEmbedding(16)], ids=["sinusoidal", "fourier"]
)
def test_time_embedding_cannot_be_trained(embedding):
    """No leaves that a gradient, weight decay or a moving average could change."""
    assert jax.tree.leaves(embedding) == []


def test_fourier_frequencies_follow_from_the_seed():
    assert jnp.array_equal(nn.FourierEmbedding(8, seed=1)(0.7), nn.FourierEmbedding(8, seed=1)(0.7))
    assert not jnp.allclose(nn.FourierEmbedding(8, seed=1)(0.7), nn.FourierEmbedding(8, seed=2)(0.7))


def test_time_embedding_follows_the_dtype_of_t(x64):
    assert nn.SinusoidalEmbedding(4)(0.3).dtype == jnp.float64
    assert nn.FourierEmbedding(4)(0.3).dtype == jnp.float64


def test_label_embedding_has_a_row_per_class_and_one_for_none():
    embedding = nn.LabelEmbedding(5, 3, key=jax.random.key(0))
    assert embedding.null_label == 5
    rows = jax.vmap(embedding)(jnp.arange(6))
    assert jnp.array_equal(rows, embedding.table)
    assert len(np.unique(np.asarray(rows), axis=0)) == 6
    assert jnp.array_equal(embedding(embedding.null_label), embedding.table[5])


def test_label_embedding_without_null():
    embedding = nn.LabelEmbedding(5, 3, null=False, key=jax.random.key(0))
    assert embedding.table.shape == (5, 3)
    with pytest.raises(ValueError, match="no null label"):
        _ = embedding.null_label
    with pytest.raises(ValueError, match="out of range"):
        embedding(5)


@pytest.mark.parametrize("label", [-1, 6])
def test_label_out_of_range_is_never_another_class(label):
    embedding = nn.LabelEmbedding(5, 3, key=jax.random.key(0))
    with pytest.raises(ValueError, match="from 0 to 5"):
        embedding(label)
    assert jnp.all(jnp.isnan(jax.jit(lambda label: embedding(label))(jnp.asarray(label))))


def test_labels_are_integers():
    embedding = nn.LabelEmbedding(5, 3, key=jax.random.key(0))
    with pytest.raises(TypeError, match="ONE integer"):
        embedding(jnp.asarray(1.0))
    with pytest.raises(TypeError, match="ONE integer"):
        embedding(jnp.arange(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.SinusoidalEmbedding(7),
        lambda: nn.SinusoidalEmbedding(8, max_period=1.0, min_period=2.0),
        lambda: nn.FourierEmbedding(0),
        lambda: nn.FourierEmbedding(8, scale=0.0),
        lambda: nn.LabelEmbedding(0, 4, key=jax.random.key(0)),
        lambda: nn.ResidualMLP(LIKE, depth=0, key=jax.random.key(0)),
        lambda: nn.ResidualMLP(LIKE, dropout=1.0, key=jax.random.key(0)),
    ],
)
def test_bad_sizes_are_refused(make):
    with pytest.raises(ValueError, match=r"wants"):
        make()


# --- the residual network ------------------------------------------------------------------------


def test_parameter_count(network):
    def linear(inputs, outputs):
        return inputs * outputs + outputs

    embed = linear(10, EMBEDDING) + linear(EMBEDDING, EMBEDDING)
    labels = (CLASSES + 1) * EMBEDDING
    block = linear(EMBEDDING, 3 * WIDTH) + linear(WIDTH, HIDDEN) + linear(HIDDEN, WIDTH)
    ends = linear(SIZE, WIDTH) + linear(EMBEDDING, 2 * WIDTH) + linear(WIDTH, SIZE)
    assert count(network) == embed + labels + DEPTH * block + ends


def test_output_is_zero_at_the_start(fresh):
    out = call(fresh, T, X, LABEL)
    assert out.shape == LIKE.shape and out.dtype == LIKE.dtype
    assert jnp.all(out == 0)


def test_blocks_are_the_identity_at_the_start(fresh):
    """With a last map that is not zero, nothing of the blocks shows until they are trained."""
    # Not ones, of which the norm before it leaves but rounding.
    visible = eqx.tree_at(lambda n: n.last, fresh, random_like(fresh.last))
    other_blocks = eqx.tree_at(lambda n: n.blocks.second, visible, random_like(visible.blocks.second))
    assert jnp.array_equal(call(visible, T, X, LABEL), call(other_blocks, T, X, LABEL))
    assert jnp.all(jnp.abs(call(visible, T, X, LABEL)) > 1e-3)


def test_gradient_reaches_every_parameter_after_one_perturbation(network):
    @eqx.filter_grad
    def gradient(network):
        labels = jnp.arange(CLASSES + 1)
        out = jax.vmap(lambda label: network(T, X, label))(labels)
        return jnp.sum(out * jax.random.normal(jax.random.key(3), out.shape))

    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter_jit(gradient)(network)):
        assert jnp.all(jnp.isfinite(leaf)), path
        # Each row (an output of a map) gets one, and each of the stacked blocks.
        assert jnp.all(jnp.any(leaf != 0, axis=-1)), path


def test_training_leaves_the_zero_start(fresh):
    """Zero gates and a zero last map are no dead end: five steps of gradient descent reach the blocks."""

    @eqx.filter_jit
    def trained(network):
        parameters, static = eqx.partition(network, eqx.is_inexact_array)
        optimiser = optax.sgd(0.3)

        def loss(p):
            return jnp.mean((eqx.combine(p, static)(T, X, LABEL) - 2 * X) ** 2)

        def step(_, p):
            updates, _ = optimiser.update(jax.grad(loss)(p), optimiser.init(p))
            return eqx.apply_updates(p, updates)

        return eqx.combine(jax.lax.fori_loop(0, 5, step, parameters), static)

    moved = jax.tree.map(lambda a, b: jnp.any(a != b), trained(fresh).blocks, fresh.blocks)
    assert jax.tree.all(moved)


def test_time_label_and_state_all_matter(network):
    base = call(network, T, X, LABEL)
    assert not jnp.allclose(base, call(network, jnp.float32(0.31), X, LABEL))
    assert not jnp.allclose(base, call(network, T, X, jnp.asarray(1)))
    assert not jnp.allclose(base, call(network, T, X + 0.1, LABEL))


def test_no_label_is_the_null_label(network):
    assert network.null_label == CLASSES
    assert jnp.array_equal(call(network, T, X, None), call(network, T, X, jnp.asarray(CLASSES)))
    assert not jnp.allclose(call(network, T, X, None), call(network, T, X, LABEL))


def test_vmap_equals_loop(network):
    x = jax.random.normal(jax.random.key(2), (5, *LIKE.shape))
    t = jnp.linspace(0, 1, 5)
    labels = jnp.arange(5)
    batch = eqx.filter_jit(jax.vmap(lambda t, x, label: network(t, x, label)))(t, x, labels)
    for i in range(5):
        np.testing.assert_allclose(batch[i], call(network, t[i], x[i], labels[i]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_scan_equals_the_loop_over_blocks(network, dropout):
    """The stacked blocks, one by one, in the order of their stack, each with its own dropout."""
    keys = jax.random.split(jax.random.key(4), DEPTH)

    @eqx.filter_jit
    def loop(network):
        embedding = network.embedding(T, LABEL)
        h = network.first(jnp.ravel(X))
        for i in range(DEPTH):
            block = jax.tree.map(lambda leaf: leaf[i] if eqx.is_array(leaf) else leaf, network.blocks)  # noqa: B023
            h = block(h, embedding, dropout, key=keys[i])
        scale, shift = jnp.split(network.modulation(embedding), 2)
        norm = (h - jnp.mean(h)) / jnp.sqrt(jnp.var(h) + 1e-5)
        return network.last((1 + scale) * norm + shift).reshape(LIKE.shape)

    got = call(with_dropout(network, dropout), T, X, LABEL, jax.random.key(4))
    np.testing.assert_allclose(got, loop(network), rtol=1e-4, atol=1e-5)


def test_program_does_not_grow_with_depth():
    def size(depth):
        network = eqx.filter_eval_shape(
            lambda: nn.ResidualMLP(LIKE, width=4, depth=depth, embedding_dim=4, key=jax.random.key(0))
        )
        return len(str(eqx.filter_make_jaxpr(lambda n: n(T, X))(network)[0]).splitlines())

    assert size(2) == size(12)


def test_dropout_is_off_without_a_key(network):
    dropping = with_dropout(network)
    base = call(dropping, T, X, LABEL)
    assert jnp.array_equal(base, call(network, T, X, LABEL))
    one, two = (call(dropping, T, X, LABEL, jax.random.key(seed)) for seed in (0, 1))
    assert not jnp.allclose(one, base)
    assert not jnp.allclose(one, two)
    assert jnp.array_equal(one, call(dropping, T, X, LABEL, jax.random.key(0)))


def test_states_of_any_structure(plain):
    x = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    out = call(plain, T, x, None)
    assert jax.tree.map(jnp.shape, out) == {"a": (2, 2), "b": (3,)}


def test_computes_in_the_dtype_of_its_parameters(network):
    """Half-precision parameters, a float32 state in, a float32 state out, and t never rounded."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16) if eqx.is_inexact_array(p) else p, network)
    out = call(half, T, X, LABEL)
    assert out.dtype == jnp.float32
    assert half.embedding(T, LABEL).dtype == jnp.bfloat16
    np.testing.assert_allclose(out, call(network, T, X, LABEL), atol=0.1)
    # 0.3 and 0.3005 are the same number in bfloat16, whose embeddings differ by more than its rounding.
    assert not jnp.array_equal(half.time_embedding(jnp.float32(0.3)), half.time_embedding(jnp.float32(0.3005)))


def test_wrong_calls_are_refused(network, plain, untyped):
    with pytest.raises(ValueError, match=r"batch with jax.vmap"):
        network(T, jnp.ones((2, 3, 2)), LABEL)
    with pytest.raises(TypeError, match="must be floating point"):
        network(T, jnp.ones((3, 2), int), LABEL)
    with pytest.raises(ValueError, match=r"time_embedding of shape \(\), but wants an array with one axis"):
        nn.ResidualMLP(LIKE, time_embedding=lambda t: t, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"UNet got a time_embedding of shape \(\), but wants an array with one axis"):
        nn.UNet(1, width=8, time_embedding=lambda t: t, key=jax.random.key(0))
    with pytest.raises(ValueError, match="build it with num_classes"):
        plain(T, jnp.ones(7), LABEL)
    with pytest.raises(ValueError, match="build it with num_classes"):
        _ = plain.null_label


# --- precision ------------------------------------------------------------------------------------------------------


class Weights(eqx.Module):
    """tanh(W x), t, and what it was called with."""

    weight: jax.Array
    seen: list = eqx.field(static=True)

    def __call__(self, t, x, args, *, key=None):
        self.seen.append((self.weight.dtype, t.dtype, x["a"].dtype, args["scale"].dtype, args["label"].dtype))
        return {"a": jnp.tanh(x["a"] @ self.weight) * args["scale"] * t.astype(x["a"].dtype)}


def half_precision(dtype):
    rng = np.random.default_rng(0)
    network = Weights(jnp.asarray(rng.normal(size=(16, 16)), jnp.float32), [])
    args = {"scale": jnp.asarray(1.5), "label": jnp.asarray(3)}
    return network, nn.Precision(network, dtype), {"a": jnp.asarray(rng.normal(size=16), jnp.float32)}, args


def test_precision_rounds_what_is_computed_and_leaves_the_rest():
    network, half, x, args = half_precision(jnp.bfloat16)
    out = half(jnp.asarray(0.3), x, args)["a"]
    bf16, f32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    assert network.seen == [(bf16, f32, bf16, bf16, args["label"].dtype)]
    assert out.dtype == jnp.float32
    exact = np.tanh(np.asarray(x["a"], float) @ np.asarray(network.weight, float)) * 1.5 * 0.3
    error = np.abs(np.asarray(out, float) - exact).max()
    assert 1e-5 < error < 0.03, "near what bfloat16 can tell, and not nearer"
    same = nn.Precision(network, jnp.float32)(jnp.asarray(0.3), x, args)["a"]
    np.testing.assert_allclose(same, exact, atol=1e-5)


def test_gradients_of_a_network_in_half_precision_are_those_of_its_float32_parameters():
    network, half, x, args = half_precision(jnp.bfloat16)

    def value(network):
        return jnp.sum(network(jnp.asarray(0.3), x, args)["a"] ** 2)

    rounded = eqx.filter_grad(value)(half).network.weight
    exact = eqx.filter_grad(value)(network).weight
    assert rounded.dtype == jnp.float32
    assert jnp.linalg.norm(rounded - exact) < 0.05 * jnp.linalg.norm(exact)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "warned"),
    [(jnp.bfloat16, 5e-4, True), (jnp.bfloat16, 2e-3, False), (jnp.float16, 5e-5, True), (jnp.float32, 1e-6, False)],
)
def test_a_tolerance_below_what_the_network_resolves_warns(dtype, tolerance, warned):
    """Through `Precision`, and as well where the parameters themselves are of that dtype."""
    parameters = jnp.ones(3, dtype)
    network = eqx.Partial(lambda weight, t, x, args, *, key=None: -x, parameters)
    controller = diffrax.ClipStepSizeController(diffrax.PIDController(rtol=tolerance, atol=tolerance / 10))
    for one in (network, nn.Precision(lambda t, x, args, *, key=None: -x, dtype)):
        flow = fs.Flow(one, fs.paths.Linear(), fs.predictions.Velocity())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fs.solve(flow, jnp.ones(2), solver=diffrax.Heun(), controller=controller)
        texts = [str(warning.message) for warning in caught]
        assert bool(texts) == warned
        if warned:
            assert f"tolerance {tolerance:g} is below" in texts[0] and jnp.dtype(dtype).name in texts[0]
