"""Arithmetic: linear combinations of pytrees, noise like a state, distances, powers and integrals of scalars."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from ._types import Like, PRNGKey, Scalar, ScalarLike, State


def as_scalar(value: ScalarLike) -> Scalar:
    """`value` as a strongly typed scalar of JAX's default float: float32, float64 under x64.

    **Raises:** `ValueError` for anything but one number.
    """
    if isinstance(value, float | int | np.number | np.ndarray):
        # Through NumPy nothing is compiled; and what is known stays so while something else is traced.
        with jax.ensure_compile_time_eval():
            array = jnp.asarray(np.asarray(value, jax.dtypes.canonicalize_dtype(float)))
    else:
        array = jnp.asarray(value)
    if array.ndim != 0:
        raise ValueError(
            f"A number was wanted, but an array of shape {array.shape} was given: everything here takes one example "
            "and one time, so batch with jax.vmap."
        )
    return array.astype(float)


def optional_scalar(value: ScalarLike | None) -> Scalar | None:
    """`as_scalar`, with None for None."""
    return None if value is None else as_scalar(value)


def state_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype in which a state of this dtype is solved: float32 at least, float64 under x64, as time is."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.zeros(()).dtype)


def as_state(x: State) -> State:
    """Arrays as Diffrax solves them: of `state_dtype`, and without weak types, which would trace again."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, state_dtype(leaf.dtype)), x)


def state_like(like: Like) -> Like:
    """The shapes of one example with the dtypes of `as_state`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, state_dtype(leaf.dtype)), like)


def safe_sqrt(x: Scalar) -> Scalar:
    """sqrt(x) whose derivative at 0 is 0, not infinite: for coefficients that vanish there together with a factor."""
    # NaN stays NaN.
    vanishes = x <= 0
    return jnp.where(vanishes, 0, jnp.sqrt(jnp.where(vanishes, 1, x)))


def safe_power(base: Scalar, exponent: Scalar) -> Scalar:
    """base^exponent for base, exponent >= 0, with finite derivatives at base = 0; 0^0 = 1."""
    positive = base > 0
    power = jnp.exp(exponent * jnp.log(jnp.where(positive, base, 1)))
    return jnp.where(positive, power, jnp.where(exponent == 0, 1, 0))


def increasing_root(function: Callable[[Scalar], Scalar], lower: Scalar, upper: Scalar) -> Scalar:
    """The root of an increasing scalar function, bracketed by `lower` and `upper`; where there is none, the nearer one.

    It has first and second derivatives in everything that `function` closes over, and none in the bracket.
    """

    def bisect(_: object, bracket: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        low, high = bracket
        middle = 0.5 * (low + high)
        below = function(middle) < 0
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    # Enough halvings for the last bit of a root near 0 as well.
    bracket = jax.lax.fori_loop(0, 2 * jnp.finfo(lower.dtype).nmant, bisect, (lower, upper))
    # Exact at the ends, which a bisection only approaches.
    root = jnp.where(function(lower) >= 0, lower, jnp.where(function(upper) <= 0, upper, bracket[1]))
    # Newton steps from the fixed root carry the derivatives: one gives the first, two the second as well.
    root = jax.lax.stop_gradient(root)
    newton = root
    for _ in range(2):
        value, slope = jax.jvp(function, (newton,), (jnp.ones_like(newton),))
        slope = jnp.where(slope == 0, jnp.finfo(slope.dtype).tiny, slope)
        newton = newton - value / slope
    return root + (newton - jax.lax.stop_gradient(newton))


def beta_logit_quantile(u: Scalar, a: Scalar, b: Scalar) -> Scalar:
    """ln(x/(1 - x)) of the quantile x of Beta(a, b) at probability u, from -80 to 80.

    A quantile as its logit keeps its digits near 0 and near 1; beyond e^-80 it is 0 or 1 in float32, also after
    multiplication by a time.
    """
    limit = jnp.asarray(80, a.dtype)
    return increasing_root(lambda logit: beta_cdf(logit, a, b) - u, -limit, limit)


def beta_cdf(logit: Scalar, a: Scalar, b: Scalar) -> Scalar:
    """The probability of Beta(a, b) below x = sigmoid(logit).

    The regularised incomplete beta function by its continued fraction (DLMF 8.17.22), differentiable in a and b, which
    JAX's `betainc` is not. Cut after 64 terms, which in float64 leaves 1e-13 of it for a, b up to 100 and 1e-7 up to
    1000.
    """
    log_beta = jax.scipy.special.betaln(a, b)
    # The fraction converges fast below the mean, roughly; above it, the probability of 1 - x under Beta(b, a).
    above = jax.nn.sigmoid(logit) > (a + 1) / (a + b + 2)
    a, b = jnp.where(above, b, a), jnp.where(above, a, b)
    logit = jnp.where(above, -logit, logit)
    x = jax.nn.sigmoid(logit)
    m = jnp.asarray(np.arange(32), x.dtype)
    odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
    m = m + 1
    even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))

    def append(tail: Scalar, terms: tuple[Scalar, Scalar]) -> tuple[Scalar, None]:
        return 1 + terms[0] / (1 + terms[1] / tail), None

    fraction, _ = jax.lax.scan(append, jnp.ones_like(x), (odd, even), reverse=True)
    log_power = a * jax.nn.log_sigmoid(logit) + b * jax.nn.log_sigmoid(-logit)
    tail = jnp.exp(log_power - log_beta) / (a * fraction)
    return jnp.where(above, 1 - tail, tail)


def is_zero(value: ScalarLike) -> bool:
    """Whether `value` is known to be the number 0; what is traced is not."""
    return not isinstance(value, jax.core.Tracer) and np.size(value) == 1 and bool(np.all(np.asarray(value) == 0))


def integral(integrand: Callable[[Scalar], Float[Array, "..."]], start: Scalar, end: Scalar) -> Float[Array, "..."]:
    """The integral of a smooth function by Gauss-Legendre quadrature with 16 nodes.

    For e^x over a length of 10 this is exact to rounding in float64, over a length of 20 to 1e-11.
    """
    nodes, weights = np.polynomial.legendre.leggauss(16)
    half = (end - start) / 2
    values = jax.vmap(integrand)(start + half * (1 + jnp.asarray(nodes, half.dtype)))
    return half * jnp.tensordot(jnp.asarray(weights, half.dtype), values, 1, precision=jax.lax.Precision.HIGHEST)


def phis(count: int, z: Scalar) -> Float[Array, " {count}"]:
    r"""phi_k(z) = \int_0^1 e^{(1-u) z} u^{k-1}/(k-1)! du for k = 1..count: phi_1 = (e^z - 1)/z, phi_k(0) = 1/k!."""
    near = jnp.abs(z) < 1
    small, large = jnp.where(near, z, 0), jnp.where(near, 1, z)
    nodes, weights = np.polynomial.legendre.leggauss(16)
    u = (1 + nodes) / 2
    table = np.stack([weights / 2 * u**k / math.factorial(k) for k in range(count)])
    near_values = jnp.sum(jnp.asarray(table, z.dtype) * jnp.exp(jnp.asarray(1 - u, z.dtype) * small)[None], axis=1)
    # The recurrence phi_{k+1} = (phi_k - 1/k!)/z cancels where z is small.
    far_values = [jnp.expm1(large) / large]
    for k in range(1, count):
        far_values.append((far_values[-1] - 1 / math.factorial(k)) / large)
    return jnp.where(near, near_values, jnp.stack(far_values))


def linear_combination(coefficients: Sequence[ScalarLike], trees: Sequence[State]) -> State:
    """sum_i coefficients[i] * trees[i], computed in each leaf's own dtype."""

    def combine(*leaves):
        total = None
        for coefficient, leaf in zip(coefficients, leaves, strict=True):
            scaled = jnp.asarray(coefficient).astype(leaf.dtype) * leaf
            total = scaled if total is None else total + scaled
        return total

    return jax.tree.map(combine, *trees)


def frozen(tree: PyTree) -> PyTree:
    """The same tree, through whose arrays no gradient passes."""
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def normal_like(key: PRNGKey, like: Like) -> State:
    """Independent standard normal noise with the structure, shapes and dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noise)


def normal_with(key: PRNGKey, like: Like, moments: tuple[Scalar, Scalar]) -> State:
    """Independent normal elements of one mean and standard deviation, `moments`, shaped like `like`."""
    mean, std = moments
    noise = linear_combination((std,), (normal_like(key, like),))
    return jax.tree.map(lambda leaf: leaf + mean.astype(leaf.dtype), noise)


def tree_size(tree: Like) -> int:
    """The number of elements of all leaves together: the dimension d of one example."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def tree_dot(a: State, b: State) -> Scalar:
    """The inner product of two states over all their elements."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return jax.tree.reduce(jnp.add, products)


def squared_distances(x: Float[Array, " dim"], others: Float[Array, "num dim"]) -> Float[Array, " num"]:
    """|x - y|^2 for every row y, of their differences.

    A product of matrices, |x|^2 - 2 x.y + |y|^2, would lose what is near in clusters far apart. For many x, `jax.vmap`
    it.
    """

    def one(y: Float[Array, " dim"]) -> Scalar:
        return jax.lax.platform_dependent(x, y, cpu=_by_features, default=_by_pairs)

    if others.shape[0] <= _TILE:
        return jax.vmap(one)(others)
    return jax.lax.map(one, others, batch_size=_TILE)


#: So many rows at a time, for which the sums of some hundred x stay in a CPU's cache.
_TILE = 1024


def _by_features(x: Float[Array, " dim"], y: Float[Array, " dim"]) -> Scalar:
    """Feature by feature: over many x and y a loop of long vectors, where XLA makes slow code of the other on a CPU."""

    def add(total: Scalar, pair: tuple[Scalar, Scalar]) -> tuple[Scalar, None]:
        # A gradient squares again: else it would keep what belongs to every pair and feature.
        return total + jax.checkpoint(_squared_difference)(*pair), None

    return jax.lax.scan(add, jnp.zeros((), x.dtype), (x, y))[0]


def _by_pairs(x: Float[Array, " dim"], y: Float[Array, " dim"]) -> Scalar:
    return jnp.sum(_squared_difference(x, y))


def _squared_difference(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    return (x - y) ** 2


def all_finite(tree: State) -> jax.Array:
    """Whether every element of every leaf is finite, a boolean scalar."""
    finite = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree)
    return jax.tree.reduce(jnp.logical_and, finite, jnp.asarray(True))
