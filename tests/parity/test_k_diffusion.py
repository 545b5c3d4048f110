"""Equal numbers in k-diffusion: lists of sigmas, its samplers and wrappers.

Both sides compute in float32, and differ by 2e-6 of the size of an example with k-diffusion 0.1.1.post1, or by what is
written behind a tolerance. Its package imports
CLIP for an evaluation that is not needed here, so the modules are taken without it.
"""

import importlib
import importlib.util
import math
import sys
import types

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.alike import BATCH, RNG, X, check, difference, importorskip, ours, toy

import flowsolve as fs

torch = importorskip("torch")
found = importlib.util.find_spec("k_diffusion")
if found is None:
    pytest.skip("k-diffusion is not installed", allow_module_level=True)
if "k_diffusion" not in sys.modules:
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["k_diffusion"] = package
sampling = importorskip("k_diffusion.sampling")
external = importorskip("k_diffusion.external")
layers = importorskip("k_diffusion.layers")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

# float32 rounds the ends of their lists past 0.02 and 80.
EDM = fs.paths.EDM(t_data=0.02 * (1 - 1e-6), t_noise=80 * (1 + 1e-6))
SIGMAS = sampling.get_sigmas_karras(14, 0.02, 80.0)
START = 80 * X
Z = RNG.normal(size=(13, BATCH, 2)).astype(np.float32)
LOG_SNR = fs.solvers.LogSNR()


def denoiser(xp, x, sigma, level):
    """E[x_0 | x_0 + sigma eps] of the toy network."""
    scaled = x / xp.sqrt(1 + sigma**2)
    return x - sigma * toy(xp, scaled, level)


def theirs(x, sigma, **_):
    sigma = sigma[:, None]
    return denoiser(torch, x, sigma, sigma.log())


FLOW = fs.Flow(lambda t, x, args=None, *, key=None: denoiser(jnp, x, t, jnp.log(t)), EDM, fs.predictions.Data())


def sample(name, normal=None, sigmas=SIGMAS, **settings):
    if normal is not None:
        numbers = iter(normal)
        settings["noise_sampler"] = lambda *_: torch.from_numpy(next(numbers))
    function = getattr(sampling, name)
    return function(theirs, torch.from_numpy(START.copy()), sigmas, disable=True, **settings).numpy()


@pytest.mark.parametrize(
    ("sigmas", "grid"),
    [
        (sampling.get_sigmas_karras(20, 0.02, 80.0, 5.0), fs.grids.Karras(20, rho=5.0)),
        (sampling.get_sigmas_exponential(20, 0.02, 80.0), fs.grids.LogSNR(20)),
        (sampling.get_sigmas_polyexponential(20, 0.02, 80.0, 1.5), fs.grids.PolyExponential(20, rho=1.5)),
    ],
    ids=["karras", "exponential", "polyexponential"],
)
def test_sigmas(sigmas, grid):
    np.testing.assert_allclose(fs.grids.ThenClean(grid)(EDM), sigmas, rtol=5e-6)


def test_vp_sigmas():
    """Equal times of the VP path."""
    path = fs.paths.VP(0.1, 20.0, t_data=1e-3)
    ts = fs.grids.ThenClean(fs.grids.Uniform(20))(path)
    levels = jax.vmap(lambda t: path.sigma(t) / path.alpha(t))(ts)
    np.testing.assert_allclose(levels, sampling.get_sigmas_vp(20), rtol=5e-4)  # 2e-4: theirs is a difference from 1


DETERMINISTIC = {
    "sample_euler": (fs.solvers.DDIM(), {}),
    "sample_heun": (fs.solvers.EDMHeun(), {}),
    "sample_lms": (fs.solvers.LMS(4), {"order": 4}),
    "sample_dpmpp_2m": (fs.solvers.DPMSolverPP(2), {}),
    "sample_dpmpp_2s_ancestral": (fs.solvers.DPMSolverPPSinglestep(2), {"eta": 0.0}),
    "sample_dpmpp_sde": (fs.solvers.DPMSolverPPSinglestep(2), {"eta": 0.0}),
    "sample_dpmpp_2m_sde": (
        fs.solvers.AdamsBashforth(2, prediction=fs.predictions.Data(), variable=LOG_SNR),
        {"eta": 0.0, "solver_type": "heun"},
    ),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers(name):
    solver, settings = DETERMINISTIC[name]
    check(sample(name, **settings), ours(FLOW, solver, SIGMAS, START), 2e-5)


def test_third_order():
    """Without noise: the formula of DPM-Solver++ 3M. Only the second step differs, which is short here."""
    sigmas = torch.tensor([80.0, 79.0, 78.0, 40.0, 20.0, 9.0, 4.0, 1.5, 0.5, 0.1, 0.02, 0.0])
    given = sample("sample_dpmpp_3m_sde", sigmas=sigmas, eta=0.0)
    check(given, ours(FLOW, fs.solvers.DPMSolverPP(3, as_published=True), sigmas, START), 1e-3)  # 5e-4
    other = difference(given, ours(FLOW, fs.solvers.DPMSolverPP(3), sigmas, START))
    print("other formula", other)
    assert other > 5e-3


STOCHASTIC = {
    "sample_euler_ancestral": (fs.solvers.DDIM(0.8), fs.ReverseSDE(0.8), {"eta": 0.8}),
    "sample_dpmpp_2m_sde": (fs.solvers.SDEDPMSolverPP(2), fs.ReverseSDE(0.6**0.5), {"eta": 0.6}),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_samplers(name):
    """Theirs draws nothing in the last step, ours multiplies by 0."""
    solver, dynamics, settings = STOCHASTIC[name]
    noise = np.concatenate([Z, np.zeros_like(Z[:1])])
    found = ours(FLOW, solver, SIGMAS, START, dynamics=dynamics, noise=noise)
    check(sample(name, normal=Z, **settings), found, 2e-5)


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun"])
def test_churn(name, monkeypatch):
    """gamma is S_churn over the number of steps; at the first step theirs goes above 80, where our path ends."""
    numbers = iter(np.concatenate([Z, np.zeros_like(Z[:1])]))
    monkeypatch.setattr(sampling.torch, "randn_like", lambda x: torch.from_numpy(next(numbers)))
    given = sample(name, s_churn=3.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.01)
    inner = fs.solvers.DDIM() if name == "sample_euler" else fs.solvers.EDMHeun()
    churn = fs.solvers.Churn(inner, 3.0 / 14, s_min=0.05, s_max=50.0, s_noise=1.01)
    noise = np.concatenate([Z, np.zeros_like(Z[:1])])
    check(given, ours(FLOW, churn, SIGMAS, START, dynamics=fs.dynamics.AddedNoise(), noise=noise), 2e-5)


def test_ancestral_step():
    down, up = sampling.get_ancestral_step(1.5, 1.0, 1.0)
    kept, fresh = EDM.noise_split(1.0, 1.5)
    np.testing.assert_allclose([down, up], [kept * 1.0, fresh * 1.0], rtol=1e-6)


def test_derivative():
    sigma = torch.full((BATCH,), 1.5)
    x = torch.from_numpy(X)
    given = sampling.to_d(x, sigma, theirs(x, sigma))
    check(given, jax.vmap(lambda x: FLOW.velocity(1.5, x))(X), 1e-5)


def test_denoiser():
    """Karras's scalings, the denoised and the loss, with sigma as the network's input."""

    def inner(xp, x, sigma):
        return xp.tanh(0.9 * x + 0.4 * xp.roll(x, 1, -1)) / (1 + sigma)

    model = layers.Denoiser(
        type("Inner", (torch.nn.Module,), {"forward": lambda self, x, s: inner(torch, x, s[:, None])})(), sigma_data=0.5
    )
    sigma, noise = np.array([0.1, 0.7, 3.0, 20.0], np.float32), Z[0]
    flow = fs.Flow(
        lambda t, x, args=None, *, key=None: inner(jnp, x, t),
        EDM,
        fs.predictions.Data(),
        fs.EDMPreconditioner(0.5, noise_level=lambda path, t: t),
    )
    scalings = torch.stack(model.get_scalings(torch.from_numpy(sigma)))
    found = jax.vmap(lambda s: jnp.stack(flow.preconditioner.coefficients(EDM, s)))(jnp.asarray(sigma))
    check(scalings.T, found[:, [1, 2, 0]], 1e-6)
    x = torch.from_numpy(X + sigma[:, None] * noise)
    check(model(x, torch.from_numpy(sigma)).detach(), jax.vmap(flow.denoised)(sigma, x.numpy()), 1e-5)
    given = model.loss(torch.from_numpy(X), torch.from_numpy(noise), torch.from_numpy(sigma)).detach()
    loss = fs.losses.Regression(weight=fs.weights.EDM(0.5))
    check(given, jax.vmap(lambda t, x, z: loss.one(flow, x, t=t, noise=z))(sigma, X, noise), 1e-4)


def test_weightings():
    """On the loss of the data, at sigma_data = 1: theirs are on that of the network, c_out^2 of it."""
    sigma = np.array([0.1, 0.7, 3.0, 20.0], np.float32)
    for name, weight in (
        ("karras", fs.weights.EDM(1.0)),
        ("soft-min-snr", fs.weights.Sigmoid(0.0)),
        ("snr", fs.weights.SNR()),
    ):
        model = layers.Denoiser(torch.nn.Identity(), sigma_data=1.0, weighting=name)
        given = model.weighting(torch.from_numpy(sigma)) / model.get_scalings(torch.from_numpy(sigma))[1] ** 2
        ours_ = jax.vmap(lambda s: weight(EDM, s))(jnp.asarray(sigma))  # noqa: B023
        np.testing.assert_allclose(given, ours_, rtol=1e-5)


def test_v_and_discrete_wrappers():
    """A network of v on the arc, and one of eps at integer timesteps, as denoisers of x_0 + sigma eps."""
    sigma = np.array([0.1, 0.7, 3.0, 10.0], np.float32)
    x = X * np.sqrt(1 + sigma[:, None] ** 2)

    def output(xp, x, t):
        return xp.tanh(0.9 * x + 0.4 * xp.roll(x, 1, -1)) * (1 + 0.1 * t)

    inner = type("Inner", (torch.nn.Module,), {"forward": lambda self, x, t: output(torch, x, t[:, None])})()

    def network(t, x, args=None, *, key=None):
        return output(jnp, x, t)

    arc = fs.OnPath(fs.Flow(network, fs.paths.Trigonometric(), fs.predictions.V()), fs.paths.EDM(1e-3, 100.0))
    given = external.VDenoiser(inner)(torch.from_numpy(x), torch.from_numpy(sigma))
    check(given.detach(), jax.vmap(arc.denoised)(sigma, x), 2e-5)
    path = fs.paths.Discrete.linear()
    kept = np.cumprod(1 - np.asarray(path.betas)).astype(np.float32)
    wrapped = external.DiscreteEpsDDPMDenoiser(inner, torch.from_numpy(kept), quantize=True)
    integers = np.array([3, 100, 600, 900])
    sigma = wrapped.sigmas[integers]
    given = wrapped(torch.from_numpy(x), sigma).detach()

    def discrete(t, x, args=None, *, key=None):
        return output(jnp, x, path.timestep(t).astype(float))

    moved = fs.OnPath(fs.Flow(discrete, path, fs.predictions.Noise()), fs.paths.EDM(0.02, 100.0))
    check(given, jax.vmap(moved.denoised)(jnp.asarray(sigma.numpy()), x), 2e-4)


def test_log_likelihood(monkeypatch):
    """The same signs as probe and tight tolerances on both sides."""
    signs = np.where(Z[0] < 0, -1, 1).astype(np.float32)
    monkeypatch.setattr(sampling.torch, "randint_like", lambda x, high: torch.from_numpy((signs + 1) / 2))
    given = sampling.log_likelihood(theirs, torch.from_numpy(X), 0.02, 80.0, atol=1e-6, rtol=1e-6)[0]

    class GivenProbe(eqx.Module):
        probe: jax.Array

        def __call__(self, key, like):
            return self.probe

    def one(flow, x, probe):
        return fs.log_prob(
            flow,
            x,
            divergence=fs.divergence.Hutchinson(1, GivenProbe(probe)),
            key=jax.random.key(0),
            solver=diffrax.Dopri5(),
            controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
        )

    found = fs.batched(one)(FLOW, jnp.asarray(X), jnp.asarray(signs))
    np.testing.assert_allclose(given, found, atol=1e-3)  # of about -10 nats
    assert np.all(np.abs(given.numpy()) < 50) and math.isfinite(float(found[0]))
