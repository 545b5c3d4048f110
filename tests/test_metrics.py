"""Metrics: against closed forms, loops over all pairs in NumPy, and SciPy; unbiased ones in standard errors."""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from flowsolve import metrics

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers whichever tests run."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def normal(*shape, mean=0.0, std=1.0):
    return (mean + std * RNG.normal(size=shape)).astype(np.float32)


def pairs(a, b, function):
    """function(x, y) of all pairs of rows, in float64."""
    return np.array([[function(x, y) for y in np.float64(b)] for x in np.float64(a)])


def distance(x, y):
    return np.sqrt(np.sum((x - y) ** 2))


# --- Frechet ------------------------------------------------------------------------------------


def gaussian(mean, covariance, count=11):
    """The moments of `count` examples with this mean and covariance."""
    factor = np.sqrt(count - 1) * np.linalg.cholesky(covariance).T
    return metrics.Moments(jnp.int32(count), jnp.float32(mean), jnp.float32(factor))


@pytest.mark.quick
def test_frechet_of_gaussians():
    a, b = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    # The two eigenvalues of (C_a C_b)^(1/2) have the sum of squares tr(C_a C_b) and the product det(C_a C_b)^(1/2).
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    value = metrics.frechet_distance(gaussian([0.0, 1.0], a, 5), gaussian([2.0, 0.5], b, 50))
    np.testing.assert_allclose(value, 4.25 + np.trace(a) + np.trace(b) - 2 * root, rtol=1e-6)


@pytest.mark.quick
def test_frechet_of_lines():
    """Two examples have the covariance of rank one 2 u u^T, and of two of them the root has the trace 2 |u . v|."""
    u, v = normal(6), normal(6)
    a, b = (metrics.Moments.of(np.stack([1 + w, 1 - w])) for w in (u, v))
    np.testing.assert_allclose(metrics.frechet_distance(a, b), 2 * (u @ u + v @ v - 2 * abs(u @ v)), rtol=1e-5)


def test_frechet_of_singular_covariances():
    """Fewer examples than features, against the formula in float64."""
    scales = np.logspace(0, -2, 40, dtype=np.float32)
    a, b = normal(15, 40) * scales, normal(25, 40, mean=0.02) * scales
    c_a, c_b = np.cov(np.float64(a), rowvar=False), np.cov(np.float64(b), rowvar=False)
    values, vectors = np.linalg.eigh(c_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ c_b @ root), 0)).sum()
    expected = np.sum((np.float64(a).mean(0) - b.mean(0)) ** 2) + np.trace(c_a) + np.trace(c_b) - 2 * cross
    value = metrics.frechet_distance(metrics.Moments.of(a), metrics.Moments.of(b))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.quick
def test_frechet_of_nearly_the_same():
    """Scaled by 1 + h, the distance is h^2 tr C, which a difference of traces of float32 does not resolve."""
    a = normal(50, 8)
    a -= a.mean(0)
    h = 2.0**-10
    value = metrics.frechet_distance(metrics.Moments.of(a), metrics.Moments.of((1 + h) * a))
    np.testing.assert_allclose(value, h**2 * np.trace(np.cov(np.float64(a), rowvar=False)), rtol=1e-3)


def test_moments_of_batches_are_those_of_the_whole():
    x = normal(600, 5) @ normal(5, 5) + np.float32(1000)
    x[:, 3] = x[0, 3]
    one, few, many = np.split(x, [1, 4])
    moments = metrics.Moments.of(one).update(few).update(many)
    other = metrics.Moments.of(many).merge(metrics.Moments.of(x[:4]))
    covariance = np.cov(np.float64(x), rowvar=False)
    for each in (moments, other, metrics.Moments.of(x)):
        assert int(each.count) == 600
        np.testing.assert_allclose(each.mean, np.float64(x).mean(0), rtol=2e-7)
        np.testing.assert_allclose(each.covariance, covariance, rtol=3e-4, atol=3e-5)
        assert float(metrics.frechet_distance(each, moments)) < 1e-6


# --- kernels -------------------------------------------------------------------------------------

KERNELS = {
    "gaussian": (metrics.Gaussian(1.5), lambda x, y: np.exp(-(distance(x, y) ** 2) / 4.5)),
    "gaussians": (
        metrics.Gaussian([0.5, 3.0]),
        lambda x, y: np.exp(-(distance(x, y) ** 2) / 0.5) + np.exp(-(distance(x, y) ** 2) / 18),
    ),
    "polynomial": (metrics.Polynomial(), lambda x, y: (x @ y / len(x) + 1) ** 3),
}


def unbiased(function, a, b):
    """E k(X, X') + E k(Y, Y') - 2 E k(X, Y), over pairs of different examples."""
    within = [
        np.mean([function(x, y) for x, y in itertools.permutations(np.float64(rows), 2)], dtype=np.float64)
        for rows in (a, b)
    ]
    return sum(within) - 2 * pairs(a, b, function).mean()


@pytest.mark.parametrize("dim", [3, 30])
@pytest.mark.parametrize("name", KERNELS)
def test_mmd_is_the_mean_over_pairs(name, dim):
    kernel, function = KERNELS[name]
    a, b = normal(9, dim), normal(6, dim, mean=0.5)
    value = metrics.kernel_mmd(a, b, kernel=kernel)
    np.testing.assert_allclose(value, unbiased(function, a, b), rtol=1e-5, atol=1e-6)


H = 0.8
REPLICATED = {
    "mmd": jax.jit(jax.vmap(lambda a, b: metrics.kernel_mmd(a, b, kernel=metrics.Gaussian(H)))),
    "energy": jax.jit(jax.vmap(metrics.energy_distance)),
}


def replicated(name, mean, std, num=6, dim=3, replicates=4000):
    """Mean and standard error of a metric of num against num + 2 examples, of N(0, I) and of N(mean, std^2 I)."""
    key_a, key_b = jax.random.split(KEY)
    a = jax.random.normal(key_a, (replicates, num, dim))
    b = mean + std * jax.random.normal(key_b, (replicates, num + 2, dim))
    values = np.asarray(REPLICATED[name](a, b), np.float64)
    return values.mean(), values.std() / np.sqrt(replicates)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.4)])
def test_mmd_of_gaussians(mean, std):
    """Exact in the mean, at six examples; x - y is N(., v I), and E exp(-|x - y|^2/2 h^2) is known."""
    dim = 3

    def expected(shift, v):
        return (H**2 / (H**2 + v)) ** (dim / 2) * np.exp(-dim * shift**2 / (2 * (H**2 + v)))

    exact = expected(0, 2) + expected(0, 2 * std**2) - 2 * expected(mean, 1 + std**2)
    value, error = replicated("mmd", mean, std)
    assert error < 0.002
    assert abs(value - exact) < 4 * error


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.4)])
def test_energy_distance_of_gaussians(mean, std):
    """In one dimension E|N(m, v)| = sqrt(2 v/pi) exp(-m^2/2 v) + m erf(m/sqrt(2 v))."""

    def expected(m, v):
        return np.sqrt(2 * v / np.pi) * np.exp(-(m**2) / (2 * v)) + m * scipy.special.erf(m / np.sqrt(2 * v))

    exact = 2 * expected(mean, 1 + std**2) - expected(0, 2) - expected(0, 2 * std**2)
    value, error = replicated("energy", mean, std, dim=1)
    assert error < 0.01
    assert abs(value - exact) < 4 * error


def test_energy_distance_is_scipys_without_its_bias():
    """SciPy's is the root of the form in which an example is a pair with itself."""
    a, b = normal(40), normal(30, mean=0.3)
    within_a, within_b = (np.sum(pairs(x[:, None], x[:, None], distance)) / len(x) / (len(x) - 1) for x in (a, b))
    biased = metrics.energy_distance(a, b) + within_a / 40 + within_b / 30
    np.testing.assert_allclose(np.sqrt(biased), scipy.stats.energy_distance(a, b), rtol=1e-5)


@pytest.mark.parametrize("dim", [2, 30])
def test_energy_distance_is_the_mean_over_pairs(dim):
    # Far from the origin, where squares that are not centred cancel.
    a, b = normal(9, dim, mean=100.0), normal(6, dim, mean=101.0)
    expected = -unbiased(lambda x, y: distance(x, y), a, b)
    np.testing.assert_allclose(metrics.energy_distance(a, b), expected, rtol=1e-4)


@pytest.mark.quick
def test_median_distance():
    a, b = normal(20, 3), normal(15, 3)
    both = np.concatenate([a, b])
    expected = np.median(pairs(both, both, distance)[np.triu_indices(35, 1)])
    np.testing.assert_allclose(metrics.median_distance(a, b), expected, rtol=1e-6)
    # Of 60 every third is taken, of 15 all.
    thinned = metrics.median_distance(np.repeat(a, 3, axis=0), b, examples=20)
    np.testing.assert_allclose(thinned, expected, rtol=1e-6)


# --- transport -----------------------------------------------------------------------------------


@pytest.mark.quick
def test_sliced_wasserstein_on_a_line():
    a, b = normal(7), normal(5, mean=0.4)
    expected = scipy.stats.wasserstein_distance(a, b)
    value = metrics.sliced_wasserstein(a, b, key=KEY, projections=3, order=1)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Both as 35 examples, then one to one.
    apart = np.sort(np.repeat(a, 5)) - np.sort(np.repeat(b, 7))
    value = metrics.sliced_wasserstein(a, b, key=KEY, projections=3)
    np.testing.assert_allclose(value, np.sqrt(np.mean(apart**2)), rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_sliced_wasserstein_of_a_shift(order):
    """In every direction the shift itself: |s| (E |theta . e|^p)^(1/p) over the sphere."""
    dim, projections = 5, 4096
    a = normal(20, dim)
    b = RNG.permutation(a) + np.array([0, 0, 3, 0, 4], np.float32)
    moments = [
        math.gamma(dim / 2) * math.gamma((p + 1) / 2) / (math.sqrt(math.pi) * math.gamma((dim + p) / 2))
        for p in (order, 2 * order)
    ]
    error = 5**order * np.sqrt((moments[1] - moments[0] ** 2) / projections)
    value = metrics.sliced_wasserstein(a, b, key=KEY, projections=projections, order=order)
    assert abs(float(value) ** order - 5**order * moments[0]) < 3 * error


@pytest.mark.quick
def test_wasserstein_is_the_best_permutation():
    a, b = normal(6, 3), normal(6, 3)
    squares = pairs(a, b, distance) ** 2
    best = min(sum(squares[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(6)))
    np.testing.assert_allclose(metrics.wasserstein(a, b), np.sqrt(best / 6), rtol=1e-6)


def test_wasserstein_is_scipys_assignment():
    a, b = normal(100, 4), normal(100, 4, mean=0.3)
    squares = pairs(a, b, distance) ** 2
    best = squares[scipy.optimize.linear_sum_assignment(squares)].mean()
    np.testing.assert_allclose(metrics.wasserstein(a, b), np.sqrt(best), rtol=1e-6)


def entropic_cost(a, b, epsilon):
    """min <pi, c> + epsilon KL(pi | 1/(n m)) by Sinkhorn's iterations in float64."""
    cost = pairs(a, b, distance) ** 2
    f, g = np.zeros(len(a)), np.zeros(len(b))
    for _ in range(3000):
        f = -epsilon * (scipy.special.logsumexp((g - cost) / epsilon, axis=1) - np.log(len(b)))
        g = -epsilon * (scipy.special.logsumexp((f[:, None] - cost) / epsilon, axis=0) - np.log(len(a)))
    return f.mean() + g.mean()


A_SINKHORN, B_SINKHORN = normal(16, 2), normal(16, 2, mean=0.6)


def sinkhorn(a, b, epsilon, **settings):
    pytest.importorskip("ott")
    return metrics.sinkhorn_divergence(a, b, epsilon=epsilon, **settings)


def test_sinkhorn_divergence():
    a, b, epsilon = A_SINKHORN, B_SINKHORN[:11], 0.3
    expected = entropic_cost(a, b, epsilon) - entropic_cost(a, a, epsilon) / 2 - entropic_cost(b, b, epsilon) / 2
    np.testing.assert_allclose(sinkhorn(a, b, epsilon, tolerance=1e-4), expected, rtol=2e-3)


def test_sinkhorn_divergence_at_its_ends():
    a, b = A_SINKHORN, B_SINKHORN
    many = 20_000
    assert abs(float(sinkhorn(a, RNG.permutation(a), 0.3, tolerance=1e-4, iterations=many))) < 1e-5
    np.testing.assert_allclose(sinkhorn(a, b, 0.003, iterations=many), metrics.wasserstein(a, b) ** 2, rtol=2e-3)
    means = np.sum((a.mean(0) - b.mean(0)) ** 2)
    np.testing.assert_allclose(sinkhorn(a, b, 1e3, tolerance=1e-6, iterations=many), means, rtol=2e-2)


# --- the classifier ------------------------------------------------------------------------------


def test_classifier_of_shifted_gaussians():
    """At best Phi(|shift|/2) of the answers are right, whatever the units, beside a number that never changes."""
    shift, num = 2.0, 1500
    scales = np.array([1, 1e3, 1e-3, 1, 1], np.float32)
    a, b = normal(num, 5), normal(num, 5)
    b[:, :4] += shift / 2
    a[:, 4], b[:, 4] = 7, 7
    test = metrics.classifier_two_sample(a * scales + 3, b * scales + 3, key=KEY)
    best, error = scipy.stats.norm.cdf(shift / 2), float(test.standard_error)
    np.testing.assert_allclose(error, np.sqrt(best * (1 - best) / (2 * num)), rtol=0.05)
    assert best - 0.01 - 3 * error < float(test.accuracy) < best + 3 * error


def test_classifier_holds_out():
    """Noise that a network learns by heart is not told apart, nor by which law has more examples."""
    a, b = normal(60, 150), normal(181, 150)
    test = metrics.classifier_two_sample(a, b, key=KEY, width=32, steps=200)
    assert abs(float(test.accuracy) - 0.5) < 3 * float(test.standard_error)
    np.testing.assert_allclose(test.standard_error, 0.25 * np.sqrt(1 / 60 + 1 / 181), rtol=0.2)
    assert metrics.classifier_two_sample(a, b + 100, key=KEY, width=32, steps=200) == (1, 0)


# --- precision and recall ------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 30])
@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_by_loops(neighbours, dim):
    real, fake = normal(30, dim), normal(22, dim, mean=1.5 / np.sqrt(dim), std=0.8)

    def reaches(rows):
        return [
            sorted(distance(x, y) for j, y in enumerate(rows) if j != i)[neighbours - 1] for i, x in enumerate(rows)
        ]

    real_reach, fake_reach = reaches(np.float64(real)), reaches(np.float64(fake))
    apart = pairs(real, fake, distance)
    precision = np.mean([any(apart[i, j] <= real_reach[i] for i in range(30)) for j in range(22)])
    recall = np.mean([any(apart[i, j] <= fake_reach[j] for j in range(22)) for i in range(30)])
    density = sum(apart[i, j] <= real_reach[i] for i in range(30) for j in range(22)) / (22 * neighbours)
    coverage = np.mean([any(apart[i, j] <= real_reach[i] for j in range(22)) for i in range(30)])
    values = metrics.precision_recall(real, fake, neighbours=neighbours)
    np.testing.assert_allclose(values, (precision, recall, density, coverage), rtol=1e-6)
    assert len({*map(float, values)} - {0.0, 1.0}) >= 3


def test_clusters_far_apart():
    """Half of both a long way off: what is near within a cluster, a product of matrices loses in float32."""
    a, b = normal(24, 30), normal(24, 30, mean=0.3)
    a[::2] += 1e4
    b[::2] += 1e4
    apart = pairs(a, b, distance)
    best = (apart**2)[scipy.optimize.linear_sum_assignment(apart**2)].mean()
    np.testing.assert_allclose(metrics.wasserstein(a, b), np.sqrt(best), rtol=1e-6)
    expected = unbiased(lambda x, y: np.exp(-(distance(x, y) ** 2) / 128), a, b)
    np.testing.assert_allclose(metrics.kernel_mmd(a, b, kernel=metrics.Gaussian(8.0)), expected, rtol=1e-3)
    reach, fake_reach = (np.sort(pairs(rows, rows, distance), axis=1)[:, 2] for rows in (a, b))
    hits, fake_hits = apart <= reach[:, None], apart <= fake_reach[None]
    expected = hits.any(axis=0).mean(), fake_hits.any(axis=1).mean(), hits.sum() / 48, hits.any(axis=1).mean()
    np.testing.assert_allclose(metrics.precision_recall(a, b, neighbours=2), expected, rtol=1e-6)
    assert len({*expected} - {0.0, 1.0}) >= 3


@pytest.mark.quick
def test_distances_that_overflow_are_no_zero():
    assert not np.isfinite(metrics.wasserstein(1e25 * A, B))


# --- all of them ---------------------------------------------------------------------------------

A, B = normal(12, 3), normal(12, 3, mean=0.5, std=1.5)


def frechet(a, b):
    return metrics.frechet_distance(metrics.Moments.of(a), metrics.Moments.of(b))


BLOCKED = {
    "mmd": lambda a, b, **block: metrics.kernel_mmd(a, b, kernel=metrics.Gaussian(1.0), **block),
    "energy": metrics.energy_distance,
    "sliced": lambda a, b, **block: metrics.sliced_wasserstein(a, b, key=KEY, projections=10, **block),
    "precision": metrics.precision_recall,
}


@pytest.mark.parametrize("name", BLOCKED)
def test_blocks_of_any_size(name):
    whole = BLOCKED[name](A, B)
    for block in (1, 5):
        np.testing.assert_allclose(BLOCKED[name](A, B, block=block), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.quick
def test_examples_of_any_structure():
    """A pytree is the vector of all its numbers; integers are numbers."""
    images = RNG.integers(0, 16, size=(12, 4, 3)).astype(np.uint8), RNG.integers(0, 16, size=(9, 4, 3)).astype(np.uint8)
    tree = [{"x": jnp.asarray(x[:, :2]), "y": (x[:, 2], x[:, 3, :])} for x in images]
    flat = [np.float32(x.reshape(len(x), -1)) for x in images]
    np.testing.assert_allclose(metrics.energy_distance(*tree), metrics.energy_distance(*flat), rtol=1e-6)
    np.testing.assert_allclose(frechet(*tree), frechet(*flat), rtol=1e-5)


SMOOTH = {
    "frechet": frechet,
    "frechet_singular": lambda a, b: frechet(a[:3], jnp.concatenate([b, 0 * b], axis=1)[:, :3]),
    "mmd": BLOCKED["mmd"],
    "polynomial": lambda a, b: metrics.kernel_mmd(a, b, kernel=metrics.Polynomial()),
    "energy": lambda a, b: metrics.energy_distance(a, b, block=5),
    "energy_many": lambda a, b: metrics.energy_distance(jnp.tile(a, (1, 7)), jnp.tile(b, (1, 7))),
    "sliced": BLOCKED["sliced"],
    "wasserstein": metrics.wasserstein,
    "sinkhorn": lambda a, b: sinkhorn(a, b, 0.5, tolerance=1e-9),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients(name, x64):
    """Of a compiled metric, against central differences in one direction."""
    metric = jax.jit(jax.value_and_grad(SMOOTH[name], argnums=1))
    a, b, along = (jnp.asarray(x, float) for x in (A, B, normal(12, 3)))
    h = 1e-5
    expected = (metric(a, b + h * along)[0] - metric(a, b - h * along)[0]) / (2 * h)
    _, gradient = metric(a, b)
    np.testing.assert_allclose(jnp.vdot(gradient, along), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["frechet", "energy", "sliced", "wasserstein"])
def test_gradients_at_the_same(name):
    """At equal batches, where distances vanish, a gradient is finite."""
    assert np.all(np.isfinite(jax.grad(SMOOTH[name], argnums=1)(A, jnp.asarray(A))))


def test_frechet_gradient_with_a_feature_that_is_constant():
    a, b = normal(30, 4), normal(30, 4)
    b[:, 2] = 1
    gradient = jax.grad(frechet, argnums=1)(a, jnp.asarray(b))
    assert np.all(np.isfinite(gradient))


def test_no_retrace_for_new_numbers():
    traces = []

    class Counted(metrics.AbstractKernel):
        scale: jax.Array

        def row(self, x, others):
            traces.append(1)
            return self.scale * jnp.matmul(others, x)

    for scale in (1.0, 2.0):
        metrics.kernel_mmd(A, B, kernel=Counted(jnp.asarray(scale)))
        count = len(traces)
        metrics.kernel_mmd(B, A, kernel=Counted(jnp.asarray(3 * scale)))
        assert len(traces) == count


def test_traced_numbers_are_checked_when_they_run():
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        eqx.filter_jit(metrics.energy_distance)(jnp.full((4, 2), jnp.nan), jnp.ones((4, 2)))
