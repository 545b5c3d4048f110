r"""Wasserstein distances between two batches as they are: exact, in random directions, and entropic.

$$W_p^p = \min_\pi \sum_{ij} \pi_{ij} \lvert x_i - y_j\rvert^p, \qquad
  W_\varepsilon = \min_\pi \sum_{ij} \pi_{ij} \lvert x_i - y_j\rvert^2
    + \varepsilon\,\mathrm{KL}(\pi\,\|\,1/(n m))$$

over plans whose rows sum to 1/n and whose columns to 1/m. In one dimension $W_p^p$ is the integral over the level u of
$\lvert F_x^{-1}(u) - F_y^{-1}(u)\rvert^p$.
"""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .._checks import check, check_count, check_key, is_concrete
from .._numerics import as_scalar, safe_power, safe_sqrt, squared_distances
from .._types import PRNGKey, Scalar, ScalarLike
from ..couplings import Assignment
from ._rows import Batch, Rows, over_rows, rows_of

__all__ = ["sinkhorn_divergence", "sliced_wasserstein", "wasserstein"]


def wasserstein(a: Batch, b: Batch) -> Scalar:
    """The Wasserstein distance of order 2 between two batches of one size, by the best assignment.

    Time grows with the cube of the number of examples n, memory with its square: for some thousands. Between two
    batches of the same law in d > 4 dimensions it falls with n as n^(-1/d) only.

    **Arguments:** `a`, `b`: batches of as many examples.

    **Returns:** a scalar in units of the features, W_2 and not its square.

    **Raises:** `ValueError` for batches that do not go together, or numbers that are not finite.
    """
    rows = rows_of(a, b, "wasserstein")
    if rows[0].shape != rows[1].shape:
        raise ValueError(
            f"wasserstein got {rows[0].shape[0]} and {rows[1].shape[0]} examples, but assigns one to one: take as many "
            "of both, or sliced_wasserstein, sinkhorn_divergence."
        )
    return _assigned(*rows)


@eqx.filter_jit
def _assigned(a: Rows, b: Rows) -> Scalar:
    # The key is not used: the assignment is not drawn.
    b = Assignment()(jax.random.key(0), a, b)
    return safe_sqrt(jnp.mean(jnp.sum((a - b) ** 2, axis=1)))


def sliced_wasserstein(
    a: Batch, b: Batch, *, key: PRNGKey, projections: int = 512, order: float | int = 2, block: int = 64
) -> Scalar:
    r"""$(E_\theta W_p^p(\theta\cdot x, \theta\cdot y))^{1/p}$, the mean over random directions.

    Exact in each direction, for batches of different sizes too. In d dimensions it is smaller than the Wasserstein
    distance; for two laws that differ by a shift s, at order 2, it is $\lvert s\rvert/\sqrt{d}$.

    **Arguments:** `a`, `b`: batches; `key`: for the directions, uniform on the sphere; the same key compares in the
    same directions; `projections`: how many; `order`: p >= 1; `block`: directions at a time.

    **Returns:** a scalar in units of the features.

    **Raises:** `ValueError` for batches that do not go together, numbers that are not finite, or an order below 1 or
    infinite.

    Source: Bonneel et al. (2015), J. Math. Imaging Vis. 51, 22-45.
    """
    key = check_key(key, "sliced_wasserstein")
    projections = check_count(projections, "sliced_wasserstein got projections")
    block = check_count(block, "sliced_wasserstein got block")
    if not 1 <= order < np.inf:
        raise ValueError(f"sliced_wasserstein got order = {order!r}, but wants a number of at least 1, and finite.")
    rows = rows_of(a, b, "sliced_wasserstein")
    steps = _quantile_steps(rows[0].shape[0], rows[1].shape[0])
    return _sliced(*rows, key, steps, projections, order, block)


def _quantile_steps(
    num_a: int, num_b: int
) -> tuple[Int[np.ndarray, " steps"], Int[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
    """Both quantile functions are constant between levels: the place in either order there, and the width in levels."""
    # Levels in units of 1/(num_a num_b).
    ends = np.union1d(np.arange(1, num_a + 1) * num_b, np.arange(1, num_b + 1) * num_a)
    starts = np.concatenate([[0], ends[:-1]])
    places = (starts // num_b).astype(np.int32), (starts // num_a).astype(np.int32)
    return *places, (ends - starts) / (num_a * num_b)


@eqx.filter_jit
def _sliced(a: Rows, b: Rows, key: PRNGKey, steps: tuple, projections: int, order: float | int, block: int) -> Scalar:
    # About one mean, so that little of it cancels.
    centre = jnp.mean(b, axis=0)[None]
    a, b = a - centre, b - centre
    places_a, places_b, widths = steps
    directions = jax.random.normal(key, (projections, a.shape[1]), a.dtype)
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)

    def one(direction: Float[Array, " dim"]) -> Scalar:
        along_a, along_b = (
            jnp.sort(jnp.matmul(rows, direction, precision=jax.lax.Precision.HIGHEST)) for rows in (a, b)
        )
        return jnp.sum(widths.astype(a.dtype) * jnp.abs(along_a[places_a] - along_b[places_b]) ** order)

    return safe_power(jnp.mean(over_rows(one, directions, block)), as_scalar(1 / order))


def sinkhorn_divergence(
    a: Batch, b: Batch, *, epsilon: ScalarLike, tolerance: ScalarLike = 1e-3, iterations: int = 2000
) -> Scalar:
    r"""$W_\varepsilon(x, y) - (W_\varepsilon(x, x) + W_\varepsilon(y, y))/2$, entropic transport without its bias.

    It is 0 for equal batches and >= 0. It goes to $W_2^2$ as $\varepsilon$ goes to 0, and to the squared distance of
    the means as it grows. Memory grows with the square of the number of examples.

    **Arguments:** `a`, `b`: batches; `epsilon`: > 0, in squared units of the features; `tolerance`: of the plans'
    marginals, the sum of their errors; `iterations`: the most that are taken.

    **Returns:** a scalar in squared units of the features. Its first derivatives are right, higher ones are not.

    **Raises:** `ValueError` for batches that do not go together, numbers that are not finite, or where the iterations
    do not reach the tolerance. Needs `pip install "flowsolve[ot]"`.

    Source: Genevay, Peyre & Cuturi (2018), arXiv 1706.00292; Feydy et al. (2019), arXiv 1810.08278; solved by ott-jax.
    """
    epsilon, tolerance = as_scalar(epsilon), as_scalar(tolerance)
    for name, value in (("epsilon", epsilon), ("tolerance", tolerance)):
        if is_concrete(value) and not 0 < float(value) < np.inf:
            raise ValueError(f"sinkhorn_divergence got {name} = {float(value):g}, but wants it positive and finite.")
    iterations = check_count(iterations, "sinkhorn_divergence got iterations")
    rows = rows_of(a, b, "sinkhorn_divergence")
    value, converged = _entropic(*rows, epsilon, tolerance, iterations)
    return check(
        value,
        ~converged,
        f"sinkhorn_divergence did not reach its tolerance in iterations = {iterations}, but wants to: give more of "
        "them, or a larger epsilon or tolerance.",
    )


@eqx.filter_jit
def _entropic(a: Rows, b: Rows, epsilon: Scalar, tolerance: Scalar, iterations: int) -> tuple[Scalar, Array]:
    geometry, divergences = _import_ott()
    costs = [jax.vmap(lambda x, y=y: squared_distances(x, y))(x) for x, y in ((a, b), (a, a), (b, b))]
    known_costs, epsilon = jax.lax.stop_gradient((costs, epsilon.astype(a.dtype)))
    # ott-jax promotes dtypes and ranks on its own, which a user may have forbidden.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        value, out = divergences.sinkhorn_divergence(
            geometry.Geometry,
            *known_costs,
            epsilon=epsilon,
            solve_kwargs={"threshold": tolerance.astype(a.dtype), "max_iterations": iterations},
        )
    # The derivative of each minimum in its costs is its plan.
    for weight, cost, fixed, (f, g) in zip((1, -0.5, -0.5), costs, known_costs, out.potentials, strict=True):
        plan = jnp.exp((f[:, None] + g[None, :] - fixed) / epsilon)
        value = value + weight * jnp.sum(plan * (cost - fixed))
    return value, jnp.all(jnp.stack(out.converged))


def _import_ott() -> tuple[Any, Any]:
    try:
        with warnings.catch_warnings():
            # It imports a library that says it is no longer maintained.
            warnings.simplefilter("ignore", DeprecationWarning)
            from ott.geometry import geometry
            from ott.tools import sinkhorn_divergence as divergences
    except ImportError as error:
        raise ImportError(
            'sinkhorn_divergence solves with ott-jax, which is not installed: pip install "flowsolve[ot]", or use '
            "wasserstein or sliced_wasserstein."
        ) from error
    return geometry, divergences
