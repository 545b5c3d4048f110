r"""Tuning: a grid and a multistep solver learnt for one flow and one number of steps.

Few steps leave a formula's order without meaning, but not its form: a solve of n evaluations has about 7 n numbers,
those of `solvers.TunedMultistep` and its grid, and they can be learnt by gradient descent through the solve. From
noises of its own, with e_i the RMS over the elements of (solve - accurate solve) from noise i, `tune` minimises

$$\left(\mathrm{mean}_i\, \sqrt{e_i}\right)^2 + \lambda \sqrt{\mathrm{mean}_i\, e_i^2} ,$$

the first term, near the median, for the accuracy of most samples, the second for the few that end in another mode.
With a solver given it learns the grid alone.

    tuned = fs.tuning.tune(flow, like, steps=6, key=key)
    x = fs.sample(flow, like, num=64, key=other_key, solver=tuned.solver, grid=tuned.grid)

Source: the idea of learning a solver's coefficients against an accurate one is that of Watson et al. (2022), arXiv
2202.05830, and, for linear multistep solvers and flows, Shaul et al. (2023), arXiv 2310.19075; the parametrisation and
the loss are ours.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ._checks import check, check_batch, check_count, check_key, check_state, check_type, is_concrete
from ._integrate import check_network
from ._numerics import as_scalar, normal_with, state_like, tree_size
from ._progress import import_tqdm
from ._settings import settle
from ._types import Args, Like, PRNGKey, Scalar, ScalarLike, State
from .dynamics import ProbabilityFlow
from .flow import AbstractFlow
from .grids import AbstractGrid, Given, LogSNR, VPPower
from .sampling import solve
from .solvers import DDIM, AbstractFlowSolver, TunedMultistep

__all__ = ["Tuned", "tune"]


class Tuned(eqx.Module):
    """A solver and the grid that belongs to it.

    A pytree of arrays: `eqx.tree_serialise_leaves` saves it, `eqx.tree_deserialise_leaves` reads it into another
    `Tuned` of the same number of steps.
    """

    solver: diffrax.AbstractSolver
    grid: Given


class _Parameters(eqx.Module):
    """What is learnt: all zeros but the widths is DDIM."""

    #: Logits of the widths of the steps, so that the times are monotone whatever they are.
    widths: Float[Array, " steps"]
    carry: Float[Array, " steps"]
    scale: Float[Array, " steps"]
    #: Logarithms of (t' - t_end)/(t - t_end).
    asked: Float[Array, " steps"]
    weights: Float[Array, "steps history"]

    def times(self, t_start: Scalar, t_end: Scalar) -> Float[Array, " points"]:
        """The grid from t_start to t_end."""
        widths = jax.nn.softmax(self.widths)
        # Summed from the small end, so that the last, small steps keep their digits.
        left = jnp.cumsum(widths[::-1])[::-1]
        inner = t_end + (t_start - t_end) * left[1:] / left[0]
        # The ends are constants: no gradient passes through alpha = 0 or sigma = 0.
        return jnp.concatenate([t_start[None], inner, t_end[None]])

    def solver(self, t_start: Scalar, t_end: Scalar) -> TunedMultistep:
        """The multistep of these numbers."""
        ts = self.times(t_start, t_end)
        asked = jnp.minimum(t_end + (ts[:-1] - t_end) * jnp.exp(self.asked), t_start)
        return TunedMultistep(ts, asked, self.carry, self.scale, self.weights)


def tune(
    flow: AbstractFlow,
    like: Like,
    *,
    steps: int,
    key: PRNGKey,
    args: Args = None,
    num: int = 4096,
    solver: diffrax.AbstractSolver | None = None,
    grid: AbstractGrid | None = None,
    t_start: ScalarLike | None = None,
    t_end: ScalarLike | None = None,
    reference_solver: diffrax.AbstractSolver | None = None,
    reference_grid: AbstractGrid | None = None,
    updates: int = 2500,
    batch_size: int = 256,
    learning_rate: ScalarLike = 0.02,
    rms_weight: ScalarLike = 0.1,
    history: int = 3,
    progress: bool = True,
) -> Tuned:
    r"""Learn the grid and the solver of `steps` network evaluations that follow a flow best.

    **Arguments:**

    - `flow`: any flow, guided ones included; `like`: ONE example's shape and dtype, as in `sample`;
    - `steps`: the number of steps n, of one evaluation each with the solver that is learnt; `key`: a typed key, for the
      noises and the batches;
    - `args`: labels or context with a leading axis of length `num`, or None; `num`: how many noises to learn from;
    - `solver`: None to learn a `TunedMultistep`; or a solver of the probability flow, whose grid alone is learnt;
    - `grid`: the grid to begin with, `grids.VPPower(steps)` by default;
    - `t_start`, `t_end`: path times, those of the grid by default;
    - `reference_solver`, `reference_grid`: the accurate solve, `diffrax.Dopri8()` on `grids.LogSNR(32)` by default, 416
      evaluations for each noise;
    - `updates`, `batch_size`, `learning_rate`: of the descent, Adam with a warm-up and a cosine decay;
    - `rms_weight`: lambda; smaller for the accuracy of most samples, larger for that of the worst;
    - `history`: how many earlier evaluations a step of the `TunedMultistep` uses; `progress`: whether to show a bar,
      which needs tqdm.

    **Returns:** a `Tuned`: `.solver` and `.grid`, for `sample` and `solve`.

    **Raises:** `ValueError`, `TypeError` for a request that makes no sense; `RuntimeError` if all reference solves
    fail.
    """
    check_state(like, "like")
    key = check_key(key, "tuning")
    steps, num = check_count(steps, "tune got steps"), check_count(num, "tune got num")
    updates, batch_size = check_count(updates, "tune got updates"), check_count(batch_size, "tune got batch_size")
    history = check_count(history, "tune got history", least=0)
    check_batch(args, num)
    rate, weight = as_scalar(learning_rate), as_scalar(rms_weight)
    if not is_concrete((flow, key, args, rate, weight)):
        raise ValueError(
            "tune was called inside a JAX transformation, but runs its own compiled loop and shows how far it is: call "
            "it outside, and use the solver and grid that it returns inside."
        )
    check(None, ~(rate > 0), f"tune got learning_rate = {learning_rate}, but wants it positive.")
    check(None, ~(weight >= 0), f"tune got rms_weight = {rms_weight}, but wants it >= 0.")
    tqdm = import_tqdm("tune") if progress else None
    like = state_like(like)
    if grid is not None:
        check_type(grid, AbstractGrid, "grid", "an instance such as fs.grids.Power(6)")
        if grid.steps != steps:
            raise ValueError(f"grid has {grid.steps} steps, but {steps} are to be tuned: make them equal.")
    grid = VPPower(steps) if grid is None else grid
    if isinstance(solver, AbstractFlowSolver) and solver.default_dynamics.stochastic:
        raise ValueError(
            f"tune learns on the probability flow, but got {type(solver).__name__}, which draws noise: give it a "
            "deterministic solver, such as the one that this is without noise."
        )
    settle(
        flow,
        solver=DDIM() if solver is None else solver,
        grid=grid,
        controller=None,
        dynamics=ProbabilityFlow(),
        t_start=t_start,
        t_end=t_end,
    )
    start_time, end_time = grid.ends(flow.path, t_start, t_end)
    check_network(flow, like, jax.tree.map(lambda leaf: leaf[0] if eqx.is_array_like(leaf) else leaf, args))

    noise_key, batch_key = jax.random.split(key)
    x_start, x_end = _references(
        flow,
        like,
        num,
        noise_key,
        args,
        diffrax.Dopri8() if reference_solver is None else reference_solver,
        LogSNR(32) if reference_grid is None else reference_grid,
        start_time,
        end_time,
    )
    known = jnp.all(jnp.stack([jnp.isfinite(leaf).reshape(num, -1).all(1) for leaf in jax.tree.leaves(x_end)]), 0)
    if not bool(jnp.any(known)):
        raise RuntimeError(
            "All reference solves failed: check the network for NaN or infinite output, or give reference_solver and "
            "reference_grid."
        )
    task = _Task(flow, solver, start_time, end_time, x_start, x_end, args, known, weight)

    first = _first(grid(flow.path, start_time, end_time), history)
    learnt = _descend(task, first, batch_key, updates, batch_size, rate, tqdm)
    before, after = float(_value(task, first)), float(_value(task, learnt))
    if not np.isfinite(after):
        raise RuntimeError(
            f"Tuning diverged: the loss was {before:.4g} at first and is {after} now. Lower learning_rate, or begin "
            "with another grid."
        )
    # Never worse, on its own noises, than what it began with.
    tuned_solver = (learnt if after < before else first).solver(start_time, end_time)
    return Tuned(tuned_solver if solver is None else solver, Given(tuned_solver.ts))


class _Task(eqx.Module):
    """What a set of parameters is judged by."""

    flow: AbstractFlow
    solver: diffrax.AbstractSolver | None
    t_start: Scalar
    t_end: Scalar
    x_start: State
    x_end: State
    args: Args
    known: Array
    rms_weight: Scalar

    def loss(self, parameters: _Parameters, rows: Array) -> Scalar:
        """The module's loss over some of the noises."""
        own = parameters.solver(self.t_start, self.t_end)
        solver = own if self.solver is None else self.solver

        def error(row: Array) -> Scalar:
            x, target, args = jax.tree.map(
                lambda leaf: leaf[row] if eqx.is_array_like(leaf) else leaf, (self.x_start, self.x_end, self.args)
            )
            end = _unrolled(self.flow, solver, own.ts, x, args)
            squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), end, target)
            # Smooth at 0, where a reference is met exactly.
            return jnp.sqrt(jax.tree.reduce(jnp.add, squares) / tree_size(x) + 1e-12)

        errors = jax.vmap(error)(rows)
        return jnp.mean(jnp.sqrt(errors)) ** 2 + self.rms_weight * jnp.sqrt(jnp.mean(errors**2))


def _unrolled(
    flow: AbstractFlow, solver: diffrax.AbstractSolver, ts: Float[Array, " points"], x: State, args: Args
) -> State:
    """The solver's steps alone, as `diffeqsolve` takes them on a grid, in a scan that is cheap to differentiate."""
    terms = ProbabilityFlow().terms(flow)
    state = solver.init(terms, -ts[0], -ts[1], x, args)

    def step(carried: Any, index: Any) -> tuple[Any, None]:
        x, state = carried
        x, _, _, state, _ = solver.step(terms, -ts[index], -ts[index + 1], x, args, state, False)
        return (x, state), None

    (x, _), _ = jax.lax.scan(step, (x, state), jnp.arange(len(ts) - 1))
    return x


def _first(ts: Float[Array, " points"], history: int) -> _Parameters:
    """DDIM on a grid."""
    steps = len(ts) - 1
    zeros = jnp.zeros((steps,), ts.dtype)
    return _Parameters(jnp.log(ts[:-1] - ts[1:]), zeros, zeros, zeros, jnp.zeros((steps, history), ts.dtype))


@eqx.filter_jit
def _references(
    flow: AbstractFlow,
    like: Like,
    num: int,
    key: PRNGKey,
    args: Args,
    solver: diffrax.AbstractSolver,
    grid: AbstractGrid,
    t_start: Scalar,
    t_end: Scalar,
) -> tuple[State, State]:
    """`num` noises and where the flow carries them."""
    moments = flow.path.start(t_start)

    def one(index: Array, args: Args) -> tuple[State, State]:
        x = normal_with(jax.random.fold_in(key, index), like, moments)
        sol = solve(flow, x, args, solver=solver, grid=grid, t_start=t_start, t_end=t_end, throw=False)
        return x, jax.tree.map(lambda leaf: leaf[-1], sol.ys)

    return eqx.filter_vmap(one, in_axes=(0, eqx.if_array(0)))(jnp.arange(num), args)


@eqx.filter_jit
def _value(task: _Task, parameters: _Parameters) -> Scalar:
    """The loss over up to 1024 of the noises whose reference is known."""
    rows = jnp.argsort(~task.known)[:1024]
    return task.loss(parameters, rows)


# The logits of the widths are of order 1, the other numbers of order 0.1.
_WIDTH_RATE = 3.0


@eqx.filter_jit
def _some_updates(
    task: _Task,
    parameters: _Parameters,
    state: PyTree,
    key: PRNGKey,
    numbers: Array,
    updates: int,
    batch_size: int,
    learning_rate: Scalar,
) -> tuple[_Parameters, PyTree, Scalar]:
    optimiser = _optimiser(updates, learning_rate)
    chances = task.known.astype(float)
    chances = chances / jnp.sum(chances)

    def update(carried: Any, number: Array) -> tuple[Any, Scalar]:
        parameters, state = carried
        rows = jax.random.choice(jax.random.fold_in(key, number), len(chances), (batch_size,), p=chances)
        value, gradient = jax.value_and_grad(task.loss)(parameters, rows)
        with jax.numpy_dtype_promotion("standard"):  # Optax promotes inside
            change, state = optimiser.update(gradient, state)
        change = eqx.tree_at(lambda c: c.widths, change, replace_fn=lambda widths: _WIDTH_RATE * widths)
        return (optax.apply_updates(parameters, change), state), value

    (parameters, state), values = jax.lax.scan(update, (parameters, state), numbers)
    return parameters, state, jnp.mean(values)


def _optimiser(updates: int, learning_rate: Scalar) -> optax.GradientTransformation:
    warmup = max(updates // 20, 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(updates, warmup + 1), 0.01)
    return optax.chain(
        optax.zero_nans(),
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.99),
        optax.scale_by_schedule(schedule),
        optax.scale(-1.0),
        optax.stateless(lambda change, _: jax.tree.map(lambda leaf: learning_rate * leaf, change)),
    )


def _descend(
    task: _Task,
    parameters: _Parameters,
    key: PRNGKey,
    updates: int,
    batch_size: int,
    learning_rate: Scalar,
    tqdm: Any,
) -> _Parameters:
    """All updates, in blocks between which the bar moves."""
    state = _optimiser(updates, learning_rate).init(parameters)  # pyright: ignore[reportArgumentType]
    bar = None if tqdm is None else tqdm(total=updates, unit="update", desc="tune", dynamic_ncols=True)
    block = min(50, updates)
    done = 0
    while done < updates:
        size = min(block, updates - done)
        numbers = done + jnp.arange(size)
        parameters, state, value = _some_updates(
            task, parameters, state, key, numbers, updates, batch_size, learning_rate
        )
        done += size
        if bar is not None:
            bar.set_postfix(loss=f"{float(value):.4g}")
            bar.update(size)
    if bar is not None:
        bar.close()
    return parameters
