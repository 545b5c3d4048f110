"""Fixed steps as one loop: y_{i+1} = step(s_i, s_{i+1}, y_i), with the steps of any Diffrax solver.

`diffrax.diffeqsolve` takes the same steps. Around them it places what adaptive steps, events and saving between steps
need, which multiplies the time to compile, and its loop with checkpoints has its own derivative, of which a batch
holds one copy of the parameters an example. Where only the last state is asked for, this loop does with neither.

Its gradient keeps the states at the ends of segments, and what the solver carries there, and computes the steps of a
segment again: 2 to 3 sqrt(n) of both and one step of the solver at a time, for three evaluations instead of one.
Up to 64 steps are one segment, which keeps every state, for two. Derivatives of both modes pass through it.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ._numerics import linear_combination
from ._types import Args, Scalar
from .dynamics import network_output, unwrap
from .solvers.multistep import AbstractMultistep, StepWeights

_ONE_SEGMENT = 64

#: The number of a step, its two ends, and its weights where the solver has a table.
Row: TypeAlias = tuple[Int[Array, ""], Scalar, Scalar, StepWeights | None]


def fixed_steps(
    terms: diffrax.AbstractTerm,
    solver: diffrax.AbstractSolver,
    ts: Float[Array, " n"],
    table: StepWeights | None,
    x_start: PyTree,
    args: Args,
) -> tuple[PyTree, diffrax.RESULTS]:
    """The state after the last step of the grid `ts`, and the first failure that a step of the solver reports.

    A multistep solver takes its weights from the `table`.
    """
    if table is not None:
        assert isinstance(solver, AbstractMultistep)
        step, begun = _tabulated_step(terms, solver, x_start, args)
    elif (tableau := _two_stages(solver)) is not None:
        step, begun = _two_stage_step(terms, tableau, args), None
    else:
        step, begun = _any_step(terms, solver, ts, x_start, args)
    # The results of Diffrax as arrays, which a loop can carry.
    successful = jax.tree.map(jnp.asarray, diffrax.RESULTS.successful)
    rows = jnp.arange(len(ts) - 1), ts[:-1], ts[1:], table
    x, _, result = _loop(step, (x_start, begun, successful), rows, len(ts) - 1)
    return x, result


def _any_step(
    terms: diffrax.AbstractTerm, solver: diffrax.AbstractSolver, ts: Float[Array, " n"], x_start: PyTree, args: Args
) -> tuple[Callable, PyTree]:
    """A step, and what the solver carries at first."""
    solver = jax.tree.map(_with_plain_stages, solver, is_leaf=lambda node: hasattr(node, "scan_kind"))

    def step(carry: PyTree, row: Row) -> tuple[PyTree, None]:
        (x, state, result), (_, start, end, _) = carry, row
        x, _, _, state, found = solver.step(terms, start, end, x, args, state, jnp.asarray(False))
        result = diffrax.RESULTS.where(result == diffrax.RESULTS.successful, found, result)
        return (x, state, result), None

    return step, solver.init(terms, ts[0], ts[1], x_start, args)


def _tabulated_step(
    terms: diffrax.AbstractTerm, solver: AbstractMultistep, x_start: PyTree, args: Args
) -> tuple[Callable, PyTree]:
    """The same for a solver of which all but the states is in a table."""
    field, noise, _ = unwrap(terms, type(solver).__name__)

    def step(carry: PyTree, row: Row) -> tuple[PyTree, None]:
        (x, history, result), (number, _, _, weights) = carry, row
        assert weights is not None
        output = network_output(field.flow, weights.start, x, args)
        normal = None if noise is None else noise.step_normal(number)
        x, history, _ = solver.advance(weights, x, output, normal, history)
        return (x, history, result), None

    return step, solver.begin(x_start)


def _two_stages(solver: diffrax.AbstractSolver) -> diffrax.ButcherTableau | None:
    """The tableau of an explicit Runge-Kutta solver of two stages, None for others."""
    # A HalfSolver passes for the solver inside, but has no tableau.
    tableau = getattr(solver, "tableau", None) if isinstance(solver, diffrax.AbstractERK) else None
    if not isinstance(tableau, diffrax.ButcherTableau) or tableau.num_stages != 2 or tableau.fsal:
        return None
    return tableau


def _two_stage_step(terms: diffrax.AbstractTerm, tableau: diffrax.ButcherTableau, args: Args) -> Callable:
    """A step of two stages written out: k_2 at x + a k_1, and x + b_1 k_1 + b_2 k_2.

    Diffrax's loop over stages compiles the network once for any number of them. For two it costs more than it saves.
    """
    ((node,), (inner,), outer) = tableau.c, tableau.a_lower[0], tableau.b_sol

    def step(carry: PyTree, row: Row) -> tuple[PyTree, None]:
        (x, begun, result), (_, start, end, _) = carry, row
        control = terms.contr(start, end)
        first = terms.vf_prod(start, x, args, control)
        middle = end if node == 1 else start + node * (end - start)
        second = terms.vf_prod(middle, linear_combination((1.0, inner), (x, first)), args, control)
        x = linear_combination((1.0, 1.0), (x, linear_combination(tuple(outer), (first, second))))
        return (x, begun, result), None

    return step


def _loop(step: Callable, carry: PyTree, rows: PyTree, steps: int) -> PyTree:
    """The carry after a step for each row."""

    def segment(carry: PyTree, rows: PyTree) -> tuple[PyTree, None]:
        return jax.lax.scan(jax.checkpoint(step), carry, rows)

    length = _segment_length(steps)
    whole = steps - steps % length
    if whole == length:
        carry, _ = segment(carry, jax.tree.map(lambda leaf: leaf[:whole], rows))
    else:
        segments = jax.tree.map(lambda leaf: leaf[:whole].reshape(whole // length, length, *leaf.shape[1:]), rows)
        carry, _ = jax.lax.scan(jax.checkpoint(segment), carry, segments)
    if whole < steps:
        carry, _ = segment(carry, jax.tree.map(lambda leaf: leaf[whole:], rows))
    return carry


def _with_plain_stages(solver: PyTree) -> PyTree:
    """A Runge-Kutta solver whose stages JAX itself differentiates, in either mode, as under Diffrax's DirectAdjoint."""
    if getattr(solver, "scan_kind", "") is not None:
        return solver
    return eqx.tree_at(lambda s: s.scan_kind, solver, "bounded", is_leaf=lambda leaf: leaf is None)


def _segment_length(steps: int) -> int:
    """About sqrt(steps), a divisor where there is one nearby: what is left over is a loop of its own to compile."""
    if steps <= _ONE_SEGMENT:
        return steps
    root = math.isqrt(steps)
    divisors = [length for length in range(root // 2, 2 * root + 1) if steps % length == 0]
    return min(divisors, key=lambda length: abs(length - root), default=root)
