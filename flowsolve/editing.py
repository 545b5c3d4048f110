r"""Editing: exact inversion of a sampler, SDEdit from any time, known elements under a mask, interpolation of noise.

With $x_t = \alpha x_0 + \sigma\epsilon$ and F_n the step of a solver from t_n to t_{n+1} < t_n, a sample is
$x_N = F_{N-1} \circ \dots \circ F_0(x_0)$. `sampling.encode` solves the same equation the other way, and its error
falls with the solver's order. `invert` undoes the very steps: from the last to the first it solves

$$F_n(x_n) = x_{n+1} \quad\text{by}\quad x \leftarrow x + m\,(x_{n+1} - F_n(x)), \qquad
  m = \sqrt{(\alpha^2 + \sigma^2)_{t_n} / (\alpha^2 + \sigma^2)_{t_{n+1}}}$$

with Anderson's acceleration, so that solving again gives the data back to rounding, at few steps and with guidance.

    z = fs.editing.invert(flow, x, label, solver=fs.solvers.DDIM(), grid=fs.grids.Uniform(20))
    x_edited = fs.solve(flow, z, other_label, solver=fs.solvers.DDIM(), grid=fs.grids.Uniform(20)).ys[-1]

All functions take ONE example; batch them by `batched`.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from ._checks import check, check_count, check_key, check_state, describe, known
from ._integrate import check_network, nan_on_failure, raise_on_failure
from ._numerics import as_scalar, as_state, linear_combination, safe_sqrt, tree_dot
from ._settings import Settings, opaque, settle
from ._steps import fixed_steps
from ._types import Args, PRNGKey, Scalar, ScalarLike, State
from .dynamics import AbstractDynamics
from .flow import AbstractFlow, AbstractFlowWrapper, AbstractVelocityFlow, check_flow
from .grids import AbstractGrid
from .sampling import solve
from .solvers import AbstractMultistep
from .solvers.singlestep import AbstractSinglestep

__all__ = ["Masked", "invert", "linear_interpolation", "sdedit", "spherical_interpolation"]


# --- inversion ------------------------------------------------------------------------------------------------------


def invert(
    flow: AbstractVelocityFlow,
    x_data: State,
    args: Args = None,
    *,
    solver: diffrax.AbstractSolver | None = None,
    grid: AbstractGrid | None = None,
    t_start: ScalarLike | None = None,
    t_end: ScalarLike | None = None,
    memory: int = 5,
    iterations: int = 50,
    tolerance: ScalarLike | None = None,
    throw: bool = True,
) -> State:
    """The start from which `solve` with the same settings ends at `x_data`; ONE example, batch with `batched`.

    A step is inverted by Anderson's accelerated fixed-point iteration, see the top of this module, from the state after
    the step as the first guess.

    **Arguments:**

    - `flow`, `x_data`, `args`: as in `encode`;
    - `solver`, `grid`, `t_start` > `t_end`: those of the `solve` that is undone, with its defaults. A solver whose step
      depends on the state alone: DDIM, `EDMHeun`, `DPMSolverPPSinglestep`, Euler and explicit Runge-Kutta methods of
      Diffrax. A step of a multistep solver depends on evaluations that are not known before it: `encode` with it;
    - `memory`: how many earlier iterates the acceleration combines; 0 is the plain iteration;
    - `iterations`: the most of them in one step, of as many network evaluations as a step has;
    - `tolerance`: of the residual of a step, root mean square, in units of that of the state plus
      sqrt(alpha^2 + sigma^2); 16 ulp by default;
    - `throw`: whether a step that could not be inverted raises; if not, the answer is NaN.

    **Returns:** the state at `t_start`, of the structure of `x_data`. Its derivatives, of either mode, are those of the
    exact solution of each step's equation, whatever the iterates; where that has none, NaN.

    A step onto sigma = 0 ends at the denoised prediction, which may not take the value `x_data` at all, or take it at
    several states, as may any step with strong guidance: then take more steps, or end above the clean data, at
    t_end > 0.

    **Raises:** `ValueError`, `TypeError` for a request that makes no sense; `RuntimeError` if a step was not inverted.

    Source: Pan et al. (2023), arXiv 2309.04907 (accelerated iterative diffusion inversion); Garibi et al. (2024),
    arXiv 2403.14602 (renoising); Anderson (1965), J. ACM 12, 547-560. Deviation: it iterates to a tolerance, and takes
    any solver of one step.
    """
    check_state(x_data, "x_data")
    x_data = as_state(x_data)
    settings = settle(flow, solver=solver, grid=grid, controller=None, dynamics=None, t_start=t_start, t_end=t_end)
    if settings.dynamics.stochastic:
        raise ValueError(
            f"invert undoes steps of the probability flow, but {type(settings.solver).__name__} draws noise: use a "
            "deterministic solver such as DDIM()."
        )
    if not _is_one_step(settings.solver):
        raise ValueError(
            f"invert got {type(settings.solver).__name__}, whose step is no function of the state alone: use a "
            "one-step solver such as DDIM() or diffrax.Heun(), or fs.encode, which is exact to the solver's order."
        )
    memory = check_count(memory, "invert got memory", least=0)
    most = jnp.asarray(check_count(iterations, "invert got iterations"))
    if tolerance is not None:
        tolerance = as_scalar(tolerance)
        tolerance = check(tolerance, ~(known(tolerance) > 0), "invert got tolerance = {}, but wants it > 0.", tolerance)
    x, result = _invert(flow, x_data, args, settings, memory, most, tolerance)
    return raise_on_failure(result, x) if throw else x


def _is_one_step(solver: diffrax.AbstractSolver) -> bool:
    if type(solver) is diffrax.HalfSolver:
        return _is_one_step(solver.solver)
    if isinstance(solver, AbstractMultistep):
        return solver.history == 0
    return isinstance(solver, AbstractSinglestep | diffrax.AbstractERK | diffrax.Euler)


@eqx.filter_jit
def _invert(
    flow: AbstractVelocityFlow,
    x_data: State,
    args: Args,
    settings: Settings,
    memory: int,
    iterations: Int[Array, ""],
    tolerance: Scalar | None,
) -> tuple[State, diffrax.RESULTS]:
    check_network(flow, x_data, args)
    settings = opaque(settings)
    terms, ts = settings.dynamics.terms(flow), settings.ts
    assert ts is not None
    flat, unravel = ravel_pytree(x_data)
    if tolerance is None:
        tolerance = as_scalar(16 * jnp.finfo(flat.dtype).eps)

    def size(s: Scalar) -> Scalar:
        return jnp.hypot(*flow.path.coefficients(-s))

    def back(carry: tuple[Array, Array], row: tuple[Array, PyTree]) -> tuple[tuple[Array, Array], None]:
        (target, solved), (ends, weights) = carry, row

        def step(x: Array) -> Array:
            x, _ = fixed_steps(terms, settings.solver, ends, weights, unravel(x), args)
            return ravel_pytree(x)[0]

        before = size(ends[0])
        scale = (before / size(ends[1])).astype(target.dtype)

        def residual(x: Array) -> Array:
            return scale * (target - step(x))

        first = scale * target
        bound = tolerance.astype(target.dtype) * (_rms(first) + before.astype(target.dtype))
        x, left = _root(residual, first, memory, iterations, bound)
        return (x, solved & (left <= bound)), None

    rows = jnp.stack([ts[:-1], ts[1:]], axis=1), jax.tree.map(lambda leaf: leaf[:, None], settings.table)
    (x, solved), _ = jax.lax.scan(back, (flat, jnp.asarray(True)), rows, reverse=True)
    failed = diffrax.RESULTS.nonlinear_max_steps_reached
    result = diffrax.RESULTS.where(solved, diffrax.RESULTS.successful, failed)  # pyright: ignore[reportArgumentType]
    return nan_on_failure(result, unravel(x)), result


def _rms(x: Float[Array, " d"]) -> Scalar:
    return jnp.sqrt(jnp.mean(x**2))


def _root(residual, first: Float[Array, " d"], memory: int, iterations: Int[Array, ""], bound: Scalar):
    """The x where residual(x) = 0, by `_anderson`, and the root mean square that is left of it.

    Derivatives are those of the solution, not of the iteration, which ends before they are right: with residual'(x) a
    linear map L, those of x solve L dx = -d residual, by the same iteration.
    """

    def inverse(of, b):
        size = _rms(b)
        least = 16 * jnp.finfo(b.dtype).eps * size
        solution, left = _anderson(lambda v: of(v) - b, -b, memory, iterations, least)
        return jnp.where(left <= jnp.sqrt(jnp.finfo(b.dtype).eps) * size, solution, jnp.nan)

    return jax.lax.custom_root(
        residual,
        first,
        lambda residual, first: _anderson(residual, first, memory, iterations, bound),
        lambda linear, b: jax.lax.custom_linear_solve(linear, b, inverse, transpose_solve=inverse),
        has_aux=True,
    )


def _anderson(residual, first: Float[Array, " d"], memory: int, iterations: Int[Array, ""], bound: Scalar):
    """The iterate with the smallest root mean square of residual(x), and that, by x <- x + residual(x), accelerated.

    With dX, dR the last changes of x and of the residual, x + r - (dX + dR) c where c minimises |r - dR c|.
    """

    def go_on(carry):
        number, _, _, _, _, best_size = carry
        return (number < iterations) & (best_size > bound)

    def iterate(carry):
        number, x, last, changes, best, best_size = carry
        r = residual(x)
        size = _rms(r)
        better = size < best_size
        best, best_size = jnp.where(better, x, best), jnp.where(better, size, best_size)
        step = r
        if memory:
            last_x, last_r = last
            place = (jnp.arange(memory) == (number - 1) % memory) & (number > 0)
            changes = tuple(
                jnp.where(place[:, None], (new - old)[None], kept)
                for new, old, kept in zip((x, r), (last_x, last_r), changes, strict=True)
            )
            step = r - _least_squares(changes[1], r) @ (changes[0] + changes[1])
        return number + 1, x + step, (x, r), changes, best, best_size

    none = jnp.zeros((memory, first.size), first.dtype)
    start = (jnp.zeros_like(iterations), first, (first, first), (none, none), first, jnp.full_like(bound, jnp.inf))
    *_, best, best_size = jax.lax.while_loop(go_on, iterate, start)
    return best, best_size


def _least_squares(rows: Float[Array, "memory d"], r: Float[Array, " d"]) -> Float[Array, " memory"]:
    """c that minimises |r - rows^T c|, from the normal equations in units of each row; 0 for a row of zeros."""
    norms = jnp.sqrt(jnp.sum(rows**2, axis=1))
    units = rows / jnp.where(norms > 0, norms, 1)[:, None]
    ridge = 8 * jnp.finfo(r.dtype).eps * jnp.eye(len(rows), dtype=r.dtype) + jnp.diag((norms == 0).astype(r.dtype))
    product = jnp.matmul(units, units.T, precision=jax.lax.Precision.HIGHEST)
    coefficients = jnp.linalg.solve(product + ridge, units @ r)
    return coefficients / jnp.where(norms > 0, norms, 1)


# --- SDEdit and masks -----------------------------------------------------------------------------------------------


def sdedit(
    flow: AbstractFlow,
    x_guide: State,
    args: Args = None,
    keep: PyTree | None = None,
    *,
    t_start: ScalarLike,
    key: PRNGKey,
    solver: diffrax.AbstractSolver | None = None,
    grid: AbstractGrid | None = None,
    controller: diffrax.AbstractStepSizeController | None = None,
    dynamics: AbstractDynamics | None = None,
    t_end: ScalarLike | None = None,
    throw: bool = True,
) -> State:
    r"""Noise a guide up to any time and solve from there; ONE example, batch with `batched`.

    $$x_{t} = \alpha(t)\, x_\mathrm{guide} + \sigma(t)\, \epsilon, \qquad \text{then from } t = t_\mathrm{start}
      \text{ to } t_\mathrm{end}$$

    The later the start, the more realistic and the less faithful to the guide; of a guide that is itself data, drawn
    from the law that the flow samples, the result has that law, whatever the start.

    **Arguments:**

    - `flow`, `args`: as in `solve`; the flow's noise is independent of the data;
    - `x_guide`: one example, such as a rough drawing;
    - `keep`: None, or booleans like `x_guide`, True where it is kept: there the state stays on the path from
      the noise to the guide, see `Masked`, and the result is the guide itself;
    - `t_start`: a path time; `key`: a typed key, for the noise and for a stochastic equation;
    - `solver`, `grid`, `controller`, `dynamics`, `t_end`, `throw`: as in `solve`.

    **Returns:** the edited example; NaN if the solve failed and `throw` is False.

    Source: Meng et al. (2021), arXiv 2108.01073. Deviation: with a mask the known part keeps one noise from the start
    to the end where the equation draws none.
    """
    check_flow(flow, "flow")
    check_state(x_guide, "x_guide")
    x_guide = as_state(x_guide)
    noise_key, solve_key = jax.random.split(check_key(key, "SDEdit"))
    noise = flow.source.sample(noise_key, x_guide)
    sol = solve(
        flow if keep is None else Masked(flow, x_guide, noise, keep),
        flow.path.interpolate(t_start, x_guide, noise),
        args,
        solver=solver,
        grid=grid,
        controller=controller,
        dynamics=dynamics,
        key=solve_key,
        t_start=t_start,
        t_end=t_end,
        throw=throw,
    )
    x = jax.tree.map(lambda leaf: leaf[-1], sol.ys)
    if keep is not None and t_end is None:
        x = jax.tree.map(jnp.where, keep, x_guide, x)
    return nan_on_failure(sol.result, x)


class Masked(AbstractFlowWrapper):
    r"""A flow that holds the known elements of an example on their path; everywhere else it is the flow inside.

    On the known elements the denoised data is `data`, and the noise what the state itself says,

    $$E[x_0 | x_t] = x_\mathrm{known}, \qquad E[\epsilon | x_t] = (x_t - \alpha x_\mathrm{known})/\sigma ,$$

    so that a state that starts on $\alpha x_\mathrm{known} + \sigma\epsilon$ stays there under the probability flow,
    and under a reverse SDE is drawn anew around the known data at the level of each time. The network sees the known
    elements at the noise level of its time. It does not know that they are known: the others are drawn from their
    conditional law exactly where they are independent of the known ones, and approximately elsewhere.

    **Arguments:** `flow`: any flow; `data`: one example, of which the known elements count; `eps`: the noise at which
    they start, alike, which speaks at sigma = 0, where the state says nothing of it; `keep`: booleans like `data`.

    Source: Song et al. (2020), arXiv 2011.13456, and Meng et al. (2021), arXiv 2108.01073 (the known part replaced by
    the noised data at every step). Deviation: it is a flow, so that every solver takes it, between steps as well.
    """

    flow: AbstractFlow
    data: State
    eps: State
    keep: PyTree

    def __init__(self, flow: AbstractFlow, data: State, eps: State, keep: PyTree):
        check_flow(flow, "flow")
        if not all(getattr(leaf, "dtype", None) == jnp.bool_ for leaf in jax.tree.leaves(keep)):
            raise TypeError(
                f"Masked got keep = {describe(keep)}, but wants booleans, True where an element is known: "
                "compare it with 0."
            )
        shapes = [jax.tree.map(jnp.shape, part) for part in (data, eps, keep)]
        if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
            raise ValueError(
                f"Masked got data {describe(data)}, eps {describe(eps)} and keep {describe(keep)}, but wants the same "
                "structure and shapes: broadcast the mask to those of the data."
            )
        self.flow, self.data, self.eps, self.keep = flow, data, eps, keep

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        t = as_scalar(t)
        alpha, sigma = self.path.coefficients(t)
        a, b, c = self.prediction.coefficients(self.path, t)
        clean = sigma == 0
        share = jnp.where(clean, 0, 1 / jnp.where(clean, 1, sigma))
        noise = linear_combination((share, -alpha * share, clean.astype(t.dtype)), (x, self.data, self.eps))
        held = linear_combination((a / c, b / c), (self.data, noise))
        return jax.tree.map(jnp.where, self.keep, held, self.flow.output(t, x, args, key=key))


# --- interpolation --------------------------------------------------------------------------------------------------


def spherical_interpolation(a: State, b: State, weight: ScalarLike) -> State:
    r"""The point at `weight` of the great arc from a to b, over all elements of an example together.

    $$\frac{\sin((1-w)\theta)}{\sin\theta}\, a + \frac{\sin(w\theta)}{\sin\theta}\, b, \qquad
      \cos\theta = \frac{\langle a, b\rangle}{|a|\,|b|}$$

    Where a and b have the same norm, so has every point between them. Two independent noises of many elements are
    nearly at right angles, and every point between them is nearly normal.

    **Arguments:** `a`, `b`: two encodings (of `encode` or `invert`), alike, of any pytree; `weight`: w, 0 at a, 1 at b.

    **Returns:** a state like a.

    **Raises:** `ValueError` for states that are not alike, that are zero, or that point in opposite directions, between
    which there is no one arc.

    Source: Song, Meng & Ermon (2020), arXiv 2010.02502, appendix; Shoemake (1985), SIGGRAPH 19, 245-254. The angle
    is had without cancellation: $2\,\mathrm{atan2}(|\hat a - \hat b|, |\hat a + \hat b|)$.
    """
    _check_alike(a, b)
    w = as_scalar(weight)
    norms = [safe_sqrt(as_scalar(tree_dot(x, x))) for x in (a, b)]
    unit_a, unit_b = (
        linear_combination((1 / jnp.where(norm == 0, 1, norm),), (x,)) for norm, x in zip(norms, (a, b), strict=True)
    )
    apart, together = (linear_combination((1.0, sign), (unit_a, unit_b)) for sign in (-1.0, 1.0))
    sizes = [safe_sqrt(as_scalar(tree_dot(x, x))) for x in (apart, together)]
    opposite = sizes[1] < 1e-3
    w = check(
        w,
        known(norms[0] == 0) | known(norms[1] == 0) | known(opposite),
        "spherical_interpolation got states of norm {} and {} that are zero or opposite, between which there is no one "
        "arc: use linear_interpolation.",
        *norms,
    )
    angle = 2 * jnp.arctan2(*sizes)

    def share(w: Scalar) -> Scalar:
        """sin(w angle)/sin(angle), w at the angle 0."""
        return w * jnp.sinc(w * angle / jnp.pi) / jnp.sinc(angle / jnp.pi)

    return linear_combination((share(1 - w), share(w)), (a, b))


def linear_interpolation(a: State, b: State, weight: ScalarLike) -> State:
    r"""The point at `weight` between two noises, of the variance of either:

    $$\frac{(1 - w)\, a + w\, b}{\sqrt{(1-w)^2 + w^2}}$$

    Of independent a, b ~ N(0, s^2 I) it is exactly N(0, s^2 I) at every w, in any number of dimensions.

    **Arguments:** `a`, `b`: two states alike, of any pytree; `weight`: w, 0 at a, 1 at b.

    **Returns:** a state like a. **Raises:** `ValueError` for states that are not alike.
    """
    _check_alike(a, b)
    w = as_scalar(weight)
    size = jnp.hypot(1 - w, w)
    return linear_combination(((1 - w) / size, w / size), (a, b))


def _check_alike(a: State, b: State) -> None:
    check_state(a, "a")
    check_state(b, "b")
    if describe(a) != describe(b):
        raise ValueError(
            f"Interpolation got {describe(a)} and {describe(b)}, but wants two states of the same structure, shapes "
            "and dtypes."
        )
