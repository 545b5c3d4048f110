"""Every solver of overhead.py, and the same update by hand: a `lax.scan` over a table of coefficients made with NumPy.

Euler and Heun run on the velocity of `Linear`, all others on `VP` with a network that predicts the noise.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

import flowsolve as fs

Batch = Float[Array, "num ..."]
#: Samples, from a network and a key.
Program = Callable[[eqx.Module, Key[Array, ""]], Batch]
Table = Float[np.ndarray, "steps columns"]


class Problem(NamedTuple):
    """A network, one example's shape, the number of examples."""

    network: Callable[[Key[Array, ""]], eqx.Module]
    shape: tuple[int, ...]
    num: int


def scanned(
    problem: Problem,
    table: Table,
    step: Callable,
    *,
    start_std: float = 1.0,
    begin: Callable[[Batch], tuple] = lambda x: (x,),
) -> Program:
    """A scan over a table's rows: step(forward, normal, carry, row) is the next carry, whose first entry is the state.

    The start and the noise of the steps are those of `fs.sample`.
    """

    def program(network: eqx.Module, key: Key[Array, ""]) -> Batch:
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(jnp.arange(problem.num))
        x = jax.vmap(lambda pair: start_std * jax.random.normal(jax.random.split(pair[0], 1)[0], problem.shape))(keys)

        def forward(t: Array, x: Batch) -> Batch:
            return jax.vmap(lambda x: network(t, x))(x)

        def body(carry: tuple, numbered: tuple[Array, Array]) -> tuple[tuple, None]:
            number, row = numbered

            def normal() -> Batch:
                def one(pair: Key[Array, "2"]) -> Array:
                    # `brownian.StepNoise` numbers the steps so.
                    return jax.random.normal(jax.random.fold_in(pair[1], 2**14 * number + 64), problem.shape)

                return jax.vmap(one)(keys)

            return step(forward, normal, carry, row), None

        rows = jnp.arange(len(table)), jnp.asarray(table, jnp.float32)
        return jax.lax.scan(body, begin(x), rows)[0][0]

    return program


def columns(*given: np.ndarray) -> Table:
    return np.stack(given, axis=-1)


def floor(problem: Problem, evaluations: int) -> Program:
    """Forward passes, each of the output of the one before."""

    def step(forward, _, carry, row):
        return (forward(row[0], carry[0]),)

    return scanned(problem, columns(np.linspace(1, 1 / evaluations, evaluations)), step)


def euler(problem: Problem, steps: int) -> Program:
    times = np.linspace(1, 0, steps + 1)

    def step(forward, _, carry, row):
        (x,), (t, dt) = carry, row
        return (x + dt * forward(t, x),)

    return scanned(problem, columns(times[:-1], np.diff(times)), step)


def heun(problem: Problem, steps: int) -> Program:
    times = np.linspace(1, 0, steps + 1)

    def step(forward, _, carry, row):
        (x,), (t, s, dt) = carry, row
        first = forward(t, x)
        return (x + dt / 2 * (first + forward(s, x + dt * first)),)

    return scanned(problem, columns(times[:-1], times[1:], np.diff(times)), step)


def diffusion(steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Times, alpha, sigma and ln(alpha/sigma) of `fs.paths.VP()`."""
    times = np.linspace(1, 1e-4, steps + 1)
    log_alpha = -(times**2) * 19.9 / 4 - times * 0.1 / 2
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    return times, alpha, sigma, np.log(alpha / sigma)


def ddim(problem: Problem, steps: int) -> Program:
    times, alpha, sigma, _ = diffusion(steps)
    scale = alpha[1:] / alpha[:-1]

    def step(forward, _, carry, row):
        (x,), (t, of_state, of_output) = carry, row
        return (of_state * x + of_output * forward(t, x),)

    table = columns(times[:-1], scale, sigma[1:] - scale * sigma[:-1])
    return scanned(problem, table, step, start_std=sigma[0])


def dpm_solver(problem: Problem, steps: int) -> Program:
    """DPM-Solver++(2M)."""
    return _dpm_solver(problem, steps, noisy=False)


def sde_dpm_solver(problem: Problem, steps: int) -> Program:
    """SDE-DPM-Solver++(2M)."""
    return _dpm_solver(problem, steps, noisy=True)


def _dpm_solver(problem: Problem, steps: int, *, noisy: bool) -> Program:
    times, alpha, sigma, level = diffusion(steps)
    h = np.diff(level)
    kept = np.exp(-h) if noisy else np.ones(steps)
    of_state = kept * sigma[1:] / sigma[:-1]
    of_data = alpha[1:] - alpha[:-1] * of_state
    change = np.append(0, h[1:] / h[:-1]) * of_data / 2

    def step(forward, normal, carry, row):
        (x, before), (t, data_of_state, data_of_output, of_state, of_data, of_before, of_noise) = carry, row
        data = data_of_state * x + data_of_output * forward(t, x)
        x = of_state * x + of_data * data + of_before * before
        return x + of_noise * normal() if noisy else x, data

    table = columns(
        times[:-1],
        1 / alpha[:-1],
        -sigma[:-1] / alpha[:-1],
        of_state,
        of_data + change,
        -change,
        sigma[1:] * np.sqrt(1 - kept**2),
    )
    return scanned(problem, table, step, start_std=sigma[0], begin=lambda x: (x, jnp.zeros_like(x)))


def unipc(problem: Problem, steps: int, *, order: int = 3) -> Program:
    """UniPC with its corrector, bh2, of lower order in the first and the last steps."""
    times, alpha, sigma, level = diffusion(steps)
    of_state = sigma[1:] / sigma[:-1]
    of_data = alpha[1:] - alpha[:-1] * of_state
    # The weights of the data at a step and before it, newest first: for the step, and for correcting the last one.
    predictor, corrector = np.zeros((steps, order)), np.zeros((steps, order + 1))
    predictor[:, 0], corrector[1:, 1] = of_data, of_data[:-1]
    for n in range(steps):
        h = level[n + 1] - level[n]
        count = min(n, order - 1, steps - 1 - n)
        nodes = (level[n - 1 - np.arange(count)] - level[n]) / h
        weights = alpha[n + 1] * _unipc_weights(nodes, h)
        predictor[n, : count + 1] += -weights.sum(), *weights
        if n + 1 < steps:
            weights = alpha[n + 1] * _unipc_weights(np.append(nodes, 1), h)
            corrector[n + 1, : count + 2] += weights[-1], -weights.sum(), *weights[:-1]

    def step(forward, _, carry, row):
        (x, scaled, past), (t, data_of_state, data_of_output, of_state) = carry, row[:4]
        data = (data_of_state * x + data_of_output * forward(t, x), *past)
        corrected = scaled + sum(weight * d for weight, d in zip(row[4 : 5 + order], data, strict=True))
        scaled = of_state * corrected
        x = scaled + sum(weight * d for weight, d in zip(row[5 + order :], data[:-1], strict=True))
        return x, scaled, data[:-1]

    table = columns(times[:-1], 1 / alpha[:-1], -sigma[:-1] / alpha[:-1], of_state, *corrector.T, *predictor.T)
    return scanned(problem, table, step, start_std=sigma[0], begin=lambda x: (x, x, (jnp.zeros_like(x),) * order))


def _unipc_weights(nodes: np.ndarray, h: float) -> np.ndarray:
    """B(h) rho_k/r_k of the nodes r_k but the one at 0."""
    b, power = -math.expm1(-h), math.expm1(-h) / -h
    moments = []
    for i in range(1, len(nodes) + 1):
        power = (power - 1 / math.factorial(i)) / -h
        moments.append(h * math.factorial(i) * power / b)
    rho = [0.5] if len(nodes) == 1 else np.linalg.solve(np.vander(nodes, increasing=True).T, moments)
    return b * np.asarray(rho) / nodes


def sde_euler(problem: Problem, steps: int) -> Program:
    """Euler-Maruyama of the reverse SDE."""
    times, _, sigma, _ = diffusion(steps)
    ds, beta = -np.diff(times), (0.1 + 19.9 * times)[:-1]

    def step(forward, normal, carry, row):
        (x,), (t, of_state, of_output, of_noise) = carry, row
        return (of_state * x + of_output * forward(t, x) + of_noise * normal(),)

    table = columns(times[:-1], 1 + ds * beta / 2, -ds * beta / sigma[:-1], np.sqrt(beta * ds))
    return scanned(problem, table, step, start_std=sigma[0])


class Method(NamedTuple):
    """A solver, and the same by hand; with the most that it should take over the forward passes alone."""

    solver: diffrax.AbstractSolver
    by_hand: Callable[..., Program]
    most_over_floor: float | None = None
    evaluations: int = 1
    dynamics: fs.dynamics.AbstractDynamics | None = None

    def flow(self, network: eqx.Module) -> fs.Flow:
        if self.by_hand in (euler, heun):
            return fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
        return fs.Flow(network, fs.paths.VP(), fs.predictions.Noise())

    def sample(
        self, network_or_flow: Any, problem: Problem, key: Key[Array, ""], steps: int, **spreading: Any
    ) -> Batch:
        """As a user writes it."""
        flow = network_or_flow if isinstance(network_or_flow, fs.Flow) else self.flow(network_or_flow)
        return fs.sample(
            flow,
            jax.ShapeDtypeStruct(problem.shape, jnp.float32),
            num=problem.num,
            key=key,
            solver=self.solver,
            grid=fs.grids.Uniform(steps),
            dynamics=self.dynamics,
            **spreading,
        )

    def in_jit(self, problem: Problem, steps: int) -> Program:
        """The same in a user's jit."""
        return lambda network, key: self.sample(network, problem, key, steps)


METHODS = {
    "Euler": Method(diffrax.Euler(), euler, 1.02),
    "Heun": Method(diffrax.Heun(), heun, evaluations=2),
    "DDIM": Method(fs.solvers.DDIM(), ddim, 1.02),
    "DPMSolverPP 2": Method(fs.solvers.DPMSolverPP(2), dpm_solver, 1.05),
    "UniPC 3": Method(fs.solvers.UniPC(3), unipc, 1.05),
    "SDE Euler": Method(diffrax.Euler(), sde_euler, dynamics=fs.dynamics.ReverseSDE(1.0)),
    "SDEDPMSolverPP 2": Method(fs.solvers.SDEDPMSolverPP(2), sde_dpm_solver, dynamics=fs.dynamics.ReverseSDE(1.0)),
}
