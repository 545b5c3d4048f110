"""What makes JAX compile again, and what does not, for each entry point: one table.

A number that a user sweeps is an array all the way down, also where it was given as a Python float. What sets shapes or
the program's structure compiles again, and so does a number of a path, which stays a plain number so that a gradient of
a flow is that of its network. The network itself is traced once for all programs that call it with the same shapes.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import flowsolve as fs

LIKE = jax.ShapeDtypeStruct((2,), jnp.float32)
X = jnp.array([0.3, -0.2])
KEY = jax.random.key(0)
SDE = fs.dynamics.ReverseSDE


class Counted(eqx.Module):
    """A network that keeps count of its traces."""

    scale: jax.Array
    traces: list[None] = eqx.field(static=True)

    def __call__(self, t, x, args, *, key=None):
        self.traces.append(None)
        shift = 0 if args is None else args.astype(x.dtype)
        return self.scale * jnp.tanh(x) * t + shift


def pid(tolerance):
    return diffrax.PIDController(rtol=tolerance, atol=tolerance)


def sample(flow, **settings):
    fs.sample(flow, LIKE, **{"num": 2, "key": KEY, "grid": fs.grids.Uniform(3), **settings})


def solve(flow, x=X, **settings):
    fs.solve(flow, x, **{"grid": fs.grids.Uniform(3), **settings})


def batched(flow, x=jnp.stack([X, X]), args=None, *, mesh=None, chunk=None, key=None, **settings):
    function = eqx.Partial(fs.solve, **{"grid": fs.grids.Uniform(3), **settings})
    arguments = (x,) if args is None else (x, args)
    fs.batched(function, mesh=mesh, chunk=chunk)(flow, *arguments, key=key)


LOSS = fs.losses.Regression(times=fs.times.Uniform())
BATCH = jnp.stack([X, 2 * X])
# (entry point, what changes) -> (a call with a value of it, two values).
SAME_PROGRAM = {
    ("sample", "key"): (lambda flow, v: sample(flow, key=jax.random.key(v)), (0, 1)),
    ("sample", "args"): (lambda flow, v: sample(flow, args=jnp.array([0, v])), (0, 1)),
    ("sample", "weights"): (lambda flow, v: sample(eqx.tree_at(lambda f: f.network.scale, flow, v)), (X[0], X[1])),
    ("sample", "tolerance"): (
        lambda flow, v: sample(flow, solver=diffrax.Heun(), grid=None, controller=pid(v)),
        (1e-2, 1e-3),
    ),
    ("sample", "times of the grid"): (lambda flow, v: sample(flow, grid=fs.grids.Given([1.0, v, 0.0])), (0.3, 0.4)),
    ("sample", "rho of the grid"): (lambda flow, v: sample(flow, grid=fs.grids.Karras(3, rho=v)), (3.0, 7.0)),
    ("sample", "t_end"): (lambda flow, v: sample(flow, t_end=v), (0.1, 0.2)),
    ("sample", "data_std"): (lambda flow, v: sample(flow, t_start=0.9, data_std=v), (0.5, 1.0)),
    ("sample", "eta of the dynamics"): (
        lambda flow, v: sample(flow, solver=fs.solvers.DDIM(), dynamics=SDE(v)),
        (0.3, 1),
    ),
    ("sample", "eta of DDIM"): (lambda flow, v: sample(flow, solver=fs.solvers.DDIM(v)), (0.3, 1.0)),
    ("sample", "churn"): (lambda flow, v: sample(flow, solver=fs.solvers.Churn(fs.solvers.DDIM(), v)), (0.1, 0.2)),
    ("sample", "guidance scale"): (
        lambda flow, v: sample(fs.guidance.ClassifierFree(flow, scale=v, null=jnp.asarray(3)), args=jnp.array([0, 1])),
        (1.5, 4.0),
    ),
    ("solve", "x"): (lambda flow, v: solve(flow, v * X), (1.0, 2.0)),
    ("solve", "saved times"): (lambda flow, v: solve(flow, saveat=diffrax.SaveAt(ts=jnp.array([v, 0.1]))), (0.5, 0.6)),
    ("solve", "tolerance"): (
        lambda flow, v: solve(flow, solver=diffrax.Heun(), grid=None, controller=pid(v)),
        (1e-2, 1e-3),
    ),
    ("solve", "throw"): (lambda flow, v: solve(flow, throw=v), (True, False)),
    ("encode", "x"): (lambda flow, v: fs.encode(flow, v * X, grid=fs.grids.Uniform(3)), (1.0, 2.0)),
    ("encode", "t_end"): (lambda flow, v: fs.encode(flow, X, grid=fs.grids.Uniform(3), t_end=v), (0.5, 0.6)),
    ("log_prob", "x"): (
        lambda flow, v: fs.log_prob(flow, v * X, solver=diffrax.Heun(), controller=pid(0.1)),
        (1.0, 2.0),
    ),
    ("log_prob", "tolerance"): (
        lambda flow, v: fs.log_prob(flow, X, solver=diffrax.Heun(), controller=pid(v)),
        (0.1, 0.2),
    ),
    ("sample_and_log_prob", "key"): (
        lambda flow, v: fs.sample_and_log_prob(
            flow, LIKE, key=jax.random.key(v), solver=diffrax.Heun(), grid=fs.grids.Uniform(3)
        ),
        (0, 1),
    ),
    ("batched", "x"): (lambda flow, v: batched(flow, v * BATCH), (1.0, 2.0)),
    ("batched", "tolerance"): (
        lambda flow, v: batched(flow, solver=diffrax.Heun(), grid=None, controller=pid(jnp.asarray(v))),
        (0.1, 0.2),
    ),
    ("loss", "data and key"): (lambda flow, v: loss(flow, v * BATCH, key=jax.random.key(int(v))), (1.0, 2.0)),
}
NEW_PROGRAM = {
    ("sample", "num"): (lambda flow, v: sample(flow, num=v), (2, 3)),
    ("sample", "steps"): (lambda flow, v: sample(flow, grid=fs.grids.Uniform(v)), (3, 4)),
    ("sample", "solver"): (lambda flow, v: sample(flow, solver=v), (fs.solvers.DDIM(), fs.solvers.DPMSolverPP(2))),
    ("sample", "chunk"): (lambda flow, v: sample(flow, num=4, chunk=v), (2, 4)),
    ("sample", "max_steps"): (
        lambda flow, v: sample(flow, solver=diffrax.Heun(), grid=None, controller=pid(0.1), max_steps=v),
        (64, 128),
    ),
    ("solve", "shape of x"): (lambda flow, v: solve(flow, jnp.ones(v)), (2, 3)),
    ("solve", "a number of the path"): (
        lambda flow, v: solve(eqx.tree_at(lambda f: f.path, flow, fs.paths.VP(beta_max=v))),
        (10.0, 20.0),
    ),
    ("encode", "steps"): (lambda flow, v: fs.encode(flow, X, grid=fs.grids.Uniform(v)), (3, 4)),
    ("batched", "length"): (lambda flow, v: batched(flow, jnp.ones((v, 2))), (2, 3)),
}


@eqx.filter_jit
def loss(flow, batch, *, key):
    return LOSS(flow, batch, key=key)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Diffrax checks its terms under standard promotion: under the tests' strict one JAX would trace once more."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def compilations():
    """A list that grows by one with every program that XLA compiles."""
    programs = []

    def listen(event: str, duration: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(details)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield programs
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(("entry", "knob"), [*SAME_PROGRAM, *NEW_PROGRAM])
def test_programs_and_traces(entry, knob, compilations):
    call, values = {**SAME_PROGRAM, **NEW_PROGRAM}[entry, knob]
    traces = []
    flow = fs.Flow(Counted(jnp.asarray(0.5), traces), fs.paths.Linear(), fs.predictions.Velocity())
    call(flow, values[0])
    assert len(traces) == 1, "the network is traced once a solve"
    so_far = len(compilations)
    assert so_far > 0
    call(flow, values[1])
    if (entry, knob) in SAME_PROGRAM:
        assert len(compilations) == so_far, compilations[so_far:]
    else:
        assert len(compilations) > so_far
    so_far = len(compilations)
    call(flow, values[0])
    assert len(compilations) == so_far
