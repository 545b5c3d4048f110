r"""A flow: a network, the path it lives on, and what it predicts.

On $x_t = \alpha x_0 + \sigma\epsilon$ one network evaluation gives every quantity of the field,

- denoised $= E[x_0 | x_t]$, noise $= E[\epsilon | x_t]$,
- velocity $= \alpha' E[x_0|x_t] + \sigma' E[\epsilon|x_t]$, score $= -E[\epsilon|x_t]/\sigma$,

each by one `convert` of the prediction. Everything takes ONE example: `network(t, x, args, *, key=None)` with `t`
a float32 scalar (float64 under x64), `x` a pytree of arrays and `args` any pytree; batch with `jax.vmap`.
"""

import abc
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._checks import check, check_callable, check_state, check_type, describe, is_concrete
from ._numerics import as_scalar, linear_combination
from ._types import Args, Network, PRNGKey, Scalar, ScalarLike, State
from .paths import AbstractPath
from .preconditioning import AbstractPreconditioner
from .predictions import (
    AbstractPrediction,
    Data,
    Noise,
    Score,
    Triple,
    Velocity,
    combine,
    conversion_weights,
    convert,
)
from .sources import AbstractSource, Normal

__all__ = [
    "AbstractFlow",
    "AbstractFlowWrapper",
    "AbstractVelocityFlow",
    "Flow",
    "OnPath",
    "TimeReversed",
    "VarianceFlow",
]


class AbstractVelocityFlow(eqx.Module):
    """Anything whose velocity carries a source to the data over the times of a path: all that an ODE solver wants."""

    path: eqx.AbstractVar[AbstractPath]
    #: The law at the noise end.
    source: eqx.AbstractVar[AbstractSource]

    @property
    @abc.abstractmethod
    def has_score(self) -> bool:
        """Whether it offers a score, and so a stochastic equation."""

    @abc.abstractmethod
    def velocity(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """dx_t/dt of the probability flow."""

    @abc.abstractmethod
    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> PyTree:
        """What the networks give in one evaluation."""


class AbstractFlow(AbstractVelocityFlow):
    """Anything that predicts one quantity on a path: a network, a guided network, an exact oracle."""

    path: eqx.AbstractVar[AbstractPath]
    prediction: eqx.AbstractVar[AbstractPrediction]
    #: The law of eps; with another than `sources.Normal` there is no score.
    source: eqx.AbstractVar[AbstractSource]

    @abc.abstractmethod
    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """The value of `self.prediction` at (t, x), of the structure of `x`."""

    @property
    def has_score(self) -> bool:
        """Whether -E[eps|x_t]/sigma is a score."""
        return self.source.has_score

    def predict(
        self,
        prediction: AbstractPrediction,
        t: ScalarLike,
        x: State,
        args: Args = None,
        *,
        key: PRNGKey | None = None,
    ) -> State:
        """Any prediction at (t, x), converted from the flow's own; raises as `convert` does.

        **Raises:** `TypeError` for the score of a flow that has none, see `sources`.
        """
        if isinstance(prediction, Score):
            check_has_score(self, "A score")
        t = as_scalar(t)
        inside = self.path.contains(t)
        if is_concrete(inside):
            check(
                t,
                ~inside,
                f"t is {float(t):g}, outside {type(self.path).__name__}: take a time from t_data to t_noise.",
            )
        return convert(self.path, t, x, self.output(t, x, args, key=key), self.prediction, prediction)

    def velocity(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """dx_t/dt of the probability flow: alpha' E[x_0|x_t] + sigma' E[eps|x_t]."""
        return self.predict(Velocity(), t, x, args, key=key)

    def score(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """grad ln p_t(x) = -E[eps|x_t]/sigma; raises unless the flow's source is `sources.Normal`."""
        return self.predict(Score(), t, x, args, key=key)

    def denoised(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """The posterior mean of the data, E[x_0|x_t]."""
        return self.predict(Data(), t, x, args, key=key)

    def noise(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """The posterior mean of the noise, E[eps|x_t]."""
        return self.predict(Noise(), t, x, args, key=key)

    def mixture_weights(self, t: Scalar, target: Triple) -> Triple:
        """The weights with which `combine` turns (x_t, output) into (a x_0 + b eps)/c, target = (a, b, c).

        For solvers and dynamics, which want one particular mixture of data and noise at each time.
        """
        return conversion_weights(self.path, t, self.prediction.coefficients(self.path, t), target)

    def mixture(self, target: Triple, t: Scalar, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """(a E[x_0|x_t] + b E[eps|x_t])/c for target = (a, b, c), from one network evaluation."""
        return combine(self.mixture_weights(t, target), x, self.output(t, x, args, key=key))


class AbstractFlowWrapper(AbstractFlow):
    """A flow around another, on its path, with its source, in its prediction."""

    flow: eqx.AbstractVar[AbstractFlow]

    @property
    def path(self) -> AbstractPath:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped flow's path."""
        return self.flow.path

    @property
    def prediction(self) -> AbstractPrediction:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the wrapped flow predicts."""
        return self.flow.prediction

    @property
    def source(self) -> AbstractSource:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped flow's source."""
        return self.flow.source


class Flow(AbstractFlow):
    """A network on a path.

    **Arguments:**

    - `network`: `network(t, x, args, *, key=None)`, one example in, its structure, shapes and dtypes out;
    - `path`: the Gaussian path it was or will be trained on;
    - `prediction`: what the network predicts. With a preconditioner: what the preconditioned network predicts;
    - `preconditioner`: None, or for instance `EDMPreconditioner(data_std)`;
    - `source`: the law of the noise, `sources.Normal()` by default. `sources.CoupledNormal()` for a flow that is
      trained with a coupling, `sources.Source(draw)` for one from any other law.

    **Raises:** `TypeError` for a `Score` prediction from a source that has no score; `ValueError` if the network's
    output is not shaped as its input (when it is first called), or if the preconditioner predicts something else than
    `prediction`.
    """

    network: Network
    path: AbstractPath
    prediction: AbstractPrediction
    preconditioner: AbstractPreconditioner | None = None
    source: AbstractSource = Normal()

    def __check_init__(self):
        check_callable(self.network, "Flow got a network", "network(t, x, args, *, key=None).")
        if not isinstance(self.path, AbstractPath) or not isinstance(self.prediction, AbstractPrediction):
            raise TypeError(
                f"Flow got path {type(self.path).__name__} and prediction {type(self.prediction).__name__}, but "
                "wants instances in the order Flow(network, path, prediction), e.g. paths.Linear(), "
                "predictions.Velocity()."
            )
        check_type(self.source, AbstractSource, "source", "an instance such as fs.sources.CoupledNormal()")
        if isinstance(self.prediction, Score):
            check_has_score(self, "A network that predicts the score")
        if self.preconditioner is not None and self.preconditioner.prediction != self.prediction:
            raise ValueError(
                f"Flow got prediction {type(self.prediction).__name__} with a preconditioner that predicts "
                f"{type(self.preconditioner.prediction).__name__}: pass predictions."
                f"{type(self.preconditioner.prediction).__name__}() to Flow."
            )

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        check_state(x, "x")
        t = as_scalar(t)
        if self.preconditioner is None:
            output = self.network(t, x, args, key=key)
        else:
            output = self.preconditioner.apply(self.network, self.path, t, x, args, key=key)
        check_output(output, x)
        return output


class VarianceFlow(AbstractFlow):
    """A network that predicts, beside its output, the variance of the ancestral step.

    **Arguments:** `network`: `network(t, x, args, *, key=None)` -> (output, nu), both of the structure and shapes of x,
    with nu from 0 (the posterior's variance) to 1 (the large one), see `solvers.LearnedVariance`; `path`, `prediction`:
    as in `Flow`.

    In everything else it is the flow of its output. Source: Nichol & Dhariwal (2021), arXiv 2102.09672.
    """

    network: Network
    path: AbstractPath
    prediction: AbstractPrediction
    source: ClassVar[AbstractSource] = Normal()

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        return self.output_and_interpolation(t, x, args, key=key)[0]

    def output_and_interpolation(
        self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None
    ) -> tuple[State, State]:
        """(output, nu) from one evaluation."""
        check_state(x, "x")
        both = self.network(as_scalar(t), x, args, key=key)
        if not (isinstance(both, tuple) and len(both) == 2):
            raise ValueError(f"The network of a VarianceFlow returned {describe(both)}, but wants a pair (output, nu).")
        for part in both:
            check_output(part, x)
        return both


def check_flow(flow: object, what: str) -> None:
    """Raise unless a wrapper's flow is one."""
    check_type(flow, AbstractFlow, what, "an AbstractFlow such as fs.Flow(network, path, prediction)")


def differ_in_path(first: AbstractVelocityFlow, second: AbstractVelocityFlow) -> bool:
    """Whether two flows are known to be on different paths; what is traced is not."""
    same = eqx.tree_equal(first.path, second.path)
    return is_concrete(same) and not bool(same)


def check_has_score(flow: AbstractVelocityFlow, what: str) -> None:
    """Raise unless the flow offers a score."""
    if isinstance(flow, AbstractFlow) and not flow.has_score:
        raise TypeError(
            f"{what} was asked of a flow whose source is {type(flow.source).__name__}, but a score exists for noise "
            "that is normal and independent of the data: use the velocity and ProbabilityFlow, or train without a "
            "coupling and with sources.Normal()."
        )
    if not flow.has_score:
        raise TypeError(f"{what} was asked of a {type(flow).__name__} without a score: give it a score_network.")


def check_output(output: State, x: State) -> None:
    """Raise unless a network's output has the structure, shapes and dtypes of its input."""
    same = jax.tree.structure(output) == jax.tree.structure(x) and all(
        hasattr(o, "shape") and o.shape == i.shape and o.dtype == i.dtype
        for o, i in zip(jax.tree.leaves(output), jax.tree.leaves(x), strict=True)
    )
    if not same:
        raise ValueError(
            f"The network returned {describe(output)} for one example x of {describe(x)}, but wants the same "
            "structure, shapes and dtypes: a network sees one example without a batch axis, and one that computes "
            "in another dtype casts its output back."
        )


class TimeReversed(eqx.Module):
    """A network trained the other way round in time (noise at 0, data at 1), turned to this library's time.

    With t' = t_data + t_noise - t it is network(t', x), with its sign flipped where it predicts a derivative in
    time (`Velocity`): dx/dt' = -dx/dt. Wrapping twice gives the original back.

    **Arguments:** `network`: the network in its own time; `path`: the path in this library's time, whose ends are
    exchanged; `prediction`: what the network predicts, in its own time.
    """

    network: Network
    path: AbstractPath
    prediction: AbstractPrediction

    def __call__(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """The prediction at (t, x), one example."""
        reversed_t = (as_scalar(self.path.t_data) + as_scalar(self.path.t_noise)) - as_scalar(t)
        output = self.network(reversed_t, x, args, key=key)
        return linear_combination((self.prediction.time_reversal_sign,), (output,))


class OnPath(AbstractFlow):
    """A flow moved to another Gaussian path after training.

    Paths differ only in the scale and the clock of the same family of marginals. At the time tau where the trained
    path A has the proportion alpha : sigma of the new path B at t,

        x_A = x_B (alpha_A(tau) + sigma_A(tau)) / (alpha_B(t) + sigma_B(t)),

    and E[x_0|x_t], E[eps|x_t] are those of A at (tau, x_A). The network is called inside the range of noise
    levels it was trained on: the new path's ends are drawn in to that range.

    **Arguments:** `flow`: the trained flow; `path`: the path to move to.
    """

    flow: AbstractFlow
    path: AbstractPath
    prediction: AbstractPrediction

    def __init__(self, flow: AbstractFlow, path: AbstractPath):
        self.flow = flow
        self.prediction = flow.prediction
        # The ends are numbers, also where a flow is moved inside a jit.
        with jax.ensure_compile_time_eval():
            ends = (
                _end_within(path, path.t_data, flow.path, flow.path.t_data, sign=-1),
                _end_within(path, path.t_noise, flow.path, flow.path.t_noise, sign=1),
            )
        self.path = eqx.tree_at(lambda p: (p.t_data, p.t_noise), path, ends)

    @property
    def source(self) -> AbstractSource:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The law of the noise, the trained flow's."""
        return self.flow.source

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        t = as_scalar(t)
        trained = self.flow.path
        alpha_b, sigma_b = self.path.coefficients(t)
        tau = trained.time_at(alpha_b, sigma_b)
        # Rounding must not carry tau past the ends that the network knows.
        tau = jnp.clip(tau, as_scalar(trained.t_data), as_scalar(trained.t_noise))
        alpha_a, sigma_a = trained.coefficients(tau)
        x_a = linear_combination(((alpha_a + sigma_a) / (alpha_b + sigma_b),), (x,))
        return self.flow.mixture(self.prediction.coefficients(self.path, t), tau, x_a, args, key=key)


def _end_within(
    path: AbstractPath, end: ScalarLike, trained: AbstractPath, trained_end: ScalarLike, *, sign: int
) -> ScalarLike:
    """`end` of `path`, drawn in to the noise level of `trained_end` if it lies beyond that.

    Beyond means more noise for sign = 1 and less for sign = -1.
    """
    alpha_trained, sigma_trained = trained.coefficients(as_scalar(trained_end))

    def is_beyond(t: Scalar) -> bool:
        alpha, sigma = path.coefficients(t)
        return sign * float(sigma * alpha_trained - sigma_trained * alpha) > 0

    if not is_beyond(as_scalar(end)):
        return end
    drawn_in = path.time_at(alpha_trained, sigma_trained)
    # A time is rounded, and an ulp of it may be much of alpha or sigma: round it inwards.
    for _ in range(32):
        if not is_beyond(drawn_in):
            break
        drawn_in = jnp.nextafter(drawn_in, -sign * jnp.full_like(drawn_in, jnp.inf))
    return float(drawn_in)
