r"""Inpainting by replacement: after each step the known part of the data is put back, at the noise of the time reached.

With a mask M (1 where the data is known to be $x^*$) a step from t to s is

$$x_s \leftarrow M (\alpha_s x^* + \sigma_s z) + (1 - M)\, x_s$$

and x_s is carried back to time t by fresh noise and stepped down again, several times, so that the unknown part comes
to agree with the known one.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from .._checks import check_count, check_state, describe
from .._numerics import as_scalar, linear_combination
from .._types import Args, ScalarLike, State
from ..dynamics import unwrap
from .wrappers import AbstractNoiseRaiser, check_one_step, inner_counts, raise_noise

__all__ = ["RePaint"]


class RePaint(AbstractNoiseRaiser):
    r"""Inpainting with any flow, around any one-step solver of the probability flow.

    Each step draws as DDPM's does: the inner solver goes down to the time whose noise is the part that x_s keeps of
    x_t, and fresh noise raises it to s. With `DDIM()` inside this is the ancestral step, as in the paper.

    **Arguments:** `solver`: the inner solver; `mask`: booleans shaped as one example, True where it is known; `known`:
    one example, read where the mask is True; `repeats`: how often each step is taken, 10 by default as in the paper, 1
    for replacement alone.

    The data is known without noise; for a noisy measurement see `posterior`. Exact only where many small steps are
    taken with many repeats. For masks and images of each example's own vmap over the solver:
    `jax.vmap(lambda x, key: fs.sample(flow, like, num=1, key=key, solver=RePaint(DDIM(), mask, x)))(xs, keys)`.

    Evaluations are `repeats` times those of the inner solver. On fixed grids only. Dense output is linear. Deviations:
    noise is raised back over one step (the paper's jump length is 10 of its 250), the last step included.
    Source: Lugmayr et al. (2022), arXiv 2201.09865.
    """

    solver: diffrax.AbstractSolver
    mask: PyTree[Bool[Array, "..."]]
    known: State
    repeats: int = eqx.field(static=True)

    def __init__(self, solver: diffrax.AbstractSolver, mask: PyTree, known: PyTree, *, repeats: int = 10):
        check_one_step(solver, "RePaint")
        self.solver = solver
        self.mask, self.known = jax.tree.map(jnp.asarray, (mask, known))
        if any(leaf.dtype != bool for leaf in jax.tree.leaves(self.mask)):
            raise TypeError(
                f"RePaint got a mask of {describe(self.mask)}, but wants booleans, True where data is known."
            )
        check_state(self.known, "known")
        if jax.tree.map(jnp.shape, self.mask) != jax.tree.map(jnp.shape, self.known):
            raise ValueError(
                f"RePaint got a mask of {describe(self.mask)} and known data of {describe(self.known)}, but wants both "
                "shaped as one example: broadcast the mask."
            )
        self.repeats = check_count(repeats, "RePaint got repeats")

    @property
    def evaluations_per_step(self) -> int:
        """Those of the inner solver, which begins anew each time, times `repeats`."""
        return self.repeats * sum(inner_counts(self.solver))

    @property
    def evaluations_at_start(self) -> int:
        """Those of the inner solver."""
        return inner_counts(self.solver)[1]

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ScalarLike,
        t1: ScalarLike,
        y0: State,
        args: Args,
        solver_state: Any,
        made_jump: Any,
    ) -> tuple[State, None, dict[str, Any], Any, diffrax.RESULTS]:
        """The module's step, `repeats` times."""
        del made_jump
        if jax.tree.map(jnp.shape, self.known) != jax.tree.map(jnp.shape, y0):
            raise ValueError(
                f"RePaint got known data of {describe(self.known)}, but one example of the flow is {describe(y0)}: "
                "give both the same structure and shapes, without a batch axis."
            )
        field, noise, _ = unwrap(terms, "RePaint")
        assert noise is not None
        path = field.flow.path
        inner = self.inner_terms(terms, field)
        start, target = -as_scalar(t0), -as_scalar(t1)
        alpha, sigma = path.coefficients(target)
        kept, _ = path.noise_split(target, start)
        below = jnp.clip(path.time_at(alpha, sigma * kept), as_scalar(path.t_data), target)

        def once(carried: Any, number: Any) -> tuple[Any, None]:
            x, state = carried

            def normal(use: int) -> State:
                return noise.extra_normal(as_scalar(t0), as_scalar(t1), 3 * number + use)

            raised = raise_noise(path, target, start, x, normal(0))
            x = jax.tree.map(lambda first, again: jnp.where(number == 0, first, again), y0, raised)
            x, _, _, state, _ = self.solver.step(inner, -start, -below, x, args, state, True)
            x = raise_noise(path, below, target, x, normal(1))
            known = linear_combination((alpha, sigma), (self.known, normal(2)))
            x = jax.tree.map(jnp.where, self.mask, known, x)
            return (x, state), None

        # The first pass starts from y0; what is carried into it is not read.
        (x, state), _ = jax.lax.scan(once, (y0, solver_state), jnp.arange(self.repeats))
        return x, None, {"y0": y0, "y1": x, "formula": None}, state, diffrax.RESULTS.successful
