"""Log-densities against closed forms, on vectors and images; Hutchinson's bias; gradients by finite differences."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import gaussian_flow_map

import flowsolve as fs

TIGHT = {"controller": diffrax.PIDController(rtol=1e-5, atol=1e-5), "solver": diffrax.Dopri8()}
PATHS = {
    "linear": fs.paths.Linear(),
    "vp": fs.paths.VP(),
    "edm": fs.paths.EDM(),
    "trigonometric": fs.paths.Trigonometric(),
}


def covariance(dim):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    return 0.3 * root @ root.T + 0.2 * np.eye(dim)


def oracle(shape):
    dim = int(np.prod(shape))
    mean = np.linspace(-0.5, 0.5, dim).reshape(shape)
    return fs.testing.Gaussian(jnp.asarray(mean, float), covariance(dim)), mean.ravel(), covariance(dim)


def gaussian_log_density(x, mean, covariance):
    difference = np.asarray(x, np.float64).ravel() - mean
    return -0.5 * (
        difference @ np.linalg.solve(covariance, difference)
        + np.linalg.slogdet(covariance)[1]
        + len(mean) * np.log(2 * np.pi)
    )


def flow_density(path, mean, covariance):
    """The law of the flow started from the path's prior N(0, sigma^2): affine in the noise, so Gaussian."""
    dim = len(mean)
    zero = gaussian_flow_map(path, mean, covariance, path.t_noise, path.t_data, np.zeros(dim))
    columns = [
        gaussian_flow_map(path, mean, covariance, path.t_noise, path.t_data, basis) - zero for basis in np.eye(dim)
    ]
    matrix = float(path.sigma(path.t_noise)) * np.stack(columns, 1)
    return zero, matrix @ matrix.T


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)], ids=["vector", "image"])
def test_log_prob_is_the_flows_own_density(path, shape):
    """Within 1e-3 nats at rtol = atol = 1e-5 of the flow started from the path's prior."""
    path = PATHS[path]
    data, mean, cov = oracle(shape)
    flow = data.flow(path, fs.predictions.Velocity())
    x = jax.vmap(data.sample_data)(jax.random.split(jax.random.key(1), 4))
    got = jax.vmap(lambda x: fs.log_prob(flow, x, throw=False, **TIGHT))(x)
    own = [gaussian_log_density(one, *flow_density(path, mean, cov)) for one in x]
    np.testing.assert_allclose(got, own, rtol=0, atol=1e-3)
    # The data's own marginal at t_data: the same where the prior is exact, close to it on VP and EDM.
    alpha, sigma = float(path.alpha(path.t_data)), float(path.sigma(path.t_data))
    marginal = [gaussian_log_density(one, alpha * mean, alpha**2 * cov + sigma**2 * np.eye(len(mean))) for one in x]
    exact_prior = isinstance(path, fs.paths.Linear | fs.paths.Trigonometric)
    np.testing.assert_allclose(got, marginal, rtol=0, atol=1e-3 if exact_prior else 0.05)


@pytest.mark.parametrize("prediction", ["Velocity", "Noise"])
def test_mixture_log_prob(prediction):
    """A density that is no Gaussian, on VP in 2-d; the prior's own error is stated by the tolerance."""
    means = np.array([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]])
    data = fs.testing.GaussianMixture(np.array([0.5, 0.3, 0.2]), means, np.array([0.1, 0.2, 0.15]))
    path = fs.paths.VP()
    flow = data.flow(path, getattr(fs.predictions, prediction)())
    x = jnp.array([[-1.0, 0.2], [0.5, 0.1], [0.1, -1.1]])
    got = jax.vmap(lambda x: fs.log_prob(flow, x, throw=False, **TIGHT))(x)
    exact = jax.vmap(lambda x: data.log_prob(path, path.t_data, x))(x)
    np.testing.assert_allclose(got, exact, rtol=0, atol=0.02)


class Along(fs.divergence.AbstractDivergence):
    """The quadratic form v^T J v of one given direction, to read a solve's integrated Jacobian off."""

    vector: jax.Array
    random = False

    def probes(self, like, key):
        return self.vector

    def apply(self, field, x, probes):
        value, derivative = jax.linearize(field, x)
        return value, probes @ derivative(probes)


def test_hutchinson_is_unbiased_with_the_variance_of_its_probes():
    """Mean within 4 standard errors, variance within 10 % of the closed form, for both distributions and 1 or 3 probes.

    With M the Jacobian integrated along the solve, xi^T M xi has mean tr M and, S the symmetric part of M, variance
    2 |S|^2 for Gaussian probes and 2 (|S|^2 - |diag S|^2) for signs, divided by the number of probes.
    """
    data, _, _ = oracle((5,))
    flow = data.flow(fs.paths.Linear(), fs.predictions.Velocity())
    x = jnp.array([0.3, -0.1, 0.4, 0.0, 0.2])
    settings = {"solver": diffrax.Midpoint(), "grid": fs.grids.Uniform(12), "throw": False}
    exact = float(fs.log_prob(flow, x, **settings))
    along = jax.jit(jax.vmap(lambda v: fs.log_prob(flow, x, divergence=Along(v), **settings)))
    units = np.eye(5)
    pairs = (units[:, None] + units[None]).reshape(-1, 5)
    forms = np.asarray(along(jnp.asarray(np.concatenate([np.zeros((1, 5)), units, pairs]), jnp.float32)), np.float64)
    forms = forms - forms[0]
    single = forms[1:6]
    symmetric = (forms[6:].reshape(5, 5) - single[:, None] - single[None]) / 2
    for distribution in (fs.divergence.rademacher, fs.divergence.gaussian):
        total = np.sum(symmetric**2) - (distribution is fs.divergence.rademacher) * np.sum(np.diag(symmetric) ** 2)
        for probes in (1, 3):
            rule = fs.divergence.Hutchinson(probes, distribution)
            estimate = jax.jit(jax.vmap(lambda k, rule=rule: fs.log_prob(flow, x, divergence=rule, key=k, **settings)))
            draws = np.asarray(estimate(jax.random.split(jax.random.key(2), 8000)), np.float64)
            assert abs(draws.mean() - exact) < 4 * draws.std() / np.sqrt(len(draws))
            np.testing.assert_allclose(draws.var(), 2 * total / probes, rtol=0.1)


@pytest.mark.parametrize("divergence", ["exact", "exact_batched"])
def test_divergence_of_a_linear_field(divergence):
    """A known trace, of a matrix and of a field on a pytree."""
    rng = np.random.default_rng(1)
    matrix = jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)
    rule = fs.divergence.Exact(4 if divergence == "exact_batched" else None)
    x = jnp.arange(6.0)
    value, trace = rule.apply(lambda x: matrix @ x, x, rule.probes(x, None))
    np.testing.assert_allclose(value, matrix @ x, rtol=1e-5)
    np.testing.assert_allclose(trace, np.trace(matrix), rtol=1e-5)
    tree = {"a": jnp.ones(2), "b": jnp.ones((2, 2))}
    field = lambda x: {"a": 3 * x["a"] + jnp.sum(x["b"]), "b": x["b"] ** 2}  # noqa: E731
    np.testing.assert_allclose(rule.apply(field, tree, None)[1], 3 * 2 + 2 * 4, rtol=1e-6)


@pytest.mark.quick
def test_hutchinson_probes_are_fixed_for_a_solve_and_averaged():
    """xi^T A xi, its mean over probes, with the probes given: not redrawn and divided by their number."""
    matrix = jnp.asarray(np.random.default_rng(3).normal(size=(4, 4)), jnp.float32)
    rule = fs.divergence.Hutchinson(5, fs.divergence.gaussian)
    probes = rule.probes(jnp.zeros(4), jax.random.key(0))
    assert probes.shape == (5, 4)
    _, estimate = rule.apply(lambda x: matrix @ x, jnp.zeros(4), probes)
    np.testing.assert_allclose(estimate, np.mean([p @ matrix @ p for p in np.asarray(probes)]), rtol=1e-5)


def test_gradient_agrees_with_finite_differences(x64):
    """In the data and in a parameter of the network."""

    @eqx.filter_jit
    def value(x, scale):
        network = lambda t, x, args, *, key=None: jnp.tanh(scale * x) * (1 - t) - x[::-1]  # noqa: E731
        flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
        return fs.log_prob(flow, x, solver=diffrax.Heun(), grid=fs.grids.Uniform(8), throw=False)

    x, scale, step = jnp.array([0.3, -0.8, 0.1]), jnp.asarray(0.7), 1e-5
    on_x, on_scale = jax.grad(value, argnums=(0, 1))(x, scale)
    for i in range(3):
        basis = step * jnp.eye(3)[i]
        np.testing.assert_allclose(on_x[i], (value(x + basis, scale) - value(x - basis, scale)) / (2 * step), rtol=1e-6)
    difference = (value(x, scale + step) - value(x, scale - step)) / (2 * step)
    np.testing.assert_allclose(on_scale, difference, rtol=1e-6)


def test_gradient_is_the_score_on_the_oracle():
    """grad ln p at the data end, through an adaptive solve."""
    data, mean, cov = oracle((5,))
    flow = data.flow(fs.paths.Linear(), fs.predictions.Velocity())
    x = jnp.array([0.3, -0.1, 0.4, 0.0, 0.2])
    got = jax.grad(lambda x: fs.log_prob(flow, x, throw=False, **TIGHT))(x)
    np.testing.assert_allclose(got, -np.linalg.solve(cov, np.asarray(x) - mean), rtol=2e-3, atol=2e-3)


def test_sample_and_log_prob_agrees_with_log_prob_of_the_sample():
    data, _, _ = oracle((5,))
    flow = data.flow(fs.paths.VP(), fs.predictions.Velocity())
    keys = jax.random.split(jax.random.key(4), 3)
    x, log_p = jax.vmap(lambda key: fs.sample_and_log_prob(flow, data.like, key=key, throw=False, **TIGHT))(keys)
    again = jax.vmap(lambda x: fs.log_prob(flow, x, throw=False, **TIGHT))(x)
    np.testing.assert_allclose(log_p, again, atol=2e-3)


def test_the_log_density_stays_out_of_the_error_norm():
    """The steps of the augmented solve are those of the state alone, however large the divergence."""
    data, _, _ = oracle((5,))
    flow = data.flow(fs.paths.Linear(), fs.predictions.Velocity())
    x = jnp.array([0.3, -0.1, 0.4, 0.0, 0.2])
    calls = {}
    for name in ("encode", "log_prob"):
        count = 0

        def bump():
            nonlocal count
            count += 1

        def network(t, x, args, *, key=None):
            jax.debug.callback(bump)
            return flow.output(t, x, args)

        counted = fs.Flow(network, flow.path, flow.prediction)
        getattr(fs, name)(counted, x, **TIGHT)
        jax.effects_barrier()
        calls[name] = count
    assert calls["encode"] == calls["log_prob"]


def test_log_prob_from_a_prior_below_t_noise():
    """With the data's moments the prior at t_end is exact, so the density is too."""
    data = fs.testing.Gaussian.isotropic(jnp.full((3,), 0.3), 0.5)
    flow = data.flow(fs.paths.Linear(), fs.predictions.Velocity())
    settings = {**TIGHT, "t_end": 0.6, "data_mean": 0.3, "data_std": 0.5, "throw": False}
    x = jnp.array([0.1, 0.5, -0.4])
    np.testing.assert_allclose(fs.log_prob(flow, x, **settings), data.log_prob(flow.path, 0.0, x), atol=1e-3)


@pytest.mark.quick
def test_bits_per_dim():
    """A uniform density over 256 levels scaled to [-1, 1] costs exactly 8 bits."""
    dim = 12
    uniform = jnp.asarray(-dim * np.log(2.0))
    np.testing.assert_allclose(fs.bits_per_dim(uniform, dim, bin_width=2 / 256), 8.0, rtol=1e-6)
    standard = -0.5 * dim * np.log(2 * np.pi * np.e)
    np.testing.assert_allclose(fs.bits_per_dim(jnp.asarray(standard), dim), 0.5 * np.log2(2 * np.pi * np.e), rtol=1e-6)


def test_no_retrace():
    # Diffrax checks its terms under standard promotion: under the tests' strict one JAX would trace once more.
    with jax.numpy_dtype_promotion("standard"):
        _another_tolerance()


def _another_tolerance():
    class Network(eqx.Module):
        scale: jax.Array

        def __call__(self, t, x, args, *, key=None):
            return -self.scale * x

    network = eqx.debug.assert_max_traces(Network(jnp.asarray(1.0)), max_traces=1)
    flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
    for tolerance in (1e-3, 1e-2):
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        fs.log_prob(flow, jnp.full((3,), tolerance), solver=diffrax.Tsit5(), controller=controller)
