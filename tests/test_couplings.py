"""Couplings: optimal, bijective, drawn from the plan they claim, and with every label at its example."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

import flowsolve as fs
from flowsolve import _numerics, couplings, losses, paths, predictions, sources
from flowsolve.couplings import Assignment, Independent, Pairs, Sinkhorn, SquaredDistance, WithCondition

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def clouds(num, dim=3):
    rng = np.random.default_rng(num)
    return (jnp.asarray(rng.normal(size=(num, dim)) + shift, float) for shift in (1.0, 0.0))


def distances(x, z):
    return ((np.float64(x)[:, None] - np.float64(z)[None]) ** 2).sum(-1)


order = eqx.filter_jit(lambda coupling, key, data, noise, args=None: coupling.order(key, data, noise, args))


# --- costs -----------------------------------------------------------------------------------------


@pytest.mark.quick
def test_squared_distance():
    x, z = clouds(5)
    np.testing.assert_allclose(SquaredDistance().matrix(x, z, None), distances(x, z), rtol=1e-5)
    split = [{"a": v[:, 0], "b": v[:, 1:].reshape(5, 2, 1)} for v in (x, z)]
    np.testing.assert_allclose(SquaredDistance().matrix(*split, None), distances(x, z), rtol=1e-5)


@pytest.mark.quick
def test_conditions_cost_their_distance():
    x, z = clouds(4)
    labels = jnp.asarray([0, 1, 1, 2])
    differ = np.asarray(labels)[:, None] != np.asarray(labels)[None]
    found = WithCondition(7.0).matrix(x, z, labels)
    np.testing.assert_allclose(found, distances(x, z) + 7.0 * differ, rtol=1e-5)

    def apart(first, second):
        return jnp.sum((first["y"] - second["y"]) ** 2)

    conditions = {"y": jnp.asarray(RNG.normal(size=(4, 2)), float)}
    found = WithCondition(0.5, distance=apart).matrix(x, z, conditions)
    np.testing.assert_allclose(found, distances(x, z) + 0.5 * distances(*2 * [conditions["y"]]), rtol=1e-5)


def far(num=32, dim=20):
    """Both far from the origin; and half of both a long way off, where neighbours stay as near as they were."""
    rng = np.random.default_rng(1)
    x, z = rng.normal(size=(2, num, dim))
    apart = 1e4 * (np.arange(num) % 2)[:, None]
    return [jnp.asarray([v + 1e4, v + apart], float) for v in (x, z)]


def test_distances_far_from_the_origin():
    """Of float32 points, in float64; and the best assignment, which within a cluster hangs on what a product loses."""
    x, z = far()
    orders = eqx.filter_jit(jax.vmap(lambda x, z: Assignment().order(KEY, x, z)))(x, z)
    matrices = jax.jit(jax.vmap(lambda x, z: SquaredDistance().matrix(x, z, None)))(x, z)
    for i in range(2):
        cost = distances(x[i], z[i])
        np.testing.assert_allclose(matrices[i], cost, rtol=1e-6)
        best = cost[scipy.optimize.linear_sum_assignment(cost)].sum()
        np.testing.assert_allclose(cost[np.arange(32), orders[i]].sum(), best, rtol=1e-6)


def test_distances_to_many_rows():
    """More than go at a time, on a CPU and on anything else, with their derivatives."""
    rng = np.random.default_rng(2)
    x, others, weights = (jnp.asarray(rng.normal(size=shape), float) for shape in ((3,), (1500, 3), (1500,)))
    np.testing.assert_allclose(_numerics.squared_distances(x, others), distances(x[None], others)[0], rtol=1e-6)

    def weighted(x, others):
        return jnp.vdot(weights, _numerics.squared_distances(x, others))

    found = jax.jit(jax.grad(weighted, (0, 1)))(x, others)
    apart = 2 * np.float64(weights)[:, None] * (np.float64(x)[None] - np.float64(others))
    np.testing.assert_allclose(found[0], apart.sum(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found[1], -apart, rtol=1e-5, atol=1e-6)
    for one in (_numerics._by_features, _numerics._by_pairs):
        np.testing.assert_allclose(one(x, others[0]), distances(x[None], others[:1])[0, 0], rtol=1e-6)


# --- exact assignment ------------------------------------------------------------------------------


@pytest.mark.quick
def test_assignment_is_the_best_of_all_permutations():
    x, z = clouds(6)
    cost = distances(x, z)
    best = min(itertools.permutations(range(6)), key=lambda p: cost[range(6), p].sum())
    assert order(Assignment(), KEY, x, z).tolist() == list(best)


def test_both_solvers_find_the_same_cost():
    """SciPy's on a CPU and Optax's on anything else."""
    x, z = clouds(40, 8)
    cost = SquaredDistance().matrix(x, z, None)
    rows, columns = scipy.optimize.linear_sum_assignment(np.float64(cost))
    for solve in (couplings._by_scipy, couplings._by_optax):
        found = np.asarray(jax.jit(solve)(cost))
        assert np.array_equal(np.sort(found), rows)
        np.testing.assert_allclose(distances(x, z)[rows, found].sum(), distances(x, z)[rows, columns].sum(), rtol=1e-5)


def test_assignment_of_a_batch_of_batches():
    x, z = clouds(12)
    x, z = x.reshape(2, 6, 3), z.reshape(2, 6, 3)
    together = eqx.filter_vmap(lambda x, z: Assignment().order(KEY, x, z))(x, z)
    for i in range(2):
        assert np.array_equal(together[i], order(Assignment(), KEY, x[i], z[i]))


# --- the entropic plan -----------------------------------------------------------------------------


def plan64(cost, epsilon, iterations=5000):
    """Sinkhorn's iteration, written out in float64."""
    num = len(cost)
    log_kernel = -cost / epsilon
    f = g = np.zeros(num)
    for _ in range(iterations):
        f = -np.log(num) - np.logaddexp.reduce(log_kernel + g[None], axis=1)
        g = -np.log(num) - np.logaddexp.reduce(log_kernel + f[:, None], axis=0)
    return np.exp(log_kernel + f[:, None] + g[None])


@pytest.mark.parametrize("epsilon", [0.5, 5.0, None])
def test_plan_equals_the_written_out_iteration(epsilon):
    x, z = clouds(20)
    cost = distances(x, z)
    coupling = Sinkhorn(epsilon, tolerance=1e-5)
    found = np.exp(np.float64(eqx.filter_jit(lambda c: c.log_plan(x, z))(coupling)))
    wanted = plan64(cost, 0.05 * cost.mean() if epsilon is None else epsilon)
    np.testing.assert_allclose(found.sum(axis=0), 1 / 20, rtol=1e-3)
    np.testing.assert_allclose(found.sum(axis=1), 1 / 20, rtol=1e-3)
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-7)


def test_plan_far_from_the_origin():
    x, z = (v[0, :20, :3] for v in far())
    found = np.exp(np.float64(eqx.filter_jit(lambda c: c.log_plan(x, z))(Sinkhorn(0.5, tolerance=1e-5))))
    np.testing.assert_allclose(found, plan64(distances(x, z), 0.5), rtol=2e-3, atol=1e-7)


def test_a_plan_that_did_not_converge():
    """It raises, but where it is compiled; there the rows are right, and the error is that of the columns."""
    x, z = clouds(20)
    coupling = Sinkhorn(0.05, iterations=20)
    with pytest.raises(ValueError, match="did not reach its tolerance in iterations = 20"):
        coupling.order(KEY, x, z)
    compiled = eqx.filter_jit(lambda c: (c.order(KEY, x, z), c.log_plan(x, z), c.marginal_error(x, z)))
    drawn, log_plan, error = compiled(coupling)
    plan = np.exp(np.float64(log_plan))
    np.testing.assert_allclose(plan.sum(axis=1), 1 / 20, rtol=1e-5)
    np.testing.assert_allclose(error, np.abs(plan.sum(axis=0) - 1 / 20).sum(), rtol=1e-4)
    assert error > 0.01 and sorted(drawn.tolist()) == list(range(20))
    assert compiled(Sinkhorn(5.0, iterations=20))[2] < 1e-3


@pytest.mark.quick
def test_equal_examples_are_all_alike():
    """At no cost at all the default epsilon, a share of the mean cost, is 0."""
    x = jnp.ones((6, 2))
    log_plan, drawn = eqx.filter_jit(lambda c: (c.log_plan(x, x), c.order(KEY, x, x)))(Sinkhorn())
    np.testing.assert_allclose(np.exp(log_plan), 1 / 36, rtol=1e-5)
    assert sorted(drawn.tolist()) == list(range(6))


def test_draws_with_replacement_follow_the_plan():
    x, z = clouds(5)
    plan = plan64(distances(x, z), 2.0)
    keys = jax.random.split(KEY, 20_000)
    coupling = Sinkhorn(2.0, replace=True, tolerance=1e-5)
    drawn = np.asarray(eqx.filter_jit(lambda keys: jax.vmap(lambda key: coupling.order(key, x, z))(keys))(keys))
    for i in range(5):
        frequency = np.bincount(drawn[:, i], minlength=5) / len(drawn)
        wanted = plan[i] / plan[i].sum()
        assert np.all(np.abs(frequency - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / len(drawn)) + 1e-3)


def test_draws_without_replacement_are_permutations():
    x, z = clouds(16)
    keys = jax.random.split(KEY, 200)
    coupling = Sinkhorn(2.0)
    drawn = np.asarray(eqx.filter_jit(lambda keys: jax.vmap(lambda key: coupling.order(key, x, z))(keys))(keys))
    assert np.array_equal(np.sort(drawn, axis=1), np.tile(np.arange(16), (200, 1)))
    assert len(np.unique(drawn, axis=0)) > 190
    # Near the optimal cost: far below that of random pairs.
    cost = distances(x, z)
    mean = cost[np.arange(16), drawn].sum(axis=1).mean()
    best = cost[scipy.optimize.linear_sum_assignment(cost)].sum()
    assert best < mean < best + 0.5 * (cost.mean() * 16 - best)


def test_two_pairs_are_drawn_as_their_plan_says():
    """Of two examples the first draw decides: the identity has the weight of a diagonal entry in its row."""
    x, z = clouds(2)
    plan = plan64(distances(x, z), 6.0)
    keys = jax.random.split(KEY, 20_000)
    drawn = jax.jit(jax.vmap(lambda key: Sinkhorn(6.0, tolerance=1e-5).order(key, x, z)))(keys)
    frequency = float(jnp.mean(drawn[:, 0] == 0))
    wanted = plan[0, 0] / plan[0].sum()
    assert 0.05 < wanted < 0.95
    assert abs(frequency - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / len(keys)) + 1e-3


def test_small_epsilon_is_the_assignment():
    x, z = clouds(12)
    exact = order(Assignment(), KEY, x, z)
    for replace in (False, True):
        coupling = Sinkhorn(0.005, replace=replace, iterations=20_000)
        assert np.array_equal(order(coupling, KEY, x, z), exact)


# --- the whole data set --------------------------------------------------------------------------------


FAR, POINTS = 1e4, jnp.asarray([-2.0, 0.3, 0.1, 3.0, 0.5])


@functools.cache
def plan(epsilon=0.0):
    """On a line, from N(0, 1) to five points; both far from the origin, where products of matrices are rounded."""
    source = sources.Source(lambda key, like: jax.tree.map(lambda z: z + FAR, sources.Normal().sample(key, like)))
    data = {"x": FAR + POINTS[:, None]}
    options = {"source": source, "epsilon": epsilon, "iterations": 3000, "batch_size": 128}
    return couplings.semidiscrete(data, jnp.arange(5), key=KEY, **options)


def test_semidiscrete_cells_are_quantiles():
    """On a line the i-th point from the left gets the i-th fifth of the source."""
    pairs, labels = eqx.filter_jit(plan().pairs)(jax.random.key(1), 20_000)
    noise = np.asarray(pairs.noise["x"])[:, 0] - FAR
    np.testing.assert_array_equal(pairs.data["x"][:, 0], (FAR + POINTS)[labels])
    wanted = np.argsort(POINTS)[np.floor(5 * scipy.stats.norm.cdf(noise)).astype(int)]
    assert np.mean(labels == wanted) > 0.97
    counts = np.bincount(labels, minlength=5) / len(noise)
    assert np.all(np.abs(counts - 0.2) < 0.01)
    assert abs(noise.mean()) < 4 / np.sqrt(len(noise)) and abs(noise.std() - 1) < 4 / np.sqrt(2 * len(noise))


def test_semidiscrete_with_entropy_still_draws_all_equally():
    soft = plan(1.0)
    pairs, labels = eqx.filter_jit(soft.pairs)(jax.random.key(1), 20_000)
    assert np.all(np.abs(np.bincount(labels, minlength=5) / len(labels) - 0.2) < 0.015)
    # Noise near a border goes to both sides of it.
    noise = np.asarray(pairs.noise["x"])[:, 0] - FAR
    near = np.abs(noise - scipy.stats.norm.ppf(0.2)) < 0.05
    assert len(np.unique(labels[near])) > 2


# --- conditions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", [Assignment(WithCondition(1e4)), Sinkhorn(1.0, cost=WithCondition(1e3))], ids=repr)
def test_a_large_weight_keeps_noise_in_its_class(coupling):
    x, z = clouds(24)
    labels = jnp.asarray(RNG.integers(0, 3, 24))
    found = np.asarray(order(coupling, KEY, x, z, labels))
    assert np.array_equal(np.sort(found), np.arange(24))
    assert np.array_equal(labels[found], labels)
    free = order(Assignment(), KEY, x, z)
    assert not np.array_equal(labels[free], labels)


# --- in a loss -------------------------------------------------------------------------------------


def network(t, x, args, *, key=None):
    shift = 0.0 if args is None else 0.3 * args.astype(x.dtype)
    return jnp.tanh(2 * x + t) + shift


COUPLED = fs.Flow(network, paths.Linear(), predictions.Velocity(), source=sources.CoupledNormal())
run = eqx.filter_jit(lambda loss, flow, x0, args, key: loss(flow, x0, args, key=key))


def loop(x0, noise, labels, t):
    """Flow matching of each pair, in float64."""
    x0, noise, t = (np.float64(v) for v in (x0, noise, t))
    found = []
    for i in range(len(x0)):
        x_t = (1 - t[i]) * x0[i] + t[i] * noise[i]
        output = np.tanh(2 * x_t + t[i]) + 0.3 * float(labels[i])
        found.append(np.mean((output - (noise[i] - x0[i])) ** 2))
    return np.array(found)


@pytest.mark.quick
def test_loss_of_given_pairs():
    x, z = clouds(7)
    labels = jnp.asarray(RNG.integers(0, 4, 7))
    _, aux = run(losses.Regression(), COUPLED, Pairs(x, z), labels, KEY)
    np.testing.assert_allclose(aux.losses, loop(x, z, labels, aux.t), rtol=1e-5)


def test_labels_follow_their_data():
    """Pitfall 20: the noise moves, the example stays with its label."""
    x, z = clouds(9)
    labels = jnp.asarray(RNG.integers(0, 4, 9))
    _, columns = scipy.optimize.linear_sum_assignment(distances(x, z))
    assert not np.array_equal(columns, np.arange(9))
    _, aux = run(losses.Regression(coupling=Assignment()), COUPLED, Pairs(x, z), labels, KEY)
    np.testing.assert_allclose(aux.losses, loop(x, np.asarray(z)[columns], labels, aux.t), rtol=1e-5)


def test_coupled_loss_lowers_the_targets_variance():
    """Optimal pairs are nearer: the mean square of the velocity of a pair falls, noise and data stay the same."""
    x, _ = clouds(256, 2)
    silent = fs.Flow(lambda t, x, args, *, key=None: 0 * x, COUPLED.path, COUPLED.prediction, source=COUPLED.source)
    free, tied = (
        run(losses.Regression(coupling=coupling), silent, x, None, KEY)[0] for coupling in (Independent(), Assignment())
    )
    assert tied < 0.6 * free


def test_a_flow_with_a_score_is_refused():
    x, z = clouds(4)
    flow = fs.Flow(network, paths.Linear(), predictions.Velocity())
    for loss, data, what in [
        (losses.Regression(coupling=Assignment()), x, "Assignment"),
        (losses.Regression(), Pairs(x, z), "Pairs"),
    ]:
        with pytest.raises(TypeError, match=f"{what} made the noise depend on the data.*CoupledNormal"):
            loss(flow, data, key=KEY)


def test_numbers_that_are_not_finite():
    """A compiled loss is NaN, so that training stops, and says nothing; a call by itself raises."""
    x, z = clouds(4)
    for coupling in (Assignment(), Sinkhorn(), Sinkhorn(replace=True)):
        for bad in (jnp.nan, jnp.inf):
            with pytest.raises(ValueError, match="SquaredDistance gave costs that are NaN or infinite"):
                coupling.order(KEY, x.at[1, 0].set(bad), z)
        # Of the noise alone, so that the loss has it of no other example than through the coupling.
        _, aux = run(losses.Regression(coupling=coupling), COUPLED, Pairs(x, z.at[1, 0].set(jnp.nan)), None, KEY)
        assert np.all(np.isnan(aux.losses))


@pytest.mark.quick
def test_errors():
    x, z = clouds(4)
    for coupling in (Independent(), Assignment(), Sinkhorn()):
        for wrong in (z[:3], z[:, :2], {"a": z}):
            with pytest.raises(ValueError, match=r"A coupling got data float32.*both of the same structure"):
                coupling(KEY, x, wrong)
    with pytest.raises(ValueError, match="one leading axis"):
        Assignment().order(KEY, x[0, 0], z[0, 0])
    with pytest.raises(ValueError, match="leading axis of length 4"):
        Assignment(WithCondition(1.0)).order(KEY, x, z, jnp.arange(3))
    for data, options, message in [
        (x, {"args": jnp.arange(3)}, "leading axis of length 4"),
        (x.at[0, 0].set(jnp.nan), {}, "data that are NaN"),
        (x[:0], {}, "at least one"),
        ((x, z[:3]), {}, "one leading axis"),
        (x, {"learning_rate": -1.0}, "learning_rate = -1"),
        (x, {"epsilon": np.inf}, "epsilon = inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            couplings.semidiscrete(data, key=KEY, **options)
    with pytest.raises(ValueError, match="WithCondition got no args"):
        Assignment(WithCondition(1.0)).order(KEY, x, z)
    with pytest.raises(ValueError, match="weight = -1"):
        WithCondition(-1.0)
    with pytest.raises(ValueError, match="epsilon = 0"):
        Sinkhorn(0.0)
    with pytest.raises(ValueError, match="iterations = 0"):
        Sinkhorn(iterations=0)
    with pytest.raises(ValueError, match="epsilon = -1"):
        couplings.semidiscrete(x, key=KEY, epsilon=-1.0)
    with pytest.raises(ValueError, match="Pairs got data"):
        Pairs(x, z[:, :2])


def test_sinkhorn_without_ott(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ott.geometry", None)
    with pytest.raises(ImportError, match=r"flowsolve\[ot\]"):
        Sinkhorn()
