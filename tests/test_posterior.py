"""Sampling under a measurement, against the exact posterior of the oracles and against explicit linear algebra."""

import itertools
import json
import re
import subprocess
import sys

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from members import TARGETS

import flowsolve as fs
from flowsolve import paths, predictions
from flowsolve.particles import _systematic
from flowsolve.posterior import DPS, MMPS, Measurement, Observed, PiGDM

MEAN, COVARIANCE = TARGETS["gaussian"][1][0], TARGETS["gaussian"][2][0]
GAUSSIAN = fs.testing.Gaussian(MEAN, COVARIANCE)
MATRIX, Y, STD = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]], np.float32), np.float32([0.3, -2.0]), 0.2
POSTERIOR = GAUSSIAN.given(MATRIX, Y, STD)


def linear(x):
    return jnp.asarray(MATRIX) @ x


MEASUREMENT = Measurement(linear, Y, std=STD)
# A mixture in the plane, of which one combination is measured: its posterior has two modes.
WEIGHTS, MEANS, VARIANCES = np.array([0.5, 0.3, 0.2]), np.array([[0.0, 0.0], [2.0, -1.0], [-1.5, 1.0]]), [0.2, 0.1, 0.3]
MIXTURE = fs.testing.GaussianMixture(WEIGHTS, MEANS, np.array(VARIANCES))
ROW = np.float32([[1.0, 0.5]])


def one_combination(x):
    return jnp.asarray(ROW) @ x


def on_mixture(y=None):
    return Measurement(one_combination, y, std=0.3)


def mixture_posterior(y, std=0.3):
    """(mean, covariance, mean of exp(-|y - A x_0|^2/(2 std^2))) of the mixture given y, in float64."""
    a, parts = np.float64(ROW[0]), []
    for weight, mean, variance in zip(WEIGHTS, MEANS, VARIANCES, strict=True):
        total = variance * a @ a + std**2
        gain = variance * a / total
        innovation = y - a @ mean
        evidence = weight * std / np.sqrt(total) * np.exp(-0.5 * innovation**2 / total)
        parts.append((evidence, mean + gain * innovation, variance * (np.eye(2) - np.outer(gain, a))))
    evidences, means, covariances = map(np.array, zip(*parts, strict=True))
    w = evidences / evidences.sum()
    mean = w @ means
    spread = np.einsum("k,ki,kj->ij", w, means - mean, means - mean)
    return mean, np.einsum("k,kij->ij", w, covariances) + spread, evidences.sum()


# --- the score ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "prediction"),
    [
        (paths.Linear(), predictions.Velocity()),
        (paths.Linear(), predictions.Noise()),
        (paths.VP(), predictions.Score()),
        (paths.EDM(), predictions.Data()),
    ],
    ids=["linear_velocity", "linear_noise", "vp_score", "edm_data"],
)
def test_exact_where_the_assumed_covariance_is(path, prediction):
    """MMPS on any Gaussian, PiGDM on an isotropic one: the output of the exact posterior's flow, both ends included."""
    isotropic = fs.testing.Gaussian.isotropic(MEAN, 0.7)

    @jax.jit
    @jax.vmap
    def outputs(t, x):
        return [
            (given.flow(path, prediction).output(t, x), guided.output(t, x), jax.grad(_total(guided))(x, t))
            for given, guided in (
                (POSTERIOR, MMPS(GAUSSIAN.flow(path, prediction), MEASUREMENT)),
                (
                    isotropic.given(MATRIX, Y, STD),
                    PiGDM(isotropic.flow(path, prediction), MEASUREMENT, data_std=0.7),
                ),
            )
        ]

    fractions = np.float32([0, 1e-3, 0.1, 0.5, 0.9, 0.99, 0.9999, 1])
    t = np.float32(path.t_data) + np.float32(path.t_noise - path.t_data) * fractions
    x = np.random.default_rng(0).normal(size=(len(t), 3)).astype(np.float32)
    for name, (exact, got, gradient) in zip(("MMPS", "PiGDM"), outputs(t, x), strict=True):
        assert np.isfinite(gradient).all()
        error = np.abs(got - exact).max(axis=1) / np.maximum(1, np.abs(exact).max(axis=1))
        print(f"{name} on {type(path).__name__}: {error.max():.1e} at t = {t[error.argmax()]:g}")
        # Beyond alpha/sigma = 0.001 the guidance is that of the time where it is 0.001.
        assert (error < np.where(t > 0.999, 1e-3, 1e-4)).all(), (name, t, error)


def _total(flow):
    return lambda x, t: jnp.sum(flow.output(t, x))


def test_against_dense_algebra_for_a_nonlinear_operator_of_pytrees():
    """State and measurement are pytrees, A is nonlinear, the noise correlated, the data a mixture."""
    path, t = paths.VP(), 0.3
    means = {"a": jnp.asarray(TARGETS["mixture"][1][:, :2]), "b": jnp.asarray(TARGETS["mixture"][1][:, 2:])}
    flow = fs.testing.GaussianMixture(TARGETS["mixture"][0], means, TARGETS["mixture"][2]).flow(path, predictions.V())
    x = {"a": jnp.array([0.4, -0.2]), "b": jnp.array([1.1])}
    y = (jnp.array([0.1]), jnp.array([1.0, -0.5]))
    noise = np.array([[0.5, 0.1, 0.0], [0.1, 0.3, 0.1], [0.0, 0.1, 0.2]])

    def operator(x):
        return x["a"][:1] * x["b"], jnp.tanh(x["a"]) + jnp.sin(x["b"][0])

    def correlated(v):
        flat, unravel = jax.flatten_util.ravel_pytree(v)
        return unravel(jnp.asarray(noise, jnp.float32) @ flat)

    covariance = lineax.FunctionLinearOperator(correlated, jax.eval_shape(lambda: y), lineax.positive_semidefinite_tag)
    measurement = Measurement(operator, y, covariance=covariance)
    alpha, sigma = (float(value) for value in path.coefficients(jnp.asarray(t)))
    spread = (0.8 * sigma) ** 2 / ((0.8 * alpha) ** 2 + sigma**2)
    cases = {
        "MMPS": (
            MMPS(flow, measurement, rtol=1e-6, max_steps=16),
            lambda r, a, j: np.linalg.solve(noise + sigma**2 / alpha * a @ j @ a.T, r),
        ),
        "PiGDM": (
            PiGDM(flow, measurement, data_std=0.8, rtol=1e-6),
            lambda r, a, j: np.linalg.solve(noise + spread * a @ a.T, r),
        ),
        "DPS": (DPS(flow, measurement, zeta=0.6), lambda r, a, j: 2 * 0.6 * r / np.linalg.norm(r)),
    }

    @jax.jit
    def dense(flat):
        denoised = lambda z: jax.flatten_util.ravel_pytree(flow.denoised(t, unravel(z)))[0]  # noqa: E731
        measured = lambda z: jax.flatten_util.ravel_pytree(operator(unravel(z)))[0]  # noqa: E731
        d = denoised(flat)
        residual = jax.flatten_util.ravel_pytree(y)[0] - measured(d)
        prior = jax.flatten_util.ravel_pytree(flow.score(t, unravel(flat)))[0]
        return jax.jacfwd(denoised)(flat), jax.jacfwd(measured)(d), residual, prior

    flat, unravel = jax.flatten_util.ravel_pytree(x)
    jacobian, a, residual, prior = map(np.float64, dense(flat))

    def weighed(weigh):
        """J^T A^T w from dense matrices."""
        return jacobian.T @ a.T @ weigh(residual, a, jacobian)

    scores = {}
    for name, (guided, weigh) in cases.items():
        scores[name] = np.float64(jax.flatten_util.ravel_pytree(eqx.filter_jit(guided.score)(t, x))[0] - prior)
        expected = weighed(weigh)
        np.testing.assert_allclose(scores[name], expected, rtol=2e-4, atol=2e-5)

    def square(x):
        residual = jax.tree.map(jnp.subtract, y, operator(flow.denoised(t, x)))
        return sum(jnp.sum(leaf**2) for leaf in residual)

    # The paper's expression: -zeta/|r| grad |r|^2.
    gradient = jax.flatten_util.ravel_pytree(jax.grad(square)(x))[0]
    np.testing.assert_allclose(scores["DPS"], -0.6 / np.sqrt(square(x)) * gradient, rtol=1e-4, atol=1e-5)
    # The likelihood of clean data, in the metric of the noise.
    residual = np.concatenate([np.float64(b - a) for a, b in zip(operator(x), y, strict=True)])
    exact = -0.5 * residual @ np.linalg.solve(noise, residual)
    np.testing.assert_allclose(measurement.log_likelihood(x, y), exact, rtol=1e-5)


def test_score_and_path_transform_together():
    """DPS moved to another path is DPS there: its scale means the same on both."""
    flow = MIXTURE.flow(paths.Linear(), predictions.Velocity())
    moved = fs.OnPath(DPS(flow, on_mixture(jnp.array([0.3])), 0.7), paths.EDM())
    there = DPS(fs.OnPath(flow, paths.EDM()), on_mixture(jnp.array([0.3])), 0.7)
    x = jnp.array([0.5, -1.0])
    np.testing.assert_allclose(moved.score(1.5, x), there.score(1.5, x), rtol=1e-4)


def test_conjugate_gradients_with_little_noise():
    """64 elements, 32 measurements: the exact posterior within tolerance, and more steps are closer to it."""
    std, rng = 1e-3, np.random.default_rng(1)
    root, matrix = rng.normal(size=(64, 64)) / 8, rng.normal(size=(32, 64)) / 8
    oracle = fs.testing.Gaussian(np.zeros(64), root @ root.T + 0.01 * np.eye(64))
    y = jnp.asarray(matrix @ root @ rng.normal(size=64), jnp.float32)
    exact = oracle.given(matrix, y, std).flow(paths.Linear(), predictions.Velocity())
    measurement = Measurement(lambda x: jnp.asarray(matrix, jnp.float32) @ x, y, std=std)
    flow = oracle.flow(paths.Linear(), predictions.Velocity())
    t, x = jnp.array([0.1, 0.5, 0.9]), jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)

    @jax.jit
    @jax.vmap
    def errors(t, x):
        found = [MMPS(flow, measurement, max_steps=steps).denoised(t, x) for steps in (4, 16, 64)]
        return jnp.stack([jnp.max(jnp.abs(one - exact.denoised(t, x))) for one in found])

    error = np.asarray(errors(t, x)).max(axis=0)
    print(f"std = {std:g}: errors of 4, 16 and 64 steps {error}")
    assert (np.diff(error) < 0).all() and error[-1] < 2e-3


def test_gradients_pass_through_conjugate_gradients():
    """The denoised data is affine in y and in x: its derivatives are the differences of the exact one."""
    flow = MMPS(GAUSSIAN.flow(paths.Linear(), predictions.Velocity()), Measurement(linear, std=STD), rtol=1e-6)
    t, x = 0.6, jnp.array([0.2, 0.5, -1.0])

    @jax.jit
    def jacobians(x, y):
        return jax.jacrev(lambda x, y: flow.denoised(t, x, Observed(y)), argnums=(0, 1))(x, y)

    def exact(x, y):
        return GAUSSIAN.given(MATRIX, y, STD).denoised(paths.Linear(), t, x)

    in_x, in_y = jacobians(x, jnp.asarray(Y))
    for i, unit in enumerate(np.eye(3, dtype=np.float32)):
        np.testing.assert_allclose(in_x[:, i], exact(x + unit, Y) - exact(x, Y), rtol=1e-3, atol=1e-4)
    for i, unit in enumerate(np.eye(2, dtype=np.float32)):
        np.testing.assert_allclose(in_y[:, i], exact(x, Y + unit) - exact(x, Y), rtol=1e-3, atol=1e-4)


# --- sampling -----------------------------------------------------------------------------------------------

GUIDED = MMPS(GAUSSIAN.flow(paths.Linear(), predictions.Velocity()), Measurement(linear, std=STD))


@pytest.mark.parametrize(
    ("solver", "grid"),
    [
        (diffrax.Heun(), fs.grids.LogSNR(48)),
        (fs.solvers.UniPC(3), fs.grids.LogSNR(24)),
        (fs.solvers.SDEDPMSolverPP(2), fs.grids.LogSNR(64)),
    ],
    ids=["heun", "unipc", "sde"],
)
def test_samples_of_the_gaussian_posterior(solver, grid):
    """Mean and covariance within 5 standard errors."""
    num = 4_000
    settings = {"num": num, "key": jax.random.key(0), "solver": solver, "grid": grid}
    x = np.float64(fs.sample(GUIDED, GAUSSIAN.like, args=Observed(jnp.tile(Y, (num, 1))), **settings))
    covariance = np.float64(POSTERIOR.covariance)
    in_mean = (x.mean(axis=0) - np.float64(POSTERIOR.mean)) / np.sqrt(np.diag(covariance) / num)
    variances = np.diag(covariance)
    errors = np.sqrt((np.outer(variances, variances) + covariance**2) / num)
    in_covariance = (np.cov(x, rowvar=False) - covariance) / errors
    print(f"standard errors: mean {np.abs(in_mean).max():.2f}, covariance {np.abs(in_covariance).max():.2f}")
    assert np.abs(in_mean).max() < 5 and np.abs(in_covariance).max() < 5


def test_log_density_of_the_gaussian_posterior():
    """The divergence differentiates conjugate gradients, and the integral is the exact posterior's density."""
    x = jnp.array([[0.4, -0.5, 1.5], [-0.3, 0.2, 2.3]])
    settings = {"solver": diffrax.Heun(), "grid": fs.grids.LogSNR(200)}
    ys = jnp.tile(Y, (2, 1))
    found = fs.batched(eqx.Partial(fs.log_prob, **settings))(GUIDED, x, Observed(ys))
    exact = [POSTERIOR.log_prob(paths.Linear(), 0.0, one) for one in x]
    np.testing.assert_allclose(found, exact, atol=5e-3)


def test_each_example_has_its_own_measurement_and_label():
    """As each by itself, with the measurement in the flow; and a new y is no new program."""
    traces = []

    class Counted(eqx.Module):
        def __call__(self, t, x, args, *, key=None):
            traces.append(None)
            return MIXTURE.predict(paths.Linear(), t, x, predictions.Velocity(), args)

    flow = fs.Flow(Counted(), paths.Linear(), predictions.Velocity())
    ys, labels = jnp.array([[0.3], [-0.5]]), jnp.array([0, 2])
    settings = {"num": 2, "key": jax.random.key(0), "solver": fs.solvers.DDIM(), "grid": fs.grids.Uniform(8)}
    guided = MMPS(flow, on_mixture())
    together = fs.sample(guided, MIXTURE.like, args=Observed(ys, labels), **settings)
    count = len(traces)
    fs.sample(guided, MIXTURE.like, args=Observed(ys + 1, labels), **settings)
    assert len(traces) == count
    count = None
    for i in range(2):
        alone = MMPS(flow, on_mixture(ys[i]))
        x = fs.sample(alone, MIXTURE.like, args=jnp.full(2, labels[i]), **settings)
        np.testing.assert_allclose(together[i], x[i], rtol=1e-5, atol=1e-6)
        assert count is None or len(traces) == count
        count = len(traces)


# --- particles ----------------------------------------------------------------------------------------------


def coefficients_along(path, times):
    return [[float(value) for value in path.coefficients(jnp.asarray(t))] for t in times]


def chain_of_gaussian(path, times):
    """Mean and covariance of what the ancestral chain draws along `times` for the Gaussian, in float64."""
    coefficients = coefficients_along(path, times)
    mean, covariance = np.zeros(3), coefficients[0][1] ** 2 * np.eye(3)
    for (alpha, sigma), (alpha_s, sigma_s) in itertools.pairwise(coefficients):
        rho = alpha * sigma_s / (alpha_s * sigma)
        gain = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(3))
        on_data = alpha_s * (1 - rho**2)
        step = sigma_s * rho / sigma * np.eye(3) + on_data * gain
        mean = step @ mean + on_data * (MEAN - alpha * gain @ MEAN)
        covariance = step @ covariance @ step.T + sigma_s**2 * (1 - rho**2) * np.eye(3)
    return mean, covariance


@pytest.mark.parametrize("name", ["mmps", "dps"])
def test_particles_are_exact_for_the_chain_however_few_its_steps(name):
    """Six steps, whose law is another Gaussian than the data's: its posterior and its evidence, whatever guides."""
    path, grid = paths.VP(), fs.grids.LogSNR(6)
    flow = GAUSSIAN.flow(path, predictions.Noise())
    # More noise, so that poor guidance has particles left.
    measurement, std = Measurement(linear, Y, std=0.7), 0.7
    guided = {"mmps": MMPS(flow, measurement), "dps": DPS(flow, measurement, 0.2)}
    mean, covariance = chain_of_gaussian(path, np.asarray(grid(path)))
    assert np.abs(covariance - COVARIANCE).max() > 0.2  # six steps are few
    total = MATRIX @ covariance @ MATRIX.T + std**2 * np.eye(2)
    innovation = Y - MATRIX @ mean
    gain = covariance @ MATRIX.T @ np.linalg.inv(total)
    exact = mean + gain @ innovation
    variances = np.diag(covariance - gain @ MATRIX @ covariance)
    evidence = std**2 / np.sqrt(np.linalg.det(total)) * np.exp(-0.5 * innovation @ np.linalg.solve(total, innovation))

    @jax.jit
    @jax.vmap
    def run(key, threshold):
        cloud = fs.particles.sample(
            guided[name], GAUSSIAN.like, num=1_000, key=key, grid=grid, resample_below=threshold
        )
        weights = jnp.exp(cloud.log_weights)
        mean = weights @ cloud.x
        square = weights @ (cloud.x - jnp.asarray(exact, jnp.float32)[None]) ** 2
        return mean, square, jnp.exp(cloud.log_evidence), jnp.sum(weights), cloud.effective_number

    runs = 48
    keys = jax.random.split(jax.random.key(2), 2 * runs)
    found = run(keys, jnp.repeat(jnp.array([0.5, 0.0]), runs))
    np.testing.assert_allclose(found[3], 1, rtol=1e-4)
    for start in (0, runs):  # with and without drawing anew
        for what, value, truth in (
            ("mean", found[0], exact),
            ("variance", found[1], variances),
            ("evidence", found[2], evidence),
        ):
            value = np.float64(value)[start : start + runs]
            distance = np.abs((value.mean(axis=0) - truth) / (value.std(axis=0) / np.sqrt(runs))).max()
            effective = float(found[4][start : start + runs].mean())
            print(f"{name}: {what} at {distance:.1f} standard errors, {effective:.0f} of 1,000 particles effective")
            assert distance < 5, (what, value.mean(axis=0), truth)


@pytest.mark.slow
def test_particles_converge_to_the_mixture_posterior():
    """Sixteen times the particles, a quarter of the error; the flow alone stays where it is."""
    y = 0.3
    mean, _, evidence = mixture_posterior(y)
    flow = MIXTURE.flow(paths.Linear(), predictions.Velocity())
    guided = PiGDM(flow, on_mixture(jnp.array([y])))

    def run(num, runs):
        @jax.jit
        @jax.vmap
        def one(key):
            cloud = fs.particles.sample(guided, MIXTURE.like, num=num, key=key, grid=fs.grids.VPPower(300))
            return jnp.exp(cloud.log_weights) @ cloud.x, jnp.exp(cloud.log_evidence)

        means, evidences = map(np.float64, one(jax.random.split(jax.random.key(0), runs)))
        return np.sqrt(((means - mean) ** 2).sum(axis=1).mean()), evidences

    few, _ = run(32, 64)
    many, evidences = run(512, 16)
    alone = fs.sample(
        guided, MIXTURE.like, num=2_000, key=jax.random.key(1), solver=fs.solvers.DDIM(), grid=fs.grids.VPPower(50)
    )
    error = np.linalg.norm(np.float64(alone).mean(axis=0) - mean)
    print(f"error of the mean: 32 particles {few:.3f}, 512 {many:.3f}; the flow alone {error:.3f}")
    assert 2.5 < few / many < 6.5 and many < 0.2 * error
    np.testing.assert_allclose(evidences.mean(), evidence, rtol=0.05)


@pytest.mark.quick
def test_negative_curvature_counts_as_none():
    """A network whose Jacobian is negative: V is taken as 0 along it, and the residual is weighed by the noise."""
    wrong = fs.Flow(lambda t, x, args, *, key=None: -x, paths.EDM(), predictions.Data())
    measurement = Measurement(lambda x: x, jnp.array([1.0, -2.0]), std=0.5)
    t, x = 3.0, jnp.array([0.3, 0.4])
    expected = -(jnp.array([1.0, -2.0]) + x) / 0.25
    np.testing.assert_allclose(MMPS(wrong, measurement, max_steps=1).guide(t, x).score, expected, rtol=1e-5)
    assert np.isfinite(MMPS(wrong, measurement, max_steps=8).guide(t, x).score).all()


@pytest.mark.quick
def test_systematic_draws():
    """Each index its share rounded up or down, and its share on average; none of weight 0."""
    weights = np.array([0.05, 0.0, 0.4, 0.25, 0.3])
    draw = jax.jit(jax.vmap(lambda key: _systematic(key, jnp.log(jnp.asarray(weights, jnp.float32)), 7)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4_000)))
    counts = (drawn[:, :, None] == np.arange(5)).sum(axis=1)
    assert (np.abs(counts - 7 * weights) < 1 + 1e-5).all() and (counts[:, 1] == 0).all()
    np.testing.assert_allclose(counts.mean(axis=0), 7 * weights, atol=0.04)


# --- RePaint ------------------------------------------------------------------------------------------------


def repaint_of_gaussian(path, times, mask, known, repeats):
    """Mean and covariance of RePaint's samples of the Gaussian, whose steps are affine, in float64."""
    m, keep = np.diag(mask.astype(float)), np.diag(1.0 - mask)
    mean, covariance = np.zeros(3), np.eye(3)
    for (alpha, sigma), (alpha_s, sigma_s) in itertools.pairwise(coefficients_along(path, times)):
        rho = alpha * sigma_s / (alpha_s * sigma)
        gain = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(3))
        on_data = alpha_s * (1 - rho**2)
        step = sigma_s * rho / sigma * np.eye(3) + on_data * gain
        for number in range(repeats):
            if number > 0:
                scale = alpha / alpha_s
                mean = scale * mean
                covariance = scale**2 * covariance + (sigma**2 - (scale * sigma_s) ** 2) * np.eye(3)
            mean = step @ mean + on_data * (MEAN - alpha * gain @ MEAN)
            covariance = step @ covariance @ step.T + sigma_s**2 * (1 - rho**2) * np.eye(3)
            mean = m @ (alpha_s * known) + keep @ mean
            covariance = sigma_s**2 * m + keep @ covariance @ keep
    return mean, covariance


def test_repaint_against_its_recursion_on_a_gaussian():
    """Moments in standard errors; the known part comes out as it is; repeats bring the rest to the conditional law."""
    path, grid, num = paths.Linear(), fs.grids.Uniform(12), 6_000
    mask, known = np.array([True, False, True]), np.float32([1.5, 99.0, 0.5])
    flow = GAUSSIAN.flow(path, predictions.Velocity())
    rest = COVARIANCE[1, [0, 2]] @ np.linalg.inv(COVARIANCE[np.ix_([0, 2], [0, 2])])
    exact = MEAN[1] + rest @ (known[[0, 2]] - MEAN[[0, 2]])
    found = []
    for repeats in (1, 5):
        solver = fs.solvers.RePaint(fs.solvers.DDIM(), mask, known, repeats=repeats)
        x = fs.sample(flow, GAUSSIAN.like, num=num, key=jax.random.key(0), solver=solver, grid=grid)
        np.testing.assert_array_equal(x[:, [0, 2]], np.tile(known[[0, 2]], (num, 1)))
        x = np.float64(x)[:, 1]
        mean, covariance = repaint_of_gaussian(path, np.asarray(grid(path)), mask, known, repeats)
        assert abs(x.mean() - mean[1]) < 5 * np.sqrt(covariance[1, 1] / num)
        assert abs(x.var() - covariance[1, 1]) < 5 * covariance[1, 1] * np.sqrt(2 / num)
        found.append(abs(mean[1] - exact))
        print(f"{repeats} repeats: mean {x.mean():.3f}, by the recursion {mean[1]:.3f}, of the posterior {exact:.3f}")
    assert found[1] < 0.35 * found[0] and found[0] > 0.1


def test_repaint_counts_and_takes_other_solvers():
    flow = GAUSSIAN.flow(paths.EDM(), predictions.Data())
    known = jnp.array([1.5, 0.0, 0.5])
    solver = fs.solvers.RePaint(fs.solvers.EDMHeun(), jnp.array([True, False, True]), known, repeats=3)
    start = 80 * jax.random.normal(jax.random.key(1), (3,))
    sol = fs.solve(flow, start, solver=solver, grid=fs.grids.Karras(5), key=jax.random.key(0))
    assert sol.stats["nfe"] == 5 * 3 * 2
    # To the noise that is left at t_data.
    np.testing.assert_allclose(sol.ys[0, [0, 2]], known[jnp.array([0, 2])], atol=0.01)


# --- bad input ----------------------------------------------------------------------------------------------

FLOW = GAUSSIAN.flow(paths.Linear(), predictions.Velocity())
COUPLED = fs.Flow(FLOW.output, paths.Linear(), predictions.Velocity(), source=fs.sources.CoupledNormal())
X = jnp.ones(3)
DDIM = fs.solvers.DDIM()
ERRORS = {
    "shape": (lambda: MMPS(FLOW, Measurement(linear, jnp.ones(3), std=1)).score(0.5, X), ValueError, r"float32\[2\]"),
    "structure": (
        lambda: DPS(FLOW, Measurement(lambda x: (x, x), X)).score(0.5, X),
        ValueError,
        r"\(float32\[3\], float32\[3\]\) for one example, but y is float32\[3\]",
    ),
    "dtype": (
        lambda: DPS(FLOW, Measurement(lambda x: x.astype(jnp.bfloat16), X)).score(0.5, X),
        ValueError,
        "bfloat16.*but y is float32",
    ),
    "batch of y": (
        lambda: fs.sample(
            MMPS(FLOW, Measurement(linear, jnp.ones((4, 2)), std=1)), GAUSSIAN.like, num=4, key=jax.random.key(0)
        ),
        ValueError,
        r"float32\[4, 2\].*Observed takes a y",
    ),
    "integer y": (lambda: Measurement(linear, jnp.ones(2, int)), TypeError, "y has dtype int32"),
    "no y": (lambda: MMPS(FLOW, Measurement(linear, std=1)).score(0.5, X), ValueError, "has no y"),
    "two y": (
        lambda: MMPS(FLOW, MEASUREMENT).score(0.5, X, Observed(jnp.asarray(Y))),
        ValueError,
        "y was given twice",
    ),
    "matrix": (lambda: Measurement(MATRIX, Y), TypeError, "lambda x: matrix @ x"),
    "negative std": (lambda: Measurement(linear, Y, std=-1), ValueError, "std = -1, but wants a deviation >= 0"),
    "nan std": (lambda: Measurement(linear, Y, std=float("nan")), ValueError, "std = nan"),
    "two noises": (
        lambda: Measurement(linear, Y, std=1, covariance=lineax.DiagonalLinearOperator(jnp.ones(2))),
        ValueError,
        "both std and covariance",
    ),
    "covariance of another size": (
        lambda: MMPS(FLOW, Measurement(linear, Y, covariance=lineax.DiagonalLinearOperator(jnp.ones(3)))).score(0.5, X),
        ValueError,
        r"covariance of a Measurement is that of float32\[3\], but y is float32\[2\]",
    ),
    "covariance as array": (lambda: Measurement(linear, Y, covariance=jnp.eye(2)), TypeError, "lineax"),
    "mmps without noise": (lambda: MMPS(FLOW, Measurement(linear, Y)), ValueError, "MMPS divides by the noise"),
    "pigdm without noise": (lambda: PiGDM(FLOW, Measurement(linear, Y)), ValueError, "PiGDM divides by the noise"),
    "likelihood without noise": (
        lambda: Measurement(linear, Y).log_likelihood(X, jnp.asarray(Y)),
        ValueError,
        "log_likelihood divides by the noise",
    ),
    "particles without noise": (
        lambda: fs.particles.sample(DPS(FLOW, Measurement(linear, Y)), GAUSSIAN.like, num=4, key=jax.random.key(0)),
        ValueError,
        "particles.sample divides by the noise",
    ),
    "particles of a plain flow": (
        lambda: fs.particles.sample(FLOW, GAUSSIAN.like, num=4, key=jax.random.key(0)),
        TypeError,
        "wants a posterior flow",
    ),
    "threshold": (
        lambda: fs.particles.sample(
            MMPS(FLOW, MEASUREMENT), GAUSSIAN.like, num=4, key=jax.random.key(0), resample_below=2
        ),
        ValueError,
        "resample_below = 2",
    ),
    "no score": (lambda: MMPS(COUPLED, MEASUREMENT), TypeError, "MMPS.*source is CoupledNormal"),
    "not a flow": (lambda: DPS(lambda t, x: x, MEASUREMENT), TypeError, "DPS's flow is a function"),
    "not a measurement": (lambda: PiGDM(FLOW, linear), TypeError, "PiGDM's measurement is a function"),
    "zeta": (lambda: DPS(FLOW, MEASUREMENT, 0.0), ValueError, "zeta = 0, but wants it positive"),
    "steps": (lambda: MMPS(FLOW, MEASUREMENT, max_steps=0), ValueError, "max_steps = 0"),
    "mask of numbers": (lambda: fs.solvers.RePaint(DDIM, jnp.ones(3), X), TypeError, "wants booleans"),
    "mask of another shape": (
        lambda: fs.solvers.RePaint(DDIM, jnp.ones(2, bool), X),
        ValueError,
        "broadcast the mask",
    ),
    "known data of another shape": (
        lambda: fs.sample(
            FLOW,
            GAUSSIAN.like,
            num=2,
            key=jax.random.key(0),
            solver=fs.solvers.RePaint(DDIM, jnp.ones(2, bool), jnp.ones(2)),
        ),
        ValueError,
        r"known data of float32\[2\], but one example of the flow is float32\[3\]",
    ),
    "repaint around a history": (
        lambda: fs.solvers.RePaint(fs.solvers.UniPC(3), jnp.ones(3, bool), X),
        ValueError,
        "RePaint got UniPC, whose history",
    ),
}


def outcome(call):
    """(type, message) of what a call raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.quick
def test_one_clear_sentence():
    """As a user has it, in a process without the tests' own checks of every annotation."""
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    wrong = []
    for name, (_, kind, message) in ERRORS.items():
        got_kind, got_message = found[name]
        if got_kind != kind.__name__ or not re.search(message, got_message) or len(got_message) > 450:
            wrong.append((name, got_kind, got_message))
    assert not wrong


if __name__ == "__main__":
    print(json.dumps({name: outcome(call) for name, (call, _, _) in ERRORS.items()}))
