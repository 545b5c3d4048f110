"""Editing: round trips and their orders, inversion to rounding, laws of SDEdit and masks, interpolation."""

import itertools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowsolve as fs
from flowsolve import editing

KEY = jax.random.key(5)
NULL = jnp.asarray(-1)
MIXTURE = fs.testing.GaussianMixture(np.ones(3), np.array([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]]), 0.2)
LABELS = jnp.arange(12) % 3
# Half of the examples without guidance beyond the condition, half with.
SCALES = jnp.repeat(jnp.asarray([1.0, 3.0]), 6)
MEAN, COVARIANCE = np.array([0.4, -0.7]), np.array([[0.5, 0.3], [0.3, 0.4]])
GAUSSIAN = fs.testing.Gaussian(jnp.asarray(MEAN, jnp.float32), COVARIANCE)
FLOW = GAUSSIAN.flow(fs.paths.Linear(), fs.predictions.Velocity())


def guided(oracle, scale, path=fs.paths.Linear()):
    return fs.guidance.ClassifierFree(oracle.flow(path, fs.predictions.Velocity()), scale, null=NULL)


def data(oracle, labels=LABELS):
    return jax.vmap(oracle.sample_data)(jax.random.split(KEY, len(labels)), labels)


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T


# --- encode and decode ----------------------------------------------------------------------------------------------


def test_adaptive_round_trip_with_and_without_guidance():
    tight = {"solver": diffrax.Tsit5(), "controller": diffrax.PIDController(rtol=1e-6, atol=1e-6)}

    def round_trip(x, label, scale):
        flow = guided(MIXTURE, scale)
        return fs.solve(flow, fs.encode(flow, x, label, **tight), label, **tight).ys[-1]

    x = data(MIXTURE)
    back = fs.batched(round_trip)(x, LABELS, SCALES)
    error = jnp.linalg.norm(back - x, axis=1) / jnp.linalg.norm(x, axis=1)
    assert error.max() < 1e-4


@pytest.mark.parametrize(
    ("solver", "order", "round_trip_order"),
    [
        (fs.solvers.DDIM(), 1, 1),
        # The leading errors of a step forth and of one back have opposite signs where the order is even.
        (diffrax.Heun(), 2, 3),
        # But for its step from alpha = 0, which is Euler's.
        (fs.solvers.EDMHeun(), 2, 2),
        (diffrax.Bosh3(), 3, 3),
        (fs.solvers.AdamsBashforth(2), 2, 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, diffrax.AbstractSolver) else None,
)
def test_encoding_converges_at_the_solvers_order(x64, solver, order, round_trip_order):
    """The encoding against the closed form, and the round trip against the data; Gaussian, correlated."""
    flow = fs.testing.Gaussian(jnp.asarray(MEAN), COVARIANCE).flow(fs.paths.Linear(), fs.predictions.Velocity())
    x, low = jnp.asarray([[0.9, -0.2], [-0.5, 0.3]]), 0.1
    # x_t - alpha m is scaled by the root of its own covariance.
    scaled = (0.9**2 * COVARIANCE + low**2 * np.eye(2)), np.eye(2)
    exact = (np.asarray(x) - 0.9 * MEAN) @ np.linalg.inv(root(scaled[0])).T
    errors = []
    for steps in (24, 48):
        settings = {"solver": solver, "grid": fs.grids.Uniform(steps)}

        @jax.vmap
        def both(x, settings=settings):
            noise = fs.encode(flow, x, t_start=low, **settings)
            return noise, fs.solve(flow, noise, t_end=low, **settings).ys[-1]

        noise, back = both(x)
        errors.append([np.abs(noise - exact).max(), np.abs(back - x).max()])
    measured = np.log2(np.asarray(errors[0]) / errors[1])
    np.testing.assert_allclose(measured, [order, round_trip_order], atol=0.3)


# --- inversion ------------------------------------------------------------------------------------------------------

INVERTED = {
    "ddim": (fs.solvers.DDIM(), fs.paths.Linear(), 10),
    "ddim_edm": (fs.solvers.DDIM(), fs.paths.EDM(), 30),
    "edm_heun": (fs.solvers.EDMHeun(), fs.paths.Linear(), 8),
    "singlestep_3": (fs.solvers.DPMSolverPPSinglestep(3), fs.paths.VP(), 10),
    "heun": (diffrax.Heun(), fs.paths.Linear(), 8),
    "tsit5": (diffrax.Tsit5(), fs.paths.Linear(), 8),
}


@pytest.mark.parametrize("name", INVERTED)
def test_inverse_of_a_coarse_solve_to_rounding(name):
    """With guidance and without; where the encoding by the same steps is percents off."""
    solver, path, steps = INVERTED[name]
    grid = fs.grids.Karras(steps) if isinstance(path, fs.paths.EDM) else fs.grids.Uniform(steps)

    def round_trip(x, label, scale):
        flow = guided(MIXTURE, scale, path)
        noise = editing.invert(flow, x, label, solver=solver, grid=grid)
        return noise, fs.solve(flow, noise, label, solver=solver, grid=grid).ys[-1]

    x = data(MIXTURE)
    noise, back = fs.batched(round_trip)(x, LABELS, SCALES)
    np.testing.assert_allclose(back, x, atol=4e-5)
    np.testing.assert_allclose(back[:6], x[:6], atol=2e-5)
    assert 0.5 < jnp.std(noise[:6]) / path.start()[1] < 1.6


def test_inverse_of_ddim_in_closed_form(x64):
    """On a Gaussian a DDIM step is affine: its inverse by NumPy, from the last step to the first; and a pytree."""
    mean, std, steps = 0.3, 0.6, 6
    like = {"a": jnp.full((2,), mean), "b": jnp.full((1, 1), mean)}
    flow = fs.testing.Gaussian.isotropic(like, std).flow(fs.paths.Linear(), fs.predictions.Velocity())
    x_data = {"a": jnp.asarray([0.9, -1.1]), "b": jnp.asarray([[2.0]])}
    x = np.array([0.9, -1.1, 2.0])
    times = np.linspace(1, 0, steps + 1)
    for t, s in list(itertools.pairwise(times))[::-1]:
        gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
        # x_s = (s/t) x + ((1 - s) - (1 - t) s/t) (m + gain (x - (1 - t) m)).
        weight = (1 - s) - (1 - t) * s / t
        x = (x - weight * mean * (1 - gain * (1 - t))) / (s / t + weight * gain)
    grid = fs.grids.Uniform(steps)
    found = editing.invert(flow, x_data, solver=fs.solvers.DDIM(), grid=grid, tolerance=1e-14)
    np.testing.assert_allclose(np.concatenate([found["a"], found["b"][0]]), x, rtol=1e-12)


def test_derivatives_of_an_inversion_against_finite_differences(x64):
    """In the data, in a parameter of the flow and in the start, of both modes; with guidance."""
    mixture = fs.testing.GaussianMixture(np.ones(2), np.array([[-1.0, 0.0], [1.0, 0.5]]), 0.4)
    label = jnp.asarray(1, NULL.dtype)

    def inverted(given):
        return editing.invert(
            guided(mixture, given[2]),
            given[:2],
            label,
            solver=fs.solvers.DDIM(),
            grid=fs.grids.Uniform(4),
            t_start=given[3],
            t_end=0.1,
            tolerance=1e-14,
        )

    at, step = jnp.asarray([0.9, -0.2, 1.8, 0.9]), 1e-5
    moved = jax.jit(jax.vmap(inverted))(at[None] + step * jnp.concatenate([jnp.eye(4), -jnp.eye(4)]))
    exact = (moved[:4] - moved[4:]).T / (2 * step)
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(mode(inverted))(at), exact, rtol=1e-6)


def test_derivatives_of_an_inversion_where_the_first_guess_is_exact():
    """The origin is inverted to itself without an iteration. Its derivative is the closed form's all the same."""
    std, steps = 0.5, 4
    flow = fs.testing.Gaussian(jnp.zeros(2), std**2).flow(fs.paths.Linear(), fs.predictions.Velocity())
    slope = 1.0
    for t, s in itertools.pairwise(np.linspace(1, 0.1, steps + 1)):
        gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
        slope /= s / t + ((1 - s) - (1 - t) * s / t) * gain
    settings = {"solver": fs.solvers.DDIM(), "grid": fs.grids.Uniform(steps), "t_end": 0.1}
    found = jax.jacfwd(lambda x: editing.invert(flow, x, **settings))(jnp.zeros(2))
    np.testing.assert_allclose(found, slope * np.eye(2), rtol=1e-5, atol=1e-6)


def test_acceleration_converges_where_the_plain_iteration_has_not():
    x, settings = data(MIXTURE), {"solver": fs.solvers.DDIM(), "grid": fs.grids.Uniform(10), "throw": False}
    flow = guided(MIXTURE, 2.0)
    plain, accelerated = (
        fs.batched(eqx.Partial(editing.invert, memory=memory, iterations=12, **settings))(flow, x, LABELS)
        for memory in (0, 4)
    )
    given_up = np.isnan(plain).any(axis=1)
    assert given_up.sum() > 3 and np.isfinite(accelerated).all()
    np.testing.assert_allclose(accelerated[~given_up], plain[~given_up], atol=1e-3)


def test_an_inversion_that_is_impossible_fails_alone():
    """The last step ends at the denoised data, which of a mixture of two points lies between the two."""
    points = fs.testing.Empirical(np.array([[-1.0], [1.0]]))
    flow = points.flow(fs.paths.Linear(), fs.predictions.Velocity())
    settings = {"solver": fs.solvers.DDIM(), "grid": fs.grids.Uniform(1), "t_start": 0.5}
    invert = fs.batched(eqx.Partial(editing.invert, throw=False, **settings))
    found = invert(flow, jnp.asarray([[0.5], [1.5]]))
    # D = tanh(alpha x/sigma^2) = tanh(2 x).
    np.testing.assert_allclose(found[0], np.arctanh(0.5) / 2, rtol=1e-4)
    assert np.isnan(found[1])
    with pytest.raises(RuntimeError, match="1 of 2 examples, the first is number 1"):
        fs.batched(eqx.Partial(editing.invert, **settings))(flow, jnp.asarray([[0.5], [1.5]]))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": fs.solvers.UniPC(2)}, "UniPC, whose step is no function of the state alone"),
        ({"solver": diffrax.ReversibleHeun()}, "ReversibleHeun, whose step"),
        ({"solver": fs.solvers.DDIM(1.0)}, "DDIM draws noise"),
        ({"tolerance": 0.0}, "tolerance = 0, but wants it > 0"),
        ({"iterations": 0}, "iterations = 0, but wants an integer of at least 1"),
        ({"t_start": 0.2, "t_end": 0.5}, "must fall"),
    ],
)
def test_bad_inversions_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        editing.invert(FLOW, jnp.zeros(2), **options)


# --- SDEdit ---------------------------------------------------------------------------------------------------------

NUM = 4_000
STARTS = jnp.asarray([0.15, 0.5, 0.95])


def sdedit_moments(guides, **options):
    """Mean (3, 2) and covariance (3, 2, 2) of the results, one for each start."""
    one = eqx.Partial(editing.sdedit, **options)

    @jax.jit
    @jax.vmap
    def many(t):
        return jax.vmap(lambda x, key: one(FLOW, x, t_start=t, key=key))(guides, jax.random.split(KEY, NUM))

    x = np.asarray(many(STARTS), np.float64)
    centred = x - x.mean(axis=1, keepdims=True)
    return x.mean(axis=1), np.einsum("tni,tnj->tij", centred, centred) / NUM


def assert_moments(found, mean, covariance):
    """Within 4.5 standard errors, those of a Gaussian."""
    variances = np.einsum("...ii->...i", covariance)
    assert np.all(np.abs(found[0] - mean) < 4.5 * np.sqrt(variances / NUM))
    products = variances[..., :, None] * variances[..., None, :]
    assert np.all(np.abs(found[1] - covariance) < 4.5 * np.sqrt((products + covariance**2) / NUM))


@pytest.mark.parametrize(
    "options",
    [
        {"solver": diffrax.Heun(), "grid": fs.grids.Uniform(20)},
        {"solver": fs.solvers.SDEDPMSolverPP(2), "grid": fs.grids.Uniform(40)},
    ],
    ids=["flow", "sde"],
)
def test_sdedit_of_data_is_data(options):
    guides = jax.vmap(GAUSSIAN.sample_data)(jax.random.split(jax.random.key(8), NUM))
    found = sdedit_moments(guides, **options)
    assert_moments(found, np.broadcast_to(MEAN, (3, 2)), np.broadcast_to(COVARIANCE, (3, 2, 2)))


def test_sdedit_of_one_guide_in_closed_form():
    """N(m + L alpha (g - m), sigma^2 L L^T), L = C^(1/2) S^(-1/2): near the guide from small t, far from late t."""
    guide = np.array([2.0, 1.0])
    guides = jnp.broadcast_to(jnp.asarray(guide, jnp.float32), (NUM, 2))
    found = sdedit_moments(guides, solver=diffrax.Heun(), grid=fs.grids.Uniform(20))
    means, covariances = [], []
    for t in np.asarray(STARTS, np.float64):
        step = root(COVARIANCE) @ np.linalg.inv(root((1 - t) ** 2 * COVARIANCE + t**2 * np.eye(2)))
        means.append(MEAN + (1 - t) * step @ (guide - MEAN))
        covariances.append(t**2 * step @ step.T)
    assert_moments(found, np.stack(means), np.stack(covariances))
    distance = np.linalg.norm(found[0] - guide, axis=1)
    assert distance[0] < 0.2 and np.all(np.diff(distance) > 0.5)


# --- masks ----------------------------------------------------------------------------------------------------------

KEEP = jnp.asarray([True, False])


def test_known_elements_stay_on_their_path_and_the_others_follow_the_flow():
    """An explicit Runge-Kutta loop in NumPy over the unknown element, with the known one put on its line."""
    guide, noise, steps = np.array([1.3, -9.0]), np.array([0.4, -0.6]), 400

    def velocity(t, x):
        gain = np.linalg.inv((1 - t) ** 2 * COVARIANCE + t**2 * np.eye(2))
        rest = gain @ (x - (1 - t) * MEAN)
        return (t * rest - MEAN - (1 - t) * COVARIANCE @ rest)[1]

    def line(t):
        return (1 - t) * guide[0] + t * noise[0]

    times, y = np.linspace(0.9, 0.1, steps + 1), noise[1]
    for t, s in itertools.pairwise(times):
        slope, middle = s - t, (s + t) / 2
        k1 = velocity(t, np.array([line(t), y]))
        k2 = velocity(middle, np.array([line(middle), y + slope * k1 / 2]))
        k3 = velocity(middle, np.array([line(middle), y + slope * k2 / 2]))
        k4 = velocity(s, np.array([line(s), y + slope * k3]))
        y += slope * (k1 + 2 * k2 + 2 * k3 + k4) / 6
    flow = editing.Masked(FLOW, *(jnp.asarray(v, jnp.float32) for v in (guide, noise)), KEEP)
    start = jnp.asarray([line(0.9), noise[1]], jnp.float32)
    for options in (
        {"solver": diffrax.Tsit5(), "controller": diffrax.PIDController(rtol=1e-5, atol=1e-5)},
        {"solver": fs.solvers.EDMHeun(), "grid": fs.grids.Uniform(60)},
    ):
        found = fs.solve(flow, start, t_start=0.9, t_end=0.1, **options).ys[-1]
        np.testing.assert_allclose(found, [line(0.1), y], atol=2e-4)
    # Down to sigma = 0, which Heun evaluates: there the state says nothing of the noise.
    end = fs.solve(flow, start, t_start=0.9, solver=diffrax.Heun(), grid=fs.grids.Uniform(5)).ys[-1]
    np.testing.assert_allclose(end[0], guide[0], atol=1e-5)
    up = fs.encode(flow, end, solver=diffrax.Heun(), grid=fs.grids.Uniform(5), t_end=0.9)
    np.testing.assert_allclose(up[0], line(0.9), atol=1e-5)


def test_masked_sdedit_keeps_the_known_and_its_noise_has_the_level_of_each_time():
    """Under the reverse SDE the known element at t is N(alpha x, sigma^2); an independent unknown one is data."""
    independent = fs.testing.Gaussian(jnp.asarray(MEAN, jnp.float32), np.array([0.5, 0.4]))
    flow = independent.flow(fs.paths.Linear(), fs.predictions.Velocity())
    guide = jnp.asarray([1.3, 0.0])
    sde = {"solver": fs.solvers.SDEDPMSolverPP(2), "grid": fs.grids.Uniform(30), "t_start": 1.0}
    keys = jax.random.split(KEY, NUM)

    @jax.jit
    @jax.vmap
    def both(key):
        end = editing.sdedit(flow, guide, None, KEEP, key=key, **sde)
        return end, editing.sdedit(flow, guide, None, KEEP, key=key, t_end=0.3, **sde)

    end, middle = both(keys)
    np.testing.assert_array_equal(end[:, 0], jnp.full(NUM, 1.3))
    for x, mean, variance in (
        (middle[:, 0], 0.7 * 1.3, 0.3**2),
        (middle[:, 1], 0.7 * MEAN[1], 0.7**2 * 0.4 + 0.3**2),
        (end[:, 1], MEAN[1], 0.4),
    ):
        assert abs(x.mean() - mean) < 4.5 * np.sqrt(variance / NUM)
        # The last step onto the data leaves a weak error of the solver besides.
        assert abs(x.var() - variance) < 4.5 * np.sqrt(2 / NUM) * variance + 0.01


@pytest.mark.quick
def test_bad_masks_are_named():
    with pytest.raises(TypeError, match="wants booleans"):
        editing.Masked(FLOW, jnp.zeros(2), jnp.zeros(2), jnp.ones(2))
    with pytest.raises(ValueError, match="broadcast the mask"):
        editing.Masked(FLOW, jnp.zeros(2), jnp.zeros(2), jnp.ones((2, 1), bool))
    with pytest.raises(ValueError, match="outside Linear"):
        editing.sdedit(FLOW, jnp.zeros(2), t_start=1.5, key=KEY)


# --- interpolation --------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_spherical_interpolation_walks_a_great_arc():
    """In the plane of a and b by equal angles, over all leaves of an example together."""
    a, b = {"u": jnp.asarray([2.0, 0.0]), "v": jnp.zeros(1)}, {"u": jnp.zeros(2), "v": jnp.asarray([2.0])}
    for w in (0.0, 0.25, 0.5, 1.0, 1.5):
        found = editing.spherical_interpolation(a, b, w)
        angle = w * np.pi / 2
        np.testing.assert_allclose(found["u"], [2 * np.cos(angle), 0.0], atol=1e-6)
        np.testing.assert_allclose(found["v"], [2 * np.sin(angle)], atol=1e-6)
    # Of unlike norms: the formula itself, in float64.
    a, b, w = np.array([1.0, 2.0, -0.5]), np.array([0.3, -1.0, 4.0]), 0.3
    angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    want = (np.sin((1 - w) * angle) * a + np.sin(w * angle) * b) / np.sin(angle)
    found = editing.spherical_interpolation(*(jnp.asarray(v, jnp.float32) for v in (a, b)), w)
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.quick
def test_spherical_interpolation_of_near_and_of_equal_states():
    a = jnp.asarray([3.0, 4.0])
    np.testing.assert_allclose(editing.spherical_interpolation(a, a, 0.3), a, rtol=1e-6)
    b = jnp.asarray([3.0, 4.001])
    np.testing.assert_allclose(editing.spherical_interpolation(a, b, 0.5), (a + b) / 2, rtol=1e-6)
    gradient = jax.grad(lambda a: jnp.sum(editing.spherical_interpolation(a, jax.lax.stop_gradient(a), 0.3)))(a)
    assert np.isfinite(gradient).all()
    for other in (-a, 0 * a):
        with pytest.raises(ValueError, match="zero or opposite"):
            editing.spherical_interpolation(a, other, 0.5)
    with pytest.raises(ValueError, match="two states of the same"):
        editing.linear_interpolation(a, jnp.ones(3), 0.5)


def test_interpolated_noise_is_noise():
    """Linear: exactly normal in two dimensions. Spherical: the squared norm of an example against its expectation."""
    weights = jnp.asarray([0.0, 0.2, 0.5, 0.9])
    a, b = jax.random.normal(KEY, (2, 20_000, 2))
    mixed = jax.vmap(lambda w: jax.vmap(lambda a, b: editing.linear_interpolation(a, b, w))(a, b))(weights)
    for x in np.asarray(mixed, np.float64).reshape(4, -1):
        assert abs(x.mean()) < 4.5 / np.sqrt(x.size) and abs(x.var() - 1) < 4.5 * np.sqrt(2 / x.size)
        assert abs((x**4).mean() - 3) < 4.5 * np.sqrt(96 / x.size)
    a, b = jax.random.normal(KEY, (2, 2_000, 256))
    mixed = jax.vmap(lambda w: jax.vmap(lambda a, b: editing.spherical_interpolation(a, b, w))(a, b))(weights)
    a, b, mixed = (np.asarray(x, np.float64) for x in (a, b, mixed))
    cosine = np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    for w, x in zip(np.asarray(weights, np.float64), mixed, strict=True):
        angle = np.arccos(cosine)
        first, second = np.sin((1 - w) * angle) / np.sin(angle), np.sin(w * angle) / np.sin(angle)
        # E over the norms, which are independent of the angle: E|a|^2 = d, (E|a|)^2 = d - 1/2 to 1e-3.
        want = np.mean(256 * (first**2 + second**2) + 2 * first * second * cosine * 255.5)
        size = np.sum(x**2, axis=1)
        assert abs(size.mean() - want) < 4.5 * size.std() / np.sqrt(2_000)
        assert abs(want / 256 - 1) < 1e-3
