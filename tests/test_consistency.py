"""Consistency losses against exact flow maps, the papers' formulas in NumPy and finite differences."""

import functools
import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowsolve as fs
from flowsolve import losses, paths, predictions, times

KEY = jax.random.key(0)
LINEAR, TRIG, EDM, VP = paths.Linear(), paths.Trigonometric(), paths.EDM(), paths.VP()
TIGHTENING = times.Tightening(3)


class Net(eqx.Module):
    """Nonlinear in x and t, of 3 elements; takes a pair of times as well."""

    matrix: jax.Array
    bias: jax.Array

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.matrix = jnp.asarray(rng.normal(size=(3, 3)) / 2, float)
        self.bias = jnp.asarray(rng.normal(size=3), float)

    def __call__(self, t, x, args=None, *, key=None):
        t = t[0] - 0.3 * t[1] if isinstance(t, tuple) else t
        shift = 0.0 if args is None else args
        return jnp.tanh(jnp.matmul(self.matrix, x, precision="highest") + t) * self.bias + 0.2 * x + shift


class ExactMap(eqx.Module):
    """The average velocity of a Gaussian, plus a shift and a stretch to be learned away."""

    oracle: fs.testing.Gaussian
    path: paths.AbstractPath
    shift: jax.Array = eqx.field(default=0.0, converter=lambda x: jnp.asarray(x, float))
    stretch: jax.Array = eqx.field(default=0.0, converter=lambda x: jnp.asarray(x, float))

    def __call__(self, t, x, args=None, *, key=None):
        t, r = t
        gap = jnp.where(t == r, 1, t - r)
        average = (x - self.oracle.flow_map(self.path, t, r, x)) / gap
        exact = jnp.where(t == r, self.oracle.velocity(self.path, t, x), average)
        return exact + self.shift + self.stretch * x


def gaussian():
    return fs.testing.Gaussian(jnp.array([0.4, -0.3, 0.1]), jnp.array([0.25, 1.0, 0.5]))


def exact(path, oracle, shift=0.0, stretch=0.0):
    return fs.flowmaps.OntoData(fs.flowmaps.FlowMap(ExactMap(oracle, path, shift, stretch), path))


def example(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=3), float), jnp.asarray(rng.normal(size=3), float)


def preconditioned(path, network=None, scheme=fs.ConsistencyPreconditioner, level=fs.preconditioning.quarter_log_ratio):
    network = Net() if network is None else network
    return fs.Flow(network, path, predictions.Data(), preconditioner=scheme(0.7, noise_level=level))


FLOWS = {
    "linear velocity": lambda: fs.Flow(Net(), LINEAR, predictions.Velocity()),
    "linear preconditioned": lambda: preconditioned(LINEAR, None, fs.EDMPreconditioner, fs.preconditioning.angle),
    "trigonometric v": lambda: fs.Flow(Net(), TRIG, predictions.V()),
    "ornstein-uhlenbeck noise": lambda: fs.Flow(Net(), paths.OrnsteinUhlenbeck(), predictions.Noise()),
    "edm": lambda: preconditioned(EDM),
    "vp": lambda: preconditioned(VP),
    "cosine": lambda: preconditioned(paths.Cosine()),
    "ve": lambda: preconditioned(paths.VE()),
    "linear onto data": lambda: fs.flowmaps.OntoData(fs.flowmaps.FlowMap(Net(), LINEAR)),
    "vp onto data": lambda: fs.flowmaps.OntoData(fs.flowmaps.FlowMap(Net(), VP)),
}


# --- the boundary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FLOWS)
def test_the_boundary_is_exact(name):
    """f(t_data, x) = x to the last bit, in one program with other times and by itself."""
    flow = FLOWS[name]()
    losses.consistency.check_boundary(flow)
    x = 3 * jax.random.normal(KEY, (64, 3))
    t = jnp.where(jnp.arange(64) % 2 == 0, flow.path.t_data, 0.5 * (flow.path.t_data + flow.path.t_noise))
    f = jax.jit(jax.vmap(flow.denoised))(t, x)
    np.testing.assert_array_equal(f[::2], x[::2])
    assert (f[1::2] != x[1::2]).all()
    np.testing.assert_array_equal(flow.denoised(flow.path.t_data, x[0]), x[0])


@pytest.mark.parametrize("path", [EDM, VP, LINEAR, TRIG], ids=lambda path: type(path).__name__)
def test_the_preconditioner_is_the_formula(path):
    """Song et al. (2023), appendix C, of x/alpha with the level counted from the data end."""
    std = 0.7
    t = jnp.asarray(np.linspace(path.t_data, path.t_noise, 23), float)
    scheme, edm = fs.ConsistencyPreconditioner(std), fs.EDMPreconditioner(std)
    c_in, skip, out = (np.float64(c) for c in jax.jit(jax.vmap(functools.partial(scheme.coefficients, path)))(t))
    alpha, sigma = (np.float64(c) for c in jax.vmap(path.coefficients)(t))
    level = sigma[0] / alpha[0]
    np.testing.assert_allclose(c_in, 1 / np.sqrt(sigma**2 + alpha**2 * std**2), rtol=1e-6)
    above = sigma - alpha * level
    np.testing.assert_allclose(skip, alpha[0] * alpha * std**2 / (above**2 + alpha**2 * std**2), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(out, alpha[0] * above * std * c_in, rtol=1e-5, atol=1e-7)
    assert skip[0] == 1 and out[0] == 0 and np.isfinite([c_in, skip, out]).all()
    if sigma[0] == 0:
        plain = jax.vmap(functools.partial(edm.coefficients, path))(t)
        np.testing.assert_allclose((c_in, skip, out), plain, rtol=1e-6, atol=1e-7)
    # The derivative at the end is that of the formula, not of the value that is put there.
    t_data = jnp.asarray(path.t_data, float)
    slope = jax.jacfwd(lambda t: jnp.stack(scheme.coefficients(path, t)[1:]))(t_data)
    d_alpha, d_sigma = (float(d) for d in path.derivatives(t_data))
    d_above = d_sigma - d_alpha * level
    np.testing.assert_allclose(slope[1], alpha[0] * d_above * std * c_in[0], rtol=1e-5)
    np.testing.assert_allclose(slope[0], -d_alpha / alpha[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "flow",
    [
        lambda: preconditioned(EDM, None, fs.EDMPreconditioner),
        lambda: preconditioned(VP, None, fs.EDMPreconditioner),
        lambda: fs.Flow(Net(), EDM, predictions.Velocity()),
        lambda: fs.Flow(Net(), VP, predictions.Noise()),
        lambda: fs.Flow(Net(), paths.Linear(t_data=0.01), predictions.Velocity()),
        lambda: fs.Flow(Net(), paths.Path(lambda t: 2 - t, lambda t: t), predictions.Velocity()),
    ],
)
@pytest.mark.parametrize("loss", [losses.Consistency(TIGHTENING), losses.ContinuousConsistency()])
def test_a_flow_that_is_not_x_at_the_end_is_refused(flow, loss):
    with pytest.raises(ValueError, match=r"f\(t_data, x\) = x, but the data of this flow .*=ConsistencyPreconditioner"):
        jax.jit(lambda x: loss(flow(), x, key=KEY)[0])(jnp.ones((2, 3)))


# --- discrete steps ---------------------------------------------------------------------------------


def numpy_noise_and_times(loss, flow, x0):
    """What a batch draws, by the keys that every loss uses."""
    key_times, key_examples = jax.random.split(KEY)
    drawn = loss.times.sample(flow.path, key_times, len(x0))
    keys = [jax.random.split(jax.random.fold_in(key_examples, i)) for i in range(len(x0))]
    noise = [flow.source.sample(key[0], x) for key, x in zip(keys, x0, strict=True)]
    return drawn, np.stack(noise)


@pytest.mark.parametrize("path", [EDM, LINEAR], ids=lambda path: type(path).__name__)
def test_training_is_the_papers_formula(path):
    """iCT's loss, sum over examples of 1/(n_t - n_r) (sqrt(|e|^2 + c^2) - c), c = 0.00054 sqrt(d), over sqrt(d)."""
    level = fs.preconditioning.angle
    flow, x0 = preconditioned(path, level=level), jax.random.normal(KEY, (32, 3))
    weights, mask = np.linspace(0, 2, 32), np.array(jax.random.bernoulli(KEY, 0.8, (32, 3)))
    mask[:2] = True
    loss = losses.Consistency(times.Tightening(2))
    call = eqx.filter_jit(lambda loss, mask: loss(flow, x0, key=KEY, example_weight=jnp.asarray(weights), mask=mask))
    value, aux = call(loss, jnp.asarray(mask))
    ((t, r), noise) = numpy_noise_and_times(loss, flow, x0)
    np.testing.assert_allclose(aux.t, t, rtol=1e-6)
    at_end = np.asarray(r == path.t_data)
    assert 3 < at_end.sum() < 29

    denoised = jax.jit(lambda t, x: flow.denoised(t, x))

    def f(t, x):
        return np.float64(denoised(t, jnp.asarray(x, float)))

    terms, plain = [], []
    for i in range(32):
        (a_t, s_t), (a_r, s_r) = (np.float64(jnp.stack(path.coefficients(s[i]))) for s in (t, r))
        x_t, x_r = a_t * x0[i] + s_t * noise[i], a_r * x0[i] + s_r * noise[i]
        error = f(t[i], x_t) - (x_r if at_end[i] else f(r[i], x_r))
        counted = error[mask[i]]
        c = 0.00054 * math.sqrt(len(counted))
        huber = (np.sqrt(np.sum(counted**2) + c**2) - c) / math.sqrt(max(len(counted), 1)) if len(counted) else 0.0
        terms.append(huber / (s_t / a_t - s_r / a_r))
        plain.append(np.mean(np.abs(counted)) if len(counted) else 0.0)
    counts = weights * mask.any(axis=1)
    np.testing.assert_allclose(aux.losses, terms, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(value, np.sum(counts * terms) / np.sum(counts), rtol=2e-4)
    other = losses.Consistency(loss.times, weight=None, elementwise=losses.absolute)
    np.testing.assert_allclose(call(other, jnp.asarray(mask))[1].losses, plain, rtol=1e-3, atol=1e-5)


def test_the_pseudo_huber_norm_of_one_element_is_the_pseudo_huber():
    error = np.array([1e-6, 1e-3, 0.5, 40.0])
    ours = jax.vmap(losses.PseudoHuberNorm(0.03))(jnp.asarray(error**2, float))
    np.testing.assert_allclose(ours, np.sqrt(error**2 + 0.03**2) - 0.03, rtol=1e-4, atol=1e-10)
    np.testing.assert_allclose(ours, losses.PseudoHuber(0.03)(jnp.asarray(error, float)) / 0.03, rtol=1e-5)


@pytest.mark.parametrize("path", [EDM, LINEAR], ids=lambda path: type(path).__name__)
def test_distillation_of_an_exact_flow_by_an_exact_student_is_zero(path, x64):
    oracle = gaussian()
    t = jnp.asarray([path.t_noise, 0.9, 0.5, 0.1])
    r = jnp.asarray([0.8 * path.t_noise, 0.85, 0.45, path.t_data])
    prediction = predictions.Velocity()
    loss = losses.Consistency(
        TIGHTENING, oracle.flow(path, prediction), diffrax.Dopri8(), weight=None, elementwise=losses.squared
    )
    x0, noise = example()

    @jax.jit
    def values(shift):
        return jax.vmap(lambda t, r: loss.one(exact(path, oracle, shift), x0, t=t, r=r, noise=noise))(t, r)

    assert (values(0.0) < 1e-16).all()
    # The error of a student that is off by shift (t - t_data).
    expected = (0.1 * (t - jnp.where(r == path.t_data, path.t_data, r))) ** 2
    np.testing.assert_allclose(values(0.1), expected, rtol=1e-4)
    assert (expected > 1e-5).all()


def test_the_bias_of_training_vanishes_with_the_step(x64):
    """The mean gradient at the exact student, by quadrature: (t - r)^2, and t - r with the weight 1/(n_t - n_r)."""
    path, oracle, t = LINEAR, fs.testing.Gaussian.isotropic(jnp.array([0.4]), 0.5), 0.6
    nodes, chances = np.polynomial.hermite_e.hermegauss(6)
    z, noise = (jnp.asarray(grid.ravel())[:, None] for grid in np.meshgrid(nodes, nodes))
    chances = jnp.asarray(np.outer(chances, chances).ravel() / (2 * math.pi))

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(r, parameters, weight):
        loss = losses.Consistency(TIGHTENING, weight=weight, elementwise=losses.squared)

        def mean(parameters):
            student = exact(path, oracle, *parameters)
            each = jax.vmap(lambda z, noise: loss.one(student, 0.4 + 0.5 * z, t=t, r=r, noise=noise))(z, noise)
            return jnp.sum(chances * each)

        return jnp.stack(jax.grad(mean)(parameters))

    steps = 0.1 * 0.5 ** np.arange(6)
    for weight, rate in ((None, 2), (losses.inverse_gap, 1)):
        biases = np.stack([gradient(t - step, (0.0, 0.0), weight) for step in steps])
        rates = np.diff(np.log(np.abs(biases[:, 1]))) / np.log(0.5)
        np.testing.assert_allclose(rates[-2:], rate, atol=0.05)
        assert np.abs(gradient(t - steps[-1], (0.1, 0.1), weight)).max() > 10 * np.abs(biases[-1]).max()


def test_distillation_steps_along_a_guided_teacher():
    """x_r is one step of Heun on the guided velocity; nothing of loss or target has a gradient but the student."""
    null = jnp.zeros(())
    guided = fs.guidance.ClassifierFree(fs.Flow(Net(1), LINEAR, predictions.Velocity()), scale=3.0, null=null)
    student = fs.Flow(Net(), LINEAR, predictions.Velocity())
    loss = losses.Consistency(TIGHTENING, guided, weight=None, elementwise=losses.squared)
    x0, noise = example()
    label, t, r = jnp.asarray(0.7), jnp.asarray(0.6), jnp.asarray(0.45)

    @eqx.filter_jit
    def value_and_gradients(student, loss):
        def value(both):
            return both[1].one(both[0], x0, label, t=t, r=r, noise=noise)

        return eqx.filter_value_and_grad(value)((student, loss))

    value, (of_student, of_loss) = value_and_gradients(student, loss)
    x_t = LINEAR.interpolate(t, x0, noise)
    first = guided.velocity(t, x_t, label)
    second = guided.velocity(r, x_t + (r - t) * first, label)
    x_r = x_t + 0.5 * (r - t) * (first + second)
    target = student.denoised(r, x_r, label)

    def explicit(student):
        return jnp.mean((student.denoised(t, x_t, label) - target) ** 2)

    wanted, gradient = eqx.filter_value_and_grad(explicit)(student)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(of_student.network.matrix, gradient.network.matrix, rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(gradient.network.matrix).max()) > 1e-3
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(of_loss))


def test_both_evaluations_have_one_key_and_equal_times_teach_nothing():
    def random(t, x, args, *, key):
        return jax.random.normal(key, x.shape)

    x0, noise = example()
    loss = losses.Consistency(TIGHTENING)
    flow = fs.Flow(random, EDM, predictions.Data())
    assert float(loss.one(flow, x0, t=2.0, r=1.0, noise=noise, key=KEY)) == 0

    def value(matrix, t, r):
        network = eqx.tree_at(lambda n: n.matrix, Net(), matrix)
        return loss.one(fs.Flow(network, TRIG, predictions.V()), x0, t=t, r=r, noise=noise)

    gradient = jax.jit(jax.value_and_grad(value))
    for pair in ((0.5, 0.5), (1.0, 1.0), (0.0, 0.0)):
        assert float(gradient(Net().matrix, *pair)[0]) == 0
    # At both ends it is finite.
    for pair in ((0.5, 0.5), (0.3, 0.0), (1.0, 0.9), (1.0, 0.0), (0.0, 0.0)):
        assert all(np.isfinite(part).all() for part in gradient(Net().matrix, *pair))


def test_the_target_at_the_data_end_is_x_for_any_network():
    x0, noise = example()
    flow = fs.Flow(Net(), EDM, predictions.Data())
    loss = losses.Consistency(TIGHTENING, weight=None, elementwise=losses.squared)
    value = jax.jit(lambda r: loss.one(flow, x0, t=1.0, r=r, noise=noise))(jnp.asarray(0.002))
    error = flow.denoised(1.0, x0 + noise) - (x0 + 0.002 * noise)
    np.testing.assert_allclose(value, jnp.mean(error**2), rtol=1e-5)


# --- pairs of times ---------------------------------------------------------------------------------


def karras(points, low=0.002, high=80.0, rho=7):
    return (low ** (1 / rho) + np.arange(points) / (points - 1) * (high ** (1 / rho) - low ** (1 / rho))) ** rho


def test_neighbours_of_a_grid_have_the_papers_probabilities():
    """Song & Dhariwal (2023), section 3.5: differences of erf((ln t - P_mean)/(sqrt 2 P_std))."""
    draw = jax.jit(lambda points: times.GridNeighbours(points).sample(EDM, KEY, 20_000))
    for points in (2, 11, 41):
        t, r = (np.float64(s) for s in draw(jnp.asarray(points, float)))
        wanted = karras(points)
        index = np.argmin(np.abs(np.log(r)[:, None] - np.log(wanted[:-1])[None]), axis=1)
        np.testing.assert_allclose(r, wanted[index], rtol=2e-5)
        np.testing.assert_allclose(t, wanted[index + 1], rtol=2e-5)
        assert set(r[index == 0]) == {np.float32(0.002)} and set(t[index == points - 2]) == {80.0}
        erf = np.array([math.erf((math.log(s) + 1.1) / (math.sqrt(2) * 2.0)) for s in wanted])
        p = np.diff(erf) / (erf[-1] - erf[0])
        counts = np.bincount(index, minlength=points - 1)
        deviations = (counts - 20_000 * p) / np.sqrt(20_000 * p * (1 - p) + 1)
        assert np.abs(deviations).max() < 4


def test_neighbours_on_a_path_with_clean_data_and_pure_noise():
    """The ends of the path are the outer points, where 0.002 and 80 stand for them in the spacing."""
    pairs = times.GridNeighbours(6, times.Uniform(), rho=2.0)
    t, r = pairs.sample(LINEAR, KEY, 500)
    level = karras(6, rho=2)
    points = level / (1 + level)
    points[0], points[-1] = 0, 1
    np.testing.assert_allclose(np.unique(t), points[1:], rtol=1e-5)
    np.testing.assert_allclose(np.unique(r), points[:-1], rtol=1e-5)
    u = np.asarray(times.Uniform().sample(LINEAR, KEY, 500))
    outer = np.concatenate([[0], points[1:-1], [1]])
    np.testing.assert_allclose(t, outer[np.searchsorted(outer, u)], rtol=1e-5)
    np.testing.assert_allclose(r, outer[np.searchsorted(outer, u) - 1], rtol=1e-5)


def test_the_curriculum_doubles():
    """N(k) = min(s_0 2^floor(k/K'), s_1) + 1 with K' = floor(K/(log2 floor(s_1/s_0) + 1))."""
    k = np.arange(801)
    ours = jax.vmap(times.doubling_points)(jnp.asarray(k / 800, float))
    np.testing.assert_array_equal(ours, np.minimum(10 * 2.0 ** (k // 100), 1280) + 1)
    few = jax.vmap(lambda p: times.doubling_points(p, first=2, last=100))(jnp.asarray(np.arange(6) / 6, float))
    np.testing.assert_array_equal(few, [3, 5, 9, 17, 33, 65])
    assert float(times.doubling_points(1.0, first=2, last=100)) == 101


# Its inverse is NaN below its own end.
SHIFTED = paths.VE(lambda t: jnp.sqrt(0.01 + t**2), inverse=lambda sigma: jnp.sqrt(sigma**2 - 0.01), t_noise=40.0)


@pytest.mark.parametrize("path", [EDM, LINEAR, VP, SHIFTED], ids=lambda path: type(path).__name__)
def test_tightening_is_the_papers_formula(path):
    """Geng et al. (2024): r = t (1 - q^-a (1 + k sigmoid(-b t))) of sigma/alpha, not below t_data."""
    draw = jax.jit(lambda stage: times.Tightening(stage, q=2.0, k=8.0, b=1.0).sample(path, KEY, 400))

    def level(t):
        alpha, sigma = jax.vmap(path.coefficients)(t)
        return np.float64(sigma) / np.float64(alpha)

    end = float(path.sigma(path.t_data) / path.alpha(path.t_data))
    inside, data_end = 0, np.float32(path.t_data)
    for stage in (0, 1, 2.5, 4, 8):
        t, r = draw(jnp.asarray(stage, float))
        n_t, n_r = level(t), level(r)
        wanted = n_t * (1 - 2.0**-stage * (1 + 8 / (1 + np.exp(n_t))))
        clean = wanted <= end
        assert (np.asarray(r)[clean & (wanted < 0.9 * end)] == data_end).all()
        np.testing.assert_allclose(n_r[~clean], wanted[~clean], rtol=1e-3, atol=1e-6)
        assert (r <= t).all() and (stage > 0 or clean.all())
        inside += (~clean).sum()
    assert inside > 1000
    noise = times.Tightening(3, times.Given([1.0, 0.0])).sample(LINEAR, KEY, 3)
    np.testing.assert_array_equal(noise, np.ones((2, 3)))


# --- continuous time --------------------------------------------------------------------------------


def angle(path, t, std):
    alpha, sigma = path.coefficients(jnp.asarray(t))
    return float(jnp.arctan2(sigma, alpha * std))


CONTINUOUS = {
    "trigonometric v": (lambda: fs.Flow(Net(), TRIG, predictions.V()), 1.0),
    "linear velocity": (lambda: fs.Flow(Net(), LINEAR, predictions.Velocity()), 0.6),
    "edm": (lambda: preconditioned(EDM), 0.7),
    "exact": (lambda: exact(LINEAR, gaussian()), 1.3),
}


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_tangent_is_a_finite_difference(name, distilled, x64):
    make, std = CONTINUOUS[name]
    flow = make()
    path, oracle = flow.path, gaussian()
    x0, noise = example()
    teacher = oracle.flow(path, predictions.Velocity()) if distilled else None

    @jax.jit
    def tangent(t, warmup):
        loss = losses.ContinuousConsistency(data_std=std, warmup=warmup, teacher=teacher)
        return loss.tangent(flow, x0, t=t, noise=noise)

    def along(t, h):
        """x on the trajectory through x_t."""
        x_t = path.interpolate(t, x0, noise)
        return x_t + h * oracle.velocity(path, t, x_t) if distilled else path.interpolate(t + h, x0, noise)

    f = jax.jit(lambda t, x: flow.denoised(t, x))
    h = 1e-5
    for t in (0.1, 0.5, 0.9):
        d_angle = (angle(path, t + h, std) - angle(path, t - h, std)) / (2 * h)
        cosine, sine = math.cos(angle(path, t, std)), math.sin(angle(path, t, std))
        slope = (f(t + h, along(t, h)) - f(t - h, along(t, -h))) / (2 * h) / d_angle
        np.testing.assert_allclose(tangent(t, 1.0), cosine * slope, rtol=1e-6, atol=1e-8)
        if distilled and name == "exact":
            np.testing.assert_allclose(tangent(t, 1.0), 0, atol=1e-8)
        # Lu & Song (2024), with their x_t = cos x_0 + s sin eps and F, in which f = cos x_t - s sin F.
        alpha, sigma = (float(c) for c in path.coefficients(jnp.asarray(t)))
        x_t = path.interpolate(t, x0, noise)
        scaled = x_t * std / math.hypot(sigma, alpha * std)
        network = (cosine * scaled - f(t, x_t)) / (std * sine)
        if distilled:
            data, eps = oracle.data_and_noise(path, t, x_t)
        else:
            data, eps = x0, noise
        velocity = cosine * std * eps - sine * data
        first = -(cosine**2) * (std * network - velocity)
        for warmup in (0.0, 0.3):
            wanted = first + warmup * (cosine * slope - first)
            np.testing.assert_allclose(tangent(t, warmup), wanted, rtol=1e-5, atol=1e-7)


def test_continuous_loss_and_gradient(x64):
    """-2/d of the normalised tangent times the derivative of F; the value is the mean square of that tangent."""
    x0, noise = example()
    flow, t, mask = fs.Flow(Net(), LINEAR, predictions.Velocity()), jnp.asarray(0.4), jnp.array([True, False, True])
    std = 0.6

    def output(flow):
        """F, of noise and data as the flow has them."""
        x_t = LINEAR.interpolate(t, x0, noise)
        data, eps = flow.denoised(t, x_t), flow.noise(t, x_t)
        return ((1 - t) * std**2 * eps - t * data) / (std * jnp.sqrt(t**2 + ((1 - t) * std) ** 2))

    for c in (0.1, 2.0, None):
        loss = losses.ContinuousConsistency(data_std=std, normalisation=c, warmup=0.8)
        g = jnp.where(mask, loss.tangent(flow, x0, t=t, noise=noise), 0)
        g = g if c is None else g / (jnp.linalg.norm(g) + c)
        value, gradient = eqx.filter_value_and_grad(
            lambda flow, loss=loss: loss.one(flow, x0, t=t, noise=noise, mask=mask)
        )(flow)
        np.testing.assert_allclose(value, jnp.sum(g**2) / 2, rtol=1e-10)
        wanted = eqx.filter_grad(lambda flow, g=g: -2 / 2 * jnp.sum(g * output(flow)))(flow)
        np.testing.assert_allclose(gradient.network.matrix, wanted.network.matrix, rtol=1e-8)
        assert float(jnp.abs(wanted.network.matrix).max()) > 1e-3


def test_continuous_is_finite_at_the_ends_and_spares_the_teacher():
    x0, noise = example()

    @eqx.filter_jit
    def gradients(flow, loss, t):
        def value(both):
            return both[1].one(both[0], x0, t=t, noise=noise)

        return eqx.filter_value_and_grad(value)((flow, loss))

    trig = fs.Flow(Net(), TRIG, predictions.V())
    teacher = fs.Flow(Net(1), TRIG, predictions.V())
    loss = losses.ContinuousConsistency(warmup=0.5, teacher=teacher)
    flat = losses.ContinuousConsistency(warmup=0.5, data_std=0.7)
    level = fs.preconditioning.angle
    cases = ((trig, loss), (preconditioned(TRIG, None, fs.EDMPreconditioner, level), flat), (preconditioned(EDM), flat))
    for flow, loss in cases:
        for t in (flow.path.t_data, 0.5, flow.path.t_noise):
            value, (of_flow, of_loss) = gradients(flow, loss, jnp.asarray(t, float))
            assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_flow))
            # What is left is the derivative in c: the tangent is normalised, then held.
            assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(of_loss))
    assert float(jnp.abs(gradients(*cases[0], jnp.asarray(0.5))[1][0].network.matrix).max()) > 1e-3


def test_a_batch_in_continuous_time_is_its_examples():
    flow, x0 = fs.Flow(Net(), TRIG, predictions.V()), jax.random.normal(KEY, (8, 3))
    loss = losses.ContinuousConsistency()
    value, aux = eqx.filter_jit(loss)(flow, x0, key=KEY)
    t, noise = numpy_noise_and_times(loss, flow, x0)
    one = jax.jit(lambda x, t, noise: loss.one(flow, x, t=t, noise=noise))
    terms = [float(one(*row)) for row in zip(x0, t, jnp.asarray(noise), strict=True)]
    np.testing.assert_allclose(aux.losses, terms, rtol=1e-4)
    np.testing.assert_allclose(value, np.mean(terms), rtol=1e-4)


# --- in training ------------------------------------------------------------------------------------


def last(states):
    """The last of them."""
    *_, state = states
    return state


def test_stages_go_on_without_tracing_again():
    traces = []

    def network(t, x, args, *, key=None):
        traces.append(None)
        return jnp.tanh(x)

    class Counted(eqx.Module):
        scale: jax.Array

        def __call__(self, t, x, args, *, key=None):
            return self.scale * network(t, x, args)

    flow = fs.Flow(Counted(jnp.ones(3)), TRIG, predictions.V())
    batches = fs.data.Batches(jax.random.normal(KEY, (8, 3)), batch_size=4, key=KEY)
    optimiser = optax.sgd(1e-2)
    kinds = (
        lambda p: losses.Consistency(times.Tightening(8 * p)),
        lambda p: losses.Consistency(times.GridNeighbours(times.doubling_points(p))),
        lambda p: losses.ContinuousConsistency(warmup=p),
    )
    for kind in kinds:
        state, counts, scales = flow, [], []
        for stage in range(3):
            key = KEY if stage == 0 else None
            settings = {"steps": 2 * (stage + 1), "every": 2, "key": key, "progress": False}
            state = last(fs.training.fit(kind(stage / 2), state, batches, optimiser, **settings))
            counts.append(len(traces))
            scales.append(state.flow.network.scale)
        assert counts[0] == counts[2] and int(state.step) == 6
        assert all(np.isfinite(s).all() for s in scales) and (scales[0] != scales[2]).any()


def test_consistency_training_reaches_the_exact_map():
    """A linear student of the shape of the exact map of N(0, 0.5^2): x_0 is 0.5/sqrt(sigma^2 + 0.25) x on EDM."""

    class Gain(eqx.Module):
        table: jax.Array

        def __call__(self, t, x, args, *, key=None):
            # Of the angle of the noise level, from 0 to pi/2; F of the preconditioned flow is a multiple of c_in x.
            return jnp.polyval(self.table, t) * x

    path = paths.EDM(t_noise=10.0)
    flow = fs.Flow(
        Gain(jnp.zeros(6)),
        path,
        predictions.Data(),
        preconditioner=fs.ConsistencyPreconditioner(0.5, noise_level=fs.preconditioning.angle),
    )
    x0 = 0.5 * jax.random.normal(KEY, (5_000, 1))
    state = flow
    for stage in range(4):
        fit = fs.training.fit(
            losses.Consistency(times.Tightening(2 * stage)),
            state,
            fs.data.Batches(x0, batch_size=256, key=KEY),
            optax.adam(1e-2),
            steps=(stage + 1) * 100,
            key=KEY if stage == 0 else None,
            ema=0.99,
            progress=False,
        )
        state = last(fit)
    sigma = jnp.asarray([0.1, 0.5, 2.0, 10.0])
    gain = jax.vmap(state.ema_flow.denoised)(sigma, jnp.ones((4, 1)))[:, 0]
    exact_gain = np.sqrt((0.25 + 0.002**2) / (0.25 + np.asarray(sigma) ** 2))
    mean_gain = 0.25 / (0.25 + np.asarray(sigma) ** 2)
    np.testing.assert_allclose(gain, exact_gain, rtol=0.15)
    # Which is far from E[x_0|x_t] where there is noise.
    assert (exact_gain / mean_gain)[1:].min() > 1.4


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: losses.Consistency(times.Uniform()), TypeError, "times is a Uniform, but wants pairs"),
        (lambda: losses.Consistency(TIGHTENING, teacher=Net()), TypeError, "teacher is a Net"),
        (lambda: losses.Consistency(TIGHTENING, solver=diffrax.Heun), TypeError, "solver is the class Heun"),
        (lambda: losses.Consistency(TIGHTENING, weight=1.0), TypeError, "weight of type float"),
        (lambda: losses.Consistency(TIGHTENING, elementwise=2.0), TypeError, "elementwise of type float"),
        (lambda: losses.ContinuousConsistency(TIGHTENING), TypeError, "times is a Tightening"),
        (lambda: losses.ContinuousConsistency(data_std=0.0), ValueError, "data_std = 0"),
        (lambda: losses.ContinuousConsistency(warmup=1.5), ValueError, "warmup = 1.5"),
        (lambda: losses.ContinuousConsistency(normalisation=-1.0), ValueError, "normalisation = -1"),
        (lambda: times.GridNeighbours(1), ValueError, "points = 1"),
        (lambda: times.GridNeighbours(4.5), ValueError, "points = 4.5"),
        (lambda: times.GridNeighbours(5, Net()), TypeError, "times is a Net"),
        (lambda: times.Tightening(-1), ValueError, "stage = -1"),
        (lambda: times.Tightening(1, q=1.0), ValueError, "q = 1"),
        (lambda: times.Tightening(1, b=0.0), ValueError, "b = 0"),
        (lambda: times.doubling_points(1.5), ValueError, "fraction = 1.5"),
        (lambda: times.doubling_points(0.5, first=20, last=10), ValueError, "first = 20 and last = 10"),
        (lambda: fs.ConsistencyPreconditioner(-1.0), ValueError, "ConsistencyPreconditioner got data_std = -1"),
        (lambda: losses.PseudoHuberNorm(0.0), ValueError, "c = 0"),
    ],
)
def test_bad_fields(make, error, match, untyped):
    with pytest.raises(error, match=match):
        make()


def test_bad_calls(untyped):
    x0, noise = example()
    flow = fs.Flow(Net(), LINEAR, predictions.Velocity())
    loss = losses.Consistency(TIGHTENING)
    with pytest.raises(ValueError, match=r"t = 0.2 and r = 0.5, but wants r <= t"):
        loss.one(flow, x0, t=0.2, r=0.5, noise=noise)
    with pytest.raises(TypeError, match="flow is a Net"):
        loss(Net(), x0[None], key=KEY)
    teacher = fs.Flow(Net(), TRIG, predictions.V())
    for other in (losses.Consistency(TIGHTENING, teacher), losses.ContinuousConsistency(teacher=teacher)):
        with pytest.raises(ValueError, match=r"The teacher is on Trigonometric.*, but the flow on Linear.*OnPath"):
            other(flow, x0[None], key=KEY)


def test_boundary_is_looked_for_behind_guidance():
    """A wrapper does not hide a flow of which f(t_data, x) is not x."""
    flow = preconditioned(EDM, None, fs.EDMPreconditioner)
    guided = fs.guidance.ClassifierFree(flow, 2.0, jnp.asarray(0.0))
    with pytest.raises(ValueError, match="A consistency function is"):
        losses.consistency.check_boundary(guided)


def test_features_of_trained_evaluations_alone():
    """What the network hands out arrives once, from the evaluation at t: through a derivative, not of the target."""

    class Both(eqx.Module):
        net: Net

        def __call__(self, t, x, args=None, *, key=None):
            return self.net(t, x, args), t

    flow = fs.Flow(fs.nn.Features(Both(Net())), LINEAR, predictions.Velocity())
    x0 = jax.random.normal(KEY, (5, 3))
    for loss in (losses.ContinuousConsistency(), losses.Consistency(TIGHTENING)):
        _, aux = eqx.filter_jit(lambda loss, flow: loss(flow, x0, key=KEY))(loss, flow)
        assert len(aux.features) == 1
        np.testing.assert_array_equal(aux.features[0], aux.t)
