r"""Guidance by anything with a score: classifiers, energies, or scores themselves.

$$\nabla \ln p_t(x) + s\, g(t, x), \qquad g = \nabla_x \ln p(y | x_t), \; \nabla_x E(t, x), \; \ldots$$

A change $s g$ of the score is one of $-\sigma s g$ of the noise and of $\sigma^2 s g/\alpha$ of the data, so with
$c\,o = a\, x_0 + b\,\epsilon$ one of

$$\frac{\sigma (a \sigma - b \alpha)}{c}\; \frac{s\, g}{\alpha}$$

of the flow's own output. Where $\alpha = 0$ the state is pure noise, of which every classifier that is right says the
same: g vanishes with alpha, and $g/\alpha$ is its limit $\partial_t g/\alpha'$.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check, check_callable, describe, is_concrete, known
from .._numerics import as_scalar, linear_combination
from .._types import Args, PRNGKey, Scalar, ScalarLike, State
from ..flow import AbstractFlow, AbstractFlowWrapper, check_flow, check_has_score
from ..predictions import Score
from .schedules import Schedule, as_scale, is_known, scale_at

__all__ = ["AddedScore", "Gradient", "LogProbability"]


class AddedScore(AbstractFlowWrapper):
    """A flow with something added to its score: score + scale g.

    Its density is p_t(x) p(y|x)^scale for a classifier, p_t(x) exp(scale E(t, x)) for an energy. A sum of several is a
    nest of several.

    **Arguments:**

    - `flow`: a flow that has a score. An unconditional one that is called with a label all the same is
      `ClassifierFree(flow, 0.0, null)`;
    - `score`: g, a callable `score(t, x, args, *, key=None)` -> state: `Gradient(energy)` of a scalar, or any other;
    - `scale`: a number, as an array, or a schedule (path, t) -> scale, for instance
      `Interval(2.0, low, high, outside=0.0)`.

    At alpha = 0 (t = 1 on `Linear`) the limit is taken that holds for a g that vanishes there, as that of the exact
    classifier does; it costs a derivative of `score` in t. An energy that does not fade with the data is infinitely
    strong in a data prediction near that end: give it a schedule that is 0 there.

    **Raises:** `TypeError` for a flow without a score.

    Source: Dhariwal & Nichol (2021), arXiv 2105.05233; Song et al. (2020), arXiv 2011.13456.
    """

    flow: AbstractFlow
    score_function: Callable[..., State]
    scale: Scalar | int | Schedule

    def __init__(self, flow: AbstractFlow, score: Callable[..., State], scale: ScalarLike | Schedule = 1.0):
        check_flow(flow, "AddedScore's flow")
        check_has_score(flow, "AddedScore, which adds to a score,")
        check_callable(
            score,
            "AddedScore got a score",
            "(t, x, args, *, key=None) -> state such as fs.guidance.Gradient(energy).",
        )
        self.flow = flow
        self.score_function = score
        self.scale = as_scale(scale)

    @classmethod
    def from_classifier(
        cls, flow: AbstractFlow, classifier: Callable[..., Array], scale: ScalarLike | Schedule = 1.0
    ) -> "AddedScore":
        """Classifier guidance, with the label as `args`: `classifier(t, x, args, *, key=None)` -> logits."""
        return cls(flow, Gradient(LogProbability(classifier)), scale)

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        t = as_scalar(t)
        scale = scale_at(self.scale, self.path, t)
        output = self.flow.output(t, x, args, key=key)
        if is_known(scale, 0):
            return output
        if self.prediction == Score():
            return linear_combination((1, scale), (output, self._added(t, x, args, key)))
        a, b, c = self.prediction.coefficients(self.path, t)
        alpha, sigma = self.path.coefficients(t)
        weight = scale * sigma * (a * sigma - b * alpha) / c
        return linear_combination((1, weight), (output, self._added_over_alpha(t, x, args, key)))

    def _added(self, t: Scalar, x: State, args: Args, key: PRNGKey | None) -> State:
        added = self.score_function(t, x, args, key=key)
        if describe(added) != describe(x):
            raise ValueError(
                f"The score of an AddedScore returned {describe(added)} for one example x of {describe(x)}, but wants "
                "the same structure, shapes and dtypes."
            )
        return added

    def _added_over_alpha(self, t: Scalar, x: State, args: Args, key: PRNGKey | None) -> State:
        """g/alpha, and its limit where alpha = 0."""
        alpha = self.path.coefficients(t)[0]
        regular = jax.tree.map(
            lambda leaf: leaf / jnp.where(alpha == 0, 1, alpha).astype(leaf.dtype), self._added(t, x, args, key)
        )
        with jax.ensure_compile_time_eval():
            least = self.path.alpha(self.path.t_noise)
        if is_concrete(least) and known(least) > 0:
            return regular
        if is_concrete(alpha) and known(alpha) > 0:
            return regular

        def limit() -> State:
            slope = jax.jvp(lambda t: self._added(t, x, args, key), (t,), (jnp.ones_like(t),))[1]
            return linear_combination((1 / self.path.derivatives(t)[0],), (slope,))

        return jax.lax.cond(alpha == 0, limit, lambda: regular)


class Gradient(eqx.Module):
    """The gradient in x of a scalar: the score of exp(energy).

    **Arguments:** `energy`: `energy(t, x, args, *, key=None)` -> scalar, large where it is to go.
    """

    energy: Callable[..., Scalar]

    def __check_init__(self):
        check_callable(self.energy, "Gradient got an energy", "(t, x, args, *, key=None) -> scalar.")

    def __call__(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        """The gradient at (t, x), one example."""
        return jax.grad(lambda x: self.energy(as_scalar(t), x, args, key=key))(x)


def _itself(args: Args) -> Args:
    return args


class LogProbability(eqx.Module):
    """The log-probability that a classifier gives to a label: log-softmax of its logits, of one example.

    **Arguments:** `classifier`: `classifier(t, x, args, *, key=None)` -> (classes,) logits for a noisy x, called with
    args = None; `label`: args -> the label, by default the args themselves.

    A label out of range raises where it is concrete and gives NaN, in the gradient as well, where it is traced.

    **Raises:** `TypeError` for a label that is no integer scalar, `ValueError` for logits that are no vector.

    Source: Dhariwal & Nichol (2021), arXiv 2105.05233.
    """

    classifier: Callable[..., Array]
    label: Callable[[Args], Array] = eqx.field(default_factory=lambda: _itself)

    def __call__(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> Float[Array, ""]:
        """ln p(label|x_t), one example."""
        logits = self.classifier(as_scalar(t), x, None, key=key)
        if logits.ndim != 1:
            raise ValueError(
                f"A classifier returned logits of shape {logits.shape}, but wants (classes,) of one example."
            )
        label = jnp.asarray(self.label(args)) if args is not None else None
        if label is None or label.shape != () or not jnp.issubdtype(label.dtype, jnp.integer):
            raise TypeError(
                f"The label is {describe(args)}, but a classifier wants ONE integer: batch with jax.vmap, and name the "
                "label's place in args, LogProbability(classifier, lambda args: args['label'])."
            )
        bad = (label < 0) | (label >= logits.size)
        if is_concrete(bad):
            check(
                label, bad, f"Label {label} is out of range: this classifier's labels run from 0 to {logits.size - 1}."
            )
        # A factor, not a choice: the gradient is to be NaN too.
        known_or_nan = jnp.where(bad, jnp.nan, jnp.ones((), logits.dtype))
        return known_or_nan * jax.nn.log_softmax(logits)[jnp.clip(label, 0, logits.size - 1)]
