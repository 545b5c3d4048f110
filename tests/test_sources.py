"""Sources: where a sample starts, what a density ends at, and which flows have a score."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import flowsolve as fs
from flowsolve import paths, predictions, solvers, sources

KEY = jax.random.key(0)
LIKE = jax.ShapeDtypeStruct((2,), jnp.float32)


def laplace(key, like):
    return jax.random.laplace(key, like.shape, like.dtype)


def laplace_density(noise):
    return jnp.sum(-jnp.abs(noise) - np.log(2))


LAPLACE = sources.Source(laplace, laplace_density)


def shrinking(path):
    """dx/dt = x: from t = 1 to 0 a state shrinks by e."""
    return fs.Flow(lambda t, x, args, *, key=None: x, path, predictions.Velocity(), source=LAPLACE)


@pytest.mark.quick
def test_samples_start_at_the_source():
    flow = shrinking(paths.Linear())
    x = fs.sample(flow, LIKE, num=3, key=KEY, solver=diffrax.Tsit5(), grid=fs.grids.Uniform(20))
    for i in range(3):
        start = laplace(jax.random.split(jax.random.fold_in(KEY, i))[0], LIKE)
        np.testing.assert_allclose(x[i], start / np.e, rtol=1e-5)


def test_density_is_the_sources_own():
    """x = eps/e has the Laplace law of scale 1/e in each element."""
    flow = shrinking(paths.Linear())
    x = jnp.asarray([0.3, -0.7])
    found = fs.log_prob(flow, x)
    np.testing.assert_allclose(found, scipy.stats.laplace(scale=1 / np.e).logpdf(x).sum(), rtol=1e-5)
    drawn, found = fs.sample_and_log_prob(flow, LIKE, key=KEY)
    np.testing.assert_allclose(found, scipy.stats.laplace(scale=1 / np.e).logpdf(drawn).sum(), rtol=1e-5)


def test_noise_is_scaled_as_on_the_path():
    """On EDM the start is 80 eps, and so is the density there."""
    still = fs.Flow(lambda t, x, args, *, key=None: 0 * x, paths.EDM(), predictions.Velocity(), source=LAPLACE)
    x = fs.sample(still, LIKE, num=1, key=KEY, solver=diffrax.Euler(), grid=fs.grids.Uniform(2))[0]
    np.testing.assert_allclose(x, 80 * laplace(jax.random.split(jax.random.fold_in(KEY, 0))[0], LIKE), rtol=1e-6)
    np.testing.assert_allclose(fs.log_prob(still, x), scipy.stats.laplace(scale=80).logpdf(x).sum(), rtol=1e-5)


@pytest.mark.quick
def test_normal_densities():
    z = jnp.asarray([0.3, -1.2, 2.0])
    for source in (sources.Normal(), sources.CoupledNormal()):
        np.testing.assert_allclose(source.log_prob(z), scipy.stats.norm.logpdf(z).sum(), rtol=1e-6)


def test_a_coupled_flow_has_all_but_a_score():
    oracle = fs.testing.Gaussian.isotropic(jnp.asarray([1.0, -0.5]), 0.5)
    plain = oracle.flow(paths.Linear(), predictions.Velocity())

    def network(t, x, args, *, key=None):
        return plain.output(t, x, args)

    coupled = fs.Flow(network, paths.Linear(), predictions.Velocity(), source=sources.CoupledNormal())
    x = jnp.asarray([0.2, 0.4])
    np.testing.assert_array_equal(coupled.denoised(0.3, x), plain.denoised(0.3, x))
    np.testing.assert_array_equal(coupled.noise(0.3, x), plain.noise(0.3, x))
    for solver in (diffrax.Heun(), solvers.DPMSolverPP(2)):
        drawn = [
            fs.sample(flow, LIKE, num=2, key=KEY, solver=solver, grid=fs.grids.Uniform(8)) for flow in (coupled, plain)
        ]
        np.testing.assert_allclose(*drawn, rtol=1e-6)
    guided = fs.guidance.ClassifierFree(coupled, 2.0, null=jnp.asarray(0))
    moved = fs.OnPath(coupled, paths.Trigonometric())
    for flow in (coupled, guided, moved):
        assert not flow.has_score
        with pytest.raises(TypeError, match="A score was asked of a flow whose source is CoupledNormal"):
            flow.score(0.3, x, jnp.asarray(0))
    assert plain.has_score


@pytest.mark.parametrize(
    "request_",
    [
        {"solver": diffrax.Euler(), "dynamics": fs.ReverseSDE(1.0)},
        {"solver": diffrax.Euler(), "dynamics": fs.ReverseSDE(diffusion=lambda t: t)},
        {"solver": solvers.DDIM(eta=1.0)},
        {"solver": solvers.SDEDPMSolverPP(2)},
        {"solver": solvers.Churn(solvers.EDMHeun(), 0.2)},
    ],
    ids=lambda request_: type(request_["solver"]).__name__ + "-" + type(request_.get("dynamics")).__name__,
)
def test_stochastic_equations_want_a_score(request_):
    """By its type, before anything is integrated."""
    flow = shrinking(paths.Linear())
    with pytest.raises(TypeError, match="a flow whose source is Source, but a score exists for noise that is normal"):
        fs.sample(flow, LIKE, num=2, key=KEY, grid=fs.grids.Uniform(4), **request_)


@pytest.mark.quick
def test_errors():
    flow = shrinking(paths.Linear())
    for options in ({"t_start": 0.9}, {"data_std": 0.5}, {"data_mean": 1.0}):
        with pytest.raises(ValueError, match="whose law is known at t_noise = 1 alone"):
            fs.sample(flow, LIKE, num=2, key=KEY, grid=fs.grids.Uniform(4), **options)
    with pytest.raises(ValueError, match="has no density"):
        fs.log_prob(fs.Flow(flow.network, flow.path, flow.prediction, source=sources.Source(laplace)), jnp.ones(2))
    with pytest.raises(ValueError, match="draw of a Source returned"):
        sources.Source(lambda key, like: jnp.zeros(3)).sample(KEY, LIKE)
    with pytest.raises(TypeError, match="predicts the score"):
        fs.Flow(flow.network, flow.path, predictions.Score(), source=LAPLACE)
    # A start of one's own is a start.
    x = fs.solve(flow, jnp.ones(2), t_start=0.5, solver=diffrax.Tsit5(), grid=fs.grids.Uniform(20)).ys[-1]
    np.testing.assert_allclose(x, np.exp(-0.5), rtol=1e-5)
