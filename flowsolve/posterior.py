r"""Sampling under a measurement: a flow in, a flow out whose score is that of the data given what was measured.

The measurement is $y = A(x_0) + n$ with $n \sim N(0, \Sigma_y)$ and A any differentiable function. By Bayes' rule the
score given y is the flow's own plus that of the likelihood,

$$\nabla \ln p_t(x_t | y) = \nabla \ln p_t(x_t) + \nabla \ln p(y | x_t) .$$

All methods here replace p(x_0|x_t) by a normal law around the denoised data, $N(D, V)$, and A by its linearisation at
D. Then y is normal given x_t, and with $J = \partial D/\partial x_t$ and the residual $r = y - A(D)$

$$\nabla \ln p(y|x_t) = J^T A^T w, \qquad w = \left(\Sigma_y + A V A^T\right)^{-1} r .$$

| flow | V, or w | exact for |
|---|---|---|
| `DPS` | $w = 2 \zeta\, r/|r|$, without a variance | |
| `PiGDM` | $V = r_t^2 I$, $r_t^2 = \sigma^2 s^2/(\alpha^2 s^2 + \sigma^2)$ | data that are N(m, s^2 I) |
| `MMPS` | $V = (\sigma^2/\alpha) J$, Tweedie's covariance | any normal data |

("exact": with a linear A.) Nothing is formed as a matrix: J^T, A and A^T act by vector-Jacobian and Jacobian-vector
products, and w is found by conjugate gradients. With s = grad ln p(y|x_t), the denoised data moves by
$(\sigma^2/\alpha) s$, E[eps|x_t] by $-\sigma s$, and the output of the flow accordingly: every solver, dynamics and
likelihood takes the flow as it takes any other.

At alpha = 0 nothing of J is left, and V is 0/0. Below alpha/sigma = 0.001 the guided denoised data is therefore that of
the time where the ratio is 0.001, which differs from its limit by about as much.

A measurement for each example of a batch goes in with `args`:

    flow = fs.posterior.MMPS(flow, fs.posterior.Measurement(operator, std=0.1))
    fs.sample(flow, like, num=64, key=key, args=fs.posterior.Observed(ys, labels))

One with its own operator is vmapped over as a whole, e.g. by
`eqx.filter_vmap(lambda m, key: fs.sample(fs.posterior.MMPS(flow, m), like, num=1, key=key))`.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import Array, Bool, Float, PyTree

from ._checks import check, check_callable, check_count, check_positive, check_state, check_type, describe, known
from ._numerics import as_scalar, linear_combination, safe_sqrt, tree_dot
from ._types import Args, PRNGKey, Scalar, ScalarLike, State
from .flow import AbstractFlow, AbstractFlowWrapper, check_flow, check_has_score
from .paths import AbstractPath
from .predictions import Data, combine, conversion_weights

__all__ = ["DPS", "MMPS", "AbstractPosterior", "Guided", "Linearised", "Measurement", "Observed", "PiGDM"]

# The proportion alpha/sigma below which a flow's Jacobian is not asked for.
_LEAST_RATIO = 1e-3

Measured = PyTree[Float[Array, "..."]]


class Measurement(eqx.Module):
    """What was measured of the data: y = A(x_0) + n, n ~ N(0, covariance).

    **Arguments:**

    - `operator`: A, a differentiable function of ONE example that returns a pytree of arrays. It need not be linear;
      the flows of this module linearise it at the denoised data, and nothing checks how good that is. A new lambda is
      a new program: define it once, or make it an `eqx.Module` that holds its arrays;
    - `y`: the measurement, shaped as A returns it: an array, so a new one does not retrace. None if each example of a
      batch brings its own, see `Observed`;
    - `std`: the standard deviation of the noise on every element; or
    - `covariance`: its covariance, a `lineax.AbstractLinearOperator` from the structure of y to itself, symmetric and
      positive definite. With neither, the noise counts as 0, which only `DPS` can do with.

    **Raises:** `TypeError` for an operator that is not callable or a y that is not of floating point; `ValueError` for
    a negative deviation, or both it and a covariance.
    """

    operator: Callable[[State], Measured]
    y: Measured | None
    #: The noise's covariance: an operator, or the number of which it is a multiple of the identity.
    covariance: Scalar | lineax.AbstractLinearOperator

    def __init__(
        self,
        operator: Callable[[State], Measured],
        y: PyTree | None = None,
        *,
        std: ScalarLike | None = None,
        covariance: lineax.AbstractLinearOperator | None = None,
    ):
        check_callable(
            operator,
            "Measurement got an operator",
            "from one example to its measurement: for a matrix, lambda x: matrix @ x.",
        )
        if std is not None and covariance is not None:
            raise ValueError("Measurement got both std and covariance: give one, a number or an operator.")
        self.operator = operator
        self.y = None if y is None else jax.tree.map(jnp.asarray, y)
        if self.y is not None:
            check_state(self.y, "y")
        if covariance is None:
            deviation = as_scalar(0.0 if std is None else std)
            deviation = check(
                deviation, ~(known(deviation) >= 0), f"Measurement got std = {std}, but wants a deviation >= 0."
            )
            self.covariance = deviation**2
        else:
            check_type(covariance, lineax.AbstractLinearOperator, "covariance", "one of lineax's operators")
            self.covariance = covariance

    def given(self, args: Args) -> tuple[Measured, Args]:
        """(y, the args that are left for the network).

        **Raises:** `ValueError` if y was given twice, here and in `args`, or not at all.
        """
        if isinstance(args, Observed):
            if self.y is not None:
                raise ValueError(
                    "y was given twice, by Measurement and by args=Observed(y): leave it out of Measurement."
                )
            return jax.tree.map(jnp.asarray, args.y), args.args
        if self.y is None:
            raise ValueError(
                "The measurement has no y: give Measurement(operator, y), or each example its own with "
                "args=posterior.Observed(ys, args)."
            )
        return self.y, args

    def check_like(self, predicted: Measured, y: Measured) -> None:
        """Raise unless what A returned, and the noise's covariance, have the structure, shapes and dtypes of y."""
        if describe(predicted) != describe(y):
            raise ValueError(
                f"The operator of a Measurement returned {describe(predicted)} for one example, but y is "
                f"{describe(y)}: make both of one structure, shape and dtype, without a batch axis (Observed takes a y "
                "for each example)."
            )
        if isinstance(self.covariance, lineax.AbstractLinearOperator):
            structure = self.covariance.in_structure()
            if describe(structure) != describe(y):
                raise ValueError(
                    f"The covariance of a Measurement is that of {describe(structure)}, but y is {describe(y)}: give "
                    "an operator from the structure of y to itself."
                )

    def noise_covariance(self, v: Measured) -> Measured:
        """The noise's covariance times v."""
        return _times(self.covariance, v)

    def log_likelihood(self, x_0: State, y: Measured) -> Scalar:
        """ln p(y|x_0) of one example up to a constant: -|y - A(x_0)|^2/2 in the metric of the noise.

        **Raises:** `ValueError` for a measurement without noise, or if A's output is not shaped as y.
        """
        self.check_noisy("log_likelihood")
        predicted = self.operator(x_0)
        self.check_like(predicted, y)
        residual = jax.tree.map(jnp.subtract, y, predicted)
        if isinstance(self.covariance, lineax.AbstractLinearOperator):
            weighed = lineax.linear_solve(self.covariance, residual).value
        else:
            weighed = linear_combination((1 / self.covariance,), (residual,))
        return as_scalar(-0.5 * tree_dot(residual, weighed))

    def check_noisy(self, name: str) -> None:
        """Raise where the noise is known to be 0."""
        if not isinstance(self.covariance, lineax.AbstractLinearOperator):
            check(
                self.covariance,
                known(self.covariance) <= 0,
                f"{name} divides by the noise of the measurement, which is 0: give Measurement a std > 0, however "
                "small against y.",
            )


class Observed(NamedTuple):
    """The `args` of a posterior flow under a measurement of each example's own: y, and the args of the network.

    **Arguments:** `y`: what `Measurement` has as its y; `args`: labels or context, or None. In `sample` and wherever a
    batch is mapped over, both have its leading axis.
    """

    y: Measured
    args: Args = None


class Linearised(NamedTuple):
    """The measurement to first order in the data around D, and the data to first order in x_t; of one example."""

    path: AbstractPath
    t: Scalar
    #: The Jacobian of A at D: a change of the data to one of the measurement.
    measure: Callable[[State], Measured]
    #: Its transpose.
    transpose: Callable[[Measured], State]
    #: The transpose of the Jacobian J of the denoised data.
    pull: Callable[[State], State]


class Guided(NamedTuple):
    """A flow's output and what a measurement adds to its score, at one x and time, of one example."""

    #: Where it is: as asked, or a little further from alpha = 0.
    t: Scalar
    x: State
    #: The flow's own output, without the measurement.
    output: State
    #: grad ln p(y|x_t).
    score: State
    #: -r.w/2, which is ln p(y|x_t) but for the determinant of y's covariance given x_t.
    log_likelihood: Scalar


class AbstractPosterior(AbstractFlowWrapper):
    """A flow given a measurement; its parts differ in how the residual is weighed."""

    measurement: eqx.AbstractVar[Measurement]

    @abc.abstractmethod
    def weigh(self, residual: Measured, at: Linearised) -> Measured:
        """w, the residual y - A(D) divided by the covariance that y has given x_t."""

    def guide(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> Guided:
        """The flow's output, the likelihood's score and its logarithm, from one evaluation of the network.

        The derivatives cost as much again and more: one vector-Jacobian product, and one for each step of conjugate
        gradients.

        **Raises:** `ValueError` if A's output is not shaped as y.
        """
        y, args = self.measurement.given(args)
        t, x = _inside(self.path, as_scalar(t), x)
        data = Data().coefficients(self.path, t)

        def denoise(x: State) -> tuple[State, State]:
            output = self.flow.output(t, x, args, key=key)
            return combine(self.flow.mixture_weights(t, data), x, output), output

        denoised, pull, output = jax.vjp(denoise, x, has_aux=True)
        predicted, measure = jax.linearize(self.measurement.operator, denoised)
        self.measurement.check_like(predicted, y)
        transpose = jax.linear_transpose(measure, denoised)
        at = Linearised(self.path, t, measure, lambda v: transpose(v)[0], lambda v: pull(v)[0])
        residual = jax.tree.map(jnp.subtract, y, predicted)
        weighed = self.weigh(residual, at)
        score = at.pull(at.transpose(weighed))
        return Guided(t, x, output, score, as_scalar(-0.5 * tree_dot(residual, weighed)))

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        asked = as_scalar(t)
        at = self.guide(asked, x, args, key=key)
        alpha, sigma = self.path.coefficients(at.t)
        # c output = a x_0 + b eps, where the score moves x_0 by sigma^2/alpha and eps by -sigma times itself. c is 0
        # for the prediction of the score alone, which has c = sigma.
        a, b, c = self.prediction.coefficients(self.path, at.t)
        sigma_over_c = jnp.where(c == 0, 1, sigma / jnp.where(c == 0, 1, c))
        output = linear_combination((1.0, (a * sigma / alpha - b) * sigma_over_c), (at.output, at.score))
        # Beyond the least ratio the data moved is that of at.t; with it x itself, and so E[eps|x_t], is exact.
        data = Data().coefficients(self.path, at.t)
        moved = combine(self.mixture_weights(at.t, data), at.x, output)
        wanted = self.prediction.coefficients(self.path, asked)
        carried = combine(conversion_weights(self.path, asked, data, wanted), x, moved)
        return jax.tree.map(lambda here, there: jnp.where(asked == at.t, here, there), output, carried)


def _times(covariance: Scalar | lineax.AbstractLinearOperator, v: Measured) -> Measured:
    if isinstance(covariance, lineax.AbstractLinearOperator):
        return covariance.mv(v)
    return linear_combination((covariance,), (v,))


def _inside(path: AbstractPath, t: Scalar, x: State) -> tuple[Scalar, State]:
    """(t, x) or, beyond the least alpha/sigma, the time where that is and the x of the same proportion of data."""
    moved = jnp.minimum(t, path.time_at(_LEAST_RATIO, 1.0))
    scale = sum(path.coefficients(moved)) / sum(path.coefficients(t))
    return moved, linear_combination((scale,), (x,))


def _check(flow: AbstractFlow, measurement: Measurement, name: str) -> None:
    check_flow(flow, f"{name}'s flow")
    check_type(measurement, Measurement, f"{name}'s measurement", "a posterior.Measurement(operator, y, std=...)")
    check_has_score(flow, f"{name}, which adds to a score,")


class DPS(AbstractPosterior):
    r"""Diffusion posterior sampling: the gradient of the residual's square, divided by its norm.

    $$\nabla \ln p(y|x_t) \approx -\frac{\zeta}{|r|} \nabla_{x_t} |y - A(D(x_t))|^2$$

    **Arguments:** `flow`; `measurement`, whose noise is not used; `zeta`: the scale, an array.

    The paper subtracts $\zeta' \nabla|r|^2/|r|$ from x after each of 1,000 steps of DDPM, whatever the step: a rule of
    its discretisation. A flow has no steps, so here the same expression is a score, which enters a step of DDPM times
    its $\beta_i$: the paper's constant step is $\zeta = \zeta'/\beta_i$. As a score it does not depend on solver, grid
    or path (it transforms as a score does under `OnPath`). The likelihood's own scale would be $\zeta = |r|/(2 c)$ with
    c the variance of an element of y given x_t, which is the noise's variance at the end and grows with t: one zeta is
    a compromise, and has to be tried.

    Source: Chung et al. (2022), arXiv 2209.14687.
    """

    flow: AbstractFlow
    measurement: Measurement
    zeta: Scalar

    def __init__(self, flow: AbstractFlow, measurement: Measurement, zeta: ScalarLike = 1.0):
        _check(flow, measurement, "DPS")
        self.flow, self.measurement = flow, measurement
        self.zeta = as_scalar(zeta)
        check_positive(self, "zeta")

    def weigh(self, residual: Measured, at: Linearised) -> Measured:
        """2 zeta r/|r|; 0 where r = 0."""
        del at
        norm = safe_sqrt(as_scalar(tree_dot(residual, residual)))
        return linear_combination((2 * self.zeta / jnp.where(norm == 0, 1, norm),), (residual,))


class PiGDM(AbstractPosterior):
    r"""Pseudo-inverse guidance: given x_t every element of the data has the same variance,
    $r_t^2 = \sigma^2 s^2/(\alpha^2 s^2 + \sigma^2)$, and none depends on another.

    **Arguments:** `flow`; `measurement`, with noise; `data_std`: s, the standard deviation of the data's elements, 1 in
    the paper; `rtol`: conjugate gradients stop where the norm of their residual is `rtol` of that of r; `max_steps`:
    and after so many steps, static.

    Deviation: the paper multiplies the score by a factor of its sampler's; here it is the score itself. A nonlinear A
    is linearised rather than given a pseudo-inverse. Source: Song et al. (2023), "Pseudoinverse-guided diffusion models
    for inverse problems", ICLR.
    """

    flow: AbstractFlow
    measurement: Measurement
    data_std: Scalar
    rtol: Scalar
    max_steps: int = eqx.field(static=True)

    def __init__(
        self,
        flow: AbstractFlow,
        measurement: Measurement,
        *,
        data_std: ScalarLike = 1.0,
        rtol: ScalarLike = 1e-4,
        max_steps: int = 16,
    ):
        _check(flow, measurement, "PiGDM")
        measurement.check_noisy("PiGDM")
        self.flow, self.measurement = flow, measurement
        self.data_std, self.rtol = as_scalar(data_std), as_scalar(rtol)
        self.max_steps = check_count(max_steps, "PiGDM got max_steps")
        check_positive(self, "data_std", "rtol")

    def weigh(self, residual: Measured, at: Linearised) -> Measured:
        """The solution with V = r_t^2 I."""
        alpha, sigma = at.path.coefficients(at.t)
        variance = (sigma * self.data_std) ** 2 / ((alpha * self.data_std) ** 2 + sigma**2)

        def covariance(v: Measured) -> Measured:
            return at.measure(linear_combination((variance,), (at.transpose(v),)))

        return _solve(self.measurement, covariance, residual, self.rtol, self.max_steps)


class MMPS(AbstractPosterior):
    r"""Moment-matching posterior sampling: given x_t the data has the covariance that Tweedie's formula says,
    $V = (\sigma^2/\alpha)\, \partial D/\partial x_t$.

    **Arguments:** `flow`; `measurement`, with noise; `rtol`, `max_steps`: of conjugate gradients, as in `PiGDM`, but 3
    steps by default. Each costs a vector-Jacobian product of the network, and each example of a batch waits for the
    slowest.

    With an exact flow more steps are more exact. The Jacobian of a trained network is not quite symmetric or positive,
    and its error counts $\sigma^2/\alpha$ times: then few steps are better than many (1 to 5 in the paper), and a start
    where alpha/sigma is 0.1 rather than 0 (`t_start` and `data_std` of `sample`). A direction in which V is negative
    counts as one without variance.

    Source: Rozet et al. (2024), arXiv 2405.13712.
    """

    flow: AbstractFlow
    measurement: Measurement
    rtol: Scalar
    max_steps: int = eqx.field(static=True)

    def __init__(self, flow: AbstractFlow, measurement: Measurement, *, rtol: ScalarLike = 1e-4, max_steps: int = 3):
        _check(flow, measurement, "MMPS")
        measurement.check_noisy("MMPS")
        self.flow, self.measurement = flow, measurement
        self.rtol = as_scalar(rtol)
        self.max_steps = check_count(max_steps, "MMPS got max_steps")
        check_positive(self, "rtol")

    def weigh(self, residual: Measured, at: Linearised) -> Measured:
        """The solution with Tweedie's V, which is symmetric: J^T stands for J."""
        alpha, sigma = at.path.coefficients(at.t)

        def covariance(v: Measured) -> Measured:
            return at.measure(linear_combination((sigma**2 / alpha,), (at.pull(at.transpose(v)),)))

        return _solve(self.measurement, covariance, residual, self.rtol, self.max_steps)


def _solve(
    measurement: Measurement,
    covariance: Callable[[Measured], Measured],
    residual: Measured,
    rtol: Scalar,
    max_steps: int,
) -> Measured:
    """(Sigma_y + A V A^T)^-1 r by conjugate gradients, where they are after `max_steps` steps."""

    def both(v: Measured) -> Measured:
        return linear_combination((1.0, 1.0), (measurement.noise_covariance(v), covariance(v)))

    operator = lineax.FunctionLinearOperator(both, jax.eval_shape(lambda: residual), lineax.positive_semidefinite_tag)
    # What decides where to stop is no function to differentiate.
    arrays, rest = eqx.partition((measurement.covariance, rtol), eqx.is_array)
    least, rtol = eqx.combine(jax.lax.stop_gradient(arrays), rest)
    return lineax.linear_solve(operator, residual, _ConjugateGradients(least, rtol, max_steps)).value


class _ConjugateGradients(lineax.AbstractLinearSolver[lineax.AbstractLinearOperator]):
    """Conjugate gradients for an operator that should be `least` and something positive, but may be a little off.

    A direction with less curvature than that of `least` counts as if it had that: a trained network's Jacobian need not
    be positive, and `lineax.CG` would then step the wrong way, or end in NaN.
    """

    least: Scalar | lineax.AbstractLinearOperator
    rtol: Scalar
    max_steps: int = eqx.field(static=True)

    def init(self, operator: lineax.AbstractLinearOperator, options: dict[str, Any]) -> lineax.AbstractLinearOperator:
        return operator

    def compute(
        self, state: lineax.AbstractLinearOperator, vector: Measured, options: dict[str, Any]
    ) -> tuple[Measured, lineax.RESULTS, dict[str, Any]]:
        square = as_scalar(tree_dot(vector, vector))

        def unfinished(carried: tuple) -> Bool[Array, ""]:
            *_, left, number = carried
            return (left > self.rtol**2 * square) & (number < self.max_steps)

        def step(carried: tuple) -> tuple:
            solution, residual, direction, left, number = carried
            image = state.mv(direction)
            least = _times(self.least, direction)
            curvature = jnp.maximum(as_scalar(tree_dot(direction, image)), as_scalar(tree_dot(direction, least)))
            length = left / curvature
            solution = linear_combination((1.0, length), (solution, direction))
            residual = linear_combination((1.0, -length), (residual, image))
            new = as_scalar(tree_dot(residual, residual))
            return solution, residual, linear_combination((1.0, new / left), (residual, direction)), new, number + 1

        zero = jax.tree.map(jnp.zeros_like, vector)
        solution, *_ = jax.lax.while_loop(unfinished, step, (zero, vector, vector, square, 0))
        return solution, lineax.RESULTS.successful, {}

    def transpose(
        self, state: lineax.AbstractLinearOperator, options: dict[str, Any]
    ) -> tuple[lineax.AbstractLinearOperator, dict[str, Any]]:
        return state.transpose(), options

    def conj(
        self, state: lineax.AbstractLinearOperator, options: dict[str, Any]
    ) -> tuple[lineax.AbstractLinearOperator, dict[str, Any]]:
        return state, options

    def assume_full_rank(self) -> bool:
        return True
