r"""Consistency training and distillation: a flow whose predicted data are the end of the trajectory, not a mean.

A consistency function takes every point of a trajectory of the probability flow to its end,

$$f(t, x_t) = x_{t_\mathrm{data}}, \qquad f(t_\mathrm{data}, x) = x .$$

Here it is `flow.denoised`. At `t_data` it must be x itself, whatever the network says:

| flow | on a path with |
|---|---|
| `Flow(network, path, Velocity())`, `V()`, ... | sigma(t_data) = 0: `Linear`, `Trigonometric`, ... |
| `Flow(network, path, Data(), EDMPreconditioner(s, angle))` | sigma(t_data) = 0 |
| `Flow(network, path, Data(), ConsistencyPreconditioner(s))` | any data end: `EDM`, `VP`, ... |
| `flowmaps.OntoData(flow_map)` | any data end |

Of a point x_t and a slightly earlier one x_r of the same trajectory, r < t, the second is the target:

$$w(t, r)\; \ell\big(f_\theta(t, x_t) - \mathrm{sg}\, f_\theta(r, x_r)\big)$$

In training x_r is made of the same data and noise as x_t, whose mean is on the trajectory to first order in t - r; in
distillation one step of a solver goes there along a teacher. `ContinuousConsistency` is the limit of t - r to 0.

It is sampled in one or a few steps:

    x = fs.sample(flow, like, num=64, key=key, solver=fs.solvers.ConsistencySampling(), grid=fs.grids.Karras(2))
"""

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Real

from .._checks import check, check_callable, check_positive, check_type, checked, is_concrete, known
from .._features import jvp, without_features
from .._numerics import as_scalar, linear_combination, optional_scalar
from .._types import Args, PRNGKey, Scalar, ScalarLike, State
from ..couplings import AbstractCoupling, Independent
from ..flow import AbstractFlow, AbstractFlowWrapper, Flow, differ_in_path
from ..grids import Uniform
from ..paths import AbstractPath
from ..preconditioning import AbstractPreconditioner, AbstractSkipPreconditioner
from ..predictions import AbstractPrediction, Data, conversion_weights, convert, error_scale, quotients
from ..sampling import solve
from ..times import AbstractTimePairs, AbstractTimes, LogNormal
from .batch import Aux, ConditionDropout, check_pairing, mean_of, over_batch
from .elementwise import PseudoHuberNorm, squared
from .regression import check_source

__all__ = ["Consistency", "ContinuousConsistency", "inverse_gap"]


def inverse_gap(path: AbstractPath, t: Scalar, r: Scalar) -> Scalar:
    """1/(n_t - n_r), n = sigma/alpha: 1/(t - r) on EDM's path. 0 where alpha = 0, and for r = t."""
    (alpha_t, sigma_t), (alpha_r, sigma_r) = path.coefficients(t), path.coefficients(r)
    # n_t - n_r is this over alpha_t alpha_r, without an infinite n.
    gap = sigma_t * alpha_r - sigma_r * alpha_t
    return jnp.where(gap > 0, alpha_t * alpha_r / jnp.where(gap > 0, gap, 1), 0)


class Consistency(eqx.Module):
    r"""Consistency training or, with a teacher, distillation, in discrete steps from t to r < t.

        w(t, r) * l(f(t, x_t) - stop_gradient f(r, x_r)),        f = flow.denoised

    Both evaluations have the same key, so that they drop out the same. At r = t_data the target is x_r itself.
    Published losses are settings of it:

    | published loss | path | loss |
    |---|---|---|
    | improved training (iCT) | `EDM()` | `Consistency(GridNeighbours(points))` |
    | easy tuning (ECT) | `EDM()` | `Consistency(Tightening(stage))` |
    | distillation (CD) | the teacher's | `Consistency(GridNeighbours(18, Polynomial()), teacher=..., weight=None)` |

    A loss does not know how far the training is. Stage by stage a new array goes into it, and `fit` goes on from the
    state without tracing again:

        state = flow
        for stage in range(8):
            loss = fs.losses.Consistency(fs.times.Tightening(stage))
            first = key if stage == 0 else None
            for state in fs.training.fit(loss, state, batches, optimiser, steps=(stage + 1) * 500, key=first):
                ...

    and likewise with `GridNeighbours(doubling_points(stage / 8))`. For that `every` must be no more than the steps of
    the first stage.

    **Arguments:**

    - `times`: the pairs (t, r), `times.Tightening(stage)` or `times.GridNeighbours(points)`. A pair with r = t teaches
      nothing;
    - `teacher`: None: training. Otherwise a flow on the same path, guided or not, which gets no gradient;
    - `solver`: of the one step from t to r along the teacher, any of `sample`'s that needs no noise;
    - `weight`: w, a function (path, t, r) -> a scalar, or None for 1;
    - `elementwise`: l: `PseudoHuberNorm(c)` of the error as a whole, or any of `Regression`'s, averaged over elements;
    - `coupling`, `dropout`: as in `Regression`. The teacher gets the same condition as the student.

    **Raises:** `TypeError` for fields of another kind.

    Source: Song et al. (2023), arXiv 2303.01469; Song & Dhariwal (2023), arXiv 2310.14189; Geng et al. (2024), arXiv
    2406.14548. Deviations: any path, by sigma/alpha in place of t; the norm is a root of the mean, which divides the
    loss by sqrt(d).
    """

    times: AbstractTimePairs
    teacher: AbstractFlow | None = None
    solver: diffrax.AbstractSolver = diffrax.Heun()
    weight: Callable[[AbstractPath, Scalar, Scalar], Scalar] | None = inverse_gap
    elementwise: Callable[[Array], Array] | PseudoHuberNorm = eqx.field(default_factory=lambda: PseudoHuberNorm())
    coupling: AbstractCoupling = Independent()
    dropout: ConditionDropout | None = None

    def __check_init__(self):
        check_type(self.times, AbstractTimePairs, "times", "pairs of times such as fs.times.Tightening(stage=4)")
        check_type(self.solver, diffrax.AbstractSolver, "solver", "an instance such as diffrax.Heun()")
        check_callable(self.elementwise, "Consistency got elementwise", "such as fs.losses.squared.")
        if self.weight is not None:
            check_callable(self.weight, "Consistency got a weight", "weight(path, t, r), or None.")
        _check_common(self.teacher, self.coupling, self.dropout)

    def one(
        self,
        flow: AbstractFlow,
        x0: State,
        args: Args = None,
        *,
        t: ScalarLike,
        r: ScalarLike,
        noise: State,
        key: PRNGKey | None = None,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> Scalar:
        """The loss of one example at given times and noise: the equation.

        **Arguments:** as in `Regression.one`, with the pair t >= r.

        **Raises:** `ValueError` for r > t, where it is concrete.
        """
        t, r = as_scalar(t), as_scalar(r)
        if is_concrete((t, r)):
            check(t, known(r) > known(t), "Consistency got t = {} and r = {}, but wants r <= t: swap them.", t, r)
        path = flow.path
        x_t = path.interpolate(t, x0, noise)
        if self.teacher is None:
            x_r = path.interpolate(r, x0, noise)
        else:
            x_r = _step(self.teacher, self.solver, t, r, x_t, args)
        predicted = flow.denoised(t, x_t, args, key=key)
        # Exactly x_r at the end, also where a rounding or an infinity of the conversion stands in the way.
        at_end = r == as_scalar(path.t_data)
        earlier = without_features(lambda: flow.denoised(r, x_r, args, key=key))
        target = jax.tree.map(lambda f, x: jax.lax.stop_gradient(jnp.where(at_end, x, f)), earlier, x_r)
        error = linear_combination((1.0, -1.0), (predicted, target))
        one = jnp.ones_like(t)
        if isinstance(self.elementwise, PseudoHuberNorm):
            loss = self.elementwise(mean_of(squared, one, error, mask))
        else:
            loss = mean_of(self.elementwise, one, error, mask)
        return loss if self.weight is None else as_scalar(self.weight(path, t, r)) * loss

    def __call__(
        self,
        flow: AbstractFlow,
        x0: State,
        args: Args = None,
        *,
        key: PRNGKey,
        example_weight: Real[Array, " batch"] | None = None,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> tuple[Scalar, Aux]:
        """The loss of a batch and the terms it is made of, as in `Regression`; the time in them is t.

        **Raises:** as there; `ValueError` for a flow known not to be x at t_data, and for a teacher on another path.
        """
        check_boundary(flow)
        _check_path(self.teacher, flow)

        def one(
            x0: State, noise: State, args: Args, t: tuple[Scalar, Scalar], key: PRNGKey, mask: PyTree | None
        ) -> Scalar:
            return self.one(flow, x0, args, t=t[0], r=t[1], noise=noise, key=key, mask=mask)

        check_source(flow, x0, self.coupling)
        return over_batch(
            one,
            flow.path,
            self.times,
            self.coupling,
            flow.source.sample,
            x0,
            args,
            key=key,
            example_weight=example_weight,
            mask=mask,
            dropout=self.dropout,
        )


class ContinuousConsistency(eqx.Module):
    r"""Continuous-time consistency training or, with a teacher, distillation: sCM, on any path.

    For data of standard deviation s let $n = \sqrt{\sigma^2 + \alpha^2 s^2}$ and $\theta$ the angle with $\cos\theta =
    \alpha s/n$, $\sin\theta = \sigma/n$. In the prediction $F = (\alpha s^2 \epsilon - \sigma x_0)/(n s)$,

    $$f = \cos\theta\, \frac{s x_t}{n} - s \sin\theta\, F, \qquad
      L = \mathrm{mean}\,\Big|F_\theta - \mathrm{sg}\Big(F_\theta + \frac{g}{|g| + c}\Big)\Big|^2$$

    with g the tangent of the consistency function f = flow.denoised along the trajectory times $\cos\theta$, of which
    all but the first term is weighted by `warmup` w, and v the pair's velocity or the teacher's, F_v its F:

    $$g = (1 - w)\, s \cos^2\!\theta\, (F_v - F_\theta) + w \cos\theta\, \frac{df}{d\theta}, \qquad
      \cos\theta\, \frac{df}{d\theta} = \frac{\alpha n}{\alpha \sigma' - \sigma \alpha'}
        \Big(\frac{\partial f}{\partial t} + \frac{\partial f}{\partial x} v\Big)$$

    On `Trigonometric` with s = 1, F is `V` and $\theta$ is pi t/2: the paper's formula. The factor cos(theta) keeps g
    finite at both ends. One evaluation in forward mode gives f and its tangent.

    Best conditioned are `Flow(network, Trigonometric(), V())` for data of unit variance and, on any path,
    `Flow(network, path, Data(), EDMPreconditioner(s, angle))`, whose network is -F.

    **Arguments:**

    - `times`: the distribution of t; by default sigma/alpha is log-normal, `LogNormal(-1.0, 1.4)`;
    - `data_std`: s, of the data's elements;
    - `warmup`: w from 0 to 1, an array: raise it from stage to stage in a `fit` that goes on, see `Consistency`. At 0
      the loss is one of denoising;
    - `normalisation`: c, with the norm over all elements of an example; None for g as it is;
    - `teacher`: None: training. Otherwise a flow on the same path, guided or not, which gets no gradient;
    - `coupling`, `dropout`: as in `Regression`.

    **Raises:** `ValueError` for numbers out of range, `TypeError` for fields of another kind.

    Source: Lu & Song (2024), arXiv 2410.11081. Deviations: noise of unit variance, where the paper's has the data's, so
    that s comes in by the angle; any path and prediction; without the learned weight.
    """

    times: AbstractTimes = eqx.field(default_factory=lambda: LogNormal(-1.0, 1.4))
    data_std: Scalar = eqx.field(default=1.0, converter=as_scalar)
    warmup: Scalar = eqx.field(default=1.0, converter=as_scalar)
    normalisation: Scalar | None = eqx.field(default=0.1, converter=optional_scalar)
    teacher: AbstractFlow | None = None
    coupling: AbstractCoupling = Independent()
    dropout: ConditionDropout | None = None

    def __check_init__(self):
        check_type(self.times, AbstractTimes, "times", "an instance such as fs.times.LogNormal(-1.0, 1.4)")
        check_positive(self, "data_std")
        if self.normalisation is not None:
            check_positive(self, "normalisation")
        if is_concrete(self.warmup) and not 0 <= float(self.warmup) <= 1:
            raise ValueError(
                f"ContinuousConsistency got warmup = {float(self.warmup):g}, but wants a number from 0 to 1."
            )
        _check_common(self.teacher, self.coupling, self.dropout)

    def one(
        self,
        flow: AbstractFlow,
        x0: State,
        args: Args = None,
        *,
        t: ScalarLike,
        noise: State,
        key: PRNGKey | None = None,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> Scalar:
        """The loss of one example at a given time and noise; arguments as in `Regression.one`."""
        t = as_scalar(t)
        output, scale, tangent = self._terms(flow, x0, args, t, noise, key)
        tangent = _masked(tangent, mask)
        if self.normalisation is not None:
            square = jax.tree.reduce(jnp.add, jax.tree.map(lambda g: jnp.sum(g**2).astype(t.dtype), tangent))
            tangent = linear_combination((1 / (jnp.sqrt(square) + self.normalisation),), (tangent,))
        # 0, but not its derivative: F_theta - sg F_theta.
        moved = jax.tree.map(lambda o: o - jax.lax.stop_gradient(o), output)
        error = linear_combination((scale, -1.0), (moved, jax.lax.stop_gradient(tangent)))
        return mean_of(squared, jnp.ones_like(t), error, mask)

    def tangent(
        self,
        flow: AbstractFlow,
        x0: State,
        args: Args = None,
        *,
        t: ScalarLike,
        noise: State,
        key: PRNGKey | None = None,
    ) -> State:
        """g of one example, before it is normalised."""
        return self._terms(flow, x0, args, as_scalar(t), noise, key)[2]

    def _terms(
        self, flow: AbstractFlow, x0: State, args: Args, t: Scalar, noise: State, key: PRNGKey | None
    ) -> tuple[State, Scalar, State]:
        """The flow's output, the factor from its error to one of F, and g."""
        path, s = flow.path, self.data_std
        (alpha, sigma), (d_alpha, d_sigma) = path.coefficients(t), path.derivatives(t)
        norm = jnp.sqrt(sigma**2 + (alpha * s) ** 2)
        a, b, c = flow.prediction.coefficients(path, t)
        scale = error_scale(path, t, (a, b), (-sigma, alpha * s**2, norm * s))
        # Where sigma = 0 some predictions say nothing of F: f is x there, and there is nothing to train.
        scale = jnp.where(jnp.isinf(scale), 0, scale)
        x_t = path.interpolate(t, x0, noise)

        def function(t: Scalar, x: State) -> tuple[State, State]:
            output = flow.output(t, x, args, key=key)
            return output, convert(path, t, x, output, flow.prediction, Data())

        if self.teacher is None:
            velocity = linear_combination((d_alpha, d_sigma), (x0, noise))
        else:
            velocity = self.teacher.velocity(t, x_t, args)
        # The tangents have the factor cos(theta) dt/dtheta: as large as n, where dt/dtheta alone may be infinite.
        pace = alpha * norm / (alpha * d_sigma - sigma * d_alpha)
        direction = linear_combination((pace,), (velocity,))
        (output, _), (_, whole) = jvp(function, (t, x_t), (pace, direction))
        if self.teacher is None:
            error = linear_combination((c, -a, -b), (output, x0, noise))
        else:
            taught = self.teacher.mixture((a, b, c), t, x_t, args)
            error = linear_combination((c, -c), (output, taught))
        first = -((alpha * s / norm) ** 2) * s * scale
        g = linear_combination((self.warmup, (1 - self.warmup) * first), (whole, error))
        return output, scale * c, g

    def __call__(
        self,
        flow: AbstractFlow,
        x0: State,
        args: Args = None,
        *,
        key: PRNGKey,
        example_weight: Real[Array, " batch"] | None = None,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> tuple[Scalar, Aux]:
        """The loss of a batch and the terms it is made of, as in `Regression`.

        **Raises:** as `Consistency`.
        """
        check_boundary(flow)
        _check_path(self.teacher, flow)

        def one(x0: State, noise: State, args: Args, t: Scalar, key: PRNGKey, mask: PyTree | None) -> Scalar:
            return self.one(flow, x0, args, t=t, noise=noise, key=key, mask=mask)

        check_source(flow, x0, self.coupling)
        return over_batch(
            one,
            flow.path,
            self.times,
            self.coupling,
            flow.source.sample,
            x0,
            args,
            key=key,
            example_weight=example_weight,
            mask=mask,
            dropout=self.dropout,
        )


def _step(teacher: AbstractFlow, solver: diffrax.AbstractSolver, t: Scalar, r: Scalar, x: State, args: Args) -> State:
    """One step of a solver along the teacher."""
    sol = solve(teacher, x, args, solver=solver, grid=Uniform(1), t_start=t, t_end=r, throw=False)
    return jax.tree.map(lambda leaf: leaf[-1], sol.ys)


def _masked(tree: State, mask: PyTree[Bool[Array, "..."]] | None) -> State:
    return tree if mask is None else jax.tree.map(lambda leaf, counts: jnp.where(counts, leaf, 0), tree, mask)


def _check_common(teacher: AbstractFlow | None, coupling: AbstractCoupling, dropout: ConditionDropout | None) -> None:
    if teacher is not None:
        check_type(teacher, AbstractFlow, "teacher", "None or a flow such as fs.Flow(network, path, prediction)")
    check_pairing(coupling, dropout)


def _check_path(teacher: AbstractFlow | None, flow: AbstractFlow) -> None:
    """Raise unless student and teacher are on one path, where that is known."""
    if teacher is not None and differ_in_path(teacher, flow):
        raise ValueError(
            f"The teacher is on {teacher.path}, but the flow on {flow.path}: put the student on the teacher's path, or "
            "move the teacher with fs.OnPath(teacher, path) and take the path of that."
        )


def check_boundary(flow: AbstractFlow) -> None:
    """Raise unless f(t_data, x) = x, where that is known: not for a plain network of the data."""
    check_type(flow, AbstractFlow, "flow", "a fs.Flow or a fs.flowmaps.OntoData(flow_map)")
    while isinstance(flow, AbstractFlowWrapper):
        flow = flow.flow
    preconditioner = flow.preconditioner if isinstance(flow, Flow) else None
    if is_concrete((flow.path, preconditioner)):
        checked(_check_ends, flow.path, flow.prediction, preconditioner)


def _check_ends(
    path: AbstractPath, prediction: AbstractPrediction, preconditioner: AbstractPreconditioner | None
) -> Scalar:
    t = as_scalar(path.t_data)
    if isinstance(preconditioner, AbstractSkipPreconditioner):
        _, on_x, on_output = preconditioner.coefficients(path, t)
    elif prediction == Data():
        return t
    else:
        one, zero = jnp.ones_like(t), jnp.zeros_like(t)
        on_x, on_output = quotients(conversion_weights(path, t, prediction.coefficients(path, t), (one, zero, one)))
    return check(
        t,
        (jnp.abs(on_x - 1) > 1e-5) | (on_output != 0),
        f"A consistency function is f(t_data, x) = x, but the data of this flow at t_data of {type(path).__name__} are "
        "{} x + {} of its network's output: take Flow(network, path, Data(), "
        "preconditioner=ConsistencyPreconditioner(data_std)), or a path with sigma(t_data) = 0.",
        on_x,
        on_output,
    )
