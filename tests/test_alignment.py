"""Representation alignment: the loss against loops over examples and tokens, where its gradient goes, hidden tokens."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowsolve as fs
from flowsolve import nn
from flowsolve.alignment import REPA, Featured, cosine_similarity

NUM, SHAPE, CLASSES, DIM, BLOCK = 5, (1, 4, 4), 3, 6, 2
SIZE = nn.TransformerSize(patch=2, width=8, depth=3, heads=2, mlp_ratio=1.5)
TIME = nn.SinusoidalEmbedding(6)
RNG = np.random.default_rng(0)
X0 = jnp.asarray(RNG.normal(size=(NUM, *SHAPE)), jnp.float32)
LABELS = np.array([0, 2, 1, 1, 0])
FEATURES = RNG.normal(size=(NUM, 4, DIM)).astype(np.float32)
WEIGHTS = np.array([1, 0.5, 2, 0, 3], np.float32)
KEY = jax.random.key(7)
QUICK = {"xla_backend_optimization_level": 0}


def random_like(tree, scale=0.5):
    """The tree with random parameters, by NumPy: the zeros of the start hide most of a network."""
    rng = np.random.default_rng(9)

    def draw(leaf):
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32) if hasattr(leaf, "shape") else leaf

    return jax.tree.map(draw, tree)


def made(make):
    return random_like(eqx.filter_eval_shape(make))


@pytest.fixture(scope="module")
def dit():
    return made(lambda: nn.DiT(1, SIZE, num_classes=CLASSES, time_embedding=TIME, key=KEY))


@pytest.fixture(scope="module")
def projector():
    return made(lambda: nn.Projector(SIZE.width, DIM, hidden=7, key=KEY))


def flow_of(network):
    return fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())


@pytest.fixture(scope="module")
def flow(dit, projector):
    return flow_of(nn.Features(eqx.Partial(dit.hidden, block=BLOCK), projector))


@functools.partial(eqx.filter_jit, compiler_options=QUICK)
def call(loss, flow, args, key=KEY, example_weight=None, mask=None):
    return loss(flow, X0, args, key=key, example_weight=example_weight, mask=mask)


class Nothing(eqx.Module):
    """A loss of 0 that evaluates the network all the same: what is left is the alignment."""

    loss: fs.losses.Regression = fs.losses.Regression()

    def __call__(self, flow, x0, args=None, *, key, example_weight=None, mask=None):
        value, aux = self.loss(flow, x0, args, key=key, example_weight=example_weight, mask=mask)
        return jnp.zeros_like(value), aux


class Made(eqx.Module):
    """A loss whose terms are given."""

    aux: fs.losses.Aux

    def __call__(self, flow, x0, args=None, *, key, example_weight=None, mask=None):
        weights = 1 if self.aux.weights is None else self.aux.weights
        return jnp.sum(weights * self.aux.losses) / jnp.sum(weights * jnp.ones(NUM)), self.aux


def mean_cosine(tokens, features):
    """Of one example, token by token."""
    cosines = []
    for a, b in zip(np.asarray(tokens, float), np.asarray(features, float), strict=True):
        cosines.append(np.dot(a, b) / np.sqrt(np.dot(a, a)) / np.sqrt(np.dot(b, b)))
    return np.mean(cosines)


# --- the loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("evaluations", [1, 2])
def test_alignment_is_a_weighted_mean_of_cosines(flow, weights, evaluations):
    """Against a loop over examples and tokens, from terms that are given; several evaluations count alike."""
    rng = np.random.default_rng(1)
    losses = rng.normal(size=NUM).astype(np.float32)
    tokens = rng.normal(size=(evaluations, NUM, 4, DIM)).astype(np.float32)
    of_weights = np.ones(NUM) if weights is None else weights
    aux = jax.tree.map(jnp.asarray, fs.losses.Aux(losses, losses, weights, tuple(tokens)))
    value, got = REPA(Made(aux), weight=0.7)(flow, X0, Featured(FEATURES), key=KEY)
    terms = [
        losses[i] - 0.7 * np.mean([mean_cosine(tokens[k, i], FEATURES[i]) for k in range(evaluations)])
        for i in range(NUM)
    ]
    np.testing.assert_allclose(value, np.sum(of_weights * terms) / np.sum(of_weights), rtol=1e-5)
    assert got is aux


@pytest.mark.parametrize("case", ["all", "weights and masks"])
def test_loss_from_the_network_up(flow, dit, projector, case):
    """Regression and alignment at the times and noises of the batch, the projector in NumPy."""
    mask = None if case == "all" else jnp.asarray(np.arange(NUM) != 2)
    weights = None if case == "all" else jnp.asarray(WEIGHTS)
    args = Featured(FEATURES, LABELS)
    value, aux = call(REPA(fs.losses.Regression(), weight=0.7), flow, args, example_weight=weights, mask=mask)

    @functools.partial(eqx.filter_jit, compiler_options=QUICK)
    def drawn(dit, t):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.split(KEY)[1], i))(jnp.arange(NUM))
        noise = jax.vmap(lambda key, x0: flow.source.sample(jax.random.split(key)[0], x0))(keys, X0)
        shape = (NUM, 1, 1, 1)
        x_t = (1 - t).reshape(shape) * X0 + t.reshape(shape) * noise
        return noise, jax.vmap(lambda t, x, label: dit.hidden(t, x, label, block=BLOCK))(t, x_t, jnp.asarray(LABELS))

    noise, (outputs, hidden) = jax.tree.map(lambda leaf: np.asarray(leaf, float), drawn(dit, aux.t))

    def linear(layer, h):
        return h @ np.asarray(layer.weight, float).T + np.asarray(layer.bias, float)

    def silu(h):
        return h / (1 + np.exp(-h))

    total = norm = 0.0
    for i in range(NUM):
        projected = linear(projector.last, silu(linear(projector.second, silu(linear(projector.first, hidden[i])))))
        np.testing.assert_allclose(aux.features[0][i], projected, rtol=1e-4, atol=1e-4)
        term = np.mean((outputs[i] - (noise[i] - X0[i])) ** 2) - 0.7 * mean_cosine(projected, FEATURES[i])
        counts = 1.0 if case == "all" else WEIGHTS[i] * (i != 2)
        total, norm = total + counts * term, norm + counts
    np.testing.assert_allclose(value, total / norm, rtol=1e-4)


def test_weight_0_is_the_loss_inside_to_the_last_bit(flow):
    inner = fs.losses.Regression(times=fs.times.LogitNormal())
    value, aux = call(REPA(inner, weight=0.0), flow, Featured(FEATURES, LABELS))
    want, want_aux = call(inner, flow, LABELS)
    assert value == want and jnp.array_equal(aux.losses, want_aux.losses)


def test_around_another_loss():
    """Hybrid, whose network says two things already: the same value less the weighted cosine."""
    shapes = functools.partial(nn.DiT, 1, SIZE, num_classes=CLASSES, out_channels=2, time_embedding=TIME)
    dit = made(lambda: shapes(key=KEY))
    network = nn.SplitVariance(nn.Features(eqx.Partial(dit.hidden, block=1)))
    path = fs.paths.VP()
    flow = fs.flow.VarianceFlow(network, path, fs.predictions.Noise())
    inner = fs.losses.Hybrid(fs.losses.Regression(times=fs.times.Given(fs.grids.Uniform(4)(path))))
    features = RNG.normal(size=(NUM, 4, SIZE.width)).astype(np.float32)
    value, aux = call(REPA(inner), flow, Featured(features, LABELS))
    want, _ = call(inner, flow, LABELS)
    cosines = [mean_cosine(aux.features[0][i], features[i]) for i in range(NUM)]
    np.testing.assert_allclose(value, want - 0.5 * np.mean(cosines), rtol=1e-5)


def test_conditions_are_dropped_inside(flow, dit):
    """The dropout sees the network's args alone: dropping all is training on the null label."""
    null = jnp.asarray(dit.null_label)
    dropped = REPA(fs.losses.Regression(dropout=fs.losses.ConditionDropout(1.0, null)))
    value, _ = call(dropped, flow, Featured(FEATURES, LABELS))
    want, _ = call(REPA(fs.losses.Regression()), flow, Featured(FEATURES, np.full(NUM, dit.null_label)))
    other, _ = call(REPA(fs.losses.Regression()), flow, Featured(FEATURES, LABELS))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert abs(value - other) > 1e-3


# --- cosines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-30, 3.0, 1e30])
def test_tokens_that_are_the_features_up_to_scale_have_the_least_loss(flow, scale):
    aux = fs.losses.Aux(jnp.zeros(NUM), jnp.zeros(NUM), None, (jnp.asarray(scale * FEATURES),))

    def value(features):
        return REPA(Made(aux), weight=1.0)(flow, X0, Featured(features), key=KEY)[0]

    np.testing.assert_allclose(value(FEATURES), -1, rtol=1e-6)
    np.testing.assert_allclose(value(-FEATURES), 1, rtol=1e-6)
    gradient = jax.grad(value)(jnp.asarray(FEATURES))
    assert jnp.max(jnp.abs(gradient)) < 1e-6


def test_cosine_of_other_dtypes_and_of_zero():
    tokens = jnp.asarray(FEATURES[0]).at[1].set(0)
    features = jnp.asarray(FEATURES[1])
    got, gradient = jax.value_and_grad(cosine_similarity)(tokens, features)
    np.testing.assert_allclose(got, 0.25 * 3 * mean_cosine(tokens[np.array([0, 2, 3])], features[np.array([0, 2, 3])]))
    assert jnp.all(jnp.isfinite(gradient))
    half = cosine_similarity(tokens.astype(jnp.bfloat16), features.astype(jnp.float16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, got, atol=0.01)


def test_cosine_derivative_is_that_of_finite_differences(x64):
    rng = np.random.default_rng(2)
    a, b, direction = jnp.asarray(rng.normal(size=(3, 4, DIM)))
    _, got = jax.jvp(lambda a: cosine_similarity(a, b), (a,), (direction,))
    step = 1e-5
    want = (mean_cosine(a + step * direction, b) - mean_cosine(a - step * direction, b)) / (2 * step)
    np.testing.assert_allclose(got, want, rtol=1e-8)


# --- where it goes ------------------------------------------------------------------------------------------------


def test_gradient_goes_to_the_projector_and_the_blocks_before(flow):
    @functools.partial(eqx.filter_jit, compiler_options=QUICK)
    @eqx.filter_grad
    def gradient(flow):
        return REPA(Nothing())(flow, X0, Featured(FEATURES, jnp.asarray(LABELS)), key=KEY)[0]

    network = gradient(flow).network
    for leaf in jax.tree.leaves(network.head):
        assert jnp.linalg.norm(leaf) > 1e-4
    dit = network.network.func.__self__
    for leaf in jax.tree.leaves(dit.blocks):
        for k in range(SIZE.depth):
            assert jnp.any(leaf[k] != 0) == (k < BLOCK)
    assert jnp.any(dit.first.weight != 0) and jnp.any(dit.label_embedding.table != 0)
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves((dit.modulation, dit.last)))


def test_sampling_computes_no_head_and_draws_the_same(dit):
    def raising(tokens):
        raise AssertionError("the head was computed")

    wrapped = flow_of(nn.Features(eqx.Partial(dit.hidden, block=BLOCK), raising))
    like, settings = jax.ShapeDtypeStruct(SHAPE, jnp.float32), {"solver": diffrax.Euler(), "grid": fs.grids.Uniform(3)}
    draws = [
        fs.sample(flow, like, num=2, key=KEY, args=jnp.asarray([0, 1]), **settings) for flow in (flow_of(dit), wrapped)
    ]
    assert jnp.array_equal(*draws)
    with pytest.raises(AssertionError, match="the head was computed"):
        call(REPA(fs.losses.Regression()), wrapped, Featured(FEATURES, LABELS))


def test_fit_trains_the_projector_and_measures_the_loss_inside_by_time(flow):
    """One step: beside it Regression alone, whose loss by time is the same and whose projector stays."""
    states = []
    for loss, args in ((REPA(fs.losses.Regression()), Featured(FEATURES, LABELS)), (fs.losses.Regression(), LABELS)):
        batches = [(X0, args)]
        (state,) = fs.training.fit(
            loss, flow, batches, optax.sgd(0.1), steps=1, key=KEY, ema=None, every=1, progress=False
        )
        states.append(state)
    aligned, plain = states
    np.testing.assert_allclose(aligned.metrics["loss_by_t"], plain.metrics["loss_by_t"], rtol=1e-5)
    value, aux = call(REPA(fs.losses.Regression()), flow, Featured(FEATURES, LABELS), key=jax.random.fold_in(KEY, 0))
    np.testing.assert_allclose(aligned.metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(plain.metrics["loss"], jnp.mean(aux.losses), rtol=1e-5)
    for start, moved, same in zip(
        *(jax.tree.leaves(f.network.head) for f in (flow, aligned.flow, plain.flow)), strict=True
    ):
        assert jnp.array_equal(start, same) and not jnp.array_equal(start, moved)


def test_projector_starts_as_the_paper_says():
    projector = nn.Projector(20, 30, hidden=50, key=KEY)
    for layer, sizes in ((projector.first, 70), (projector.second, 100), (projector.last, 80)):
        bound = np.sqrt(6 / sizes)
        assert 0.97 * bound < jnp.max(jnp.abs(layer.weight)) <= bound
        np.testing.assert_allclose(jnp.std(layer.weight), bound / np.sqrt(3), rtol=0.05)
        assert not jnp.any(layer.bias)


# --- hidden tokens ------------------------------------------------------------------------------------------------


def block_of(stack, k):
    return jax.tree.map(lambda leaf: leaf[k] if eqx.is_array(leaf) else leaf, stack)


def dit_blocks(network, t, x, label, key):
    h, apply, _ = network._parts(t, x, label)
    for k in range(network.size.depth):
        h, _ = apply(block_of(network.blocks, k), h, None, jax.random.split(key, network.size.depth)[k])
        yield h


def mlp_blocks(network, t, x, label, key):
    h, embedding = network.first(jnp.ravel(x)), network.embedding(t, label)
    for k in range(network.depth):
        h = block_of(network.blocks, k)(h, embedding, network.dropout, key=jax.random.split(key, network.depth)[k])
        yield h


def uvit_blocks(network, t, x, label, key):
    h, mask = network._tokens(t, x, label)
    half, skips = network.size.depth // 2, []
    for k in range(half):
        h = block_of(network.down, k)(h, None, mask)
        skips.append(h)
        yield h[-4:]
    h = network.middle(h, None, mask)
    yield h[-4:]
    for k in range(half):
        h = block_of(network.up, k)(h, skips.pop(), mask)
        yield h[-4:]


NETWORKS = {
    "DiT": (lambda: nn.DiT(1, SIZE, num_classes=CLASSES, dropout=0.3, time_embedding=TIME, key=KEY), dit_blocks),
    "UViT": (lambda: nn.UViT(SHAPE, SIZE._replace(depth=5), num_classes=CLASSES, key=KEY), uvit_blocks),
    "ResidualMLP": (
        lambda: nn.ResidualMLP(
            jax.ShapeDtypeStruct(SHAPE, jnp.float32), width=8, depth=3, num_classes=CLASSES, dropout=0.3, key=KEY
        ),
        mlp_blocks,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_is_what_the_blocks_give_one_by_one(name):
    """And the output that of a plain call, to the last bit, dropout included."""
    make, blocks = NETWORKS[name]
    network, x, t, label = made(make), X0[0], jnp.asarray(0.3, jnp.float32), 1
    want = eqx.filter_jit(lambda network, x: list(blocks(network, t, x, label, KEY)), compiler_options=QUICK)(
        network, x
    )

    @eqx.filter_jit
    def hidden(network, x):
        return [network.hidden(t, x, label, block=k + 1, key=KEY) for k in range(len(want))]

    plain = eqx.filter_jit(lambda network, x: network(t, x, label, key=KEY))(network, x)
    assert len(want) >= 3 and not np.allclose(want[0], want[1], rtol=0.01)
    for (out, kept), h in zip(hidden(network, x), want, strict=True):
        assert jnp.array_equal(out, plain)
        np.testing.assert_allclose(kept, h, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(h))))
    for block in (0, len(want) + 1):
        with pytest.raises(ValueError, match=f"an integer from 1 to {len(want)}"):
            network.hidden(t, x, label, block=block)


# --- what is not taken --------------------------------------------------------------------------------------------


def test_what_is_not_taken(flow, dit, untyped):
    loss, args = REPA(fs.losses.Regression()), Featured(FEATURES, LABELS)

    def abstract(loss, flow, args):
        eqx.filter_eval_shape(lambda flow: loss(flow, X0, args, key=KEY), flow)

    with pytest.raises(TypeError, match=r"args of REPA is a ndarray, but wants fs\.alignment\.Featured"):
        abstract(loss, flow, LABELS)
    with pytest.raises(
        ValueError, match=r"Nothing that a network handed out came through Regression.*fs\.nn\.Features\("
    ):
        abstract(loss, flow_of(dit), args)
    for wrong in (FEATURES[..., 1:], FEATURES[:, 1:], FEATURES[:, 0]):
        with pytest.raises(ValueError, match=r"tokens of float32\[4, 6\] and features of.*a feature for each token"):
            abstract(loss, flow, Featured(wrong, LABELS))
    for wrong in (FEATURES[1:], np.ones((NUM, 4, DIM), int), np.float32(1)):
        with pytest.raises(ValueError, match=r"for 5 examples, but wants floating-point numbers of shape \(5, tokens"):
            abstract(loss, flow, Featured(wrong, LABELS))
    pair = flow_of(nn.Features(eqx.Partial(dit.hidden, block=1), lambda tokens: (tokens, tokens)))
    with pytest.raises(TypeError, match="but REPA wants one array of tokens"):
        abstract(loss, pair, args)
    with pytest.raises(TypeError, match=r"gave NoneType beside its value, but wants losses\.Aux"):
        abstract(REPA(lambda *given, **named: (jnp.zeros(()), None)), flow, args)
    with pytest.raises(TypeError, match="REPA got a loss of type int"):
        REPA(3)
    with pytest.raises(ValueError, match="weight = -1, but wants it >= 0"):
        REPA(fs.losses.Regression(), -1.0)
    with pytest.raises(ValueError, match="Projector got width = 0"):
        nn.Projector(0, 3, key=KEY)
    with pytest.raises(ValueError, match=r"tokens of float32\[4, 6\], but was built for a width of 8"):
        flow.network.head(jnp.asarray(FEATURES[0]))
