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
`WithCondition`, where the noise j is given the condition of example j. For costs that are NaN or infinite a coupling
raises; in a compiled function, which does not, it gives NaN for noise, so that the loss is NaN and training stops.

Source: Pooladian et al. (2023), arXiv 2304.14772; Tong et al. (2023), arXiv 2302.00482; Cheng & Schwing (2025), arXiv
2503.10636 (conditions).
"""

import abc
import contextlib
import math
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

from ._checks import check, check_batch, check_count, check_key, check_positive, check_state, describe, is_concrete
from ._numerics import all_finite, as_scalar, optional_scalar, squared_distances
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
    """The cost of giving a noise to an example, a finite number."""

    @abc.abstractmethod
    def matrix(self, data: State, noise: State, args: Args) -> Float[Array, "num num"]:
        """c(i, j) for example i with noise j, both batches; `args` are the examples' conditions."""


class SquaredDistance(AbstractCost):
    """The squared Euclidean distance |x - z|^2 over all elements of an example."""

    def matrix(self, data: State, noise: State, args: Args) -> Float[Array, "num num"]:
        del args
        return _distances(_rows(data), _rows(noise))


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
        check_batch(args, jax.tree.leaves(data)[0].shape[0])
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

        **Returns:** numbers from 0 to num - 1; num throughout where the costs are not finite.

        **Raises:** `ValueError` for batches that do not go together and, outside of a compiled function, for costs that
        are not finite.
        """

    def __call__(self, key: PRNGKey, data: State, noise: State, args: Args = None) -> State:
        """The noise in that order, NaN where there is none: its i-th entry belongs to example i."""
        order = self.order(check_key(key, "a coupling"), data, noise, args)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf).at[order].get(mode="fill", fill_value=jnp.nan), noise)


class Independent(AbstractCoupling):
    """Noise i with example i: drawn noise is independent of the data, given pairs stay pairs."""

    independent: ClassVar[bool] = True

    def order(self, key: PRNGKey, data: State, noise: State, args: Args = None) -> Int[Array, " num"]:
        del key, args
        return jnp.arange(_check_alike(data, noise))


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
        return _assignment(jax.lax.stop_gradient(_costs(self.cost, data, noise, args)))


class Sinkhorn(AbstractCoupling):
    r"""Draws from the entropic plan $P = \mathrm{argmin}\, \langle c, P\rangle - \varepsilon H(P)$ of equal weights.

    By default every noise is used once: example by example, in a random order, j is drawn from row i of the plan among
    those not yet taken. With replacement each row is drawn from by itself, which follows the plan exactly.

    **Arguments:** `epsilon`: > 0, in units of the cost, or None for 0.05 of the batch's mean cost; `replace`: whether a
    noise may be drawn more than once; `cost`: the cost of a pair; `tolerance`: of the plan's marginals, the sum of
    their errors; `iterations`: the most that are taken.

    A small epsilon takes many iterations, and one below about 1e-5 of the largest cost is lost in float32. A plan that
    misses the tolerance raises, but not in a compiled function such as a step of training: there it is used as it is,
    with the right rows, and a noise is still used once. So try a batch first: `marginal_error(data, noise)`.

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
        log_plan = jax.lax.stop_gradient(self.log_plan(data, noise, args))
        drawn = (_draw_rows if self.replace else _draw_permutation)(key, log_plan)
        return jnp.where(jnp.any(jnp.isnan(log_plan)), drawn.size, drawn)

    def log_plan(self, data: State, noise: State, args: Args = None) -> Float[Array, "num num"]:
        """ln of the plan, whose rows sum to 1/num each; so do its columns, up to `marginal_error`.

        NaN for costs that are not finite.

        **Raises:** `ValueError` as `order`, and outside of a compiled function where the error is above the tolerance.
        """
        log_plan = self._solved(data, noise, args)
        error = _column_error(log_plan)
        # A little more than what the solver sees, of a plan that is rounded.
        if is_concrete(error) and is_concrete(self.tolerance) and float(error) > 1.1 * float(self.tolerance):
            raise ValueError(
                f"Sinkhorn did not reach its tolerance in iterations = {self.iterations}, the columns of the plan are "
                f"off by {float(error):.2g} together: give more iterations, or a larger epsilon or tolerance."
            )
        return log_plan

    def marginal_error(self, data: State, noise: State, args: Args = None) -> Scalar:
        r"""$\sum_j \lvert \sum_i P_{ij} - 1/n\rvert$ of the plan, from 0 to 2; it is to be below `tolerance`.

        Also within a compiled function, where nothing raises.
        """
        return _column_error(self._solved(data, noise, args))

    def _solved(self, data: State, noise: State, args: Args) -> Float[Array, "num num"]:
        geometry, linear_problem, sinkhorn = _import_ott()
        cost = _costs(self.cost, data, noise, args)
        if self.epsilon is None:
            # Where all costs are 0 any number gives the plan, in which all pairs are alike.
            mean = jnp.mean(cost)
            epsilon = jnp.where(mean == 0, 1, 0.05 * mean)
        else:
            epsilon = self.epsilon.astype(cost.dtype)
        # ott-jax promotes dtypes and ranks on its own, which a user may have forbidden.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=cost, epsilon=epsilon))
            solve = sinkhorn.Sinkhorn(threshold=self.tolerance.astype(cost.dtype), max_iterations=self.iterations)
            solved = solve(problem)
        # Its rows made right, which is half an iteration more and leaves no larger error in the columns.
        log_plan = jax.nn.log_softmax((solved.g[None, :] - cost) / epsilon, axis=1) - math.log(cost.shape[0])
        return jnp.where(jnp.all(jnp.isfinite(cost)), log_plan, jnp.nan)


def _column_error(log_plan: Float[Array, "num num"]) -> Scalar:
    return jnp.sum(jnp.abs(jnp.sum(jnp.exp(log_plan), axis=0) - 1 / log_plan.shape[0])).astype(float)


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
        num = check_count(num, "Semidiscrete.pairs got num")
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.data)
        keys = jax.random.split(check_key(key, "Semidiscrete.pairs"), (num, 2))
        noise = jax.vmap(lambda key: self.source.sample(key, like))(keys[:, 0])
        gain = self.potential[None, :] - _distances(_rows(noise), _rows(self.data))
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

    **Raises:** `ImportError` without ott-jax; `ValueError` for no data, axes that disagree, data that are not finite,
    or numbers that make no sense.
    """
    pointcloud, problems, solvers = _import_semidiscrete()
    key = check_key(key, "semidiscrete")
    data, args = jax.tree.map(jnp.asarray, (data, args))
    check_state(data, "data")
    shapes = [leaf.shape for leaf in jax.tree.leaves(data)]
    if not all(shape and shape[0] == shapes[0][0] > 0 for shape in shapes):
        raise ValueError(
            f"semidiscrete got data {describe(data)}, but wants arrays with one leading axis, one entry an example, of "
            "at least one."
        )
    check_batch(args, shapes[0][0])
    data = check(
        data, ~all_finite(data), "semidiscrete got data that are NaN or infinite, but wants finite ones: look for them."
    )
    iterations = check_count(iterations, "semidiscrete got iterations")
    batch_size = check_count(batch_size, "semidiscrete got batch_size")
    if not 0 <= epsilon < np.inf:
        raise ValueError(f"semidiscrete got epsilon = {epsilon}, but wants a finite number >= 0.")
    rate = as_scalar(learning_rate)
    if is_concrete(rate) and not 0 < float(rate) < np.inf:
        raise ValueError(f"semidiscrete got learning_rate = {float(rate):g}, but wants it positive and finite.")
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), data)
    rows = _rows(data)

    def sampler(key: PRNGKey, shape: tuple[int, ...], dtype: Any = None) -> Array:
        noise = jax.vmap(lambda key: source.sample(key, like))(jax.random.split(key, shape[0]))
        return _rows(noise).astype(rows.dtype)

    @jax.jit
    def learn(key: PRNGKey, rows: Float[Array, "num dim"], rate: Scalar) -> Float[Array, " num"]:
        scale_key, key = jax.random.split(key)
        scale = jnp.mean(_distances(sampler(scale_key, (256,)), rows))
        schedule = optax.cosine_decay_schedule(1.0, iterations)
        optimiser = optax.chain(optax.adam(1.0), optax.scale_by_schedule(schedule), optax.scale(rate * scale))
        # ott-jax promotes dtypes and ranks on its own, which a user may have forbidden.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            problem = problems.SemidiscreteLinearProblem(
                pointcloud.SemidiscretePointCloud(sampler, rows, cost_fn=_PointCloudCost(), epsilon=epsilon)
            )
            solver = solvers.SemidiscreteSolver(
                num_iterations=iterations, batch_size=batch_size, optimizer=optimiser, error_eval_every=iterations
            )
            return solver(key, problem).g

    return Semidiscrete(data, args, source, as_scalar(epsilon), learn(key, rows, rate))


class _PointCloudCost(eqx.Module):
    """The squared distance as ott-jax asks for it, whose own is a product of matrices."""

    def all_pairs(self, x: Float[Array, "rows dim"], y: Float[Array, "columns dim"]) -> Float[Array, "rows columns"]:
        return _distances(x, y)


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
    """The column of each row in the assignment of least cost; none if a cost is not finite."""
    finite = jnp.all(jnp.isfinite(cost))
    columns = jax.lax.platform_dependent(jnp.where(finite, cost, 0), cpu=_by_scipy, default=_by_optax)
    return jnp.where(finite, columns, columns.size)


def _by_scipy(cost: Float[Array, "num num"]) -> Int[Array, " num"]:
    def on_host(cost: Array) -> np.ndarray:
        return scipy.optimize.linear_sum_assignment(np.asarray(cost))[1].astype(np.int32)

    columns = jax.ShapeDtypeStruct(cost.shape[:1], jnp.int32)
    return jax.pure_callback(on_host, columns, cost, vmap_method="sequential")


def _by_optax(cost: Float[Array, "num num"]) -> Int[Array, " num"]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros(cost.shape[:1], jnp.int32).at[rows].set(columns.astype(jnp.int32))


def _costs(cost: AbstractCost, data: State, noise: State, args: Args) -> Float[Array, "num num"]:
    """The costs of batches that go together; where they are known, they must be finite."""
    _check_alike(data, noise)
    costs = cost.matrix(data, noise, args)
    if is_concrete(costs) and not np.all(np.isfinite(costs)):
        raise ValueError(
            f"{type(cost).__name__} gave costs that are NaN or infinite, but a coupling wants finite ones: look for "
            "such numbers in the data and the noise."
        )
    return costs


def _check_alike(data: State, noise: State) -> int:
    """The number of examples of two batches; raise if their structures or shapes differ."""
    shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(batch)] for batch in (data, noise)]
    if jax.tree.structure(data) != jax.tree.structure(noise) or shapes[0] != shapes[1]:
        raise ValueError(
            f"A coupling got data {describe(data)} and noise {describe(noise)}, but wants both of the same structure "
            "and shapes: one noise an example."
        )
    if not shapes[0] or len({shape[:1] for shape in shapes[0]}) != 1 or not shapes[0][0]:
        raise ValueError(
            f"A coupling got data {describe(data)}, but wants arrays with one leading axis, one entry an example."
        )
    return shapes[0][0][0]


def _distances(x: Float[Array, "rows dim"], z: Float[Array, "columns dim"]) -> Float[Array, "rows columns"]:
    return jax.vmap(lambda row: squared_distances(row, z))(x)


def _rows(batch: State) -> Float[Array, "num dim"]:
    """A batch of examples as the rows of a matrix."""
    leaves = jax.tree.leaves(batch)
    num = leaves[0].shape[0]
    return jnp.concatenate([leaf.reshape(num, -1).astype(float) for leaf in leaves], axis=1)
