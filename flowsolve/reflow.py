r"""Reflow: train a flow on the pairs that another one makes, which straightens its paths.

A flow carries each noise $\epsilon$ to one example $x_0$; a second flow trained on these pairs (`couplings.Pairs`)
has straighter paths, on which a few steps go as far as many. How straight they are:

$$\mathrm{curvature} = \frac{E \int |\dot x_t - (x_{t_1} - x_{t_0})/(t_1 - t_0)|^2\, dt}
   {E\, |x_{t_1} - x_{t_0}|^2/(t_1 - t_0)}$$

along the solutions of the probability flow: 0 where every path is straight and run through at one speed, or stands
still, and then one step of Euler is exact.

A round is pairs of the last flow, and a flow trained on them, from the last one's network:

    loss = fs.losses.Regression()
    for number in range(3):
        pairs = fs.reflow.pairs(flow, like, num=50_000, key=jax.random.fold_in(key, number), chunk=1_000)
        batches = fs.data.Batches(pairs, batch_size=256, key=key)
        flow = fs.Flow(flow.network, flow.path, flow.prediction, source=fs.sources.CoupledNormal())
        *_, state = fs.training.fit(loss, flow, batches, optax.adamw(1e-4), steps=10_000, key=key)
        flow = state.ema_flow
        print(number, fs.reflow.curvature(flow, like, num=1_000, key=key))

Distillation of a straight flow is the same loss at t_noise alone, where on `Linear` the optimal velocity is
$\epsilon - x_0$, so that one step of Euler is the pair: `times.Given` draws from all of its times but the last.

    loss = fs.losses.Regression(times=fs.times.Given((1.0, 0.0)))               # for two steps: (1.0, 0.5, 0.0)
    ...
    x = fs.sample(one_step, like, num=64, key=key, solver=diffrax.Euler(), grid=fs.grids.Uniform(1))

Source: Liu, Gong & Liu (2022), arXiv 2209.03003. Deviation: the curvature is divided by the mean square of the whole
displacement, so that it has no units.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from ._checks import check_batch, check_count, check_key, check_state
from ._numerics import as_scalar, linear_combination, state_like, tree_dot
from ._types import Args, Like, PRNGKey, Scalar, State
from .batching import batched
from .couplings import Pairs
from .flow import AbstractVelocityFlow
from .grids import AbstractGrid, Uniform
from .sampling import solve

__all__ = ["curvature", "pairs"]


def pairs(
    flow: AbstractVelocityFlow,
    like: Like,
    *,
    num: int,
    key: PRNGKey,
    args: Args = None,
    solver: diffrax.AbstractSolver | None = None,
    grid: AbstractGrid | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    mesh: Mesh | None = None,
    chunk: int | None = None,
    progress: bool = False,
) -> Pairs:
    """`num` noises of a flow's source, each with the example to which its probability flow carries it.

    **Arguments:** as in `sample`; pair i depends on `key` and i alone.

    **Returns:** `couplings.Pairs` of batches, the noise in units in which the source draws it.
    """
    check_state(like, "like")
    key, num = check_key(key, "reflow"), check_count(num, "pairs got num")
    check_batch(args, num)
    one = eqx.Partial(_pair, like=state_like(like), solver=solver, grid=grid, controller=controller)
    return batched(one, mesh=mesh, chunk=chunk, progress=progress)(flow, jnp.arange(num), args, key=key)


def _pair(
    flow: AbstractVelocityFlow, index: Array, args: Args, *, key: PRNGKey, like: Like, solver, grid, controller
) -> Pairs:
    # The index is there for a batch without args, whose size nothing else would tell.
    del index
    noise, x_start = _start(flow, key, like)
    sol = solve(flow, x_start, args, solver=solver, grid=grid, controller=controller)
    return Pairs(jax.tree.map(lambda leaf: leaf[-1], sol.ys), noise)


def _start(flow: AbstractVelocityFlow, key: PRNGKey, like: Like) -> tuple[State, State]:
    """A noise, and the state at t_noise."""
    noise = flow.source.sample(key, like)
    return noise, linear_combination((flow.path.sigma(flow.path.t_noise),), (noise,))


def curvature(
    flow: AbstractVelocityFlow,
    like: Like,
    *,
    num: int,
    key: PRNGKey,
    args: Args = None,
    solver: diffrax.AbstractSolver = diffrax.Heun(),
    grid: AbstractGrid = Uniform(100),
    mesh: Mesh | None = None,
    chunk: int | None = None,
) -> Scalar:
    """How far the paths of a flow are from straight lines run through at one speed; see the top of this module.

    **Arguments:** `flow`, `like`, `num`, `key`, `args`, `mesh`, `chunk`: as in `sample`; `solver`, `grid`: fine enough
    that the solution is accurate; the integral is taken by the trapezoidal rule on the grid.

    **Returns:** a scalar, 0 if straight.
    """
    check_state(like, "like")
    key, num = check_key(key, "curvature"), check_count(num, "curvature got num")
    check_batch(args, num)
    one = eqx.Partial(_squares, like=state_like(like), solver=solver, grid=grid)
    bend, length = batched(one, mesh=mesh, chunk=chunk)(flow, jnp.arange(num), args, key=key)
    bend, length = jnp.mean(bend), jnp.mean(length)
    # A flow that stands still is straight; one that comes back to where it was has an infinite curvature.
    return jnp.where(bend == 0, bend, bend / jnp.where(bend == 0, 1, length))


def _squares(
    flow: AbstractVelocityFlow, index: Array, args: Args, *, key: PRNGKey, like: Like, solver, grid
) -> tuple[Scalar, Scalar]:
    """The numerator and the denominator of one example."""
    del index
    _, x_start = _start(flow, key, like)
    sol = solve(flow, x_start, args, solver=solver, grid=grid, saveat=diffrax.SaveAt(t0=True, steps=True))
    ts, xs = sol.ts, sol.ys
    assert ts is not None
    span = as_scalar(ts[-1] - ts[0])
    chord = jax.tree.map(lambda leaf: (leaf[-1] - leaf[0]) / span.astype(leaf.dtype), xs)
    velocities = jax.vmap(lambda t, x: flow.velocity(t, x, args))(ts, xs)

    def square(velocity: State) -> Scalar:
        difference = jax.tree.map(jnp.subtract, velocity, chord)
        return as_scalar(tree_dot(difference, difference))

    bend = jnp.abs(jnp.trapezoid(jax.vmap(square)(velocities), ts))
    return bend, as_scalar(tree_dot(chord, chord)) * jnp.abs(span)
