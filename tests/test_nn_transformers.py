"""Transformers on patches: against NumPy in float64, gradients by complex steps; starts, sizes, conditions."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import flowsolve as fs
from flowsolve import nn

SHAPE, CLASSES, TOKENS, CONTEXT = (2, 4, 6), 3, 4, 3
SIZE = nn.TransformerSize(patch=2, width=8, depth=3, heads=2, mlp_ratio=1.5)
TIME = nn.SinusoidalEmbedding(6)
RNG = np.random.default_rng(5)
#: What is this small takes longer to compile than to run.
QUICK = {"xla_backend_optimization_level": 0}


def dit_with_context():
    return nn.DiT(
        2, SIZE, num_classes=CLASSES, context_dim=CONTEXT, out_channels=4, time_embedding=TIME, key=jax.random.key(0)
    )


def dit_rotary():
    return nn.DiT(
        2,
        SIZE,
        num_classes=CLASSES,
        positions=nn.RotaryPositions(),
        qk_norm=True,
        remat=True,
        time_embedding=TIME,
        key=jax.random.key(0),
    )


def uvit():
    size = SIZE._replace(depth=5)
    return nn.UViT(SHAPE, size, num_classes=CLASSES, context_shape=(TOKENS, CONTEXT), key=jax.random.key(0))


def random_like(tree, scale=0.5):
    """The tree with random parameters, by NumPy: the zeros of the start hide most of a network."""
    rng = np.random.default_rng(9)

    def draw(leaf):
        return jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32) if hasattr(leaf, "shape") else leaf

    return jax.tree.map(draw, tree)


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))


@pytest.fixture(scope="module")
def networks():
    return {make.__name__: random_like(eqx.filter_eval_shape(make)) for make in (dit_with_context, dit_rotary, uvit)}


@pytest.fixture(scope="module")
def dit(networks):
    return networks["dit_with_context"]


# --- one batch: a label and a context with a mask, the null label with a whole context, nothing attended to ----------

T = np.array([0.3, 0.8, 0.55], np.float32)
X = RNG.normal(size=(3, *SHAPE)).astype(np.float32)
LABELS = np.array([1, CLASSES, 0])
CONTEXTS = RNG.normal(size=(3, TOKENS, CONTEXT)).astype(np.float32)
MASKS = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
WEIGHTS = RNG.normal(size=(3, 4, *SHAPE[1:])).astype(np.float32)


def conditions(has_context):
    return nn.Condition(LABELS, CONTEXTS, MASKS) if has_context else jnp.asarray(LABELS)


def takes_context(network):
    return isinstance(network, nn.UViT) or network.context_dim is not None


@functools.partial(eqx.filter_jit, compiler_options=QUICK)
def call(network, t, x, args, key=None):
    return network(t, x, args, key=key)


@functools.partial(eqx.filter_jit, compiler_options=QUICK)
def outputs_and_gradient(network, t, x, args, weights):
    """The batch's outputs, and the gradient of sum(weights * outputs) in the parameters and in x."""

    @eqx.filter_grad(has_aux=True)
    def gradient(both):
        network, x = both
        out = jax.vmap(network)(t, x, args)
        return jnp.sum(out * weights[:, : out.shape[1]]), out

    grads, out = gradient((network, x))
    return out, grads


@pytest.fixture(scope="module")
def results(networks):
    return {
        name: outputs_and_gradient(network, T, X, conditions(takes_context(network)), WEIGHTS)
        for name, network in networks.items()
    }


# --- the networks in NumPy, for real or complex parameters --------------------------------------------------------


def linear(p, h):
    return h @ p.weight.T + (0 if p.bias is None else p.bias)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    return x / 2 * (1 + scipy.special.erf(x / np.sqrt(2)))


def normed(h, eps):
    centred = h - h.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


def softmax(logits):
    weights = np.exp(logits - logits.real.max())
    return weights / weights.sum()


def attention_reference(p, h, context=None, mask=None, turn=None):
    """Token by token and head by head."""
    width = h.shape[-1] // p.heads
    if context is None:
        q, k, v = np.split(linear(p.query_key_value, h), 3, -1)
    else:
        q, (k, v) = linear(p.query, h), np.split(linear(p.key_value, context), 2, -1)
    attended = np.zeros(q.shape, complex)
    for head in range(p.heads):
        part = slice(head * width, (head + 1) * width)
        qs, ks, vs = q[:, part], k[:, part], v[:, part]
        if p.query_norm is not None:
            qs = qs / np.sqrt((qs**2).mean(-1, keepdims=True) + 1e-5) * p.query_norm.weight
            ks = ks / np.sqrt((ks**2).mean(-1, keepdims=True) + 1e-5) * p.key_norm.weight
        if turn is not None:
            qs, ks = turn(qs), turn(ks)
        seen = np.arange(len(ks)) if mask is None else np.flatnonzero(mask)
        for i in range(len(h)):
            if len(seen):
                attended[i, part] = softmax(ks[seen] @ qs[i] / np.sqrt(width)) @ vs[seen]
    return linear(p.out, attended)


def patches_of(x):
    """Patches of 2 x 2, row by row, with the elements of the first channel first."""
    return np.stack(
        [
            np.concatenate([x[c, r : r + 2, s : s + 2].ravel() for c in range(x.shape[0])])
            for r in range(0, x.shape[1], 2)
            for s in range(0, x.shape[2], 2)
        ]
    )


def image_of(tokens, channels):
    out = np.zeros((channels, *SHAPE[1:]), tokens.dtype)
    for i, token in enumerate(tokens):
        r, s = divmod(i, SHAPE[2] // 2)
        out[:, 2 * r : 2 * r + 2, 2 * s : 2 * s + 2] = token.reshape(channels, 2, 2)
    return out


def grid():
    return [(r, c) for r in range(SHAPE[1] // 2) for c in range(SHAPE[2] // 2)]


def sincos(width):
    rows = []
    for r, c in grid():
        omega = [10_000.0 ** (-i / (width // 4)) for i in range(width // 4)]
        rows.append([f(o * place) for place in (c, r) for f in (math.sin, math.cos) for o in omega])
    return np.array(rows)


def turned(heads):
    """The i-th and the (i + width/2)-th element as a complex number times e^{i angle}, written out in reals."""
    width = heads.shape[-1]
    out = heads.copy()
    for token, (r, c) in enumerate(grid()):
        omega = [100.0 ** (-i / (width // 4)) for i in range(width // 4)]
        for i, angle in enumerate([o * place for place in (r, c) for o in omega]):
            a, b = heads[token, i], heads[token, i + width // 2]
            out[token, i] = a * math.cos(angle) - b * math.sin(angle)
            out[token, i + width // 2] = a * math.sin(angle) + b * math.cos(angle)
    return out


def time_embedding(dim, t):
    angles = 2 * np.pi * float(t) / np.geomspace(10.0, 0.1, dim // 2)
    return np.concatenate([np.cos(angles), np.sin(angles)])


def block_of(blocks, i):
    return jax.tree.map(lambda leaf: leaf[i] if eqx.is_array(leaf) else leaf, blocks)


def dit_reference(p, t, x, label, context, mask):
    """(output, the tokens after each block)."""
    c = time_embedding(6, t)
    c = linear(p.embed.layers[1], silu(linear(p.embed.layers[0], c))) + p.label_embedding.table[label]
    c = silu(c)
    rotary = isinstance(p.positions, nn.RotaryPositions)
    h = linear(p.first, patches_of(x)) + (0 if rotary else sincos(SIZE.width))
    tokens = []
    for i in range(SIZE.depth):
        block = block_of(p.blocks, i)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = np.split(linear(block.modulation, c), 6)
        attended = attention_reference(
            block.attention, (1 + scale) * normed(h, 1e-6) + shift, turn=turned if rotary else None
        )
        h = h + gate * attended
        if context is not None:
            h = h + attention_reference(block.cross, normed(h, 1e-6), context, mask)
        hidden = gelu_tanh(linear(block.first, (1 + mlp_scale) * normed(h, 1e-6) + mlp_shift))
        h = h + mlp_gate * linear(block.second, hidden)
        tokens.append(h)
    shift, scale = np.split(linear(p.modulation, c), 2)
    last = linear(p.last, (1 + scale) * normed(h, 1e-6) + shift)
    return image_of(last, p.last.weight.shape[-2] // 4), tokens


def convolved(p, image):
    """3 x 3, zeros beyond the edge."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros_like(image) + p.bias
    for i in range(3):
        for j in range(3):
            window = padded[:, i : i + image.shape[1], j : j + image.shape[2]]
            out = out + np.einsum("oc,chw->ohw", p.weight[:, :, i, j], window)
    return out


def uvit_reference(p, t, x, label, context, mask):
    def norm(layer, h):
        return normed(h, 1e-5) * layer.weight + layer.bias

    def apply(block, h):
        h = h + attention_reference(block.attention, norm(block.attention_norm, h), mask=exists)
        return h + linear(block.second, gelu(linear(block.first, norm(block.norm, h))))

    start = [time_embedding(SIZE.width, t)[None], p.label_embedding.table[label][None]]
    h = np.concatenate([*start, linear(p.context, context), linear(p.first, patches_of(x))]) + p.position
    exists = np.concatenate([[True, True], mask, np.ones(len(grid()), bool)])
    skips = []
    for i in range(2):
        h = apply(block_of(p.down, i), h)
        skips.append(h)
    h = apply(p.middle, h)
    for i in range(2):
        block = block_of(p.up, i)
        h = apply(block, linear(block.skip, np.concatenate([h, skips.pop()], -1)))
    last = linear(p.last, norm(p.norm, h[-len(grid()) :]))
    return convolved(p.convolution, image_of(last, 2)), None


REFERENCES = {"dit_with_context": dit_reference, "dit_rotary": dit_reference, "uvit": uvit_reference}


def double(network):
    return jax.tree.map(lambda leaf: np.asarray(leaf, float) if eqx.is_array(leaf) else leaf, network)


def reference_outputs(name, network, x):
    contexts = CONTEXTS.astype(float) if takes_context(network) else [None] * 3
    return [REFERENCES[name](network, T[i], x[i], LABELS[i], contexts[i], MASKS[i])[0] for i in range(3)]


@pytest.mark.parametrize("name", REFERENCES)
def test_forward_pass_equals_numpy(name, networks, results):
    want = np.stack(reference_outputs(name, double(networks[name]), X.astype(float))).real
    got = np.asarray(results[name][0])
    assert got.dtype == np.float32 and got.shape == want.shape
    assert np.abs(got - want).max() < 1e-5 * np.sqrt(np.mean(want**2))


@pytest.mark.parametrize("name", REFERENCES)
def test_backward_pass_equals_complex_steps(name, networks, results):
    """Along a random direction of every array, d/dh f(p + i h d) = Im f(p + i h d)/h to rounding, in float64."""
    rng = np.random.default_rng(3)
    both, static = eqx.partition(double((networks[name], X)), eqx.is_inexact_array)
    leaves, structure = jax.tree.flatten(both)
    gradients = jax.tree.leaves(results[name][1])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(both)]
    assert len(gradients) == len(leaves)
    largest = max(np.linalg.norm(gradient) for gradient in gradients)
    for i, gradient in enumerate(gradients):
        gradient, direction = np.asarray(gradient, float), rng.normal(size=leaves[i].shape)
        direction /= np.linalg.norm(direction)
        moved = [*leaves[:i], leaves[i] + 1e-30j * direction, *leaves[i + 1 :]]
        network, x = eqx.combine(jax.tree.unflatten(structure, moved), static)
        outputs = reference_outputs(name, network, x)
        want = sum(np.sum(WEIGHTS[j, : len(out)] * out.imag) for j, out in enumerate(outputs)) / 1e-30
        assert abs(np.sum(gradient * direction) - want) < 1e-5 * np.linalg.norm(gradient) + 1e-7 * largest, paths[i]
        assert np.linalg.norm(gradient) > 1e-3 * largest or "weight" not in paths[i], paths[i]


@pytest.mark.parametrize("block", [1, 2, SIZE.depth])
def test_hidden_tokens_are_those_after_the_block(dit, results, block):
    @functools.partial(eqx.filter_jit, compiler_options=QUICK)
    def hidden(network, t, x, args):
        return network.hidden(t, x, args, block=block)

    args = jax.tree.map(lambda leaf: leaf[0], conditions(True))
    out, tokens = hidden(dit, T[0], X[0], args)
    np.testing.assert_allclose(out, results["dit_with_context"][0][0], rtol=1e-4, atol=1e-4)
    want = dit_reference(double(dit), T[0], X[0].astype(float), LABELS[0], CONTEXTS[0].astype(float), MASKS[0])[1]
    want = want[block - 1].real
    np.testing.assert_allclose(tokens, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


# --- starts and sizes ---------------------------------------------------------------------------------------------


def test_dit_starts_as_the_paper_says():
    """Output 0, each block the identity; Xavier-uniform maps, N(0, 0.02^2) embeddings, biases 0."""
    size = nn.TransformerSize(patch=2, width=128, depth=2, heads=2)

    @functools.partial(eqx.filter_jit, compiler_options=QUICK)
    def start(t, x, label):
        network = nn.DiT(2, size, num_classes=99, context_dim=50, key=jax.random.key(1))
        return network, network.hidden(t, x, label, block=2)

    network, (out, tokens) = start(T[0], X[0], 1)
    assert jnp.all(out == 0) and out.shape == SHAPE
    want = linear(double(network.first), patches_of(X[0])) + sincos(128)
    np.testing.assert_allclose(tokens, want, atol=1e-5)
    blocks = network.blocks
    for weight in (blocks.attention.query_key_value.weight, blocks.second.weight, blocks.cross.key_value.weight):
        bound = np.sqrt(6 / sum(weight.shape[1:]))
        assert 0.99 * bound < np.abs(weight).max() <= bound
        np.testing.assert_allclose(np.std(weight), bound / np.sqrt(3), rtol=0.02)
        assert not np.allclose(weight[0], weight[1])
    for normal in (network.label_embedding.table, network.embed.layers[0].weight, network.embed.layers[1].weight):
        np.testing.assert_allclose(np.std(normal), 0.02, rtol=0.05)
    for zero in (blocks.modulation, blocks.cross.out, network.modulation, network.last, network.first.bias):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(zero))


def test_uvit_starts_as_the_paper_says():
    size = nn.TransformerSize(patch=2, width=64, depth=5, heads=2)
    start = functools.partial(nn.UViT, (3, 8, 8), size, num_classes=9, key=jax.random.key(1))
    network = eqx.filter_jit(start, compiler_options=QUICK)()
    maps = (network.first, network.last, network.up.skip, network.down.second, network.middle.attention.out)
    for weight in (network.position, *(one.weight for one in maps)):
        np.testing.assert_allclose(np.std(weight), 0.02, rtol=5 / np.sqrt(2 * weight.size))
    assert not any(np.any(one.bias) for one in maps)
    assert not np.allclose(network.up.skip.weight[0], network.up.skip.weight[1])


PUBLISHED = {"S": (384, 12, 33e6), "B": (768, 12, 130e6), "L": (1024, 24, 458e6), "XL": (1152, 28, 675e6)}


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_published_dits(name, patch):
    """On 32 x 32 x 4 latents with 1000 classes and a learned variance, by the layers of the architecture."""
    width, depth, published = PUBLISHED[name]
    size = nn.DiT.SIZES[f"{name}/{patch}"]
    network = eqx.filter_eval_shape(lambda: nn.DiT(4, size, num_classes=1000, out_channels=8, key=jax.random.key(0)))
    attention = width * 3 * width + 3 * width + width * width + width
    mlp = width * 4 * width + 4 * width + 4 * width * width + width
    modulation = width * 6 * width + 6 * width
    ends = (4 * patch**2 * width + width) + (width * 2 * width + 2 * width) + (width * 8 * patch**2 + 8 * patch**2)
    embeddings = (256 * width + width) + (width * width + width) + 1001 * width
    want = depth * (attention + mlp + modulation) + ends + embeddings
    assert count(network) == want
    assert patch > 2 or abs(want - published) < 0.5e6 + 1e-2 * published
    assert size.patch == patch and network.blocks.attention.heads == {"S": 6, "B": 12, "L": 16, "XL": 16}[name]


UVITS = {
    "S/2": ((3, 32, 32), 10, 44e6),
    "M/4": ((3, 64, 64), 1000, 131e6),
    "L/2": ((4, 32, 32), 1000, 287e6),
    "H/2": ((4, 32, 32), 1000, 501e6),
}


@pytest.mark.parametrize("name", UVITS)
def test_parameters_of_the_published_uvits(name):
    shape, classes, published = UVITS[name]
    size = nn.UViT.SIZES[name]
    network = eqx.filter_eval_shape(lambda: nn.UViT(shape, size, num_classes=classes, key=jax.random.key(0)))
    width, area = size.width, size.patch**2
    block = 3 * width**2 + (width**2 + width) + 8 * width**2 + 5 * width + 4 * width
    ends = (shape[0] * area * width + width) + (width * shape[0] * area + shape[0] * area) + 2 * width
    convolution = 9 * shape[0] ** 2 + shape[0]
    tokens = (2 + shape[1] * shape[2] // area) * width + (classes + 1) * width
    want = size.depth * block + (size.depth - 1) // 2 * (2 * width**2 + width) + ends + convolution + tokens
    assert count(network) == want
    assert abs(want - published) < 0.5e6 + 5e-3 * published


@pytest.mark.parametrize(
    "make",
    [
        lambda depth: nn.DiT(2, SIZE._replace(depth=depth), key=jax.random.key(0)),
        lambda depth: nn.UViT(SHAPE, SIZE._replace(depth=depth + 1), key=jax.random.key(0)),
    ],
    ids=["DiT", "UViT"],
)
def test_program_does_not_grow_with_depth(make):
    def size(depth):
        network = eqx.filter_eval_shape(make, depth)
        gradient = eqx.filter_grad(lambda n: jnp.sum(n(jnp.float32(0.3), jnp.ones(SHAPE))))
        return len(str(eqx.filter_make_jaxpr(gradient)(network)[0]).splitlines())

    assert size(4) == size(12)


def test_remat_holds_less():
    """What the backward pass keeps of the forward pass, in numbers."""

    def held(remat):
        network = eqx.filter_eval_shape(
            lambda: nn.DiT(2, SIZE._replace(depth=8, width=32), remat=remat, key=jax.random.key(0))
        )
        parameters, static = eqx.partition(network, lambda leaf: hasattr(leaf, "shape"))
        forward = lambda p, x: eqx.combine(p, static)(jnp.float32(0.3), x)  # noqa: E731
        backward = eqx.filter_eval_shape(lambda p, x: jax.vjp(forward, p, x)[1], parameters, jnp.ones(SHAPE))
        return count(backward) - count(parameters)

    tokens = len(grid()) * 32
    assert held(True) < 8 * 2 * tokens < held(False)


# --- positions ----------------------------------------------------------------------------------------------------


def test_sincos_equals_its_formula():
    got = nn.SincosPositions().added(SHAPE[1] // 2, SHAPE[2] // 2, 16, jnp.float32)
    np.testing.assert_allclose(got, sincos(16), atol=1e-6)
    assert nn.SincosPositions().rotation(2, 3, 8, jnp.float32) is None


def test_rotary_attention_sees_differences_of_positions_alone():
    """The product of a turned query and a turned key, over all pairs of places in a grid of 4 x 5."""
    from flowsolve.nn.positions import rotate

    rows, columns = 4, 5
    rotation = nn.RotaryPositions().rotation(rows, columns, 8, jnp.float32)
    q, k = jnp.asarray(RNG.normal(size=(2, 8)), jnp.float32)
    turned_q, turned_k = (rotate(jnp.tile(v, (rows * columns, 1, 1)), rotation)[:, 0] for v in (q, k))
    products = np.asarray(turned_q @ turned_k.T)
    places = [(r, c) for r in range(rows) for c in range(columns)]
    found: dict = {}
    for i, (r, c) in enumerate(places):
        for j, (s, d) in enumerate(places):
            found.setdefault((r - s, c - d), []).append(products[i, j])
    assert all(np.ptp(values) < 1e-5 for values in found.values())
    centres = np.array([values[0] for values in found.values()])
    assert np.diff(np.sort(centres)).max() > 1e-3 and len(np.unique(np.round(centres, 5))) > 0.9 * len(centres)
    np.testing.assert_allclose(products[0, 0], q @ k, rtol=1e-5)
    assert nn.RotaryPositions().added(2, 3, 8, jnp.float32) is None


# --- attention and conditions -------------------------------------------------------------------------------------


def test_what_does_not_exist_is_not_seen(dit, results):
    """Neither a masked token of a context nor, where all are masked, the context."""
    hidden = CONTEXTS + 10 * ~MASKS[..., None]
    changed = jax.vmap(lambda t, x, args: call(dit, t, x, args))(T, X, nn.Condition(LABELS, hidden, MASKS))
    base = results["dit_with_context"][0]
    np.testing.assert_allclose(changed, base, rtol=1e-5, atol=1e-5)
    seen = jax.vmap(lambda t, x, args: call(dit, t, x, args))(T, X, nn.Condition(LABELS, CONTEXTS + 10, MASKS))
    assert not jnp.allclose(seen[0], base[0], atol=1e-2) and not jnp.allclose(seen[1], base[1], atol=1e-2)
    np.testing.assert_allclose(seen[2], base[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dit_with_context", "uvit"])
def test_nothing_said_is_null(name, networks):
    network = networks[name]
    condition = nn.Condition(LABELS[0], CONTEXTS[0], MASKS[0])
    null = network.null(condition)
    assert network.null_label == CLASSES == null.label and not jnp.any(null.mask)
    assert jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), condition, null)
    nothing = call(network, T[0], X[0], None)
    np.testing.assert_allclose(call(network, T[0], X[0], null), nothing, rtol=1e-5, atol=1e-5)
    label = call(network, T[0], X[0], jnp.asarray(LABELS[0]))
    same = call(network, T[0], X[0], eqx.tree_at(lambda c: c.mask, condition, jnp.zeros(TOKENS, bool)))
    np.testing.assert_allclose(label, same, rtol=1e-5, atol=1e-5)
    different = [nothing, label, call(network, T[0], X[0], condition)]
    different += [
        call(network, T[0], X[0], nn.Condition(LABELS[i], CONTEXTS[j], MASKS[0])) for i, j in ((1, 0), (0, 1))
    ]
    different += [call(network, T[1], X[0], None), call(network, T[0], X[1], None)]
    for i, a in enumerate(different):
        for b in different[:i]:
            assert jnp.abs(a - b).max() > 1e-2
    labels = network.null(jnp.asarray(LABELS))
    assert jnp.array_equal(labels, jnp.full(3, CLASSES)) and labels.dtype == jnp.asarray(LABELS).dtype


def test_guidance_takes_conditions(networks):
    """u + s (c - u), with u the network's null condition."""
    network = networks["uvit"]
    flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
    condition = nn.Condition(LABELS[0], CONTEXTS[0], MASKS[0])
    guided = fs.guidance.ClassifierFree(flow, 2.5, network.null(condition))
    got = eqx.filter_jit(guided.velocity)(jnp.asarray(T[0]), jnp.asarray(X[0]), condition)
    u, c = (call(network, T[0], X[0], args) for args in (None, condition))
    np.testing.assert_allclose(got, u + 2.5 * (c - u), rtol=1e-4, atol=1e-4)


def test_dropout_is_off_without_a_key(dit, results):
    dropping = eqx.tree_at(lambda n: n.dropout, dit, 0.5)
    args = jax.tree.map(lambda leaf: leaf[0], conditions(True))
    np.testing.assert_allclose(
        call(dropping, T[0], X[0], args), results["dit_with_context"][0][0], rtol=1e-5, atol=1e-5
    )
    one, two, again = (call(dropping, T[0], X[0], args, jax.random.key(seed)) for seed in (0, 1, 0))
    assert jnp.array_equal(one, again) and not jnp.allclose(one, two, atol=1e-2)


# --- half precision, and variances ---------------------------------------------------------------------------------


def test_half_precision(dit):
    """Gradients are float32, finite and near those of float32."""
    single = random_like(dit, 0.2)
    half = nn.Precision(single, jnp.bfloat16)
    args = conditions(True)
    # JAX's attention promotes inside its backward pass.
    with jax.numpy_dtype_promotion("standard"):
        out, gradient = outputs_and_gradient(half, T, X, args, WEIGHTS)
    want, exact = outputs_and_gradient(single, T, X, args, WEIGHTS)
    assert out.dtype == jnp.float32
    assert 1e-4 < jnp.linalg.norm(out - want) / jnp.linalg.norm(want) < 0.05
    norms = []
    for a, b in zip(*map(jax.tree.leaves, (gradient, exact)), strict=True):
        assert a.dtype == jnp.float32 and jnp.all(jnp.isfinite(a))
        norms.append((jnp.linalg.norm(a - b), jnp.linalg.norm(b)))
    error, norm = np.linalg.norm(np.array(norms), axis=0)
    assert error < 0.05 * norm


def test_time_is_embedded_in_float32(networks):
    """0.3 and 0.3005 are the same number in bfloat16."""
    half = nn.Precision(networks["uvit"], jnp.bfloat16)
    args = jax.tree.map(lambda leaf: leaf[0], conditions(True))
    one, two = (call(half, np.float32(t), X[0], args) for t in (0.3, 0.3005))
    assert not jnp.array_equal(one, two)


def test_a_variance_beside_the_output(dit, results):
    network = nn.SplitVariance(dit)
    flow = fs.flow.VarianceFlow(network, fs.paths.VP(), fs.predictions.Noise())
    args = jax.tree.map(lambda leaf: leaf[0], conditions(True))
    raw = results["dit_with_context"][0][0]
    output, nu = eqx.filter_jit(flow.output_and_interpolation)(jnp.asarray(T[0]), jnp.asarray(X[0]), args)
    np.testing.assert_allclose(output, raw[:2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(nu, 0.5 + raw[2:] / 2, rtol=1e-4, atol=1e-4)
    half = nn.SplitVariance(nn.Precision(dit, jnp.bfloat16))
    parts = eqx.filter_eval_shape(half, jnp.asarray(T[0]), jnp.asarray(X[0]), args)
    assert [(part.shape, part.dtype) for part in parts] == [(SHAPE, jnp.float32)] * 2


# --- bad input -------------------------------------------------------------------------------------------------------


def test_wrong_calls_are_refused(networks, untyped):
    dit, rotary, uvit = (networks[name] for name in ("dit_with_context", "dit_rotary", "uvit"))
    for x in (jnp.ones((2, 5, 6)), jnp.ones((2, 4, 7))):
        with pytest.raises(ValueError, match=r"patches of 2 x 2 do not cover: pad or crop it to multiples of 2"):
            dit(T[0], x)
    for x in (X, jnp.ones((3, 4, 6)), jnp.ones((4, 6))):
        with pytest.raises(ValueError, match=r"ONE image of shape \(2, height, width\)"):
            rotary(T[0], jnp.asarray(x))
    with pytest.raises(ValueError, match=r"ONE image of shape \(2, 4, 6\)"):
        uvit(T[0], jnp.ones((2, 6, 4)))
    with pytest.raises(TypeError, match="must be floating point"):
        uvit(T[0], jnp.ones((2, 4, 6), int))
    with pytest.raises(TypeError, match=r"mask of int32\[2\], but wants bools"):
        nn.Condition(context=jnp.ones((2, 3)), mask=jnp.ones(2, jnp.int32))
    x = jnp.asarray(X[0])
    for network in (dit, rotary, uvit):
        for label in (-1, CLASSES + 1):
            with pytest.raises(ValueError, match=f"out of range: labels run from 0 to {CLASSES}"):
                network(T[0], x, label)
        with pytest.raises(TypeError, match=r"None, an integer label, or a Condition"):
            network(T[0], x, 0.5)
    assert jnp.all(jnp.isnan(call(rotary, T[0], X[0], jnp.asarray(CLASSES + 1))))
    for network in (dit, uvit):
        for context in (jnp.ones((TOKENS, CONTEXT + 1)), jnp.ones((2, TOKENS, CONTEXT))):
            with pytest.raises(ValueError, match=r"but was built for \(tokens, 3\)"):
                network(T[0], x, nn.Condition(1, context))
    with pytest.raises(ValueError, match=r"built for \(4, 3\): pad it"):
        uvit(T[0], x, nn.Condition(1, jnp.ones((TOKENS + 1, CONTEXT))))
    with pytest.raises(ValueError, match=r"takes no context.*build it with context_dim"):
        rotary(T[0], x, nn.Condition(1, CONTEXTS[0]))
    plain = eqx.filter_eval_shape(lambda: nn.UViT(SHAPE, SIZE, key=jax.random.key(0)))
    with pytest.raises(ValueError, match=r"takes no context.*build it with context_shape"):
        plain(T[0], x, nn.Condition(context=CONTEXTS[0]))
    for build in (nn.DiT, nn.UViT):
        with pytest.raises(TypeError, match=rf"{build.__name__}'s size is a str, but wants a fs\.nn\.TransformerSize"):
            build(SHAPE if build is nn.UViT else 2, "S/2", key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"\(tokens, width\) for a context"):
        nn.UViT(SHAPE, SIZE, context_shape=5, key=jax.random.key(0))
    with pytest.raises(ValueError, match="bool for each of its tokens"):
        nn.Condition(1, CONTEXTS[0], MASKS[0, 1:])
    for block in (0, SIZE.depth + 1):
        with pytest.raises(ValueError, match="an integer from 1 to 3"):
            dit.hidden(T[0], x, block=block)
    with pytest.raises(ValueError, match="build the network with out_channels"):
        nn.SplitVariance(lambda t, x, args, *, key=None: x)(T[0], x)


def test_what_was_not_built_is_not_taken():
    network = random_like(eqx.filter_eval_shape(lambda: nn.DiT(2, SIZE, key=jax.random.key(0))))
    for ask in (lambda: network.null_label, lambda: network.null(1), lambda: network(T[0], jnp.asarray(X[0]), 1)):
        with pytest.raises(ValueError, match=r"has no labels"):
            ask()
    assert jnp.any(call(network, T[0], X[0], None) != 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda key: nn.DiT(2, SIZE._replace(heads=3), key=key),
        lambda key: nn.DiT(0, SIZE, key=key),
        lambda key: nn.DiT(2, SIZE, dropout=1.0, key=key),
        lambda key: nn.UViT(SHAPE, SIZE._replace(depth=4), key=key),
        lambda key: nn.UViT(SHAPE, SIZE, out_channels=0, key=key),
        lambda key: nn.UViT(SHAPE, SIZE, time_embedding=nn.SinusoidalEmbedding(4), key=key),
        lambda key: nn.Attention(8, 3, key=key),
        lambda key: nn.Attention(8, 2, key=key)(jnp.ones((3, 8)), jnp.ones((2, 8))),
        lambda key: nn.Attention(8, 2, context_dim=4, key=key)(jnp.ones((3, 8))),
        lambda key: nn.Attention(8, 2, key=key)(jnp.ones((3, 8)), mask=jnp.ones(2, bool)),
        lambda key: nn.SincosPositions().added(2, 2, 6, jnp.float32),
        lambda key: nn.RotaryPositions().rotation(2, 2, 6, jnp.float32),
    ],
)
def test_bad_sizes_are_refused(make):
    with pytest.raises(ValueError, match=r"wants|build it"):
        make(jax.random.key(0))


def test_uvit_wants_an_image_that_patches_cover():
    with pytest.raises(ValueError, match="do not cover"):
        nn.UViT((2, 5, 6), SIZE, key=jax.random.key(0))
