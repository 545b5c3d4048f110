"""Flow maps, their solvers and the losses that train them, against the exact flow map of a Gaussian."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowsolve as fs
from flowsolve import flowmaps, losses, paths, predictions, solvers, times
from flowsolve.losses import MeanFlow, MeanFlowGuidance, Shortcut

KEY = jax.random.key(0)
LIKE = jax.ShapeDtypeStruct((2,), jnp.float32)
COVARIANCE = np.array([[1.5, 0.4], [0.4, 0.6]])
MEANS = np.array([[0.5, -1.0], [-1.0, 2.0]])
PATHS = {"linear": paths.Linear(), "vp": paths.VP(), "edm": paths.EDM(), "trigonometric": paths.Trigonometric()}


class Exact(eqx.Module):
    """The average velocity of Gaussians of one covariance, chosen by a label; scaled, to be wrong on purpose."""

    means: jax.Array
    path: paths.AbstractPath
    scale: jax.Array

    def oracle(self, args):
        mean = self.means[0 if args is None else args]
        return fs.testing.Gaussian(mean, jnp.asarray(COVARIANCE, mean.dtype))

    def __call__(self, t, x, args, *, key=None):
        t, r = t
        oracle = self.oracle(args)
        apart = t != r
        length = jnp.where(apart, t - r, 1).astype(x.dtype)
        average = (x - oracle.flow_map(self.path, t, r, x)) / length
        return self.scale * jnp.where(apart, average, oracle.velocity(self.path, t, x))


def exact(path, means=MEANS[:1], scale=1.0):
    return flowmaps.FlowMap(Exact(jnp.asarray(means, float), path, jnp.asarray(scale, float)), path)


class _Tight(eqx.Module):
    """The average velocity of data at 0 on EDM's path: x is proportional to t."""

    path: paths.AbstractPath

    def __call__(self, t, x, args, *, key=None):
        return x / t[0]


class Net(eqx.Module):
    """A small network of two times, nonlinear in all it gets."""

    matrix: jax.Array
    bias: jax.Array

    def __init__(self):
        rng = np.random.default_rng(0)
        self.matrix = jnp.asarray(rng.normal(size=(2, 2)) / 2, float)
        self.bias = jnp.asarray(rng.normal(size=2), float)

    def __call__(self, t, x, args, *, key=None):
        t, r = t
        shift = 0.0 if args is None else 0.3 * args.astype(x.dtype)
        return jnp.tanh(self.matrix @ x + (self.bias * jnp.sin(3 * t + r) + shift) * jnp.ones_like(x))


def net64(net, t, r, x):
    return np.tanh(np.float64(net.matrix) @ x + np.float64(net.bias) * np.sin(3 * t + r))


def pair_with_exact_velocity(oracle, path, t, x):
    """(x_0, eps) whose x_t is x and whose velocity is that of the flow: both are their posterior means."""
    return oracle.data_and_noise(path, t, x)


# --- sampling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_jumps_of_the_exact_map_reach_the_data_in_any_number_of_steps(name):
    """Every jump is exact, so that 1, 2 and 7 steps end where the flow does."""
    path = PATHS[name]
    flow = exact(path)
    start = path.sigma(path.t_noise) * jnp.array([0.7, -1.3])
    expected = flow.network.oracle(None).flow_map(path, path.t_noise, path.t_data, start)
    for steps in (1, 2, 7):
        sol = fs.solve(flow, start, solver=solvers.Jump(), grid=fs.grids.Uniform(steps))
        np.testing.assert_allclose(sol.ys[-1], expected, rtol=2e-5, atol=2e-5)
        assert sol.stats["nfe"] == steps
    # As a flow it is its velocity: an ODE solver goes the same way, and so does the log-density.
    grid = fs.grids.LogSNR(24)
    x = fs.solve(flow, start, solver=solvers.UniPC(3), grid=grid).ys[-1]
    np.testing.assert_allclose(x, expected, rtol=5e-3, atol=5e-3)


def test_the_oracle_map_is_the_flow(x64):
    """`Gaussian.flow_map` against an adaptive solver, in both directions."""
    oracle = fs.testing.Gaussian(jnp.asarray(MEANS[0]), COVARIANCE)
    path = paths.Linear()
    flow = oracle.flow(path, predictions.Velocity())
    x = jnp.array([0.3, 1.1])
    controller = diffrax.PIDController(rtol=1e-8, atol=1e-8)
    down = fs.solve(flow, x, solver=diffrax.Tsit5(), t_start=0.9, t_end=0.2, controller=controller).ys[-1]
    np.testing.assert_allclose(oracle.flow_map(path, 0.9, 0.2, x), down, atol=1e-7)
    np.testing.assert_allclose(oracle.flow_map(path, 0.2, 0.9, down), x, atol=1e-7)


def test_consistency_sampling_draws_the_data():
    """With the exact consistency function each of its steps ends in the law of the data: standard errors."""
    flow = flowmaps.OntoData(exact(PATHS["linear"]))
    num = 20_000
    for grid in (fs.grids.Uniform(1), fs.grids.Given([1.0, 0.6, 0.3, 0.0])):
        x = np.asarray(fs.sample(flow, LIKE, num=num, key=KEY, solver=solvers.ConsistencySampling(), grid=grid))
        errors = np.sqrt(np.diag(COVARIANCE) / num)
        assert np.all(np.abs(x.mean(0) - MEANS[0]) < 4 * errors)
        spread = np.sqrt((COVARIANCE**2 + np.outer(np.diag(COVARIANCE), np.diag(COVARIANCE))) / num)
        assert np.all(np.abs(np.cov(x.T) - COVARIANCE) < 4 * spread)


def test_consistency_sampling_is_its_formula():
    """x_s = rho f + sqrt(sigma_s^2 - rho^2 sigma_d^2) z with a z of its own: moments given x_t. At t_data f itself."""
    path = PATHS["vp"]
    flow = flowmaps.OntoData(exact(path))
    x = jnp.array([0.4, -0.2])

    def step(key):
        return fs.solve(
            flow, x, solver=solvers.ConsistencySampling(), grid=fs.grids.Uniform(1), t_start=0.8, t_end=0.5, key=key
        ).ys[-1]

    num = 4_000
    drawn = np.asarray(jax.vmap(step)(jax.random.split(KEY, num)))
    alpha, sigma = (float(c) for c in path.coefficients(jnp.asarray(0.5)))
    alpha_data, sigma_data = (float(c) for c in path.coefficients(jnp.asarray(path.t_data)))
    rho = alpha / alpha_data
    mean, std = rho * np.asarray(flow.denoised(0.8, x)), np.sqrt(sigma**2 - (rho * sigma_data) ** 2)
    assert np.all(np.abs(drawn.mean(0) - mean) < 4 * std / np.sqrt(num))
    assert np.all(np.abs(drawn.std(0) / std - 1) < 4 / np.sqrt(2 * num))
    for path in PATHS.values():
        flow = flowmaps.OntoData(exact(path))
        found = fs.solve(flow, x, solver=solvers.ConsistencySampling(), grid=fs.grids.Uniform(1), key=KEY).ys[-1]
        np.testing.assert_allclose(found, flow.denoised(path.t_noise, x), rtol=1e-6)


def test_consistency_sampling_has_the_noise_of_the_middle():
    """Data that is one point: x_s has the path's own standard deviation, of which sigma_d is in f already."""
    path = paths.EDM(t_data=0.5, t_noise=20.0)
    tight = flowmaps.FlowMap(_Tight(path), path)

    def step(key):
        start = 20.0 * jax.random.normal(key, (2,))
        return fs.solve(
            flowmaps.OntoData(tight),
            start,
            solver=solvers.ConsistencySampling(),
            grid=fs.grids.Uniform(1),
            t_end=0.8,
            key=jax.random.fold_in(key, 1),
        ).ys[-1]

    drawn = np.asarray(jax.vmap(step)(jax.random.split(KEY, 4_000)))
    assert abs(drawn.std() / 0.8 - 1) < 4 / np.sqrt(2 * drawn.size)


def test_boundary_of_the_consistency_function_is_exact():
    for path in PATHS.values():
        flow = flowmaps.OntoData(flowmaps.FlowMap(Net(), path))
        x = jnp.array([0.3, -1.7])
        assert np.array_equal(flow.output(path.t_data, x), x)


# --- targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_target_at_the_true_map_is_the_map(name, x64):
    """For all r < t, and r = t, the target at the exact u is u: pitfall 19."""
    path = PATHS[name]
    pairs = times.TimePairs(times.Uniform())
    all_losses = MeanFlow(), MeanFlow(predicted_tangent=True), Shortcut(pairs, finest=0.0)
    flow, oracle = exact(path), exact(path).network.oracle(None)
    low, high = path.t_data, path.t_noise
    places = np.array([0.02, 0.1, 0.3, 0.5, 0.8, 0.99])
    pairs = np.array([(t, r) for t in places for r in places if r <= t])
    t, r = jnp.asarray(low + (high - low) * pairs).T

    @eqx.filter_jit
    def both(t, r):
        x = path.interpolate(t, jnp.array([0.4, -0.3]), jnp.array([1.0, 0.5]))
        data, noise = pair_with_exact_velocity(oracle, path, t, x)
        targets = [loss.target(flow, data, t=t, r=r, noise=noise) for loss in all_losses]
        return targets, flow.average_velocity(t, r, x)

    targets, u = jax.vmap(both)(t, r)
    scale = np.maximum(1, np.abs(u))
    for target in targets:
        assert np.max(np.abs(target - u) / scale) < 1e-5


def test_target_at_a_wrong_map_is_another(x64):
    """A scaled map is no fixed point: the test above can fail."""
    path = PATHS["linear"]
    flow = exact(path, scale=1.1)
    x = jnp.array([0.5, 0.2])
    data, noise = pair_with_exact_velocity(exact(path).network.oracle(None), path, 0.8, x)
    for loss in (MeanFlow(), Shortcut(times.TimePairs(times.Uniform()), finest=0.0)):
        target = loss.target(flow, data, t=0.8, r=0.2, noise=noise)
        assert np.max(np.abs(target - flow.average_velocity(0.8, 0.2, x))) > 1e-3


def test_guided_target_is_the_guided_average_velocity(x64):
    """Label 0 is the null. Both Gaussians have one covariance, so that the guided flow is a Gaussian's again."""
    path, omega, kappa = PATHS["linear"], 1.5, 0.4
    scale = omega / (1 - kappa)
    guided_mean = MEANS[0] + scale * (MEANS[1] - MEANS[0])
    flow = exact(path, np.stack([MEANS[0], guided_mean]))
    conditional = fs.testing.Gaussian(jnp.asarray(MEANS[1]), jnp.asarray(COVARIANCE))
    x, null = jnp.array([0.4, 1.0]), jnp.asarray(0)

    def target(loss, t, r, label):
        oracle = conditional if label else flow.network.oracle(null)
        data, noise = pair_with_exact_velocity(oracle, path, t, x)
        return loss.target(flow, data, jnp.asarray(label), t=t, r=r, noise=noise)

    loss = MeanFlow(guidance=MeanFlowGuidance(null, omega, kappa))
    for t, r in ((0.9, 0.1), (0.5, 0.4), (0.7, 0.7)):
        for label in (0, 1):
            expected = flow.average_velocity(t, r, x, jnp.asarray(label))
            np.testing.assert_allclose(target(loss, t, r, label), expected, atol=1e-5)
    # Outside of the interval the velocity is the pair's own.
    inside = MeanFlow(guidance=MeanFlowGuidance(null, omega, kappa, low=0.6, high=0.8))
    np.testing.assert_allclose(target(inside, 0.7, 0.7, 1), flow.velocity(0.7, x, jnp.asarray(1)), atol=1e-5)
    for t in (0.5, 0.9):
        plain = conditional.velocity(path, t, x)
        np.testing.assert_allclose(target(inside, t, t, 1), plain, atol=1e-12)
    # Without kappa the scale is omega, from two evaluations.
    two = exact(path, np.stack([MEANS[0], MEANS[0] + omega * (MEANS[1] - MEANS[0])]))
    data, noise = pair_with_exact_velocity(conditional, path, 0.7, x)
    found = MeanFlow(guidance=MeanFlowGuidance(null, omega)).target(
        two, data, jnp.asarray(1), t=0.7, r=0.7, noise=noise
    )
    np.testing.assert_allclose(found, two.velocity(0.7, x, jnp.asarray(1)), atol=1e-10)


@pytest.mark.parametrize("predicted", [False, True])
def test_derivative_against_finite_differences(predicted, x64):
    """du/dt of the target, from u at x_t +- h v, t +- h."""
    path, net = PATHS["vp"], Net()
    flow = flowmaps.FlowMap(net, path)
    data, noise = jnp.array([0.4, -0.9]), jnp.array([1.2, 0.1])
    t, r, h = 0.7, 0.3, 1e-5
    x = np.asarray(path.interpolate(t, data, noise))
    d_alpha, d_sigma = (float(d) for d in path.derivatives(t))
    velocity = d_alpha * np.asarray(data) + d_sigma * np.asarray(noise)
    along = net64(net, t, t, x) if predicted else velocity
    slope = (net64(net, t + h, r, x + h * along) - net64(net, t - h, r, x - h * along)) / (2 * h)
    found = MeanFlow(predicted_tangent=predicted).target(flow, data, t=t, r=r, noise=noise)
    np.testing.assert_allclose(found, velocity - (t - r) * slope, atol=1e-8)


def test_shortcut_target_is_two_steps(x64):
    path, net = PATHS["linear"], Net()
    flow = flowmaps.FlowMap(net, path)
    data, noise = np.array([0.4, -0.9]), np.array([1.2, 0.1])
    for t, r, finest in ((0.75, 0.5, 1 / 128), (0.75, 0.5, 1 / 8), (0.75, 0.25, 1 / 8)):
        x, m = (1 - t) * data + t * noise, (t + r) / 2
        short = t - m <= finest
        first = net64(net, t, t if short else m, x)
        second = net64(net, m, m if short else r, x - (t - m) * first)
        found = Shortcut(times.TimePairs(times.Uniform()), finest=finest).target(
            flow, jnp.asarray(data), t=t, r=r, noise=jnp.asarray(noise)
        )
        np.testing.assert_allclose(found, (first + second) / 2, atol=1e-12)


def test_shortcut_is_anchored_in_the_velocity():
    """A map that never moves, but has a velocity, is no minimum: halves of the shortest interval are the velocity's."""

    class Still(eqx.Module):
        def __call__(self, t, x, args, *, key=None):
            return jnp.where(t[0] == t[1], 3 * x + 1, 0 * x)

    flow = flowmaps.FlowMap(Still(), PATHS["linear"])
    for steps in (2, 8, 128):
        value, _ = run(Shortcut(times.DyadicPairs(steps, equal=0.0)), flow, batch(256))
        assert value > 0.05
    with pytest.raises(ValueError, match="targets that nothing trains"):
        Shortcut(times.DyadicPairs(8), finest=1 / 128)


def test_no_gradient_flows_through_the_target():
    """The gradient of the loss is that of u alone, against the target as a constant."""
    path = PATHS["linear"]
    flow = flowmaps.FlowMap(Net(), path)
    data, noise, label = jnp.array([0.4, -0.9]), jnp.array([1.2, 0.1]), jnp.asarray(1)
    x = path.interpolate(0.7, data, noise)
    guidance = MeanFlowGuidance(jnp.asarray(0), 1.5, 0.4)
    for loss in (MeanFlow(power=0.0, guidance=guidance), MeanFlow(power=0.0, predicted_tangent=True), Shortcut()):
        target = loss.target(flow, data, label, t=0.7, r=0.3, noise=noise)

        @eqx.filter_jit
        def gradients(flow, loss=loss, target=target):
            constant = eqx.filter_grad(lambda f: jnp.mean((f.average_velocity(0.7, 0.3, x, label) - target) ** 2))(flow)
            return eqx.filter_grad(lambda f: loss.one(f, data, label, t=0.7, r=0.3, noise=noise))(flow), constant

        found, expected = gradients(flow)
        np.testing.assert_allclose(found.network.matrix, expected.network.matrix, rtol=1e-4)
        np.testing.assert_allclose(found.network.bias, expected.network.bias, rtol=1e-4)


# --- losses of a batch ---------------------------------------------------------------------------------------

run = eqx.filter_jit(lambda loss, flow, x0, args=None, key=KEY, mask=None: loss(flow, x0, args, key=key, mask=mask))


def batch(num=6):
    return jnp.asarray(np.random.default_rng(1).normal(size=(num, 2)), jnp.float32)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["linear", "vp"])
def test_at_equal_times_it_is_flow_matching_bitwise(name):
    path, first = PATHS[name], times.LogitNormal(-0.4, 1.0)
    flow = flowmaps.FlowMap(Net(), path)
    expected, aux = run(losses.Regression(times=first), flow, batch())
    for loss in (
        MeanFlow(times.TimePairs(first, equal=1.0), power=0.0),
        MeanFlow(times.TimePairs(first, equal=1.0), power=0.0, predicted_tangent=True),
        Shortcut(times.DyadicPairs(8, first, equal=1.0)),
    ):
        value, found = run(loss, flow, batch())
        assert np.array_equal(found.t, aux.t)
        assert np.array_equal(found.losses, aux.losses) and np.array_equal(value, expected)


def test_adaptive_weight_against_a_loop():
    """w = (sum of squares + eps)^-power: the sum over elements, once (pitfall 19), and no part of the gradient."""
    flow = flowmaps.FlowMap(Net(), PATHS["linear"])
    pairs, mask = (
        times.TimePairs(times.Uniform(), equal=0.3),
        jnp.array([[1, 1], [1, 0], [0, 1], [1, 1], [0, 0], [1, 1]]),
    )
    square, _ = run(MeanFlow(pairs, power=0.0), flow, batch())
    for power, eps in ((1.0, 1e-3), (0.75, 0.1)):
        for counts in (None, mask.astype(bool)):
            plain = run(MeanFlow(pairs, power=0.0), flow, batch(), mask=counts)[1].losses
            found = run(MeanFlow(pairs, power=power, eps=eps), flow, batch(), mask=counts)[1].losses
            number = 2 if counts is None else np.asarray(mask.sum(axis=1))
            expected = plain * (np.asarray(plain) * number + eps) ** -power
            np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert square > 0

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(flow, loss):
        return loss.one(flow, batch()[0], t=0.8, r=0.1, noise=batch()[1])

    plain, weighted = gradient(flow, MeanFlow(power=0.0)), gradient(flow, MeanFlow())
    value = MeanFlow(power=0.0).one(flow, batch()[0], t=0.8, r=0.1, noise=batch()[1])
    weight = 1 / (2 * float(value) + 1e-3)
    np.testing.assert_allclose(weighted.network.bias, weight * plain.network.bias, rtol=1e-4)


def test_batch_equals_a_loop_over_examples():
    """Each example has its own pair of times and its own noise; those of one do not depend on the others."""
    flow = flowmaps.FlowMap(Net(), PATHS["linear"])
    for loss in (MeanFlow(), Shortcut()):
        value, aux = run(loss, flow, batch())
        np.testing.assert_allclose(value, np.mean(aux.losses), rtol=1e-6)
        assert len(set(np.asarray(aux.t).tolist())) > 1
        shorter = run(loss, flow, batch()[:3])[1]
        np.testing.assert_array_equal(shorter.losses, aux.losses[:3])


def test_conditions_are_dropped_for_each_example():
    """With probability 1 every label is the null, with 0 none; between, some of a batch."""
    flow = flowmaps.FlowMap(Net(), PATHS["linear"])
    labels, null = jnp.full((64,), 2), jnp.asarray(0)
    x0 = jnp.zeros((64, 2))

    def loss(probability):
        return MeanFlow(power=0.0, dropout=losses.ConditionDropout(probability, null))

    kept, dropped = run(loss(0.0), flow, x0, labels)[1].losses, run(loss(1.0), flow, x0, labels)[1].losses
    np.testing.assert_array_equal(kept, run(MeanFlow(power=0.0), flow, x0, labels)[1].losses)
    np.testing.assert_array_equal(dropped, run(MeanFlow(power=0.0), flow, x0, 0 * labels)[1].losses)
    some = np.asarray(run(loss(0.5), flow, x0, labels)[1].losses)
    share = np.mean(some == dropped)
    assert np.all((some == dropped) | (some == kept)) and abs(share - 0.5) < 4 * 0.5 / 8


def test_laws_of_the_pairs():
    """Of TimePairs: r <= t, their share of equals, and the law of max and min of two uniforms. Of DyadicPairs: all
    intervals lie on their grids, each length as likely as another."""
    path, num = PATHS["linear"], 20_000
    t, r = (np.asarray(a) for a in times.TimePairs(times.Uniform(), equal=0.25).sample(path, KEY, num))
    same = t == r
    assert np.all(r <= t) and abs(same.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / num)
    for values, mean, variance in ((t[~same], 2 / 3, 1 / 18), (r[~same], 1 / 3, 1 / 18), (t[same], 1 / 2, 1 / 12)):
        assert abs(values.mean() - mean) < 4 * np.sqrt(variance / len(values))
    t, r = (np.asarray(a) for a in times.DyadicPairs(16, equal=0.25).sample(path, KEY, num))
    apart = t != r
    assert abs(apart.mean() - 0.75) < 4 * np.sqrt(0.25 * 0.75 / num)
    length = (t - r)[apart]
    for size in (1 / 8, 1 / 4, 1 / 2, 1.0):
        ours = np.isclose(length, size)
        assert abs(ours.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / apart.sum())
        np.testing.assert_allclose(np.unique(np.round(t[apart][ours] / size)), np.arange(1, round(1 / size) + 1))
        np.testing.assert_allclose(t[apart][ours] / size, np.round(t[apart][ours] / size), atol=1e-6)
    assert np.isclose(length, 1 / 8).sum() + np.isclose(length, 1.0).sum() < len(length)


def test_features_reach_the_loss_through_the_derivative():
    """What the network hands out at (t, r) arrives in Aux, one entry, though it was evaluated under a jvp."""

    class Both(eqx.Module):
        net: Net

        def __call__(self, t, x, args, *, key=None):
            return self.net(t, x, args), jnp.stack([t[0], t[1]])

    flow = flowmaps.FlowMap(fs.nn.Features(Both(Net())), PATHS["linear"])
    _, aux = run(MeanFlow(predicted_tangent=True), flow, batch())
    assert len(aux.features) == 1
    np.testing.assert_array_equal(aux.features[0][:, 0], aux.t)
    assert np.all(aux.features[0][:, 1] <= aux.features[0][:, 0])
    plain = run(MeanFlow(predicted_tangent=True), flowmaps.FlowMap(Net(), PATHS["linear"]), batch())
    np.testing.assert_array_equal(aux.losses, plain[1].losses)


def test_training_reaches_the_exact_map():
    """An affine family that holds the exact average velocity of a Gaussian at the times of a jump from 1 to 0."""

    class Affine(eqx.Module):
        """The flow of a Gaussian with its mean and its standard deviation as parameters."""

        mean: jax.Array
        log_std: jax.Array

        def __call__(self, t, x, args, *, key=None):
            t, r = t
            std = jnp.exp(self.log_std)

            def scale(t):
                return jnp.sqrt(((1 - t) * std) ** 2 + t**2)

            # (scale(t) - scale(r))/(t - r) without dividing by 0.
            rise = (t + r) - (2 - t - r) * std**2
            factor = rise / (scale(t) + scale(r)) / scale(t)
            return factor * (x - (1 - t) * self.mean) - self.mean

    flow = flowmaps.FlowMap(Affine(jnp.zeros(()), jnp.zeros(())), PATHS["linear"])
    data = 2 + 0.5 * jax.random.normal(KEY, (4_000, 1))
    batches = fs.data.Batches(data, batch_size=512, key=KEY)
    loss = MeanFlow(times.TimePairs(times.Uniform(), equal=0.5), power=0.0)
    rate = optax.cosine_decay_schedule(0.05, 400)
    for state in fs.training.fit(loss, flow, batches, optax.adam(rate), steps=400, key=KEY, ema=None, progress=False):
        flow = state.flow
    assert abs(float(flow.network.mean) - 2) < 0.03
    assert abs(float(jnp.exp(flow.network.log_std)) - 0.5) < 0.03


def test_moment_matching_against_a_loop(x64):
    """The discrepancy of one group, by explicit loops in NumPy."""
    path, net = paths.Linear(), Net()
    flow = flowmaps.FlowMap(net, path)
    rng = np.random.default_rng(3)
    data, noise = rng.normal(size=(3, 2)), rng.normal(size=(3, 2))
    t, r, gap, bias, power = 0.7, 0.2, 0.1, 4.0, 1.5
    angle = np.arctan2(t, 1 - t) - gap * np.pi / 2
    s = np.sin(angle) / (np.sin(angle) + np.cos(angle))
    x_t, x_s = (1 - t) * data + t * noise, (1 - s) * data + s * noise
    y = np.array([x - (t - r) * net64(net, t, r, x) for x in x_t])
    z = np.array([x - (s - r) * net64(net, s, r, x) for x in x_s])

    def kernel(a, b):
        return np.exp(-max(np.linalg.norm(a - b), 1e-6) / ((t - r) * 2))

    square = np.mean(
        [
            [kernel(a, b) + kernel(c, d) - 2 * kernel(a, d) for b, d in zip(y, z, strict=True)]
            for a, c in zip(y, z, strict=True)
        ]
    )
    log_snr = 2 * np.log((1 - t) / t)
    weight = 0.5 / (1 + np.exp(log_snr - bias)) * 2 / (t * (1 - t)) * (1 - t) ** power / ((1 - t) ** 2 + t**2)
    loss = losses.InductiveMomentMatching(3, gap=gap, bias=bias, power=power)
    found = loss.one(flow, jnp.asarray(data), t=t, r=r, noise=jnp.asarray(noise))
    np.testing.assert_allclose(found, weight * square, rtol=1e-8)


def test_moment_matching_vanishes_at_the_exact_map():
    """Of pairs on one trajectory both jumps end in the same point; and its gradient in the map's scale does not vanish
    for a wrong one."""
    path = PATHS["linear"]
    # An example and itself are among the pairs, which pulls y_i to its own z_i: less in larger groups.
    loss = losses.InductiveMomentMatching(32, gap=0.1)

    @eqx.filter_jit
    def discrepancy(flow, key):
        oracle = flow.network.oracle(None)
        start = jax.random.normal(key, (4, 2))
        x_s = jax.vmap(lambda x: oracle.flow_map(path, 1.0, 0.3, x))(start)
        x_t = jax.vmap(lambda x: oracle.flow_map(path, 1.0, 0.8, x))(start)
        y, z = (jax.vmap(lambda x, t=t: flow.jump(t, 0.1, x))(x) for t, x in ((0.8, x_t), (0.3, x_s)))
        return jnp.max(jnp.abs(y - z))

    assert discrepancy(exact(path), KEY) < 1e-5
    assert discrepancy(exact(path, scale=1.1), KEY) > 1e-2
    rows = np.random.default_rng(0).multivariate_normal(MEANS[0], COVARIANCE, 4_096)
    x0 = jnp.asarray(rows, jnp.float32)

    @eqx.filter_jit
    def slope(flow, key):
        return eqx.filter_grad(lambda flow: loss(flow, x0, key=key)[0])(flow).network.scale

    many = jax.random.split(KEY, 16)
    right = np.array([slope(exact(path), key) for key in many])
    wrong = np.array([slope(exact(path, scale=0.9), key) for key in many])
    assert abs(right.mean()) < 4 * right.std(ddof=1) / 4 + 0.02 * abs(wrong.mean())
    assert wrong.mean() < -10 * wrong.std(ddof=1) / 4


# --- bad input -----------------------------------------------------------------------------------------------


def test_bad_input_is_named(untyped):
    flow, path = flowmaps.FlowMap(Net(), PATHS["linear"]), PATHS["linear"]
    plain = fs.Flow(lambda t, x, args, *, key=None: x, path, predictions.Velocity())
    mlp = fs.nn.ResidualMLP(LIKE, width=8, depth=1, key=KEY)
    cases = [
        (TypeError, "FlowMap got a network", lambda: flowmaps.FlowMap(1.0, path)),
        (TypeError, "path is the class Linear", lambda: flowmaps.FlowMap(Net(), paths.Linear)),
        (TypeError, "flow_map is a Flow", lambda: flowmaps.OntoData(plain)),
        (ValueError, "IntervalEmbedding", lambda: flowmaps.FlowMap(mlp, path).jump(1.0, 0.0, jnp.zeros(2))),
        (TypeError, "flow is a Flow", lambda: MeanFlow()(plain, batch(), key=KEY)),
        (ValueError, "eps = 0", lambda: MeanFlow(eps=0.0)),
        (ValueError, "power = -1", lambda: MeanFlow(power=-1.0)),
        (TypeError, "times is a Uniform", lambda: MeanFlow(times.Uniform())),
        (ValueError, "kappa = 1", lambda: MeanFlowGuidance(jnp.asarray(0), 2.0, 1.0)),
        (ValueError, "null condition", lambda: MeanFlowGuidance(None, 2.0)),
        (ValueError, "r <= t: swap", lambda: flow.jump(0.2, 0.8, jnp.zeros(2))),
        (ValueError, "low = 0.9", lambda: MeanFlowGuidance(jnp.asarray(0), 2.0, low=0.9, high=0.1)),
        (
            ValueError,
            "leading axis of 8",
            lambda: losses.InductiveMomentMatching()(flow, batch(8), jnp.ones(3), key=KEY),
        ),
        (
            TypeError,
            "Pairs made the noise depend",
            lambda: losses.InductiveMomentMatching()(flow, fs.couplings.Pairs(batch(8), batch(8)), key=KEY),
        ),
        (TypeError, "IntervalEmbedding got an embedding", lambda: fs.nn.IntervalEmbedding(3)),
        (ValueError, "finest = 2", lambda: Shortcut(finest=2.0)),
        (ValueError, "groups of 4", lambda: losses.InductiveMomentMatching()(flow, batch(6), key=KEY)),
        (ValueError, "group = 1", lambda: losses.InductiveMomentMatching(1)),
        (ValueError, "power of 2", lambda: times.DyadicPairs(12)),
        (ValueError, "equal = 1.5", lambda: times.TimePairs(times.Uniform(), equal=1.5)),
        (TypeError, "first is the class", lambda: times.TimePairs(times.Uniform)),
        (TypeError, "no average velocity", lambda: fs.sample(plain, LIKE, num=1, key=KEY, solver=solvers.Jump())),
        (ValueError, "times that rise", lambda: fs.encode(flow, jnp.zeros(2), solver=solvers.Jump())),
        (
            ValueError,
            "draws its own noise",
            lambda: fs.sample(
                plain, LIKE, num=1, key=KEY, solver=solvers.ConsistencySampling(), dynamics=fs.ReverseSDE(1.0)
            ),
        ),
    ]
    for kind, text, call in cases:
        with pytest.raises(kind, match=text):
            call()
