"""Orders of convergence, and the moments of every stochastic solver, against closed forms on a Gaussian."""

import itertools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import PATHS, gaussian_flow_map

import flowsolve as fs

COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.3]])
MEAN = np.array([0.4, -0.7])


def gaussian(path):
    return fs.testing.Gaussian(jnp.asarray(MEAN, float), COVARIANCE).flow(path, fs.predictions.Velocity())


# --- order ----------------------------------------------------------------------------------------------------------

ORDERS = {
    "euler": (diffrax.Euler(), 1, 128),
    "heun": (diffrax.Heun(), 2, 64),
    "tsit5": (diffrax.Tsit5(), 5, 64),
    "ddim": (fs.solvers.DDIM(), 1, 128),
    "ddim_zero": (fs.solvers.DDIM(eta=0.0), 1, 128),
}
# ln alpha of a discrete path has kinks between its steps, which no high order survives.
SMOOTH = [name for name in PATHS if not name.startswith("discrete")]


@eqx.filter_jit
def fixed_steps(flow, solver, t_start, t_end, x, step):
    """The user's own `diffeqsolve` on the library's terms."""
    terms = fs.dynamics.ProbabilityFlow().terms(flow)
    sol = diffrax.diffeqsolve(terms, solver, -t_start, -t_end, step, x, max_steps=None)
    return sol.ys[-1]


def measured_order(path, solver, most_steps):
    """log2 of the error's ratio at the last doubling of the steps that rounding does not reach."""
    flow = gaussian(path)
    # From sigma/alpha = 3 to 1, where every path is smooth and the leading error term rules.
    t_start, t_end = path.time_at(1.0, 3.0), path.time_at(1.0, 1.0)
    x = jnp.array([1.2, -0.5]) * path.start(t_start, data_std=0.6)[1]
    exact = gaussian_flow_map(path, MEAN, COVARIANCE, t_start, t_end, x)
    errors, steps = [], 8
    while steps <= most_steps and (not errors or errors[-1] > 2e-13):
        final = fixed_steps(flow, solver, t_start, t_end, x, (t_start - t_end) / steps)
        errors.append(np.linalg.norm(final - exact))
        steps *= 2
    return float(np.log2(errors[-2] / errors[-1]))


@pytest.mark.parametrize("path", SMOOTH)
@pytest.mark.parametrize("solver", ORDERS)
def test_order(path, solver, x64):
    solver, order, steps = ORDERS[solver]
    assert abs(measured_order(PATHS[path], solver, steps) - order) < 0.3


@pytest.mark.quick
@pytest.mark.parametrize("prediction", ["Data", "Noise", "Velocity", "V", "Score"])
def test_ddim_does_not_depend_on_what_the_network_predicts(prediction):
    """The step is written in mixtures of data and noise, whichever the network gives."""
    oracle = fs.testing.Gaussian(jnp.asarray(MEAN, float), COVARIANCE)
    flow = oracle.flow(fs.paths.VP(), getattr(fs.predictions, prediction)())
    x = jnp.array([1.0, -1.0])
    grid = fs.grids.Uniform(3)
    got = fs.solve(flow, x, solver=fs.solvers.DDIM(), grid=grid).ys[-1]
    ts = np.asarray(grid(flow.path))
    for t, s in itertools.pairwise(ts):
        data, noise = oracle.data_and_noise(flow.path, t, x)
        x = flow.path.alpha(s) * data + flow.path.sigma(s) * noise
    np.testing.assert_allclose(got, x, rtol=2e-5)


def test_ddim_is_finite_from_alpha_zero_and_exact_onto_sigma_zero():
    """From pure noise in one step the sample is E[x_0 | x_1]; onto sigma = 0 no noise is added, whatever eta."""
    flow = gaussian(fs.paths.Linear())
    x = jnp.array([0.3, -2.0])
    for eta in (None, 1.0):
        sol = fs.solve(flow, x, solver=fs.solvers.DDIM(eta), grid=fs.grids.Uniform(1), key=jax.random.key(0))
        np.testing.assert_allclose(sol.ys[-1], MEAN, rtol=1e-6)
    edm = gaussian(fs.paths.EDM())
    key = jax.random.key(0)
    ends = {}
    for name, grid in {"clean": fs.grids.ThenClean(fs.grids.Karras(5)), "noisy": fs.grids.Karras(4)}.items():
        sol = fs.solve(edm, 80 * x, solver=fs.solvers.DDIM(1.0), grid=grid, key=key)
        ends[name] = sol.ys[-1]
    np.testing.assert_allclose(ends["clean"], edm.denoised(0.002, ends["noisy"]), rtol=1e-5)


def test_ddim_runs_backwards_in_a_plain_diffeqsolve(x64):
    """Encoding: Diffrax negates time where t0 > t1, which the solver must undo."""
    path = fs.paths.VP()
    flow = gaussian(path)
    x = jnp.array([0.2, -0.4])
    exact = gaussian_flow_map(path, MEAN, COVARIANCE, 0.1, 0.9, x)
    there = fixed_steps(flow, fs.solvers.DDIM(), jnp.asarray(0.1), jnp.asarray(0.9), x, jnp.asarray(-0.8 / 2000))
    np.testing.assert_allclose(there, exact, rtol=3e-3)
    euler = fixed_steps(flow, diffrax.Euler(), jnp.asarray(0.1), jnp.asarray(0.9), x, jnp.asarray(-0.8 / 2000))
    np.testing.assert_allclose(euler, exact, rtol=3e-3)


# --- moments of the stochastic solvers ------------------------------------------------------------------------------

STOCHASTIC = {
    "euler": diffrax.Euler(),
    "euler_heun": diffrax.EulerHeun(),
    "shark": diffrax.ShARK(),
    "sra1": diffrax.SRA1(),
    "ddim": fs.solvers.DDIM(),
}
# (path, t_start): those with a finite diffusion at t_noise, and Linear from below it.
STARTS = {
    "vp": None,
    "sub_vp": None,
    "ve": None,
    "edm": None,
    "discrete_linear": None,
    "ornstein_uhlenbeck": None,
    "linear": 0.99,
}
NUM = 8192


class GivenNoise(diffrax.AbstractBrownianPath):
    """A Brownian path over the steps of a grid from given standard normal numbers, to differentiate in."""

    ts: jax.Array
    w: jax.Array
    h: jax.Array
    levy_area: type = eqx.field(static=True, default=diffrax.SpaceTimeLevyArea)

    @property
    def t0(self):
        return self.ts[0]

    @property
    def t1(self):
        return self.ts[-1]

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        step = jnp.argmin(jnp.abs(self.ts - t0))
        dt = t1 - t0
        w = jnp.sqrt(dt) * self.w[step]
        if not use_levy:
            return w
        return diffrax.SpaceTimeLevyArea(dt=dt, W=w, H=jnp.sqrt(dt / 12) * self.h[step])


@pytest.mark.quick
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_is_the_papers(eta, x64):
    """x_s = alpha_s x_0 + sqrt(sigma_s^2 - (eta q)^2) eps + eta q z with q^2 = sigma_s^2 (1 - SNR_t / SNR_s), by hand.

    Moments cannot tell one noise level from another: every level has the right marginals.
    """
    path = fs.paths.Cosine()
    flow = gaussian(path)
    t, s, x, z = 0.7, 0.4, jnp.array([0.8, -0.3]), np.array([0.5, -1.5])
    terms = fs.dynamics.ReverseSDE(1.0).terms(flow, GivenNoise(jnp.array([-t, -s]), z[None], z[None]))
    got = diffrax.diffeqsolve(terms, fs.solvers.DDIM(eta), -t, -s, t - s, x).ys[-1]
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([float(v) for v in path.coefficients(jnp.asarray(u))] for u in (t, s))
    data = np.asarray(flow.denoised(t, x))
    noise = (np.asarray(x) - alpha_t * data) / sigma_t
    q = sigma_s * np.sqrt(1 - (alpha_t / sigma_t) ** 2 / (alpha_s / sigma_s) ** 2)
    expected = alpha_s * data + np.sqrt(sigma_s**2 - (eta * q) ** 2) * noise + eta * q * z
    np.testing.assert_allclose(got, expected, rtol=1e-10)


@eqx.filter_jit
def propagated_moments(flow, solver, dynamics, ts, mean, covariance):
    """Mean and covariance of a scheme that is linear on a Gaussian, from its response to unit inputs: exact."""
    steps = len(ts) - 1

    def solve(inputs):
        x, w, h = inputs[:2], inputs[2 : 2 + 2 * steps], inputs[2 + 2 * steps :]
        terms = dynamics.terms(flow, GivenNoise(ts, w.reshape(steps, 2), h.reshape(steps, 2)))
        controller = diffrax.StepTo(ts)
        sol = diffrax.diffeqsolve(
            terms, solver, ts[0], ts[-1], None, mean + x, stepsize_controller=controller, max_steps=steps
        )
        return sol.ys[-1]

    units = jnp.concatenate([jnp.zeros((1, 2 + 4 * steps)), jnp.eye(2 + 4 * steps)])
    ends = jax.vmap(solve)(units)
    response = (ends[1:] - ends[:1]).T
    on_x, on_noise = response[:, :2], response[:, 2:]
    return ends[0], on_x @ covariance @ on_x.T + on_noise @ on_noise.T


def start_moments(path, t_start):
    """The start of `fs.sample`: data moments that are isotropic, as its arguments are."""
    mean, std = path.start(t_start, data_mean=0.1, data_std=0.6)
    return jnp.full(2, mean), std**2 * jnp.eye(2)


def in_standard_errors(x, mean, covariance):
    """The largest deviation of sample mean and covariance, each in its own standard errors."""
    x = np.asarray(x, np.float64)
    n = len(x)
    errors = [np.abs(x.mean(0) - mean) / np.sqrt(np.diag(covariance) / n)]
    centred = x - x.mean(0)
    sample = centred.T @ centred / n
    variance = np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2
    errors.append((np.abs(sample - covariance) / np.sqrt(variance / n)).ravel())
    return float(np.concatenate(errors).max())


def sde_samples(path, solver, eta, steps, t_start):
    flow = gaussian(path)
    dynamics = fs.dynamics.ReverseSDE(eta)
    grid = fs.grids.LogSNR(steps)
    settings = {"t_start": t_start, "data_mean": 0.1, "data_std": 0.6}
    x = fs.sample(
        flow,
        jax.ShapeDtypeStruct((2,), jnp.float32),
        num=NUM,
        key=jax.random.key(7),
        dynamics=dynamics,
        solver=solver,
        grid=grid,
        **settings,
    )
    return flow, dynamics, grid, x


@pytest.mark.parametrize("path", STARTS)
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_sde_moments_at_few_steps_are_the_schemes_own(path, solver):
    path, t_start, solver = PATHS[path], STARTS[path], STOCHASTIC[solver]
    for eta in (0.5, 1.0) if isinstance(solver, fs.solvers.DDIM) else (0.5, 1.0, 2.0):
        flow, dynamics, grid, x = sde_samples(path, solver, eta, 12, t_start)
        ts = -grid(path, t_start, None)
        mean, covariance = propagated_moments(flow, solver, dynamics, ts, *start_moments(path, t_start))
        assert in_standard_errors(x, np.asarray(mean), np.asarray(covariance)) < 4


@pytest.mark.parametrize("path", STARTS)
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_sde_moments_at_many_steps_are_the_datas(path, solver):
    path, t_start, solver = PATHS[path], STARTS[path], STOCHASTIC[solver]
    for eta in (0.5, 1.0) if isinstance(solver, fs.solvers.DDIM) else (0.5, 1.0, 2.0):
        # First order in the noise level too: DDIM wants smaller steps for a bias below the standard error.
        steps = 1200 if isinstance(solver, fs.solvers.DDIM) else 300
        *_, x = sde_samples(path, solver, eta, steps, t_start)
        alpha, sigma = path.alpha(path.t_data), path.sigma(path.t_data)
        covariance = float(alpha) ** 2 * COVARIANCE + float(sigma) ** 2 * np.eye(2)
        assert in_standard_errors(x, float(alpha) * MEAN, covariance) < 4


if __name__ == "__main__":  # the measured orders, one line a solver
    with jax.enable_x64(True):
        for name, (solver, order, steps) in ORDERS.items():
            orders = [f"{path} {measured_order(PATHS[path], solver, steps):.2f}" for path in SMOOTH]
            print(f"{name}, order {order}: " + ", ".join(orders))
