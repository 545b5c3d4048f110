r"""Couplings: which noise goes with which example of a batch.

A loss draws as much noise as there are examples, and a coupling says in which order the noise goes to them: pair i is
$(x_0^i, \epsilon^{j(i)})$. Data stay where they are, and with them their labels, masks and weights.

| coupling | order | |
|---|---|---|
| `Independent` | $j(i) = i$ | the product of both laws; pairs that are given stay pairs |
| `Assignment` | the permutation with the least $\sum_i c(x_0^i, \epsilon^{j(i)})$ | exact minibatch optimal transport |
| `Sinkhorn` | drawn from the $P$ with the least $\langle c, P\rangle - \varepsilon H(P)$ | entropic optimal transport |

With any but the first the noise depends on the data, and a flow has no score: its source is
`sources.CoupledNormal()`, or `sources.Source(draw)` for another law at the noise end.

    flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity(), source=fs.sources.CoupledNormal())
    loss = fs.losses.Regression(coupling=fs.couplings.Assignment())

The cost is $c = |x - z|^2$ over all elements of an example, plus $w\, d(y, y')$ of their conditions for
`WithCondition`, where the noise j is given the condition of example j.

Source: Pooladian et al. (2023), arXiv 2304.14772; Tong et al. (2023), arXiv 2302.00482; Cheng & Schwing (2025), arXiv
2503.10636 (conditions).
"""

import abc
import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jaxtyping import Array, Float, Int, PyTree

from ._checks import check_count, check_key, check_positive, check_state, describe, is_concrete
from ._numerics import as_scalar, optional_scalar
from ._types import Args, PRNGKey, Scalar, ScalarLike, State
from .sources import AbstractSource, Normal

__all__ = [
    "AbstractCost",
    "AbstractCoupling",
    "Assignment",
    "Independent",
    "Pairs",
    "Semidiscrete",
    "Sinkhorn",
    "SquaredDistance",
    "WithCondition",
    "mismatch",
    "semidiscrete",
]


class Pairs(eqx.Module):
    """Data and the noise that each example is given, in the place of the data alone.

    For pairs that belong together, such as a noise and where a flow carries it, or for draws of both ends that a
    coupling is to pair. A loss takes it for `x0`, and a data set of it is one like any other.

    **Arguments:** `data`, `noise`: of the same structure, shapes and dtypes; both one example, or both a batch.
    """

    data: State
    noise: State

    def __check_init__(self):
        if describe(self.data) != describe(self.noise):
            raise ValueError(
                f"Pairs got data {describe(self.data)} and noise {describe(self.noise)}, but wants both of the same "
                "structure, shapes and dtypes."
            )


class AbstractCost(eqx.Module):
    """The cost of giving a noise to an example."""

    @abc.abstractmethod
    def matrix(self, data: State, noise: State, args: Args) -> Float[Array, "num num"]:
        """c(i, j) for example i with noise j, both batches; `args` are the examples' conditions."""


class SquaredDistance(AbstractCost):
    """The squared Euclidean distance |x - z|^2 over all elements of an example."""

    def matrix(self, data: State, noise: State, args: Args) -> Float[Array, "num num"]:
        del args
        return _squared_distances(_rows(data), _rows(noise))


def mismatch(first: Args, second: Args) -> Scalar:
    """1 where two conditions differ in any of their elements, 0 where they are the same."""
    differ = jax.tree.map(lambda a, b: jnp.any(a != b), first, second)
    return jax.tree.reduce(jnp.logical_or, differ, jnp.asarray(False)).astype(float)


class WithCondition(AbstractCost):
    """A cost plus `weight` times a distance of the conditions, where noise j has the condition of example j.

    With a large weight the noise of a class stays in that class, so that the source given a condition is what a sampler
    draws, N(0, I); with weight 0, given a condition it is a part of N(0, I) only.

    **Arguments:** `weight`: >= 0, in units of the cost; `cost`: the cost without conditions; `distance`: (args of one
    example, args of another) -> a number >= 0, `mismatch` by default.

    Source: Cheng & Schwing (2025), arXiv 2503.10636.
    """

    weight: Scalar = eqx.field(converter=as_scalar)
    cost: AbstractCost = SquaredDistance()
    distance: Callable[[Args, Args], Scalar] = mismatch

    def __check_init__(self):
        if is_concrete(self.weight) and not float(self.weight) >= 0:
            raise ValueError(f"WithCondition got weight = {float(self.weight):g}, but wants a weight >= 0.")

    def matrix(self, data: State, noise: State, args: Args) -> Float[Array, "num num"]:
        if not jax.tree.leaves(args):
            raise ValueError("WithCondition got no args, but compares those of the examples: pass them to the loss.")
        apart = jax.vmap(lambda first: jax.vmap(lambda second: self.distance(first, second))(args))(args)
        cost = self.cost.matrix(data, noise, args)
        return cost + (self.weight * apart).astype(cost.dtype)


class AbstractCoupling(eqx.Module):
    """An order in which the noise of a batch goes to its examples."""

    #: Whether noise and data stay independent, so that the flow keeps its score.
    independent: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def order(self, key: PRNGKey, data: State, noise: State, args: Args = None) -> Int[Array, " num"]:
        """The noise j(i) of each example i.

        **Arguments:** `key`: one typed key; `data`, `noise`: batches of the same size; `args`: the examples'
        conditions, a pytree whose arrays have the same leading axis, or None.
        """

    def __call__(self, key: PRNGKey, data: State, noise: State, args: Args = None) -> State:
        """The noise in that order: its i-th entry belongs to example i."""
        order = self.order(check_key(key, "a coupling"), data, noise, args)
        return jax.tree.map(lambda leaf: leaf[order], noise)


class Independent(AbstractCoupling):
    """Noise i with example i: drawn noise is independent of the data, given pairs stay pairs."""

    independent: ClassVar[bool] = True

    def order(self, key: PRNGKey, data: State, noise: State, args: Args = None) -> Int[Array, " num"]:
        del key, noise, args
        return jnp.arange(jax.tree.leaves(data)[0].shape[0])


class Assignment(AbstractCoupling):
    """The permutation of least total cost: exact optimal transport between the two halves of a batch.

    On a CPU by SciPy, called back from the compiled program; on any other device by Optax's Hungarian algorithm.

    **Arguments:** `cost`: the cost of a pair.

    Source: Pooladian et al. (2023), arXiv 2304.14772; Tong et al. (2023), arXiv 2302.00482.
    """

    cost: AbstractCost = SquaredDistance()
    independent: ClassVar[bool] = False

    def order(self, key: PRNGKey, data: State, noise: State, args: Args = None) -> Int[Array, " num"]:
        del key
        return _assignment(jax.lax.stop_gradient(self.cost.matrix(data, noise, args)))


class Sinkhorn(AbstractCoupling):
    r"""Draws from the entropic plan $P = \mathrm{argmin}\, \langle c, P\rangle - \varepsilon H(P)$ of equal weights.

    By default every noise is used once: example by example, in a random order, j is drawn from row i of the plan among
    those not yet taken. With replacement each row is drawn from by itself, which follows the plan exactly.

    **Arguments:** `epsilon`: > 0, in units of the cost, or None for 0.05 of the batch's mean cost; `replace`: whether a
    noise may be drawn more than once; `cost`: the cost of a pair; `tolerance`: of the plan's marginals, the sum of
    their errors; `iterations`: the most that are taken.

    Needs `pip install "flowsolve[ot]"`.

    Source: Cuturi (2013), arXiv 1306.0895; Tong et al. (2023), arXiv 2302.00482, with replacement.
    """

    epsilon: Scalar | None = eqx.field(default=None, converter=optional_scalar)
    replace: bool = eqx.field(static=True, default=False)
    cost: AbstractCost = SquaredDistance()
    tolerance: Scalar = eqx.field(default=1e-3, converter=as_scalar)
    iterations: int = eqx.field(static=True, default=2000)
    independent: ClassVar[bool] = False

    def __check_init__(self):
        _import_ott()
        check_positive(self, "tolerance")
        if self.epsilon is not None:
            check_positive(self, "epsilon")
        check_count(self.iterations, "Sinkhorn got iterations")

    def order(self, key: PRNGKey, data: State, noise: State, args: Args = None) -> Int[Array, " num"]:
        log_plan = self.log_plan(data, noise, args)
        return (_draw_rows if self.replace else _draw_permutation)(key, jax.lax.stop_gradient(log_plan))

    def log_plan(self, data: State, noise: State, args: Args = None) -> Float[Array, "num num"]:
        """ln of the plan, whose rows and columns sum to 1/num each."""
        geometry, linear_problem, sinkhorn = _import_ott()
        cost = self.cost.matrix(data, noise, args)
        epsilon = 0.05 * jnp.mean(cost) if self.epsilon is None else self.epsilon.astype(cost.dtype)
        # ott-jax promotes dtypes and ranks on its own, which a user may have forbidden.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=epsilon))
            solve = sinkhorn.Sinkhorn(threshold=self.tolerance.astype(cost.dtype), max_iterations=self.iterations)
            solved = solve(problem)
        return (solved.f[:, None] + solved.g[None, :] - cost) / epsilon


class Semidiscrete(eqx.Module):
    r"""Optimal transport between a source and a whole data set, learnt once: each noise has its example.

    With a number $g_i$ for each example, learnt so that every example is drawn equally often,

    $$i(z) = \mathrm{argmin}_i\; |x_i - z|^2 - g_i ,$$

    or for epsilon > 0 drawn from the softmax of $(g_i - |x_i - z|^2)/\varepsilon$. Unlike a coupling of batches it has
    no error of a batch, and a batch of it costs one search through the data.

    **Arguments:** as in `semidiscrete`, which makes it; `potential`: the numbers g.

    Source: Genevay et al. (2016), arXiv 1605.08527; Mousavi-Hosseini et al. (2025), arXiv 2509.25519 (flow matching).
    """

    data: State
    args: Args
    source: AbstractSource
    epsilon: Scalar
    potential: Float[Array, " num"]

    def pairs(self, key: PRNGKey, num: int) -> tuple[Pairs, Args]:
        """`num` pairs and the args of their data: a batch for a loss, e.g. from `data.Draws`."""
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.data)
        keys = jax.random.split(check_key(key, "Semidiscrete.pairs"), (num, 2))
        noise = jax.vmap(lambda key: self.source.sample(key, like))(keys[:, 0])
        gain = self.potential[None, :] - _squared_distances(_rows(noise), _rows(self.data))
        soft = jax.vmap(lambda key, row: jax.random.gumbel(key, row.shape, row.dtype))(keys[:, 1], gain)
        index = jnp.argmax(gain + self.epsilon.astype(gain.dtype) * soft, axis=1)
        data, args = jax.tree.map(lambda leaf: leaf[index], (self.data, self.args))
        return Pairs(data, noise), args


def semidiscrete(
    data: PyTree,
    args: Args = None,
    *,
    key: PRNGKey,
    source: AbstractSource = Normal(),
    epsilon: float = 0.0,
    iterations: int = 20_000,
    batch_size: int = 256,
    learning_rate: ScalarLike = 0.1,
) -> Semidiscrete:
    """Learn a `Semidiscrete` plan by stochastic gradient steps on its dual, with ott-jax.

    **Arguments:** `data`: the data set, examples along the leading axis; `args`: their labels or the like; `key`: for
    the draws; `source`: the law of the noise; `epsilon`: >= 0, in units of the squared distance; `iterations` of
    `batch_size` noises each; `learning_rate`: of the first steps, in units of the mean squared distance; it falls to 0.

    **Returns:** the plan.

    **Raises:** `ImportError` without ott-jax; `ValueError` for numbers that make no sense.
    """
    pointcloud, problems, solvers = _import_semidiscrete()
    key = check_key(key, "semidiscrete")
    data, args = jax.tree.map(jnp.asarray, (data, args))
    check_state(data, "data")
    iterations = check_count(iterations, "semidiscrete got iterations")
    batch_size = check_count(batch_size, "semidiscrete got batch_size")
    if not epsilon >= 0:
        raise ValueError(f"semidiscrete got epsilon = {epsilon}, but wants a number >= 0.")
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), data)
    rows = _rows(data)

    def sampler(key: PRNGKey, shape: tuple[int, ...], dtype: Any = None) -> Array:
        noise = jax.vmap(lambda key: source.sample(key, like))(jax.random.split(key, shape[0]))
        return _rows(noise).astype(rows.dtype)

    @jax.jit
    def learn(key: PRNGKey, rows: Float[Array, "num dim"], rate: Scalar) -> Float[Array, " num"]:
        scale_key, key = jax.random.split(key)
        scale = jnp.mean(_squared_distances(sampler(scale_key, (256,)), rows))
        schedule = optax.cosine_decay_schedule(1.0, iterations)
        optimiser = optax.chain(optax.adam(1.0), optax.scale_by_schedule(schedule), optax.scale(rate * scale))
        # ott-jax promotes dtypes and ranks on its own, which a user may have forbidden.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            problem = problems.SemidiscreteLinearProblem(
                pointcloud.SemidiscretePointCloud(sampler, rows, epsilon=epsilon)
            )
            solver = solvers.SemidiscreteSolver(
                num_iterations=iterations, batch_size=batch_size, optimizer=optimiser, error_eval_every=iterations
            )
            return solver(key, problem).g

    potential = learn(key, rows, as_scalar(learning_rate))
    return Semidiscrete(data, args, source, as_scalar(epsilon), potential)


def _draw_rows(key: PRNGKey, log_plan: Float[Array, "num num"]) -> Int[Array, " num"]:
    """j(i) from row i."""
    levels = jax.random.uniform(key, log_plan.shape[:1], log_plan.dtype)
    return jax.vmap(_draw)(levels, log_plan)


def _draw_permutation(key: PRNGKey, log_plan: Float[Array, "num num"]) -> Int[Array, " num"]:
    """j(i) from row i without the columns that are taken, in a random order of the rows."""
    order_key, draw_key = jax.random.split(key)
    num = log_plan.shape[0]
    levels = jax.random.uniform(draw_key, (num,), log_plan.dtype)

    def one(taken: Array, drawing: tuple[Array, Array]) -> tuple[Array, Array]:
        row, level = drawing
        j = _draw(level, jnp.where(taken, -jnp.inf, log_plan[row]))
        return taken.at[j].set(True), j

    rows = jax.random.permutation(order_key, num)
    _, drawn = jax.lax.scan(one, jnp.zeros((num,), bool), (rows, levels))
    return jnp.zeros((num,), drawn.dtype).at[rows].set(drawn)


def _draw(level: Array, log_weights: Float[Array, " num"]) -> Int[Array, ""]:
    """The index at which the cumulative weights pass a level in [0, 1)."""
    # The largest weight is 1, however little of the plan is left.
    cumulative = jnp.cumsum(jnp.exp(log_weights - jnp.max(log_weights)))
    index = jnp.searchsorted(cumulative, level * cumulative[-1], side="right")
    # Rounding must not carry it onto an index of no weight behind the last.
    return jnp.minimum(index, jnp.searchsorted(cumulative, cumulative[-1], side="left"))


def _import_ott() -> tuple[Any, Any, Any]:
    with _importing_ott("Sinkhorn"):
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn
    return geometry, linear_problem, sinkhorn


def _import_semidiscrete() -> tuple[Any, Any, Any]:
    with _importing_ott("semidiscrete"):
        from ott.geometry import semidiscrete_pointcloud
        from ott.problems.linear import semidiscrete_linear_problem
        from ott.solvers.linear import semidiscrete
    return semidiscrete_pointcloud, semidiscrete_linear_problem, semidiscrete


@contextlib.contextmanager
def _importing_ott(who: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # It imports a library that says it is no longer maintained.
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    except ImportError as error:
        raise ImportError(
            f'{who} solves with ott-jax, which is not installed: pip install "flowsolve[ot]", or use Assignment.'
        ) from error


@jax.jit
def _assignment(cost: Float[Array, "num num"]) -> Int[Array, " num"]:
    """The column of each row in the assignment of least cost."""
    return jax.lax.platform_dependent(cost, cpu=_by_scipy, default=_by_optax)


def _by_scipy(cost: Float[Array, "num num"]) -> Int[Array, " num"]:
    def on_host(cost: Array) -> np.ndarray:
        return scipy.optimize.linear_sum_assignment(np.asarray(cost))[1].astype(np.int32)

    columns = jax.ShapeDtypeStruct(cost.shape[:1], jnp.int32)
    return jax.pure_callback(on_host, columns, cost, vmap_method="sequential")


def _by_optax(cost: Float[Array, "num num"]) -> Int[Array, " num"]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros(cost.shape[:1], jnp.int32).at[rows].set(columns.astype(jnp.int32))


def _squared_distances(x: Float[Array, "rows dim"], z: Float[Array, "columns dim"]) -> Float[Array, "rows columns"]:
    product = jnp.matmul(x, z.T, precision=jax.lax.Precision.HIGHEST)
    squares = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(z**2, axis=1)[None, :]
    return jnp.maximum(squares - 2 * product, 0)


def _rows(batch: State) -> Float[Array, "num dim"]:
    """A batch of examples as the rows of a matrix."""
    leaves = jax.tree.leaves(batch)
    num = leaves[0].shape[0]
    return jnp.concatenate([leaf.reshape(num, -1).astype(float) for leaf in leaves], axis=1)
