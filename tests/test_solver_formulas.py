"""Each scheme against its paper's formulas, in float64 NumPy, on a flow that is not linear and a grid that is not even.

Orders and moments cannot tell one consistent formula from another; these can.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate
from test_solver_noise import GivenNoise, steps_over

import flowsolve as fs

PATH = fs.paths.VP()
TIMES = np.array([0.9, 0.7, 0.55, 0.3, 0.2, 0.12])
X = np.array([0.8, -0.3])
RNG = np.random.default_rng(0)
Z = RNG.normal(size=(len(TIMES) - 1, 2, 2))


def oracle():
    means = jnp.array([[1.0, -0.5], [-1.5, 0.4]])
    covariances = jnp.array([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]]])
    return fs.testing.GaussianMixture(jnp.array([0.4, 0.6]), means, covariances)


@eqx.filter_jit
def run(solver, dynamics, ts, x, noise):
    """The library's steps, all of them."""
    flow = oracle().flow(PATH, fs.predictions.Velocity())
    brownian = GivenNoise(-ts, noise[:, 0], noise[:, 1], noise) if dynamics.stochastic else None
    return steps_over(dynamics.terms(flow, brownian), solver, ts, x)


@pytest.fixture(scope="module")
def denoise():
    """E[x_0|x_t = x] at t, as a NumPy function."""
    with jax.enable_x64(True):
        function = jax.jit(lambda t, x: oracle().flow(PATH, fs.predictions.Velocity()).denoised(t, x))

    def call(t, x):
        with jax.enable_x64(True):
            return np.asarray(function(jnp.asarray(t, float), jnp.asarray(x)))

    return call


def coefficients(t):
    """alpha, sigma, lambda from the definition of the path."""
    total = 0.1 * t + 19.9 * t**2 / 2
    alpha, sigma = np.exp(-total / 2), np.sqrt(-np.expm1(-total))
    return alpha, sigma, np.log(alpha / sigma)


def lagrange(nodes, j, at):
    return np.prod([(at - n) / (nodes[j] - n) for i, n in enumerate(nodes) if i != j])


def steps_of(step, denoise, times=TIMES, corrector=None):
    """States at all times by a multistep formula: step(i, x, D newest first, times newest first) -> x."""
    x, history, states = X.copy(), [], []
    previous = None
    for i in range(len(times) - 1):
        data = denoise(times[i], x)
        if corrector is not None and previous is not None:
            x = corrector(i - 1, previous, history, data)
        history.insert(0, data)
        previous = x
        x = step(i, x, history)
        states.append(x)
    return np.array(states)


def dpm_2m(i, x, data):
    (_, s, lam), (a1, s1, lam1) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
    h = lam1 - lam
    d = data[0]
    if i > 0:
        r0 = (lam - coefficients(TIMES[i - 1])[2]) / h
        d = (1 + 1 / (2 * r0)) * data[0] - data[1] / (2 * r0)
    return s1 / s * x - a1 * np.expm1(-h) * d


def dpm_3m_published(i, x, data):
    if i < 2:
        return dpm_2m(i, x, data)
    (a1, s1, lam1) = coefficients(TIMES[i + 1])
    s, lams = coefficients(TIMES[i])[1], [coefficients(TIMES[i - k])[2] for k in range(3)]
    h = lam1 - lams[0]
    r0, r1 = (lams[0] - lams[1]) / h, (lams[1] - lams[2]) / h
    d10, d11 = (data[0] - data[1]) / r0, (data[1] - data[2]) / r1
    e1 = d10 + r0 / (r0 + r1) * (d10 - d11)
    e2 = (d10 - d11) / (r0 + r1)
    p2 = np.expm1(-h) / h + 1
    p3 = p2 / h - 0.5
    return s1 / s * x - a1 * np.expm1(-h) * data[0] + a1 * p2 * e1 - a1 * p3 * e2


def exponential_lagrange(order, level=0.0):
    """r e^{-level h} x + the integrals of the Lagrange polynomials in lambda, by adaptive quadrature."""

    def step(i, x, data):
        (_, s, lam), (_, s1, lam1) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
        count = min(order, i + 1)
        nodes = [coefficients(TIMES[i - k])[2] for k in range(count)]
        out = s1 / s * np.exp(-level * (lam1 - lam)) * x
        for j in range(count):
            weight = integrate.quad(
                lambda u: np.exp(u - level * (lam1 - u)) * (1 + level) * lagrange(nodes, j, u),  # noqa: B023
                lam,
                lam1,
            )[0]
            out = out + s1 * weight * data[j]
        return out

    return step


def vp_time(ratio):
    total = np.log1p(ratio**2)
    return 2 * total / (0.1 + np.sqrt(0.01 + 2 * 19.9 * total))


def deis_3(i, x, data):
    (a, s, _), (a1, s1, _) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
    count = min(3, i + 1)
    nodes = [vp_time(coefficients(TIMES[i - k])[1] / coefficients(TIMES[i - k])[0]) for k in range(count)]
    out = a1 / a * x
    for j in range(count):
        weight = integrate.quad(lambda rho: lagrange(nodes, j, vp_time(rho)), s / a, s1 / a1)[0]  # noqa: B023
        out = out + a1 * weight * data[j]
    return out


def ipndm_4(i, x, eps):
    (a, s, _), (a1, s1, _) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
    table = [(1,), (1.5, -0.5), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    mixed = sum(c * e for c, e in zip(table[min(i, 3)], eps, strict=False))
    return a1 / a * x + (s1 - a1 * s / a) * mixed


def ab_2_data_in_time(i, x, data):
    s, s1 = (coefficients(t)[1] for t in TIMES[i : i + 2])
    count = min(2, i + 1)
    nodes = list(TIMES[i : None if i + 1 == count else i - count : -1][:count])
    out = s1 / s * x

    def slope(t):
        alpha, sigma, _ = coefficients(t)
        # d(alpha/sigma)/dt = -beta/2 alpha/sigma (1 + alpha^2/sigma^2)
        return -(0.1 + 19.9 * t) / 2 * alpha / sigma / sigma**2

    for j in range(count):
        weight = integrate.quad(lambda t: lagrange(nodes, j, t) * slope(t), TIMES[i], TIMES[i + 1])[0]  # noqa: B023
        out = out + s1 * weight * data[j]
    return out


def unipc(order, bh):
    """Predictor and corrector as the paper has them: solve the Vandermonde system."""

    def parts(i):
        (_, s, lam), (a1, s1, lam1) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
        h = lam1 - lam
        big = -h if bh == 1 else np.expm1(-h)
        psi, b = np.expm1(-h) / -h - 1, []
        for k in range(1, order + 1):
            b.append(psi * math.factorial(k) / big)
            psi = psi / -h - 1 / math.factorial(k + 1)
        return s, s1, a1, h, lam, big, np.array(b)

    def nodes(i, count):
        *_, h, lam, _, _ = parts(i)
        return [(coefficients(TIMES[i - k])[2] - lam) / h for k in range(1, count)]

    def correction(r, differences, b, big, a1):
        if not r:
            return 0
        rho = np.array([0.5]) if len(r) == 1 else np.linalg.solve(np.vander(r, increasing=True).T, b[: len(r)])
        return -a1 * big * sum(p * d / q for p, d, q in zip(rho, differences, r, strict=True))

    def predict(i, x, data):
        s, s1, a1, h, _, big, b = parts(i)
        r = nodes(i, min(order, i + 1))
        base = s1 / s * x - a1 * np.expm1(-h) * data[0]
        return base + correction(r, [d - data[0] for d in data[1 : len(r) + 1]], b, big, a1)

    def correct(i, x, data, new):
        s, s1, a1, h, _, big, b = parts(i)
        r = nodes(i, min(order, i + 1))
        base = s1 / s * x - a1 * np.expm1(-h) * data[0]
        differences = [d - data[0] for d in (*data[1 : len(r) + 1], new)]
        return base + correction([*r, 1.0], differences, b, big, a1)

    return predict, correct


def compare(make_solver, expected, make_dynamics=fs.ProbabilityFlow):
    """Solver and dynamics are made under x64, which their numbers follow."""
    with jax.enable_x64(True):
        got = run(make_solver(), make_dynamics(), jnp.asarray(TIMES), jnp.asarray(X), jnp.asarray(Z))
    np.testing.assert_allclose(got, expected, rtol=2e-9)


def test_dpm_solver_multistep(denoise):
    compare(lambda: fs.solvers.DPMSolverPP(2), steps_of(dpm_2m, denoise))
    compare(lambda: fs.solvers.DPMSolverPP(3, as_published=True), steps_of(dpm_3m_published, denoise))


def test_dpm_solver_3m_is_the_quadratic_through_three_evaluations(denoise):
    def step(i, x, data):
        return dpm_2m(i, x, data) if i < 2 else exponential_lagrange(3)(i, x, data)

    compare(lambda: fs.solvers.DPMSolverPP(3), steps_of(step, denoise))


def test_dpm_solver_singlestep(denoise):
    def second(i, x, data):
        (_, s, lam), (a1, s1, lam1) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
        h, r = lam1 - lam, 0.4
        middle = PATH_TIME(lam + r * h)
        am, sm, _ = coefficients(middle)
        u = sm / s * x - am * np.expm1(-r * h) * data[0]
        d = (1 - 1 / (2 * r)) * data[0] + denoise(middle, u) / (2 * r)
        return s1 / s * x - a1 * np.expm1(-h) * d

    def third(i, x, data):
        (_, s, lam), (a1, s1, lam1) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
        h, r1, r2 = lam1 - lam, 1 / 3, 2 / 3
        t1, t2 = PATH_TIME(lam + r1 * h), PATH_TIME(lam + r2 * h)
        (am, sm, _), (an, sn, _) = coefficients(t1), coefficients(t2)
        u = sm / s * x - am * np.expm1(-r1 * h) * data[0]
        first = denoise(t1, u) - data[0]
        v = sn / s * x - an * np.expm1(-r2 * h) * data[0] + r2 / r1 * an * (np.expm1(-r2 * h) / (r2 * h) + 1) * first
        second = denoise(t2, v) - data[0]
        return s1 / s * x - a1 * np.expm1(-h) * data[0] + a1 / r2 * (np.expm1(-h) / h + 1) * second

    compare(lambda: fs.solvers.DPMSolverPPSinglestep(2, r=0.4), steps_of(second, denoise))
    compare(lambda: fs.solvers.DPMSolverPPSinglestep(3), steps_of(third, denoise))


def PATH_TIME(level):
    """The VP time at lambda."""
    return vp_time(np.exp(-level))


def test_edm_heun(denoise):
    """In x/alpha and sigma/alpha, where the flow is EDM's."""

    def step(i, x, data):
        (a, s, _), (a1, s1, _) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
        rho, rho1 = s / a, s1 / a1
        scaled = x / a
        slope = (scaled - data[0]) / rho
        guess = scaled + (rho1 - rho) * slope
        slope_end = (guess - denoise(TIMES[i + 1], a1 * guess)) / rho1
        return a1 * (scaled + (rho1 - rho) * (slope + slope_end) / 2)

    compare(lambda: fs.solvers.EDMHeun(), steps_of(step, denoise))


@pytest.mark.parametrize(("order", "bh"), [(1, 2), (2, 2), (3, 2), (3, 1)])
def test_unipc(order, bh, denoise):
    predict, correct = unipc(order, bh)
    compare(lambda: fs.solvers.UniPC(order, bh=bh), steps_of(predict, denoise, corrector=correct))
    if order == 3:

        def lowered(i, x, data):
            left = len(TIMES) - 1 - i
            return unipc(min(order, left), bh)[0](i, x, data)

        def lowered_corrector(i, x, data, new):
            left = len(TIMES) - 1 - i
            return unipc(min(order, left), bh)[1](i, x, data, new)

        compare(
            lambda: fs.solvers.UniPC(order, bh=bh).for_times(jnp.asarray(TIMES)),
            steps_of(lowered, denoise, corrector=lowered_corrector),
        )
        compare(lambda: fs.solvers.UniPC(order, bh=bh, corrector=False), steps_of(predict, denoise))


def test_multistep_on_data_and_noise(denoise):
    def eps(t, x):
        alpha, sigma, _ = coefficients(t)
        return (x - alpha * denoise(t, x)) / sigma

    compare(
        lambda: fs.solvers.AdamsBashforth(3, variable=fs.solvers.LogSNR()), steps_of(exponential_lagrange(3), denoise)
    )
    compare(lambda: fs.solvers.AdamsBashforth(2), steps_of(ab_2_data_in_time, denoise))
    compare(lambda: fs.solvers.DEIS(3), steps_of(deis_3, eps))
    compare(lambda: fs.solvers.IPNDM(4), steps_of(ipndm_4, eps))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_sde_dpm_solver(eta, denoise):
    """The published eta is the square of this library's."""
    square = eta**2

    def step(i, x, data):
        (_, s, lam), (a1, s1, lam1) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
        h = lam1 - lam
        d = data[0]
        if i > 0:
            d = d + (data[0] - data[1]) / (2 * (lam - coefficients(TIMES[i - 1])[2]) / h)
        mean = s1 / s * np.exp(-square * h) * x - a1 * np.expm1(-(1 + square) * h) * d
        return mean + s1 * np.sqrt(-np.expm1(-2 * square * h)) * Z[i, 0]

    compare(lambda: fs.solvers.SDEDPMSolverPP(2), steps_of(step, denoise), lambda: fs.ReverseSDE(eta))


def test_sa_solver(denoise):
    """Predictor and corrector with tau = 0.8, the corrector with the predictor's noise."""
    tau = 0.8
    predict_mean = exponential_lagrange(2, tau**2)

    def noise(i):
        h = coefficients(TIMES[i + 1])[2] - coefficients(TIMES[i])[2]
        return coefficients(TIMES[i + 1])[1] * np.sqrt(-np.expm1(-2 * tau**2 * h)) * Z[i, 0]

    def predict(i, x, data):
        return predict_mean(i, x, data) + noise(i)

    def correct(i, x, data, new):
        (_, s, lam), (_, s1, lam1) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
        count = min(2, i + 1)
        nodes = [lam1, *(coefficients(TIMES[i - k])[2] for k in range(count))]
        out = s1 / s * np.exp(-(tau**2) * (lam1 - lam)) * x + noise(i)
        for j, d in enumerate((new, *data[:count])):
            weight = integrate.quad(
                lambda u: np.exp(u - tau**2 * (lam1 - u)) * (1 + tau**2) * lagrange(nodes, j, u),  # noqa: B023
                lam,
                lam1,
            )[0]
            out = out + s1 * weight * d
        return out

    compare(lambda: fs.solvers.SASolver(2), steps_of(predict, denoise, corrector=correct), lambda: fs.ReverseSDE(tau))


def test_er_sde(denoise):
    """In x/alpha: phi_s/phi_t x + phi_s int D d(-1/phi) + sqrt(rho_s^2 - rho_t^2 (phi_s/phi_t)^2) z."""

    def phi(rho):
        return rho * (np.exp(rho**0.3) + 10)

    def step(i, x, data):
        (a, s, _), (a1, s1, _) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
        rho, rho1 = s / a, s1 / a1
        count = min(3, i + 1)
        nodes = [coefficients(TIMES[i - k])[1] / coefficients(TIMES[i - k])[0] for k in range(count)]
        keep = phi(rho1) / phi(rho)
        out = keep * x / a
        for j in range(count):

            def integrand(u):
                # phi'/phi^2 by the logarithmic derivative
                log_slope = 1 / u + 0.3 * u**-0.7 * np.exp(u**0.3) / (np.exp(u**0.3) + 10)
                return lagrange(nodes, j, u) * log_slope / phi(u)  # noqa: B023

            out = out + phi(rho1) * integrate.quad(integrand, rho1, rho)[0] * data[j]
        return a1 * (out + np.sqrt(rho1**2 - (keep * rho) ** 2) * Z[i, 0])

    compare(lambda: fs.solvers.ERSDE(3), steps_of(step, denoise), fs.dynamics.ExtendedReverseSDE)


def test_seeds_2(denoise):
    def step(i, x, data):
        (_, s, lam), (a1, s1, lam1) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
        h, r = lam1 - lam, 0.5
        t = PATH_TIME(lam + r * h)
        am, sm, _ = coefficients(t)
        u = sm / s * np.exp(-r * h) * x - am * np.expm1(-2 * r * h) * data[0]
        u = u + sm * np.sqrt(-np.expm1(-2 * r * h)) * Z[i, 0]
        d = (1 - 1 / (2 * r)) * data[0] + denoise(t, u) / (2 * r)
        both = np.sqrt(np.exp(-2 * (1 - r) * h) - np.exp(-2 * h)) * Z[i, 0]
        both = both + np.sqrt(-np.expm1(-2 * (1 - r) * h)) * Z[i, 1]
        return s1 / s * np.exp(-h) * x - a1 * np.expm1(-2 * h) * d + s1 * both

    compare(lambda: fs.solvers.SEEDS2(), steps_of(step, denoise), lambda: fs.ReverseSDE(1.0))


def test_ancestral_is_ddpms(denoise):
    """Mean and variances of Ho et al., from beta = 1 - alpha_t^2/alpha_s^2."""
    for variance, large in ((fs.solvers.PosteriorVariance(), False), (fs.solvers.LargeVariance(), True)):

        def step(i, x, data):
            (a, s, _), (a1, s1, _) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
            beta = 1 - (a / a1) ** 2
            mean = a1 * beta / s**2 * data[0] + (a / a1) * s1**2 / s**2 * x
            return mean + np.sqrt(beta if large else beta * s1**2 / s**2) * Z[i, 0]  # noqa: B023

        compare(lambda: fs.solvers.Ancestral(variance), steps_of(step, denoise), fs.ReverseSDE)  # noqa: B023


def test_churn_is_edms(denoise):
    """In x/alpha: raise the noise by 1 + gamma, then Euler from there (here DDIM)."""
    gamma, s_noise = 0.3, 1.1

    def step(i, x, data):
        del data
        (a, s, _), (a1, s1, _) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
        rho, raised = s / a, s / a * (1 + gamma)
        hat = x / a + np.sqrt(raised**2 - rho**2) * s_noise * Z[i, 0]
        t = vp_time(raised)
        d = (hat - denoise(t, coefficients(t)[0] * hat)) / raised
        return a1 * (hat + (s1 / a1 - raised) * d)

    compare(
        lambda: fs.solvers.Churn(fs.solvers.DDIM(), gamma, s_noise=s_noise),
        steps_of(step, denoise),
        fs.dynamics.AddedNoise,
    )


def test_langevin_corrector_is_songs(denoise):
    """After a DDIM step, two steps x + e score + sqrt(2 e) z, with e = delta sigma^2."""
    delta = 0.08

    def step(i, x, data):
        (a, s, _), (a1, s1, _) = coefficients(TIMES[i]), coefficients(TIMES[i + 1])
        x = a1 * data[0] + s1 * (x - a * data[0]) / s
        for k in range(2):
            score = -(x - a1 * denoise(TIMES[i + 1], x)) / s1**2
            z = Z[i, k]
            length = delta * s1**2
            x = x + length * score + np.sqrt(2 * length) * z
        return x

    compare(
        lambda: fs.solvers.LangevinCorrector(fs.solvers.DDIM(), steps=2, step_size=delta),
        steps_of(step, denoise),
        fs.dynamics.AddedNoise,
    )


def test_restart_is_xus(denoise):
    """After the step that reaches t_min: up to t_max by fresh noise and down again by the solver, twice."""
    low, high = 0.56, 0.65
    down = [high, 0.6, TIMES[2]]

    def ddim(x, t, s):
        (a, b, _), (a1, b1, _) = coefficients(t), coefficients(s)
        d = denoise(t, x)
        return a1 * d + b1 * (x - a * d) / b

    def step(i, x, data):
        del data
        x = ddim(x, TIMES[i], TIMES[i + 1])
        if i == 1:
            (a, b, _), (ah, bh, _) = coefficients(TIMES[2]), coefficients(high)
            for k in range(2):
                x = ah / a * x + ah * np.sqrt((bh / ah) ** 2 - (b / a) ** 2) * Z[1, k]
                x = ddim(ddim(x, down[0], down[1]), down[1], down[2])
        return x

    compare(
        lambda: fs.solvers.Restart(fs.solvers.DDIM(), (low, high), repeats=2, grid=fs.grids.Given(down)),
        steps_of(step, denoise),
        fs.dynamics.AddedNoise,
    )
