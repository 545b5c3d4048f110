"""Solves and samples: same noise whatever the batch, times of the path, status, counts, gradients."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import gaussian_flow_map

import flowsolve as fs

LIKE = jax.ShapeDtypeStruct((8,), jnp.float32)
KEY = jax.random.key(3)
MEAN, COVARIANCE = np.array([0.4, -0.7]), np.array([[0.5, 0.2], [0.2, 0.3]])


class Mlp(eqx.Module):
    """A small network with a label, for what does not depend on the data's law."""

    layers: eqx.nn.MLP

    def __init__(self, key):
        self.layers = eqx.nn.MLP(10, 8, 32, 2, activation=jax.nn.silu, key=key)

    def __call__(self, t, x, args, *, key=None):
        label = jnp.zeros(()) if args is None else args.astype(x.dtype)
        return self.layers(jnp.concatenate([x, t[None], label[None]]))


FLOW = fs.Flow(Mlp(jax.random.key(0)), fs.paths.Linear(), fs.predictions.Velocity())
LABELS = jnp.arange(64) % 3
REQUESTS = {
    "ddim": {"solver": fs.solvers.DDIM(), "grid": fs.grids.Uniform(5)},
    "ancestral": {"solver": fs.solvers.DDIM(eta=1.0), "grid": fs.grids.Uniform(5)},
    "unipc": {"solver": fs.solvers.UniPC(2), "grid": fs.grids.Uniform(5)},
    "sa": {"solver": fs.solvers.SASolver(2), "grid": fs.grids.Uniform(5)},
    "restart": {
        "solver": fs.solvers.Restart(fs.solvers.EDMHeun(), (0.3, 0.6), grid=fs.grids.Uniform(2)),
        "grid": fs.grids.Uniform(5),
    },
    "adaptive": {"solver": diffrax.Tsit5(), "controller": diffrax.PIDController(rtol=1e-3, atol=1e-3)},
    "sde": {
        "solver": diffrax.ShARK(),
        "dynamics": fs.dynamics.ReverseSDE(eta=1.0),
        "grid": fs.grids.Uniform(5),
        "t_start": 0.9,
    },
}


def gaussian(path):
    return fs.testing.Gaussian(jnp.asarray(MEAN, float), COVARIANCE).flow(path, fs.predictions.Velocity())


# --- the same samples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_name", REQUESTS)
def test_samples_do_not_depend_on_num(request_name):
    """Bitwise for num = 2, 7, 64 and under the user's own vmap; to rounding at num = 1 (another XLA kernel)."""
    settings = REQUESTS[request_name]
    whole = fs.sample(FLOW, LIKE, num=64, key=KEY, args=LABELS, **settings)
    for num in (2, 7):
        part = fs.sample(FLOW, LIKE, num=num, key=KEY, args=LABELS[:num], **settings)
        np.testing.assert_array_equal(part, whole[:num])
    one = fs.sample(FLOW, LIKE, num=1, key=KEY, args=LABELS[:1], **settings)
    np.testing.assert_allclose(one, whole[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("request_name", REQUESTS)
def test_samples_are_those_of_a_vmapped_solve(request_name):
    settings = REQUESTS[request_name]
    whole = fs.sample(FLOW, LIKE, num=64, key=KEY, args=LABELS, **settings)

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(None, 0, 0))
    def one(flow, index, label):
        start_key, noise_key = jax.random.split(jax.random.fold_in(KEY, index))
        std = flow.path.start(settings.get("t_start", 1.0))[1]
        x = std * jax.random.normal(jax.random.split(start_key, 1)[0], (8,))
        return fs.solve(flow, x, label, key=noise_key, throw=False, **settings).ys[-1]

    np.testing.assert_array_equal(one(FLOW, jnp.arange(64), LABELS), whole)


@pytest.mark.quick
def test_start_noise_is_bitwise_the_same_for_every_num():
    """A network that does nothing hands the start noise through."""
    still = fs.Flow(lambda t, x, args, *, key=None: jnp.zeros_like(x), fs.paths.Linear(), fs.predictions.Velocity())
    draws = {n: fs.sample(still, LIKE, num=n, key=KEY, grid=fs.grids.Uniform(1)) for n in (1, 2, 7, 64)}
    for n, draw in draws.items():
        np.testing.assert_array_equal(draw, draws[64][:n])


@pytest.mark.quick
def test_step_noise_depends_on_the_step_and_not_on_rounding():
    ts = jnp.linspace(-1.0, 0.0, 11)
    noise = fs.brownian.StepNoise(LIKE, KEY, ts)
    moved = fs.brownian.StepNoise(LIKE, KEY, jnp.nextafter(ts, 1.0))
    first = noise.evaluate(ts[3], ts[4])
    np.testing.assert_allclose(moved.evaluate(moved.ts[3], moved.ts[4]), first, rtol=1e-5)
    assert not np.allclose(first, noise.evaluate(ts[4], ts[5]), atol=1e-2)
    middle = 0.5 * (ts[3] + ts[4])
    assert not np.allclose(first / jnp.sqrt(2.0), noise.evaluate(ts[3], middle), atol=1e-2)
    assert not np.allclose(first / jnp.sqrt(2.0), noise.evaluate(middle, ts[4]), atol=1e-2)


@pytest.mark.quick
def test_step_noise_by_the_number_of_a_step_is_that_over_the_step():
    """For every leaf, and the leaves are independent of each other."""
    ts = jnp.linspace(-1.0, 0.0, 11) ** 3
    noise = fs.brownian.StepNoise({"a": LIKE, "b": LIKE}, KEY, ts)
    for step in (0, 4, 9):
        increment, unit = noise.evaluate(ts[step], ts[step + 1]), noise.normal(jnp.asarray(step))
        scale = jnp.sqrt(ts[step + 1] - ts[step])
        for name in ("a", "b"):
            np.testing.assert_allclose(scale * unit[name], increment[name], rtol=1e-6)
        assert not np.allclose(unit["a"], unit["b"], atol=1e-2)


def test_step_noise_has_the_moments_of_brownian_motion():
    """W ~ N(0, h), H ~ N(0, h/12), K ~ N(0, h/720), independent, within 4 standard errors."""
    shape = jax.ShapeDtypeStruct((20_000,), jnp.float32)
    ts = jnp.array([-1.0, -0.6, 0.0])
    path = fs.brownian.StepNoise(shape, KEY, ts, diffrax.SpaceTimeTimeLevyArea)
    draws = [path.evaluate(ts[i], ts[i + 1], use_levy=True) for i in (0, 1)]
    rows = np.stack([np.asarray(part) for draw in draws for part in (draw.W, draw.H, draw.K)])
    variances = np.concatenate([np.array([1, 1 / 12, 1 / 720]) * h for h in (0.4, 0.6)])
    covariance = rows @ rows.T / rows.shape[1]
    scale = np.sqrt(np.outer(variances, variances) * (1 + np.eye(6)) / rows.shape[1])
    assert np.max(np.abs(covariance - np.diag(variances)) / scale) < 4
    assert np.max(np.abs(rows.mean(1)) / np.sqrt(variances / rows.shape[1])) < 4


# --- what comes back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [fs.paths.Linear(), fs.paths.VP(), fs.paths.EDM()], ids=["linear", "vp", "edm"])
def test_default_samples_have_the_datas_moments(path):
    """With nothing chosen: mean and covariance within 4 standard errors of the flow's own law."""
    x = np.asarray(fs.sample(gaussian(path), jax.ShapeDtypeStruct((2,), jnp.float32), num=4096, key=KEY), np.float64)
    ends = [gaussian_flow_map(path, MEAN, COVARIANCE, path.t_noise, path.t_data, e) for e in ([0, 0], [1, 0], [0, 1])]
    matrix = float(path.sigma(path.t_noise)) * np.stack([ends[1] - ends[0], ends[2] - ends[0]], 1)
    mean, covariance = ends[0], matrix @ matrix.T
    assert np.all(np.abs(x.mean(0) - mean) < 4 * np.sqrt(np.diag(covariance) / len(x)))
    variance = np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2
    assert np.all(np.abs(np.cov(x.T) - covariance) < 4 * np.sqrt(variance / len(x)))


def test_solution_is_in_path_time():
    path = fs.paths.VP()
    flow = gaussian(path)
    x = np.array([0.5, -1.5])
    ts = jnp.array([0.9, 0.5, 0.25])
    saveat = diffrax.SaveAt(ts=ts, dense=True, fn=lambda t, x, args: (t, x))
    controller = diffrax.PIDController(rtol=1e-6, atol=1e-6)
    sol = fs.solve(flow, jnp.asarray(x, jnp.float32), solver=diffrax.Tsit5(), controller=controller, saveat=saveat)
    saved_t, saved_x = sol.ys
    np.testing.assert_allclose(sol.ts, ts)
    np.testing.assert_allclose(saved_t, ts)
    assert (float(sol.t0), float(sol.t1)) == pytest.approx((1.0, 1e-4))
    for i, t in enumerate(ts):
        exact = gaussian_flow_map(path, MEAN, COVARIANCE, 1.0, float(t), x)
        np.testing.assert_allclose(saved_x[i], exact, atol=2e-4)
        np.testing.assert_allclose(sol.evaluate(t), exact, atol=2e-4)


def test_encode_then_solve_gives_the_data_back():
    """Both directions, on three paths, against the closed form in between (pitfall: the direction of time)."""
    tight = {"solver": diffrax.Tsit5(), "controller": diffrax.PIDController(rtol=1e-6, atol=1e-6)}
    for path in (fs.paths.Linear(), fs.paths.VP(), fs.paths.Trigonometric()):
        flow, x = gaussian(path), jnp.array([0.9, -0.2])
        noise = fs.encode(flow, x, **tight)
        exact = gaussian_flow_map(path, MEAN, COVARIANCE, path.t_data, path.t_noise, x)
        np.testing.assert_allclose(noise, exact, atol=2e-4)
        np.testing.assert_allclose(fs.solve(flow, noise, **tight).ys[-1], x, atol=2e-4)


def test_any_start_and_any_end():
    """From t_start below t_noise the moments are those of x_t; a solve may stop early."""
    path = fs.paths.Linear()
    oracle = fs.testing.Gaussian.isotropic(jnp.full((2,), 0.3), 0.4)
    flow = oracle.flow(path, fs.predictions.Velocity())
    like = jax.ShapeDtypeStruct((2,), jnp.float32)
    settings = {"data_mean": 0.3, "data_std": 0.4, "t_start": 0.6, "t_end": 0.2}
    x = np.asarray(fs.sample(flow, like, num=8192, key=KEY, grid=fs.grids.Uniform(20), **settings))
    mean, std = 0.8 * 0.3, np.sqrt(0.2**2 + (0.8 * 0.4) ** 2)
    assert abs(x.mean() - mean) < 4 * std / np.sqrt(x.size)
    assert abs(x.std() - std) < 4 * std / np.sqrt(2 * x.size) + 1e-3


def test_pytree_state_is_two_independent_solves():
    """A dictionary of arrays gives what its parts give, deterministic and stochastic, fixed and adaptive steps."""
    oracle = fs.testing.Gaussian.isotropic({"a": jnp.zeros(3), "b": jnp.ones((2, 2))}, 0.5)
    flow = oracle.flow(fs.paths.Linear(), fs.predictions.Velocity())
    x = {"a": jnp.arange(3.0), "b": jnp.ones((2, 2))}
    got = fs.solve(flow, x, grid=fs.grids.Uniform(8)).ys
    for name, mean in (("a", jnp.zeros(3)), ("b", jnp.ones((2, 2)))):
        alone = fs.testing.Gaussian.isotropic(mean, 0.5).flow(fs.paths.Linear(), fs.predictions.Velocity())
        np.testing.assert_allclose(got[name], fs.solve(alone, x[name], grid=fs.grids.Uniform(8)).ys, rtol=1e-5)
    for settings in (
        {"solver": diffrax.ShARK(), "grid": fs.grids.Uniform(50)},
        {"solver": diffrax.SPaRK(), "controller": diffrax.PIDController(rtol=1e-2, atol=1e-2)},
    ):
        settings = {**settings, "dynamics": fs.dynamics.ReverseSDE(1.0), "t_start": 0.9, "data_std": 0.5}
        samples = fs.sample(flow, oracle.like, num=256, key=KEY, **settings)
        assert abs(float(jnp.std(samples["a"])) - 0.5) < 4 * 0.5 / np.sqrt(2 * 3 * 256) + 0.01
        assert abs(float(jnp.mean(samples["b"])) - 1.0) < 4 * 0.5 / np.sqrt(4 * 256) + 0.05


def test_any_diffusion_keeps_the_marginals():
    """w(t) = 2t starts at t = 1 of Linear, where g^2 is infinite, and vanishes with sigma at t = 0."""
    oracle = fs.testing.Gaussian.isotropic(jnp.full((2,), 0.3), 0.4)
    flow = oracle.flow(fs.paths.Linear(), fs.predictions.Velocity())
    dynamics = fs.dynamics.ReverseSDE(diffusion=lambda t: 2 * t)
    settings = {"solver": diffrax.EulerHeun(), "dynamics": dynamics, "grid": fs.grids.Uniform(200)}
    x = np.asarray(fs.sample(flow, oracle.like, num=8192, key=KEY, **settings))
    assert abs(x.mean() - 0.3) < 4 * 0.4 / np.sqrt(x.size) + 2e-3
    assert abs(x.std() - 0.4) < 4 * 0.4 / np.sqrt(2 * x.size) + 4e-3
    eta = fs.dynamics.ReverseSDE(eta=1.0)
    same = fs.dynamics.ReverseSDE(diffusion=flow.path.g_squared)
    for t in (0.0, 0.3, 0.9):
        t = jnp.asarray(t)
        np.testing.assert_allclose(same.noise_weight(flow.path, t), eta.noise_weight(flow.path, t), rtol=1e-5)


# --- counts and status ----------------------------------------------------------------------------------------------

COUNTED = {
    "euler": (diffrax.Euler(), None),
    "heun": (diffrax.Heun(), None),
    "midpoint": (diffrax.Midpoint(), None),
    "bosh3": (diffrax.Bosh3(), None),
    "tsit5": (diffrax.Tsit5(), None),
    "dopri5": (diffrax.Dopri5(), None),
    "dopri8": (diffrax.Dopri8(), None),
    "reversible_heun": (diffrax.ReversibleHeun(), None),
    "ddim": (fs.solvers.DDIM(), None),
    "half": (diffrax.HalfSolver(diffrax.Euler()), None),
    "tsit5_adaptive": (diffrax.Tsit5(), diffrax.PIDController(rtol=1e-4, atol=1e-4)),
    "bosh3_adaptive": (diffrax.Bosh3(), diffrax.PIDController(rtol=1e-4, atol=1e-4)),
    "half_adaptive": (diffrax.HalfSolver(diffrax.Euler()), diffrax.PIDController(rtol=1e-2, atol=1e-2)),
    "euler_sde": (diffrax.Euler(), "sde"),
    "euler_heun_sde": (diffrax.EulerHeun(), "sde"),
    "ito_milstein": (diffrax.ItoMilstein(), "sde"),
    "stratonovich_milstein": (diffrax.StratonovichMilstein(), "sde"),
    "shark": (diffrax.ShARK(), "sde"),
    "sra1": (diffrax.SRA1(), "sde"),
    "sea": (diffrax.SEA(), "sde"),
    "spark": (diffrax.SPaRK(), "sde"),
    "slow_rk": (diffrax.SlowRK(), "sde"),
    "general_shark": (diffrax.GeneralShARK(), "sde"),
    "ddim_sde": (fs.solvers.DDIM(), "sde"),
}


@pytest.mark.parametrize("name", COUNTED)
def test_nfe_counts_the_calls_that_really_happen(name):
    """Against a counter on the host inside the network."""
    solver, how = COUNTED[name]
    calls = 0

    def count():
        nonlocal calls
        calls += 1

    def network(t, x, args, *, key=None):
        jax.debug.callback(count)
        return -x

    flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
    settings = {"controller": how} if isinstance(how, diffrax.PIDController) else {"grid": fs.grids.Uniform(6)}
    if how == "sde":
        settings = {**settings, "dynamics": fs.dynamics.ReverseSDE(0.5), "key": KEY, "t_start": 0.9}
    sol = fs.solve(flow, jnp.ones(3), solver=solver, **settings)
    jax.effects_barrier()
    assert int(sol.stats["nfe"]) == calls


def test_nfe_is_per_example_under_vmap():
    flow = gaussian(fs.paths.Linear())
    settings = {"solver": diffrax.Tsit5(), "controller": diffrax.PIDController(rtol=1e-3, atol=1e-3)}
    x = jnp.array([[0.0, 0.0], [30.0, -40.0]])
    batch = jax.vmap(lambda x: fs.solve(flow, x, throw=False, **settings).stats["nfe"])(x)
    alone = [int(fs.solve(flow, one, **settings).stats["nfe"]) for one in x]
    assert batch.tolist() == alone and alone[0] < alone[1]


@pytest.mark.quick
def test_a_nan_is_a_result_and_an_error():
    """A fixed-step solve does not notice NaN by itself; the other examples of the batch are right."""
    flow = fs.Flow(
        lambda t, x, args, *, key=None: jnp.where(args > 0, jnp.nan, -x), fs.paths.Linear(), fs.predictions.Velocity()
    )
    x, args = jnp.ones((3, 2)), jnp.array([0, 1, 0])
    sol = jax.vmap(lambda x, args: fs.solve(flow, x, args, grid=fs.grids.Uniform(3), throw=False))(x, args)
    failed = np.asarray(sol.result == diffrax.RESULTS.nonfinite)
    assert failed.tolist() == [False, True, False]
    assert np.isfinite(np.asarray(sol.ys)[[0, 2]]).all()
    with pytest.raises(RuntimeError, match=r"1 of 3 examples, the first is number 1: the state became NaN.*t_start"):
        fs.sample(flow, jax.ShapeDtypeStruct((2,), jnp.float32), num=3, key=KEY, args=args)
    with pytest.raises(RuntimeError, match="failed: the state became NaN"):
        fs.solve(flow, jnp.ones(2), jnp.asarray(1))
    with pytest.raises(RuntimeError, match="max_steps"):
        fs.solve(
            flow,
            jnp.ones(2),
            jnp.asarray(0),
            solver=diffrax.Tsit5(),
            controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
            max_steps=2,
        )


@pytest.mark.quick
def test_what_failed_is_nan_and_never_a_partial_answer():
    """`sample`, `encode` and `log_prob` with throw=False, when the steps run out."""
    flow = gaussian(fs.paths.Linear())
    settings = {"solver": diffrax.Tsit5(), "controller": diffrax.PIDController(rtol=1e-5, atol=1e-5), "max_steps": 3}
    x = jnp.array([0.3, 0.2])
    assert np.isnan(
        fs.sample(flow, jax.ShapeDtypeStruct((2,), jnp.float32), num=2, key=KEY, throw=False, **settings)
    ).all()
    assert np.isnan(fs.encode(flow, x, throw=False, **settings)).all()
    assert np.isnan(fs.log_prob(flow, x, throw=False, **settings))


def test_half_precision_is_raised_before_noise_is_drawn():
    still = fs.Flow(lambda t, x, args, *, key=None: jnp.zeros_like(x), fs.paths.Linear(), fs.predictions.Velocity())
    x = fs.sample(still, jax.ShapeDtypeStruct((4096,), jnp.bfloat16), num=1, key=KEY, grid=fs.grids.Uniform(1))
    assert x.dtype == jnp.float32 and len(np.unique(x)) > 4000


def test_a_controllers_own_times_are_path_times():
    controller = diffrax.ClipStepSizeController(
        diffrax.PIDController(rtol=1e-2, atol=1e-2), step_ts=jnp.array([0.7, 0.3])
    )
    saveat = diffrax.SaveAt(steps=True)
    ts = fs.solve(
        gaussian(fs.paths.Linear()),
        jnp.ones(2),
        solver=diffrax.Tsit5(),
        controller=controller,
        saveat=saveat,
        max_steps=64,
    ).ts
    for t in (0.7, 0.3):
        assert np.min(np.abs(np.asarray(ts) - t)) < 1e-6


def test_half_solver_around_a_runge_kutta_solver():
    controller = diffrax.PIDController(rtol=1e-4, atol=1e-4)
    sol = fs.solve(
        gaussian(fs.paths.Linear()), jnp.ones(2), solver=diffrax.HalfSolver(diffrax.Heun()), controller=controller
    )
    exact = gaussian_flow_map(fs.paths.Linear(), MEAN, COVARIANCE, 1.0, 0.0, np.ones(2))
    np.testing.assert_allclose(sol.ys[-1], exact, atol=1e-3)


def test_ddim_inside_a_users_jit():
    """eta = 0 needs no key there either, and the gradient in eta is finite at 1."""
    flow, grid = gaussian(fs.paths.Linear()), fs.grids.Uniform(4)
    plain = fs.solve(flow, jnp.ones(2), solver=fs.solvers.DDIM(), grid=grid).ys
    inside = jax.jit(lambda x: fs.solve(flow, x, solver=fs.solvers.DDIM(0.0), grid=grid, throw=False).ys)(jnp.ones(2))
    np.testing.assert_allclose(inside, plain, rtol=1e-5)

    def value(eta):
        return jnp.sum(fs.solve(flow, jnp.ones(2), solver=fs.solvers.DDIM(eta), grid=grid, key=KEY, throw=False).ys)

    assert np.isfinite(jax.grad(value)(1.0))


# --- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ode", "ancestral", "sde"])
def test_gradients_through_a_solve_agree_with_finite_differences(name, x64):
    """Also through a fixed-step stochastic solve, whose noise the backward pass sees again."""
    settings = {
        "ode": {"grid": fs.grids.Uniform(4)},
        "ancestral": {"solver": fs.solvers.DDIM(1.0), "grid": fs.grids.Uniform(4), "key": KEY},
        "sde": {
            "solver": diffrax.Euler(),
            "dynamics": fs.dynamics.ReverseSDE(1.0),
            "grid": fs.grids.Uniform(4),
            "key": KEY,
            "t_start": 0.9,
        },
    }[name]
    x = jnp.array([0.4, -1.0])

    @eqx.filter_jit
    def value(shift, x):
        network = lambda t, x, args, *, key=None: jnp.tanh(x + shift) * (1 + t)  # noqa: E731
        flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
        return jnp.sum(fs.solve(flow, x, throw=False, **settings).ys[-1] ** 2)

    shift, step = jnp.asarray(0.3), 1e-5
    gradient = jax.grad(value)(shift, x)
    difference = (value(shift + step, x) - value(shift - step, x)) / (2 * step)
    np.testing.assert_allclose(gradient, difference, rtol=1e-6)


@pytest.mark.parametrize("adjoint", [diffrax.DirectAdjoint(), diffrax.BacksolveAdjoint(), diffrax.ForwardMode()])
def test_every_adjoint_gives_the_same_gradient(adjoint):
    settings = {"solver": diffrax.Tsit5(), "controller": diffrax.PIDController(rtol=1e-5, atol=1e-5)}
    if not isinstance(adjoint, diffrax.BacksolveAdjoint):
        settings = {"grid": fs.grids.Uniform(4)}

    def value(x, adjoint=None):
        return jnp.sum(fs.solve(FLOW, x, adjoint=adjoint, throw=False, **settings).ys[-1] ** 2)

    x = jnp.linspace(-1.0, 1.0, 8)
    differentiate = jax.jacfwd if isinstance(adjoint, diffrax.ForwardMode) else jax.grad
    np.testing.assert_allclose(differentiate(value)(x, adjoint), jax.grad(value)(x), rtol=1e-3, atol=1e-4)
