"""Stochastic solvers: moments on a Gaussian, where each scheme is linear, and the noise itself."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import PATHS

import flowsolve as fs

COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.3]])
MEAN = np.array([0.4, -0.7])
NUM = 8192


def gaussian(path):
    return fs.testing.Gaussian(jnp.asarray(MEAN, float), COVARIANCE).flow(path, fs.predictions.Velocity())


# --- the scheme's own moments, exactly ------------------------------------------------------------------------------


class GivenNoise(diffrax.AbstractBrownianPath):
    """A Brownian path over the steps of a grid from given standard normal numbers, to differentiate in.

    `w` serves a step, or the first part of one that a solver divides; `h` the second part, or the Levy area; `extra`
    what a solver draws beside.
    """

    ts: jax.Array
    w: jax.Array
    h: jax.Array
    extra: jax.Array
    levy_area: type = eqx.field(static=True, default=diffrax.SpaceTimeLevyArea)

    @property
    def t0(self):
        return self.ts[0]

    @property
    def t1(self):
        return self.ts[-1]

    def cell(self, t0, t1):
        return jnp.clip(jnp.sum(self.ts <= 0.5 * (t0 + t1)) - 1, 0, len(self.ts) - 2)

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        step, dt = self.cell(t0, t1), t1 - t0
        w = jnp.sqrt(dt) * jnp.where(t0 == self.ts[step], self.w[step], self.h[step])
        if not use_levy:
            return w
        return diffrax.SpaceTimeLevyArea(dt=dt, W=w, H=jnp.sqrt(dt / 12) * self.h[step])

    def extra_normal(self, t0, t1, number):
        return self.extra[self.cell(t0, t1), number]


def steps_over(terms, solver, ts, x):
    """The states after each step of a plain `diffeqsolve` over the times ts, from noise to data."""
    return diffrax.diffeqsolve(
        terms,
        solver,
        -ts[0],
        -ts[-1],
        None,
        x,
        stepsize_controller=diffrax.StepTo(-ts),
        max_steps=len(ts) - 1,
        saveat=diffrax.SaveAt(steps=True),
    ).ys


EXTRA = 2


@eqx.filter_jit
def propagated_moments(flow, solver, dynamics, ts, steps, mean, covariance):
    """Mean and covariance of a scheme that is linear on a Gaussian, from its response to unit inputs: exact.

    Of `ts` the first `steps` + 1 are the grid, so that one program serves several.
    """
    capacity = len(ts) - 1

    def solve(x, noise):
        w, h, extra = noise[:, 0], noise[:, 1], noise[:, 2:]
        terms = dynamics.terms(flow, GivenNoise(ts, w, h, extra))

        def advance(number, now):
            x, state = now
            x, _, _, state, _ = solver.step(terms, ts[number], ts[number + 1], x, None, state, False)
            return x, state

        state = solver.init(terms, ts[0], ts[1], mean + x, None)
        return jax.lax.fori_loop(0, steps, advance, (mean + x, state))[0]

    inputs, shape = 2 + capacity * (2 + EXTRA) * 2, (capacity, 2 + EXTRA, 2)
    units = jnp.concatenate([jnp.zeros((1, inputs)), jnp.eye(inputs)])
    ends = jax.vmap(lambda unit: solve(unit[:2], unit[2:].reshape(shape)))(units)
    response = (ends[1:] - ends[:1]).T
    on_x, on_noise = response[:, :2], response[:, 2:]
    return ends[0], on_x @ covariance @ on_x.T + on_noise @ on_noise.T


# --- Diffrax's solvers and DDIM on many paths ---
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


def start_moments(path, t_start):
    """The start of `fs.sample`: data moments that are isotropic, as its arguments are."""
    mean, std = path.start(t_start, data_mean=0.1, data_std=0.6)
    return jnp.full(2, mean), std**2 * jnp.eye(2)


def in_standard_errors(x, mean, covariance):
    """The largest deviation of sample mean and covariance, each in its own standard errors."""
    x = np.asarray(x, np.float64)
    return bias_in_standard_errors((x.mean(0), np.cov(x.T, bias=True)), mean, covariance, len(x))


def bias_in_standard_errors(moments, mean, covariance, num=NUM):
    """The same of exact moments, in the standard errors of `num` samples."""
    variance = np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2
    errors = [np.abs(moments[0] - mean) / np.sqrt(np.diag(covariance) / num)]
    errors.append((np.abs(moments[1] - covariance) / np.sqrt(variance / num)).ravel())
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


def data_moments(path):
    alpha, sigma = path.alpha(path.t_data), path.sigma(path.t_data)
    return float(alpha) * MEAN, float(alpha) ** 2 * COVARIANCE + float(sigma) ** 2 * np.eye(2)


MANY = 300


@pytest.mark.parametrize("path", STARTS)
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_sde_moments_are_the_schemes_own_and_go_to_the_datas(path, solver):
    """Of samples at 12 steps, against the scheme's own; of the scheme itself at 300 steps, against the data's."""
    path, t_start, solver = PATHS[path], STARTS[path], STOCHASTIC[solver]
    of_order_one_in_eta = isinstance(solver, fs.solvers.DDIM)
    for eta in (0.5, 1.0) if of_order_one_in_eta else (0.5, 1.0, 2.0):
        flow, dynamics, grid, x = sde_samples(path, solver, eta, 12, t_start)

        def own(steps, grid, flow=flow, dynamics=dynamics):
            ts = jnp.pad(-grid(path, t_start, None), (0, MANY - steps), mode="edge")
            start = start_moments(path, t_start)
            return [np.asarray(m) for m in propagated_moments(flow, solver, dynamics, ts, jnp.asarray(steps), *start)]

        assert in_standard_errors(x, *own(12, grid)) < 4
        if not of_order_one_in_eta:
            assert bias_in_standard_errors(own(MANY, fs.grids.LogSNR(MANY)), *data_moments(path)) < 3


@pytest.mark.parametrize("path", STARTS)
def test_ddims_moments_at_many_steps_are_the_datas(path):
    """First order in the noise level too, it wants smaller steps for a bias below the standard error."""
    for eta in (0.5, 1.0):
        *_, x = sde_samples(PATHS[path], fs.solvers.DDIM(), eta, 1200, STARTS[path])
        assert in_standard_errors(x, *data_moments(PATHS[path])) < 4


@pytest.mark.quick
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_step_is_the_papers(eta, x64):
    """x_s = alpha_s x_0 + sqrt(sigma_s^2 - (eta q)^2) eps + eta q z with q^2 = sigma_s^2 (1 - SNR_t / SNR_s), by hand.

    Moments cannot tell one noise level from another: every level has the right marginals.
    """
    path = fs.paths.Cosine()
    flow = gaussian(path)
    t, s, x, z = 0.7, 0.4, jnp.array([0.8, -0.3]), np.array([0.5, -1.5])
    noise = GivenNoise(jnp.array([-t, -s]), z[None], z[None], z[None, None])
    terms = fs.dynamics.ReverseSDE(1.0).terms(flow, noise)
    got = diffrax.diffeqsolve(terms, fs.solvers.DDIM(eta), -t, -s, t - s, x).ys[-1]
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([float(v) for v in path.coefficients(jnp.asarray(u))] for u in (t, s))
    data = np.asarray(flow.denoised(t, x))
    noise = (np.asarray(x) - alpha_t * data) / sigma_t
    q = sigma_s * np.sqrt(1 - (alpha_t / sigma_t) ** 2 / (alpha_s / sigma_s) ** 2)
    expected = alpha_s * data + np.sqrt(sigma_s**2 - (eta * q) ** 2) * noise + eta * q * z
    np.testing.assert_allclose(got, expected, rtol=1e-10)


# --- the solvers of this field, from alpha = 0 and from 80 ----------------------------------------------------------


class HalfWay(eqx.Module):
    """A network with a variance half way between the two of the ancestral step."""

    flow: fs.AbstractFlow

    def __call__(self, t, x, args, *, key=None):
        return self.flow.output(t, x, args), jnp.full_like(x, 0.5)


def plain(make):
    return lambda steps: make()


def langevin(steps):
    # Each Langevin step has a bias of its own, which goes away as it shrinks with the steps of the grid.
    return fs.solvers.LangevinCorrector(fs.solvers.SDEDPMSolverPP(1), step_size=2.0 / steps, steps=EXTRA)


def restart(steps):
    grid = fs.grids.LogSNR(max(steps // 4, 1))
    return fs.solvers.Restart(fs.solvers.DPMSolverPP(2), (0.3, 0.6), repeats=EXTRA, grid=grid)


# name -> (the solver for a number of steps, what makes its dynamics or None for its own, weak order). They are made
# when they are used, as their numbers follow x64.
SUITE = {
    "ddim": (plain(lambda: fs.solvers.DDIM(1.0)), None, 1),
    "ancestral_large": (plain(lambda: fs.solvers.Ancestral(fs.solvers.LargeVariance())), None, 1),
    "ancestral_learned": (plain(lambda: fs.solvers.Ancestral(fs.solvers.LearnedVariance())), None, 1),
    "sde_dpm_1": (plain(lambda: fs.solvers.SDEDPMSolverPP(1)), None, 1),
    "sde_dpm_2m": (plain(lambda: fs.solvers.SDEDPMSolverPP(2)), None, 1),
    "sde_dpm_2m_half": (plain(lambda: fs.solvers.SDEDPMSolverPP(2)), lambda: fs.ReverseSDE(0.5), 1),
    "sa_3": (plain(lambda: fs.solvers.SASolver(3)), None, 1),
    "sa_3_interval": (plain(lambda: fs.solvers.SASolver(3)), lambda: fs.ReverseSDE(1.2, interval=(0.2, 0.7)), 1),
    "sa_2_predictor": (plain(lambda: fs.solvers.SASolver(2, corrector=False)), lambda: fs.ReverseSDE(0.7), 1),
    "er_sde_3": (plain(lambda: fs.solvers.ERSDE(3)), None, 1),
    "er_sde_2_eta": (plain(lambda: fs.solvers.ERSDE(2)), lambda: fs.ReverseSDE(1.0), 1),
    "seeds_2": (plain(lambda: fs.solvers.SEEDS2()), None, 1),
    "churn": (lambda steps: fs.solvers.Churn(fs.solvers.EDMHeun(), 4.0 / steps, s_noise=1.0), None, 1),
    "restart": (restart, None, 1),
    "langevin": (langevin, None, 1),
}
GRIDS = {"linear": fs.grids.Uniform, "edm": fs.grids.Karras}


def suite_flow(path, name):
    flow = gaussian(path)
    return fs.flow.VarianceFlow(HalfWay(flow), path, flow.prediction) if name == "ancestral_learned" else flow


def suite_settings(path, name, steps):
    make, dynamics, _ = SUITE[name]
    solver = make(steps)
    return solver, solver.default_dynamics if dynamics is None else dynamics(), GRIDS[path](steps)


def suite_samples(path, name, steps):
    """Samples from t_noise, alpha = 0 on Linear, with the start of `fs.sample`."""
    solver, dynamics, grid = suite_settings(path, name, steps)
    return fs.sample(
        suite_flow(PATHS[path], name),
        jax.ShapeDtypeStruct((2,), jnp.float32),
        num=NUM,
        key=jax.random.key(11),
        solver=solver,
        dynamics=None if SUITE[name][1] is None else dynamics,
        grid=grid,
    )


def suite_moments(path, name, steps, start):
    """The scheme's own moments at the end of up to 80 steps, in float64."""
    solver, dynamics, grid = suite_settings(path, name, steps)
    path = PATHS[path]
    ts = jnp.pad(-grid(path), (0, 80 - steps), mode="edge")
    return propagated_moments(suite_flow(path, name), solver, dynamics, ts, jnp.asarray(steps), *start)


def deviation_and_weak_order(path, name):
    """(moments of samples at 20 steps in standard errors from the scheme's own, log4 of the error ratio, 20 to 80)."""
    x = suite_samples(path, name, 20)
    with jax.enable_x64(True):
        sigma = PATHS[path].sigma(PATHS[path].t_noise)
        moments = suite_moments(path, name, 20, (jnp.zeros(2), sigma**2 * jnp.eye(2)))
        order = np.log2(moment_error(path, name, 20) / moment_error(path, name, 80)) / 2
    return in_standard_errors(x, *(np.asarray(moment) for moment in moments)), order


def moment_error(path, name, steps):
    """The largest deviation of the scheme's own moments from the target's, from the exact marginal at t_noise."""
    alpha, sigma = PATHS[path].coefficients(jnp.asarray(PATHS[path].t_noise, float))
    start = alpha * jnp.asarray(MEAN), alpha**2 * COVARIANCE + sigma**2 * jnp.eye(2)
    target = data_moments(PATHS[path])
    return max(np.abs(a - b).max() for a, b in zip(suite_moments(path, name, steps, start), target, strict=True))


# Its first-order errors, of the two variances, cancel there: see the next test.
CANCELS = ("edm", "ancestral_learned")


@pytest.mark.parametrize("path", GRIDS)
@pytest.mark.parametrize("name", SUITE)
def test_suite_samples_have_the_schemes_moments_and_those_converge(name, path):
    """20 steps within 4 standard errors; from 20 to 80 by 4^order, but for what the last steps of a grid may cost."""
    deviation, order = deviation_and_weak_order(path, name)
    assert deviation < 4
    assert order > SUITE[name][2] - 0.3 or (path, name) == CANCELS


def test_a_variance_between_the_two_is_between_the_two(x64):
    """On EDM the small variance gives too little, the large one too much, and the mean of their logs cancels most."""
    small, large = moment_error("edm", "ddim", 40), moment_error("edm", "ancestral_large", 40)
    assert moment_error("edm", "ancestral_learned", 40) < 0.05 * min(small, large)


# --- without noise --------------------------------------------------------------------------------------------------

DETERMINISTIC = {
    "sde_dpm_2m": (fs.solvers.SDEDPMSolverPP(2), fs.solvers.DPMSolverPP(2)),
    "seeds_2": (fs.solvers.SEEDS2(), fs.solvers.DPMSolverPPSinglestep(2)),
    "sa_2": (fs.solvers.SASolver(2, corrector=False), fs.solvers.AdamsBashforth(2, variable=fs.solvers.LogSNR())),
    "er_sde_2": (fs.solvers.ERSDE(2), fs.solvers.AdamsBashforth(2, variable=fs.solvers.NoiseRatio())),
    "ddim": (fs.solvers.DDIM(), fs.solvers.DPMSolverPP(1)),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_eta_zero_takes_no_key_and_is_the_deterministic_solver_bitwise(name):
    stochastic, deterministic = DETERMINISTIC[name]
    path = fs.paths.EDM()
    flow, x = gaussian(path), 80 * jnp.array([0.3, -2.0])
    grid = fs.grids.Karras(6)
    got = fs.solve(flow, x, solver=stochastic, dynamics=fs.ReverseSDE(0.0), grid=grid).ys
    flowing = fs.solve(flow, x, solver=stochastic, dynamics=fs.ProbabilityFlow(), grid=grid).ys
    expected = fs.solve(flow, x, solver=deterministic, grid=grid).ys
    np.testing.assert_array_equal(got, flowing)
    np.testing.assert_array_equal(got, expected)


def test_no_churn_is_the_solver_itself():
    path = fs.paths.EDM()
    flow, x = gaussian(path), 80 * jnp.array([0.3, -2.0])
    grid = fs.grids.Karras(6)
    expected = fs.solve(flow, x, solver=fs.solvers.EDMHeun(), grid=grid).ys
    churn = fs.solvers.Churn(fs.solvers.EDMHeun(), 0.0)
    got = fs.solve(flow, x, solver=churn, grid=grid, key=jax.random.key(0)).ys
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["Discrete", "EDM", "Linear"])
def test_churn_raises_no_noise_beyond_the_path(name):
    """At t_noise there is nothing to raise to: the first step is the inner solver's, on a table of levels as well."""
    path = {"Discrete": fs.paths.Discrete.linear(), "EDM": fs.paths.EDM(), "Linear": fs.paths.Linear()}[name]
    flow, x = gaussian(path), float(path.sigma(path.t_noise)) * jnp.array([0.3, -2.0])
    settings = {"grid": fs.grids.Uniform(1), "t_end": 0.5 * path.t_noise}
    churned = fs.solve(flow, x, solver=fs.solvers.Churn(fs.solvers.DDIM(), 0.3), key=jax.random.key(0), **settings).ys
    np.testing.assert_allclose(churned, fs.solve(flow, x, solver=fs.solvers.DDIM(), **settings).ys, rtol=1e-5)


# --- the share of the noise that an equation keeps ------------------------------------------------------------------

KEPT = {
    "eta": lambda: fs.ReverseSDE(0.7),
    "interval": lambda: fs.ReverseSDE(1.3, interval=(0.45, 0.7)),
    "diffusion": lambda: fs.ReverseSDE(diffusion=lambda t: 2 * t**2),
    "extended": lambda: fs.dynamics.ExtendedReverseSDE(),
    "extended_eta_1": lambda: fs.dynamics.ExtendedReverseSDE(jnp.log),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_noise_is_the_integral_of_the_level(name, x64):
    """k = exp(-int eta^2 dlambda) with eta^2 = w/g^2, by a fine sum; and diffusion^2 = w."""
    dynamics = KEPT[name]()
    for path in (fs.paths.Linear(), fs.paths.VP()):
        edges = jnp.linspace(0.3, 0.9, 6001)
        middles = (edges[1:] + edges[:-1]) / 2
        levels = jax.vmap(lambda t: dynamics.level_squared(path, t))(middles)  # noqa: B023
        steps = -0.5 * jnp.diff(jax.vmap(path.log_snr)(edges))
        np.testing.assert_allclose(dynamics.kept(path, edges[-1], edges[0]), np.exp(-np.sum(levels * steps)), rtol=2e-3)
        for t in (jnp.asarray(0.5), jnp.asarray(0.8)):
            w = dynamics.diffusion(path, t) ** 2
            np.testing.assert_allclose(w, dynamics.level_squared(path, t) * path.g_squared(t), rtol=1e-12)
            np.testing.assert_allclose(dynamics.noise_weight(path, t), w / (2 * path.sigma(t)), rtol=1e-12)


def test_extra_noises_of_a_step_are_new():
    """Beside the increment and of each other, for each step; and the same whenever they are asked for."""
    ts = jnp.linspace(-1.0, 0.0, 5)
    noise = fs.brownian.StepNoise(jax.ShapeDtypeStruct((2000,), jnp.float32), jax.random.key(3), ts)
    draws = [noise.evaluate(ts[0], ts[1]) * 2]
    draws += [noise.extra_normal(ts[i], ts[i + 1], k) for i in (0, 1) for k in (0, 1)]
    draws = np.stack(draws)
    np.testing.assert_allclose(np.corrcoef(draws), np.eye(5), atol=0.1)
    np.testing.assert_allclose(draws.std(1), 1, atol=0.07)
    np.testing.assert_array_equal(noise.extra_normal(ts[1], ts[2], 1), draws[4])


if __name__ == "__main__":  # the moments in standard errors and the measured weak orders, one line a setting
    for name in SUITE:
        for path in GRIDS:
            deviation, order = deviation_and_weak_order(path, name)
            print(f"{name} on {path}: {deviation:.2f} standard errors; weak order {order:.2f}", flush=True)
