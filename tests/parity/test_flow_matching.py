"""Equal numbers in flow_matching: paths, conversions, a changed schedule, likelihoods. Time runs the other way there.

In float32; behind a tolerance is what was measured with flow_matching 1.0.10.
"""

import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.alike import DATA, X, check, importorskip

import flowsolve as fs

torch = importorskip("torch")
importorskip("flow_matching")
AffineProbPath = importorskip("flow_matching.path").AffineProbPath
scheduler = importorskip("flow_matching.path.scheduler")
ODESolver = importorskip("flow_matching.solver").ODESolver

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

T = np.array([0.15, 0.4, 0.7, 0.9], np.float32)  # their time
LINEAR, VELOCITY = fs.paths.Linear(), fs.predictions.Velocity()
PATHS = {
    "CondOT": (scheduler.CondOTScheduler(), LINEAR),
    "polynomial": (
        scheduler.PolynomialConvexScheduler(n=2),
        fs.paths.Path(lambda t: (1 - t) ** 2, lambda t: 1 - (1 - t) ** 2),
    ),
    "VP": (scheduler.VPScheduler(), fs.paths.VP(0.1, 20.0)),
    "linear VP": (
        scheduler.LinearVPScheduler(),
        fs.paths.Path(lambda t: 1 - t, lambda t: jnp.sqrt(t * (2 - t)), t_data=1e-4),
    ),
    "cosine": (scheduler.CosineScheduler(), fs.paths.Trigonometric()),
}


def theirs(xp, x, t):
    return xp.tanh(0.9 * x + 0.4 * xp.roll(x, 1, -1)) * (1 + t)


def flow_of(path=LINEAR):
    network = fs.TimeReversed(lambda t, x, args=None, *, key=None: theirs(jnp, x, t), path, VELOCITY)
    return fs.Flow(network, path, VELOCITY)


def over_batch(function, *batches):
    return jax.vmap(function)(jnp.asarray(1 - T), *batches)


@pytest.mark.parametrize("name", PATHS)
def test_paths(name):
    """x_t, its velocity, and the time of a signal-to-noise ratio."""
    schedule, path = PATHS[name]
    sample = AffineProbPath(schedule).sample(*(torch.from_numpy(x) for x in (X, DATA, T)))

    def one(t, data, noise):
        d_alpha, d_sigma = path.derivatives(t)
        return path.interpolate(t, data, noise), -(d_alpha * data + d_sigma * noise)

    for given, found in zip((sample.x_t, sample.dx_t), over_batch(one, DATA, X), strict=True):
        check(given.numpy(), found, 1e-5)  # 5e-7
    output = schedule(torch.from_numpy(T))
    times = schedule.snr_inverse(output.alpha_t / output.sigma_t).numpy()
    found = over_batch(lambda t: path.inverse_log_snr(path.log_snr(t)))
    np.testing.assert_allclose(times, 1 - np.asarray(found), atol=2e-5)


@pytest.mark.parametrize("name", PATHS)
def test_conversions(name):
    """All six, of any numbers: their sign of the velocity is the other one."""
    schedule, path = PATHS[name]
    given, t = AffineProbPath(schedule), torch.from_numpy(T)[:, None]
    value, x_t = torch.from_numpy(DATA), torch.from_numpy(X)
    data, noise = fs.predictions.Data(), fs.predictions.Noise()
    conversions = {
        given.target_to_velocity: (data, VELOCITY),
        given.epsilon_to_velocity: (noise, VELOCITY),
        given.velocity_to_target: (VELOCITY, data),
        given.epsilon_to_target: (noise, data),
        given.velocity_to_epsilon: (VELOCITY, noise),
        given.target_to_epsilon: (data, noise),
    }
    for function, (source, target) in conversions.items():
        signs = [-1 if prediction == VELOCITY else 1 for prediction in (source, target)]

        def one(t, value, x_t, source=source, target=target, signs=signs):
            return signs[1] * fs.convert(path, t, x_t, signs[0] * value, source, target)

        check(function(value, x_t, t).numpy(), over_batch(one, DATA, X), 2e-5)  # 1.3e-6


def test_changed_schedule():
    """A velocity of the straight path on the cosine one."""
    model = scheduler.ScheduleTransformedModel(
        lambda x, t: theirs(torch, x, t), scheduler.CondOTScheduler(), scheduler.CosineScheduler()
    )
    given = model(torch.from_numpy(X), torch.from_numpy(T)[:, None]).numpy()
    moved = fs.OnPath(flow_of(), fs.paths.Trigonometric())
    check(given, -over_batch(moved.velocity, X), 2e-5)  # 1e-6


@pytest.mark.parametrize(
    ("method", "solver"), [("euler", diffrax.Euler()), ("midpoint", diffrax.Midpoint()), ("heun2", diffrax.Heun())]
)
def test_samples(method, solver):
    given = ODESolver(lambda x, t: theirs(torch, x, t)).sample(torch.from_numpy(X), 0.1, method)
    solve = eqx.Partial(fs.solve, solver=solver, grid=fs.grids.Uniform(10))
    check(given.numpy(), fs.batched(solve)(flow_of(), jnp.asarray(X)).ys[:, -1], 1e-5)  # 2e-7


class GivenProbe(eqx.Module):
    """In place of a distribution of probes."""

    probe: jax.Array

    def __call__(self, key, like):
        return self.probe


@pytest.mark.parametrize("exact", [True, False])
def test_likelihood(exact):
    """By midpoint steps; of Hutchinson's estimate with the same signs."""
    torch.manual_seed(0)
    signs = np.where(torch.randn(X.shape).numpy() < 0, 1, -1).astype(np.float32)
    torch.manual_seed(0)
    given = ODESolver(lambda x, t: theirs(torch, x, t)).compute_likelihood(
        torch.from_numpy(DATA),
        lambda x: -0.5 * (x.square().sum(1) + 2 * math.log(2 * math.pi)),
        0.1,
        "midpoint",
        exact_divergence=exact,
    )[1]

    def one(flow, x, probe):
        divergence = fs.divergence.Exact() if exact else fs.divergence.Hutchinson(1, GivenProbe(probe))
        settings = {"solver": diffrax.Midpoint(), "grid": fs.grids.Uniform(10)}
        return fs.log_prob(flow, x, divergence=divergence, key=jax.random.key(0), **settings)

    check(given.numpy(), fs.batched(one)(flow_of(), jnp.asarray(DATA), jnp.asarray(signs)), 1e-5)  # 6e-8


def test_likelihood_has_no_gradient_there():
    """A scale of the model gets none of its likelihood, with `enable_grad` as well; ours agrees with differences."""
    scale = torch.tensor(0.7, requires_grad=True)
    value = (
        ODESolver(lambda x, t: scale * theirs(torch, x, t))
        .compute_likelihood(
            torch.from_numpy(DATA), lambda x: -0.5 * x.square().sum(1), 0.25, exact_divergence=True, enable_grad=True
        )[1]
        .sum()
    )
    assert not value.requires_grad

    def found(scale):
        network = fs.TimeReversed(lambda t, x, args=None, *, key=None: scale * theirs(jnp, x, t), LINEAR, VELOCITY)
        flow = fs.Flow(network, LINEAR, VELOCITY)
        return fs.log_prob(flow, jnp.asarray(DATA[0]), solver=diffrax.Euler(), grid=fs.grids.Uniform(4))

    slope = jax.grad(found)(jnp.asarray(0.7))
    np.testing.assert_allclose(slope, (found(jnp.asarray(0.71)) - found(jnp.asarray(0.69))) / 0.02, rtol=2e-3)


def test_exact_divergence_of_images():
    """Theirs takes vectors only; ours any shape."""
    image = torch.zeros(2, 2, 2)
    solver = ODESolver(lambda x, t: -x)
    with pytest.raises((IndexError, RuntimeError)):
        solver.compute_likelihood(image, lambda x: x.flatten(1).sum(1), 0.5, exact_divergence=True)
    flow = fs.Flow(lambda t, x, args=None, *, key=None: x, LINEAR, VELOCITY)
    value = fs.log_prob(flow, jnp.zeros((2, 2)), solver=diffrax.Dopri5(), grid=fs.grids.Uniform(4))
    # dx/dt = x over a time of 1: ln N(0; 0, I) + 4.
    np.testing.assert_allclose(value, 4 - 2 * math.log(2 * math.pi), rtol=1e-5)
