"""Solvers on the probability flow: orders, ends, counts and dense output, against closed forms on a Gaussian."""

import collections
import itertools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import PATHS, SOLVERS, gaussian_flow_map

import flowsolve as fs
from flowsolve.solvers.nodes import mixture_of, step_to

COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.3]])
MEAN = np.array([0.4, -0.7])


def gaussian(path, prediction=None):
    prediction = fs.predictions.Velocity() if prediction is None else prediction
    return fs.testing.Gaussian(jnp.asarray(MEAN, float), COVARIANCE).flow(path, prediction)


# --- order ----------------------------------------------------------------------------------------------------------

ORDERS = {
    "euler": (diffrax.Euler(), 1),
    "heun": (diffrax.Heun(), 2),
    "tsit5": (diffrax.Tsit5(), 5),
    "ddim_zero": (fs.solvers.DDIM(eta=0.0), 1),
} | {name: row[:2] for name, row in SOLVERS.items()}
# ln alpha of a discrete path has kinks between its steps, which no high order survives.
SMOOTH = [name for name in PATHS if not name.startswith("discrete")]
# All solvers on three paths, and one of each kind on the others.
EVERYWHERE = ("euler", "heun", "tsit5", "ddim", "unipc_2")
CASES = [(path, name) for path in SMOOTH for name in ORDERS if path in ("linear", "vp", "edm") or name in EVERYWHERE]
# Constant coefficients are right for equal steps in sigma/alpha, which is the time of EDM.
HIGHER = {("edm", "ipndm_4"): 4}


def history_times(solver, t_start, step):
    """The times of the evaluations that a solver looks back at when it starts at `t_start`."""
    size = solver.max_order if isinstance(solver, fs.solvers.AdaptiveUniPC) else getattr(solver, "history", 0)
    return t_start + step * jnp.arange(1.0, size + 1)


def exact_history(flow, solver, t_start, x, step, earlier):
    """The solver's state as if it had come along the exact solution, through `earlier`, with equal steps.

    From an empty history the first steps are of lower order, and an Euler step caps a solve at order 2.
    """
    state = solver.init(fs.dynamics.ProbabilityFlow().terms(flow), -t_start, step - t_start, x, None)
    if len(earlier) == 0:
        return state
    extrapolated = getattr(solver, "extrapolated", fs.predictions.Data())

    def value(t, x):
        return flow.mixture(mixture_of(extrapolated, t), t, x)

    ts = history_times(solver, t_start, step)
    values = tuple(value(t, x) for t, x in zip(ts, earlier, strict=True))
    valid = jnp.ones(len(values), bool)
    kept = lambda s: getattr(s, "history", s)  # noqa: E731
    state = eqx.tree_at(lambda s: (kept(s).values, s.ts, s.valid), state, (values, ts, valid))
    if getattr(kept(state), "base", None) is not None:
        # The corrector is to find the exact state at the start.
        step_before = step_to(
            flow.path, fs.ProbabilityFlow(), t_start, jnp.append(ts, t_start), jnp.ones(len(values) + 1, bool)
        )
        others = (*values[1:], value(t_start, x))
        correction = sum(w * (v - values[0]) for w, v in zip(solver.corrector(step_before), others, strict=True))
        state = eqx.tree_at(lambda s: s.history.base, state, x - correction)
    return state


@eqx.filter_jit
def equal_steps(flow, solver, t_start, t_end, x, steps, earlier):
    """The solver's own steps, any number of them in one program, from an exact history."""
    terms = fs.dynamics.ProbabilityFlow().terms(flow)
    step = (t_start - t_end) / steps

    def advance(number, now):
        x, state = now
        s0, s1 = number * step - t_start, (number + 1) * step - t_start
        x, _, _, state, _ = solver.step(terms, s0, s1, x, None, state, False)
        return x, state

    state = exact_history(flow, solver, t_start, x, step, earlier)
    return jax.lax.fori_loop(0, steps, advance, (x, state))[0]


def exact_points(path, t_from, ts, x):
    """The exact solution through x at `t_from`, at other times."""
    points = [gaussian_flow_map(path, MEAN, COVARIANCE, t_from, t, x) for t in np.asarray(ts)]
    return jnp.asarray(np.reshape(points, (len(points), 2)))


def measured_order(path, solver, most_steps=128):
    """log2 of the error's ratio at the last doubling of the steps that rounding does not reach."""
    flow = gaussian(path)
    # A solver's numbers were made before x64 was on.
    solver = jax.tree.map(lambda leaf: leaf.astype(float) if eqx.is_inexact_array(leaf) else leaf, solver)
    # From sigma/alpha = 3 to 1, where every path is smooth and the leading error term rules.
    t_start, t_end = path.time_at(1.0, 3.0), path.time_at(1.0, 1.0)
    x = jnp.array([1.2, -0.5]) * path.start(t_start, data_std=0.6)[1]
    exact = gaussian_flow_map(path, MEAN, COVARIANCE, t_start, t_end, x)
    # With fewer steps a history would lie beyond the noise of some paths.
    errors, steps = [], 16 if len(history_times(solver, t_start, 0.0)) else 8
    while steps <= most_steps and (not errors or errors[-1] > 2e-13):
        earlier = exact_points(path, t_start, history_times(solver, t_start, (t_start - t_end) / steps), x)
        final = equal_steps(flow, solver, t_start, t_end, x, jnp.asarray(steps), earlier)
        errors.append(np.linalg.norm(final - exact))
        steps *= 2
    return float(np.log2(errors[-2] / errors[-1]))


@pytest.mark.parametrize(("path", "solver"), CASES)
def test_order(path, solver, x64):
    order = HIGHER.get((path, solver), ORDERS[solver][1])
    assert abs(measured_order(PATHS[path], ORDERS[solver][0]) - order) < 0.3


@pytest.mark.parametrize("name", ["dpm_3m", "deis_4", "ab_4_data"])
def test_an_euler_start_of_ordinary_length_leaves_order_two(name, x64):
    """What the docstrings say of an empty history: its one first-order step stays in the error of the whole solve."""
    path, t_start, t_end = PATHS["vp"], jnp.asarray(0.4), jnp.asarray(0.1)
    flow, x = gaussian(path), jnp.array([1.2, -0.5])
    exact = gaussian_flow_map(path, MEAN, COVARIANCE, t_start, t_end, x)
    ends = [
        equal_steps(flow, SOLVERS[name][0], t_start, t_end, x, jnp.asarray(n), jnp.zeros((0, 2))) for n in (64, 128)
    ]
    errors = [np.linalg.norm(end - exact) for end in ends]
    assert abs(np.log2(errors[0] / errors[1]) - 2) < 0.3


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


@eqx.filter_jit
def diffeqsolve(flow, solver, t_start, t_end, x, step, state=None, ts=None):
    """The user's own `diffeqsolve` on the library's terms: the end, or the states at `ts`."""
    terms = fs.dynamics.ProbabilityFlow().terms(flow)
    saveat = diffrax.SaveAt(t1=True) if ts is None else diffrax.SaveAt(ts=-ts)
    sol = diffrax.diffeqsolve(
        terms, solver, -t_start, -t_end, step, x, max_steps=None, solver_state=state, saveat=saveat
    )
    return sol.ys if ts is not None else sol.ys[-1]


BACKWARDS = ("ddim", "dpm_2m", "unipc_3", "deis_3", "ab_2_data", "ab_3_velocity", "dpm_3s", "adaptive_unipc_3")


@pytest.mark.parametrize("name", ["euler", *BACKWARDS])
def test_encoding_in_a_plain_diffeqsolve(name, x64):
    """Diffrax negates time where t0 > t1, which a solver must undo."""
    path = fs.paths.VP()
    flow = gaussian(path)
    x = jnp.array([0.2, -0.4])
    exact = gaussian_flow_map(path, MEAN, COVARIANCE, 0.1, 0.9, x)
    solver, order = ORDERS[name]
    got = diffeqsolve(flow, solver, jnp.asarray(0.1), jnp.asarray(0.9), x, jnp.asarray(-0.8 / 1000))
    np.testing.assert_allclose(got, exact, rtol=6e-3 if order == 1 else 1e-4)


# --- ends, counts, traces -------------------------------------------------------------------------------------------

NOISY = {
    "ddim_eta": fs.solvers.DDIM(1.0),
    "ancestral": fs.solvers.Ancestral(),
    "ancestral_large": fs.solvers.Ancestral(fs.solvers.LargeVariance()),
    "sde_dpm_2m": fs.solvers.SDEDPMSolverPP(2),
    "sa_3": fs.solvers.SASolver(3),
    "er_sde_3": fs.solvers.ERSDE(3),
    "seeds_2": fs.solvers.SEEDS2(),
    "churn": fs.solvers.Churn(fs.solvers.EDMHeun(), 0.2),
    "restart": fs.solvers.Restart(fs.solvers.DPMSolverPP(2), (0.3, 0.6), repeats=2, grid=fs.grids.Uniform(3)),
    "langevin": fs.solvers.LangevinCorrector(fs.solvers.DDIM(1.0), steps=2),
}
ENDS = [(name, False) for name in SOLVERS] + [(name, True) for name in NOISY]


class Counted(eqx.Module):
    """A flow that counts its traces and its evaluations."""

    flow: fs.AbstractFlow
    counts: collections.Counter = eqx.field(static=True)

    def __call__(self, t, x, args=None, *, key=None):
        self.counts["traces"] += 1
        jax.debug.callback(lambda _: self.counts.update(evaluations=1), x)
        return self.flow.output(t, x, args)


@pytest.fixture
def standard_promotion():
    """Under strict promotion Diffrax's check of the terms traces the network once more, by itself."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(("name", "noisy"), ENDS)
def test_ends_counts_and_traces(name, noisy, standard_promotion):
    """On Linear from alpha = 0 onto sigma = 0: finite in value and gradient; evaluations as asked; one trace."""
    solver = NOISY[name] if noisy else SOLVERS[name][0]
    dynamics = None if noisy else fs.ProbabilityFlow()
    counts = collections.Counter()
    flow = gaussian(fs.paths.Linear())
    counted = fs.Flow(Counted(flow, counts), flow.path, flow.prediction)
    x = jnp.array([0.3, -2.0])
    settings = {"solver": solver, "dynamics": dynamics, "key": jax.random.key(0) if noisy else None}
    # A new shape of state, so that no other test's trace is found again.
    sol = fs.solve(counted, x, grid=fs.grids.Uniform(5), **settings)
    jax.effects_barrier()
    assert np.all(np.isfinite(sol.ys))
    assert counts["evaluations"] == sol.stats["nfe"]
    assert counts["traces"] == 1 + (name == "ancestral_learned")
    per_step = solver.evaluations_per_step
    extra = {"adaptive_unipc_3": 1, "restart": 6}.get(name, 0)
    assert sol.stats["nfe"] == 5 * per_step + extra
    if not noisy:
        assert per_step == SOLVERS[name][2]

    def total(x):
        return jnp.sum(fs.solve(flow, x, grid=fs.grids.Uniform(5), throw=False, **settings).ys)

    assert np.all(np.isfinite(jax.grad(total)(x)))


def one_step_and_denoised(name, noisy):
    """(the end of one step onto clean data, the denoised prediction), from pure noise and from another level."""
    solver = NOISY[name] if noisy else SOLVERS[name][0]
    settings = {
        "solver": solver,
        "dynamics": None if noisy else fs.ProbabilityFlow(),
        "key": jax.random.key(0) if noisy else None,
        "grid": fs.grids.Uniform(1),
    }
    x = jnp.array([0.3, -2.0])
    for path in (fs.paths.Linear(), fs.paths.EDM()):
        flow = gaussian(path)
        for t in (path.t_noise, path.time_at(1.0, 2.0)):
            if name == "churn" and t != path.t_noise:
                continue  # it is raised to another state first
            start = path.sigma(t) * x
            yield fs.solve(flow, start, t_start=t, t_end=0.0, **settings).ys[-1], flow.denoised(t, start)


ONE_STEP = [row for row in ENDS if row[0] not in ("restart", "adaptive_unipc_3")]


@pytest.mark.parametrize(("name", "noisy"), ONE_STEP)
def test_one_step_is_the_denoised_prediction(name, noisy):
    """No noise is added, nothing extrapolated."""
    for got, denoised in one_step_and_denoised(name, noisy):
        np.testing.assert_allclose(got, denoised, rtol=2e-5)


# --- dense output, jumps, adaptive steps ----------------------------------------------------------------------------

# name -> the order of the dense output, between steps
DENSE = {
    "ddim": 1,
    "dpm_2m": 2,
    "dpm_3m": 3,
    "unipc_3": 3,
    "deis_3": 3,
    "ab_2_data": 2,
    "dpm_3s": 2,
    "edm_heun": 2,
    "adaptive_unipc_3": 4,
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_output_has_its_order(name, x64):
    """The largest error over times inside the steps, none of which is the end of one."""
    path, solver = fs.paths.Linear(), SOLVERS[name][0]
    flow = gaussian(path)
    t_start, t_end = path.time_at(1.0, 3.0), path.time_at(1.0, 1.0)
    x = jnp.array([1.2, -0.5])
    places = t_start + (t_end - t_start) * jnp.asarray((np.arange(128) + 0.37) / 128)
    exact = np.stack([gaussian_flow_map(path, MEAN, COVARIANCE, t_start, t, x) for t in places])
    errors = []
    for steps in (32, 64):
        step = (t_start - t_end) / steps
        earlier = exact_points(path, t_start, history_times(solver, t_start, step), x)
        state = eqx.filter_jit(exact_history)(flow, solver, t_start, x, step, earlier)
        errors.append(np.abs(diffeqsolve(flow, solver, t_start, t_end, x, step, state, places) - exact).max())
    assert np.log2(errors[0] / errors[1]) > DENSE[name] - 0.3


def test_dense_solution_of_the_whole_solve(x64):
    """`SaveAt(dense=True)` keeps the formula of every step, on a path of callables too."""
    path = fs.paths.Path(lambda t: 1 - t, lambda t: t)
    flow = gaussian(path)
    x = jnp.array([1.2, -0.5])
    settings = {"solver": fs.solvers.DPMSolverPP(2), "grid": fs.grids.Uniform(100), "t_start": 0.8, "t_end": 0.2}
    sol = fs.solve(flow, x, saveat=diffrax.SaveAt(dense=True), **settings)
    for t in (0.7777, 0.5, 0.2001):
        exact = gaussian_flow_map(path, MEAN, COVARIANCE, 0.8, t, x)
        np.testing.assert_allclose(sol.evaluate(jnp.asarray(t)), exact, rtol=3e-4)


def test_a_jump_drops_the_history(x64):
    flow = gaussian(fs.paths.Linear())
    terms = fs.dynamics.ProbabilityFlow().terms(flow)
    x = jnp.array([1.2, -0.5])
    for name in ("dpm_3m", "unipc_2", "deis_3", "adaptive_unipc_3"):
        solver = SOLVERS[name][0]

        @eqx.filter_jit
        def step(t, size, x, state, made_jump, solver=solver):
            x, _, _, state, _ = solver.step(terms, -t, -t + size, x, None, state, made_jump)
            return x, state

        go_on, jump = jnp.asarray(False), jnp.asarray(True)
        empty = state = eqx.filter_jit(solver.init)(terms, -0.8, -0.7, x, None)
        for t in (0.95, 0.9, 0.85):
            _, state = step(jnp.asarray(t), jnp.asarray(0.05), 1.1 * x, state, go_on)
        now = jnp.asarray(0.8), jnp.asarray(0.1), x
        expected, kept, dropped = step(*now, empty, go_on)[0], step(*now, state, go_on)[0], step(*now, state, jump)[0]
        np.testing.assert_allclose(dropped, expected, rtol=1e-12)
        assert np.abs(kept - expected).max() > 1e-4


def test_a_wrapped_solver_knows_where_the_grid_ends():
    """UniPC lowers its order at the end of the grid, also inside a wrapper that adds next to nothing."""
    flow, x, grid = gaussian(fs.paths.Linear()), jnp.array([1.2, -0.5]), fs.grids.Uniform(5)
    lowered, kept = (fs.solvers.UniPC(3, corrector=False, lower_order_final=final) for final in (True, False))
    wrapped = fs.solvers.LangevinCorrector(lowered, step_size=1e-14)
    got = fs.solve(flow, x, solver=wrapped, grid=grid, key=jax.random.key(0)).ys[-1]
    np.testing.assert_allclose(got, fs.solve(flow, x, solver=lowered, grid=grid).ys[-1], rtol=1e-5)
    assert np.abs(got - fs.solve(flow, x, solver=kept, grid=grid).ys[-1]).max() > 1e-3


def test_half_solver_around_a_multistep():
    """Its half steps lie beside the grid, of which it is not told; the estimate keeps the tolerance."""
    flow, x = gaussian(fs.paths.VP()), jnp.array([1.2, -0.5])
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    sol = fs.solve(flow, x, solver=diffrax.HalfSolver(fs.solvers.UniPC(2, corrector=False)), controller=controller)
    exact = gaussian_flow_map(flow.path, MEAN, COVARIANCE, flow.path.t_noise, flow.path.t_data, x)
    np.testing.assert_allclose(sol.ys[-1], exact, atol=1e-2)


ADAPTIVE = ("dpm_2s", "dpm_3s", "edm_heun", "adaptive_unipc_3")


@pytest.mark.parametrize("path", ["linear", "vp", "edm"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_steps_keep_the_tolerance(name, path):
    """The whole path, from its noise to its data: the error is a few tolerances, and rejected steps do no harm."""
    path, solver = PATHS[path], SOLVERS[name][0]
    flow = gaussian(path)
    x = jnp.array([1.2, -0.5]) * path.sigma(path.t_noise)
    exact = gaussian_flow_map(path, MEAN, COVARIANCE, path.t_noise, path.t_data, x)
    for tolerance in (1e-2, 1e-4):
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        sol = fs.solve(flow, x, solver=solver, controller=controller)
        assert np.abs(sol.ys[-1] - exact).max() < 10 * tolerance
        assert sol.stats["num_rejected_steps"] > 0


def test_rejected_steps_leave_no_trace(x64):
    """A solve through the accepted steps alone gives the adaptive solve's answer."""
    flow = gaussian(fs.paths.EDM())
    x = 80 * jnp.array([1.2, -0.5])
    terms = fs.dynamics.ProbabilityFlow().terms(flow)
    solver = fs.solvers.AdaptiveUniPC(3)
    controller = diffrax.PIDController(rtol=1e-4, atol=1e-4)
    saveat = diffrax.SaveAt(steps=True, t0=True)
    sol = diffrax.diffeqsolve(terms, solver, -80.0, -0.002, None, x, stepsize_controller=controller, saveat=saveat)
    assert sol.stats["num_rejected_steps"] > 5
    ts = sol.ts[jnp.isfinite(sol.ts)]
    again = diffrax.diffeqsolve(terms, solver, ts[0], ts[-1], None, x, stepsize_controller=diffrax.StepTo(ts))
    np.testing.assert_allclose(again.ys[-1], sol.ys[len(ts) - 1], rtol=1e-10)


if __name__ == "__main__":  # the measured orders, then how near one step is to the denoised prediction
    with jax.enable_x64(True):
        for name, (solver, order) in ORDERS.items():
            paths = [path for path, other in CASES if other == name]
            orders = [f"{path} {measured_order(PATHS[path], solver):.2f}" for path in paths]
            print(f"{name}, order {order}: " + ", ".join(orders), flush=True)
    for row in ONE_STEP:
        worst = max(np.max(np.abs(got / denoised - 1)) for got, denoised in one_step_and_denoised(*row))
        print(f"{row[0]}: one step is {worst:.1e} from the denoised prediction", flush=True)
