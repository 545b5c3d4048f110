"""Bad input gets one clear sentence: what was given, what was wanted, what to do."""

import json
import re
import subprocess
import sys
import traceback

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import flowsolve as fs

KEY = jax.random.key(0)
LIKE = jax.ShapeDtypeStruct((2,), jnp.float32)
X = jnp.ones(2)


def network(t, x, args, *, key=None):
    return -x


FLOW = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
PID = diffrax.PIDController(rtol=1e-3, atol=1e-3)
SDE = fs.dynamics.ReverseSDE(1.0)


def flow(output=network, path=None, prediction=None):
    return fs.Flow(output, path or fs.paths.Linear(), prediction or fs.predictions.Velocity())


def sample(**settings):
    return fs.sample(FLOW, LIKE, **{"num": 2, "key": KEY, **settings})


def solve(**settings):
    return fs.solve(FLOW, X, **settings)


def tuned_solver():
    zeros = jnp.zeros(2)
    return fs.solvers.TunedMultistep(jnp.array([1.0, 0.5, 0.0]), jnp.array([1.0, 0.5]), zeros, zeros, jnp.zeros((2, 1)))


CASES = {
    "output_shape": (
        lambda: fs.solve(flow(lambda t, x, a, *, key=None: x[:1]), X),
        ValueError,
        r"float32\[1\].*batch axis",
    ),
    "output_dtype": (
        lambda: fs.solve(flow(lambda t, x, a, *, key=None: x.astype(jnp.bfloat16)), X),
        ValueError,
        "bfloat16.*casts its output back",
    ),
    "integer_x": (lambda: fs.solve(FLOW, jnp.ones(2, int)), TypeError, "x_start has dtype int32.*floating point"),
    "integer_like": (lambda: sample_like(jax.ShapeDtypeStruct((2,), jnp.int32)), TypeError, "like has dtype int32"),
    "python_like": (lambda: sample_like((2, 3)), TypeError, "like holds a int"),
    "t_start_outside": (lambda: solve(t_start=1.5), ValueError, "t_start is 1.5, outside Linear.*0 to t_noise = 1"),
    "t_end_outside": (lambda: solve(t_end=-0.1), ValueError, "t_end is -0.1, outside Linear"),
    "t_end_outside_vp": (
        lambda: fs.solve(flow(path=fs.paths.VP()), X, t_end=1e-5),
        ValueError,
        "t_end is 1e-05, outside VP, which runs from t_data = 0.0001",
    ),
    "wrong_way": (lambda: solve(t_start=0.2, t_end=0.8), ValueError, "from t = 0.2 to t = 0.8.*must fall"),
    "wrong_way_encode": (
        lambda: fs.encode(FLOW, X, t_start=0.8, t_end=0.2),
        ValueError,
        "from t = 0.8 to t = 0.2.*must rise",
    ),
    "grid_unsorted": (lambda: solve(grid=fs.grids.Given([1.0, 0.2, 0.5])), ValueError, "Given"),
    "grid_too_short": (lambda: solve(grid=fs.grids.Given([1.0])), ValueError, "Given"),
    "grid_outside": (lambda: solve(grid=fs.grids.Given([1.2, 0.5, 0.0])), ValueError, "outside"),
    "grid_no_steps": (lambda: fs.grids.Uniform(0), ValueError, "steps = 0.*at least 1"),
    "grid_class": (lambda: solve(grid=fs.grids.Uniform), TypeError, "grid is the class Uniform"),
    "grid_array": (lambda: solve(grid=jnp.linspace(1, 0, 5)), TypeError, "grid is a .*wants an instance"),
    "solver_class": (lambda: solve(solver=diffrax.Tsit5), TypeError, "solver is the class Tsit5"),
    "flow_is_network": (lambda: fs.solve(network, X), TypeError, "flow is a function.*Flow\\(network"),
    "sde_without_key": (
        lambda: solve(solver=diffrax.Euler(), dynamics=SDE, t_start=0.9),
        ValueError,
        "key is missing.*jax.random.key",
    ),
    "ancestral_without_key": (lambda: solve(solver=fs.solvers.DDIM(1.0)), ValueError, "key is missing"),
    "old_key": (lambda: sample(key=jax.random.PRNGKey(0)), TypeError, "typed key"),
    "no_error_estimate": (
        lambda: solve(solver=diffrax.Euler(), controller=PID),
        ValueError,
        "Euler has no error estimate.*grid=",
    ),
    "no_error_estimate_ddim": (
        lambda: solve(solver=fs.solvers.DDIM(), controller=PID),
        ValueError,
        "DDIM has no error",
    ),
    "fixed_controller": (
        lambda: solve(solver=diffrax.Tsit5(), controller=diffrax.ConstantStepSize()),
        TypeError,
        "pass grid=",
    ),
    "grid_and_controller": (
        lambda: solve(solver=diffrax.Tsit5(), controller=PID, grid=fs.grids.Uniform(3)),
        ValueError,
        "Both grid and controller",
    ),
    "sde_solver_on_ode": (
        lambda: solve(solver=diffrax.ShARK()),
        ValueError,
        "ShARK solves stochastic equations only.*ReverseSDE",
    ),
    "euler_heun_on_ode": (lambda: solve(solver=diffrax.EulerHeun()), ValueError, "EulerHeun solves stochastic"),
    "ode_solver_on_sde": (
        lambda: solve(solver=diffrax.Tsit5(), dynamics=SDE, key=KEY, t_start=0.9),
        ValueError,
        "Tsit5 does not converge for a stochastic equation",
    ),
    "split_solver": (lambda: solve(solver=diffrax.SemiImplicitEuler()), TypeError, "split or second-order"),
    "singular_start": (
        lambda: solve(solver=diffrax.Euler(), dynamics=SDE, key=KEY),
        ValueError,
        "At t_start = 1 on Linear.*drift of ReverseSDE is not finite",
    ),
    "singular_noise_start": (
        lambda: fs.solve(flow(prediction=fs.predictions.Noise()), X, solver=fs.solvers.DDIM()),
        ValueError,
        "At t_start = 1 on Linear.*denoised data is not finite from a Noise prediction",
    ),
    "singular_data_end": (
        lambda: fs.solve(flow(prediction=fs.predictions.Data()), X, solver=diffrax.Heun(), grid=fs.grids.Uniform(3)),
        ValueError,
        "At t_end = 0 on Linear.*from a Data prediction: move t_end inside",
    ),
    "backsolve_on_a_grid": (
        lambda: solve(adjoint=diffrax.BacksolveAdjoint()),
        ValueError,
        "BacksolveAdjoint solves backwards in time.*pass controller=",
    ),
    "saveat_backwards": (
        lambda: solve(saveat=diffrax.SaveAt(ts=jnp.array([0.1, 0.9]))),
        ValueError,
        "must run as the solve does, from t = 1 to 0",
    ),
    "saveat_list": (lambda: solve(saveat=[0.5]), TypeError, "saveat is a list"),
    "imex_solver": (lambda: solve(solver=diffrax.KenCarp3()), TypeError, "split or second-order"),
    "divergence_class": (
        lambda: fs.log_prob(FLOW, X, divergence=fs.divergence.Exact),
        TypeError,
        "divergence is the class Exact",
    ),
    "diffusion_as_eta": (lambda: fs.dynamics.ReverseSDE(lambda t: t), TypeError, r"ReverseSDE\(diffusion="),
    "batched_scale": (
        lambda: fs.guidance.ClassifierFree(FLOW, jnp.ones(2), jnp.asarray(0)),
        ValueError,
        r"array of shape \(2,\).*jax.vmap",
    ),
    "batched_time": (
        lambda: FLOW.velocity(jnp.array([0.1, 0.2]), jnp.ones((2, 2))),
        ValueError,
        r"array of shape \(2,\).*jax.vmap",
    ),
    "time_outside_flow": (lambda: FLOW.velocity(1.7, X), ValueError, "t is 1.7, outside Linear"),
    "no_null": (lambda: fs.guidance.ClassifierFree(FLOW, 1.0, None), ValueError, "null condition without arrays"),
    "negative_std": (lambda: sample(t_start=0.5, data_std=-1.0), ValueError, "data_std is -1.*>= 0"),
    "noise_level_twice": (
        lambda: solve(solver=fs.solvers.DDIM(1.0), dynamics=SDE, key=KEY),
        ValueError,
        "noise level was given twice",
    ),
    "order": (lambda: fs.solvers.UniPC(4), ValueError, "order = 4, but wants an integer from 1 to 3"),
    "order_one_singlestep": (lambda: fs.solvers.DPMSolverPPSinglestep(1), ValueError, r"wants 2 or 3: order 1 is"),
    "bh": (lambda: fs.solvers.UniPC(2, bh=3), ValueError, "bh = 3, but wants 1 or 2"),
    "extrapolate_score": (
        lambda: fs.solvers.AdamsBashforth(2, prediction=fs.predictions.Score()),
        ValueError,
        "prediction = Score, but extrapolates one of",
    ),
    "deis_sde": (lambda: solve(solver=fs.solvers.DEIS(), dynamics=SDE, key=KEY), ValueError, "DEIS does not converge"),
    "unipc_adaptive": (lambda: solve(solver=fs.solvers.UniPC(), controller=PID), ValueError, "no error estimate"),
    "sde_suite_without_key": (lambda: solve(solver=fs.solvers.SDEDPMSolverPP()), ValueError, "key is missing"),
    "ancestral_eta": (
        lambda: solve(solver=fs.solvers.Ancestral(), dynamics=fs.dynamics.ReverseSDE(0.5), key=KEY),
        ValueError,
        r"Ancestral steps through ReverseSDE\(1.0\) alone",
    ),
    "learned_variance_of_a_flow": (
        lambda: solve(solver=fs.solvers.Ancestral(fs.solvers.LearnedVariance()), key=KEY),
        TypeError,
        "predicts no variance",
    ),
    "churn_multistep": (lambda: fs.solvers.Churn(fs.solvers.UniPC(), 0.1), ValueError, "use a one-step solver"),
    "churn_gamma": (lambda: fs.solvers.Churn(fs.solvers.EDMHeun(), -0.1), ValueError, "wants a factor"),
    "churn_dynamics": (
        lambda: solve(solver=fs.solvers.Churn(fs.solvers.EDMHeun(), 0.1), dynamics=SDE, key=KEY),
        ValueError,
        "adds its own noise",
    ),
    "nested_wrappers": (
        lambda: fs.solvers.Restart(fs.solvers.Churn(fs.solvers.EDMHeun(), 0.1), (0.3, 0.6)),
        ValueError,
        "Restart got Churn, which adds noise of its own",
    ),
    "restart_interval": (
        lambda: fs.solvers.Restart(fs.solvers.EDMHeun(), (0.6, 0.3)),
        ValueError,
        r"t_min < t_max",
    ),
    "restart_outside": (
        lambda: solve(solver=fs.solvers.Restart(fs.solvers.EDMHeun(), (0.3, 0.6)), t_end=0.5, key=KEY),
        ValueError,
        "take an interval inside",
    ),
    "tuned_beside_its_grid": (
        lambda: fs.solvers.Churn(tuned_solver(), 0.1),
        ValueError,
        "steps through its own grid alone",
    ),
    "langevin_of_a_corrector": (
        lambda: fs.solvers.LangevinCorrector(fs.solvers.UniPC(2)),
        ValueError,
        "would undo what Langevin's steps do",
    ),
    "langevin_length": (
        lambda: fs.solvers.LangevinCorrector(fs.solvers.DDIM(), step_size=float("nan")),
        ValueError,
        "step_size = nan, but wants it positive",
    ),
    "langevin_without_noise": (
        lambda: solve(solver=fs.solvers.LangevinCorrector(fs.solvers.DDIM()), dynamics=fs.ProbabilityFlow(), key=KEY),
        ValueError,
        "draws noise, but was given ProbabilityFlow",
    ),
    "tune_steps": (
        lambda: fs.tuning.tune(FLOW, X, steps=0, key=KEY, progress=False),
        ValueError,
        "steps = 0, but wants an integer of at least 1",
    ),
    "tune_stochastic": (
        lambda: fs.tuning.tune(FLOW, X, steps=3, solver=fs.solvers.SASolver(), key=KEY, progress=False),
        ValueError,
        "learns on the probability flow, but got SASolver",
    ),
    "tune_args": (
        lambda: fs.tuning.tune(FLOW, X, steps=3, args=jnp.zeros(3), num=4, key=KEY, progress=False),
        ValueError,
        r"float32\[3\] for num = 4",
    ),
    "tune_rate": (
        lambda: fs.tuning.tune(FLOW, X, steps=3, learning_rate=-1.0, key=KEY, progress=False),
        ValueError,
        "learning_rate = -1.0, but wants it positive",
    ),
    "tune_in_jit": (
        lambda: jax.jit(lambda key: fs.tuning.tune(FLOW, X, steps=3, key=key, progress=False).grid.ts)(KEY),
        ValueError,
        "inside a JAX transformation",
    ),
    "churn_levels": (
        lambda: fs.solvers.Churn(fs.solvers.EDMHeun(), 0.1, s_min=5.0, s_max=1.0),
        ValueError,
        "wants s_min < s_max",
    ),
    "eta_nan": (lambda: fs.solvers.DDIM(float("nan")), ValueError, "outside"),
    "r_beyond_the_middle": (
        lambda: fs.solvers.DPMSolverPPSinglestep(2, r=0.9),
        ValueError,
        "r = 0.9, but wants a place above 0, up to 0.5",
    ),
    "variable_as_a_class": (
        lambda: fs.solvers.AdamsBashforth(2, variable=fs.solvers.Time),
        TypeError,
        "variable is the class Time",
    ),
    "variance_as_a_word": (lambda: fs.solvers.Ancestral("large"), TypeError, "variance is a str"),
    "restart_grid": (
        lambda: fs.solvers.Restart(fs.solvers.EDMHeun(), (0.3, 0.6), grid=4),
        TypeError,
        "grid is a int",
    ),
    "tune_grid": (
        lambda: fs.tuning.tune(FLOW, X, steps=3, grid=fs.grids.Uniform(4), key=KEY, progress=False),
        ValueError,
        "grid has 4 steps, but 3 are to be tuned",
    ),
    "tuned_on_another_grid": (
        lambda: solve(solver=tuned_solver(), grid=fs.grids.Uniform(3)),
        ValueError,
        "was tuned for its own grid of 2 steps",
    ),
    "ddim_eta": (lambda: fs.solvers.DDIM(1.5), ValueError, r"outside \[0, 1\]"),
    "ddim_eta_from_dynamics": (
        lambda: solve(solver=fs.solvers.DDIM(), dynamics=fs.dynamics.ReverseSDE(2.0), key=KEY),
        ValueError,
        r"outside \[0, 1\]",
    ),
    "negative_eta": (lambda: fs.dynamics.ReverseSDE(-0.5), ValueError, "eta = -0.5.*eta >= 0"),
    "num_zero": (lambda: sample(num=0), ValueError, "num = 0.*at least 1"),
    "num_float": (lambda: sample(num=2.0), ValueError, "num = 2.0"),
    "args_axis": (lambda: sample(args=jnp.arange(3)), ValueError, r"int32\[3\] for num = 2"),
    "encode_sde": (lambda: fs.encode(FLOW, X, solver=fs.solvers.DDIM(1.0)), ValueError, "encode follows"),
    "log_prob_ddim": (
        lambda: fs.log_prob(FLOW, X, solver=fs.solvers.DDIM()),
        ValueError,
        "cannot carry its log-density",
    ),
    "hutchinson_without_key": (
        lambda: fs.log_prob(FLOW, X, divergence=fs.divergence.Hutchinson()),
        ValueError,
        "key is missing",
    ),
    "hutchinson_probes": (lambda: fs.divergence.Hutchinson(0), ValueError, "num_probes = 0"),
    "bin_width": (lambda: fs.bits_per_dim(jnp.ones(()), 2, bin_width=0.0), ValueError, "bin_width is 0.0"),
    "batched_nothing": (lambda: fs.batched(3), TypeError, "batched got a int, but wants a function"),
    "batched_chunk": (lambda: fs.batched(fs.log_prob, chunk=0), ValueError, "chunk = 0, but wants an integer"),
    "batched_mesh": (lambda: sample(mesh="data"), TypeError, "mesh is a str"),
    "batched_lengths": (
        lambda: fs.batched(fs.log_prob)(FLOW, jnp.ones((4, 2)), jnp.ones(3)),
        ValueError,
        "wants one leading axis of the same length",
    ),
    "batched_keys": (
        lambda: fs.batched(lambda x, *, key: x)(jnp.arange(3.0), key=jax.random.split(jax.random.key(0), 4)),
        ValueError,
        r"key<fry>\[4\].*wants one leading axis of the same length",
    ),
    "batched_raw_key": (
        lambda: fs.batched(lambda x, *, key: x)(jnp.arange(3.0), key=jax.random.PRNGKey(0)),
        TypeError,
        "a typed key is wanted",
    ),
    "max_steps_text": (
        lambda: fs.solve(FLOW, X, controller=diffrax.PIDController(rtol=1e-3, atol=1e-3), max_steps="a"),
        ValueError,
        "max_steps = 'a', but wants an integer",
    ),
    "data_std_nan": (lambda: fs.paths.Linear().start(0.5, data_std=float("nan")), ValueError, "data_std is nan"),
    "batched_no_rows": (lambda: fs.batched(fs.log_prob)(FLOW, None), ValueError, "got no arrays"),
    "metric_shapes": (
        lambda: fs.metrics.energy_distance(jnp.ones((4, 2)), jnp.ones((4, 3))),
        ValueError,
        r"float32\[4, 2\] and float32\[4, 3\], but wants examples of the same structure and shapes",
    ),
    "metric_lengths": (
        lambda: fs.metrics.Moments.of({"x": jnp.ones((4, 2)), "y": jnp.ones(3)}),
        ValueError,
        "wants arrays of real numbers with one leading axis",
    ),
    "metric_dtype": (
        lambda: fs.metrics.energy_distance(jnp.ones((4, 2), complex), jnp.ones((4, 2))),
        TypeError,
        "wants arrays of real numbers",
    ),
    "metric_nan": (
        lambda: fs.metrics.wasserstein(jnp.full((4, 2), jnp.nan), jnp.ones((4, 2))),
        ValueError,
        "NaN or infinite",
    ),
    "metric_examples": (
        lambda: fs.metrics.precision_recall(jnp.ones((3, 2)), jnp.ones((3, 2)), neighbours=3),
        ValueError,
        "got 3 examples, but wants at least 4",
    ),
    "metric_block": (
        lambda: fs.metrics.energy_distance(jnp.ones((3, 2)), jnp.ones((3, 2)), block=0),
        ValueError,
        "block = 0, but wants an integer",
    ),
    "kernel_class": (
        lambda: fs.metrics.kernel_mmd(jnp.ones((3, 2)), jnp.ones((3, 2)), kernel=fs.metrics.Polynomial),
        TypeError,
        "kernel is the class Polynomial",
    ),
    "kernel_bandwidth": (lambda: fs.metrics.Gaussian([1.0, 0.0]), ValueError, "wants it positive and finite"),
    "frechet_features": (
        lambda: fs.metrics.frechet_distance(jnp.ones((3, 2)), jnp.ones((3, 2))),
        TypeError,
        r"wants metrics.Moments: Moments.of\(features\)",
    ),
    "frechet_sizes": (
        lambda: fs.metrics.frechet_distance(*(fs.metrics.Moments.of(jnp.ones((3, d))) for d in (2, 3))),
        ValueError,
        "got 2 and 3 features",
    ),
    "frechet_one": (
        lambda: fs.metrics.frechet_distance(*(fs.metrics.Moments.of(jnp.ones((n, 2))) for n in (1, 3))),
        ValueError,
        "a single example, which has no covariance",
    ),
    "wasserstein_sizes": (
        lambda: fs.metrics.wasserstein(jnp.ones((3, 2)), jnp.ones((4, 2))),
        ValueError,
        "3 and 4 examples, but assigns one to one",
    ),
    "sliced_order": (
        lambda: fs.metrics.sliced_wasserstein(jnp.ones((3, 2)), jnp.ones((3, 2)), key=KEY, order=0.5),
        ValueError,
        "order = 0.5, but wants a number of at least 1",
    ),
    "sliced_order_infinite": (
        lambda: fs.metrics.sliced_wasserstein(jnp.ones((3, 2)), jnp.ones((3, 2)), key=KEY, order=float("inf")),
        ValueError,
        "order = inf, but wants a number of at least 1, and finite",
    ),
    "shifted_number": (lambda: fs.times.Shifted(3, 1.0), TypeError, r"times is a int, but wants .*Uniform\(\)"),
    "times_num": (
        lambda: fs.times.Uniform().sample(fs.paths.Linear(), KEY, 2.5),
        ValueError,
        "num = 2.5, but wants an integer of at least 1",
    ),
    "stratified_class": (lambda: fs.times.Stratified(fs.times.Uniform), TypeError, "times is the class Uniform"),
    "source_number": (lambda: fs.sources.Source(3), TypeError, "draw = 3, but wants a function"),
    "source_density": (lambda: fs.sources.Source(network, 0), TypeError, "density = 0, but wants a function"),
    "sliced_key": (
        lambda: fs.metrics.sliced_wasserstein(jnp.ones((3, 2)), jnp.ones((3, 2)), key=None),
        ValueError,
        "key is missing",
    ),
    "sinkhorn_epsilon": (
        lambda: fs.metrics.sinkhorn_divergence(jnp.ones((3, 2)), jnp.ones((3, 2)), epsilon=0.0),
        ValueError,
        "epsilon = 0, but wants it positive",
    ),
    "sinkhorn_iterations": (
        lambda: fs.metrics.sinkhorn_divergence(
            jnp.arange(8.0).reshape(4, 2), jnp.arange(8.0).reshape(4, 2) ** 2, epsilon=1e-2, iterations=1
        ),
        ValueError,
        "did not reach its tolerance in iterations = 1",
    ),
    "classifier_folds": (
        lambda: fs.metrics.classifier_two_sample(jnp.ones((3, 2)), jnp.ones((9, 2)), key=KEY),
        ValueError,
        "got 3 examples, but wants at least 5",
    ),
    "classifier_rate": (
        lambda: fs.metrics.classifier_two_sample(jnp.ones((9, 2)), jnp.ones((9, 2)), key=KEY, learning_rate=-1.0),
        ValueError,
        "learning_rate that is not positive",
    ),
    "checkpoints_keep": (lambda: fs.checkpoints.Checkpoints("runs", keep=0), ValueError, "keep = 0, but wants"),
    "checkpoints_address": (
        lambda: fs.checkpoints.Checkpoints("gs://bucket/runs"),
        ValueError,
        "gs://bucket/runs is an address, but checkpoints want a directory",
    ),
    "checkpoints_of_a_flow": (
        lambda: fs.checkpoints.Checkpoints("runs").save(FLOW),
        TypeError,
        "state is a Flow, but wants a TrainState",
    ),
    "checkpoints_of_a_generator": (
        lambda: fs.checkpoints.Checkpoints("runs").save(train_state(), iter([X])),
        TypeError,
        "batches is a list_iterator, which has no get_state",
    ),
    "restore_nothing": (
        lambda: fs.checkpoints.Checkpoints("/nowhere").restore(train_state()),
        FileNotFoundError,
        "/nowhere has no checkpoint",
    ),
    "load_nothing": (lambda: fs.checkpoints.load("/nowhere", FLOW), FileNotFoundError, "no checkpoint at /nowhere"),
    "save_nothing": (lambda: fs.checkpoints.save("/tmp/nothing", FLOW), ValueError, "the tree has no arrays"),
    "foreign_terms": (
        lambda: diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y), fs.solvers.DDIM(), 0.0, 1.0, 0.1, jnp.ones(2)
        ),
        TypeError,
        "DDIM got the terms of another equation",
    ),
}


def train_state():
    network = fs.nn.ResidualMLP(LIKE, width=2, depth=1, key=KEY)
    return fs.training.init(flow(network), optax.sgd(0.1), key=KEY)


def sample_like(like):
    return fs.sample(FLOW, like, num=2, key=KEY)


def outcome(call):
    """(type, message, file of the last frame) of what a call raises."""
    try:
        call()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        return type(error).__name__, str(error), frames[-1].filename
    return "nothing", "", ""


IN_JIT = {
    "tuned_on_another_grid": (
        lambda t: solve(solver=tuned_solver(), grid=fs.grids.Given([1.0, t, 0.0])).ys,
        "was tuned for its own grid of 2 steps",
    ),
    "other_ends_of_two_points": (
        lambda t: solve(grid=fs.grids.Given([t, 0.1]), t_start=1.0, t_end=0.0).ys,
        "asked for other ends than its own",
    ),
    "churn": (lambda t: fs.solvers.Churn(fs.solvers.EDMHeun(), -t).gamma, "wants a factor"),
}


@pytest.mark.parametrize("name", IN_JIT)
def test_traced_values_are_checked_when_they_run(name):
    call, message = IN_JIT[name]
    with pytest.raises(RuntimeError, match=message):
        eqx.filter_jit(call)(jnp.asarray(0.3))


@pytest.mark.quick
def test_one_clear_sentence():
    """As a user has it, in a process without the tests' own checks of every annotation."""
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True)
    outcomes = json.loads(run.stdout.splitlines()[-1])
    wrong = []
    for name, (_, kind, message) in CASES.items():
        got_kind, got_message, file = outcomes[name]
        # No traceback into JAX's depths: the last frame is this library's.
        fine = got_kind == kind.__name__ and re.search(message, got_message) and "flowsolve" in file
        if not fine or len(got_message) > 450:
            wrong.append((name, got_kind, got_message, file))
    assert not wrong


if __name__ == "__main__":
    print(json.dumps({name: outcome(call) for name, (call, _, _) in CASES.items()}))
