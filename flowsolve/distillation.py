r"""Distribution matching distillation (DMD2): a student of one or a few steps whose samples have the teacher's law.

The student's samples $x = D_\mathrm{student}(t_k, x_{t_k})$ start from one of a list of times $t_0 > \dots > t_K$, of
which the last is the clean end. A second flow, the fake, learns to denoise these samples; where it and the teacher
disagree, the student moves. With $x_t = \alpha x + \sigma \epsilon$,

$$g = \frac{D_\mathrm{fake}(t, x_t) - D_\mathrm{teacher}(t, x_t)}{\mathrm{mean}\,|x - D_\mathrm{teacher}(t, x_t)|},
\qquad L_\mathrm{student} = \tfrac12\, \mathrm{mean}\, |x - \mathrm{sg}(x - g)|^2,
\qquad L_\mathrm{fake} = \mathrm{mean}\, |o_\mathrm{fake}(t, x_t) - o|^2 .$$

The fake trains on every step, the student on every fifth: both are one flow, `Distillation`, to be trained by `fit`.

    both = fs.distillation.Distillation(student=teacher, fake=teacher)       # both begin as the teacher
    ts = (1.0, 0.75, 0.5, 0.0)
    loss = fs.distillation.DMD2(teacher, ts=ts, start=fs.distillation.SimulatedSDE(), every=5)
    optimiser = loss.optimiser(student=optax.adamw(1e-5), fake=optax.adamw(1e-5))
    for state in fs.training.fit(loss, both, batches, optimiser, steps=20_000, key=key, ema=0.999):
        ...
    student = state.ema_flow.student
    x = fs.sample(student, like, num=64, key=key, solver=fs.solvers.ConsistencySampling(), grid=fs.grids.Given(ts))

With `SimulatedODE` sample with `solvers.DDIM()`. The teacher may be guided: `guidance.ClassifierFree(teacher, ...)`;
conditions come with the batch.

Source: Yin et al. (2024), arXiv 2405.14867 (DMD2); Yin et al. (2023), arXiv 2311.18828 (DMD).
"""

import abc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PyTree, Real

from ._checks import check, check_count, check_key, check_type, describe, is_concrete, known
from ._features import with_features
from ._numerics import as_scalar, frozen, linear_combination, normal_like, optional_scalar
from ._types import Args, PRNGKey, Scalar, ScalarLike, State
from .couplings import Independent, Pairs
from .flow import AbstractFlow, check_flow, check_has_score, differ_in_path
from .losses.batch import Aux, mean_of, over_batch
from .losses.elementwise import absolute, squared
from .losses.regression import Regression
from .paths import AbstractPath
from .predictions import AbstractPrediction, Data, is_singular
from .sources import AbstractSource
from .times import AbstractTimePairs, AbstractTimes, Given, Uniform

__all__ = [
    "DMD2",
    "AbstractStart",
    "Adversarial",
    "Distillation",
    "Renoised",
    "SimulatedODE",
    "SimulatedSDE",
    "matching_gradient",
]


class Distillation(AbstractFlow):
    """A student and the fake that follows it, as one flow to train: the student's, by everything that a flow is asked.

    **Arguments:** `student`: the flow to distil into, whose denoised data are its samples; `fake`: a flow on the same
    path that learns the law of these samples, a copy of the teacher as a rule; `count`: the number of steps since the
    student was last trained. It is an array like the parameters, which the optimiser of `DMD2.optimiser` moves.

    **Raises:** `TypeError` for what is no flow, or a fake whose source has no score; `ValueError` for different paths.
    """

    student: AbstractFlow
    fake: AbstractFlow
    count: Scalar = eqx.field(default=0.0, converter=as_scalar)

    def __check_init__(self):
        check_flow(self.student, "student")
        check_flow(self.fake, "fake")
        check_has_score(self.fake, "The fake's score")
        _check_same_path(self.student, self.fake, "The student and the fake")

    @property
    def path(self) -> AbstractPath:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The student's path."""
        return self.student.path

    @property
    def prediction(self) -> AbstractPrediction:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the student predicts."""
        return self.student.prediction

    @property
    def source(self) -> AbstractSource:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The student's source."""
        return self.student.source

    def output(self, t: ScalarLike, x: State, args: Args = None, *, key: PRNGKey | None = None) -> State:
        return self.student.output(t, x, args, key=key)


class AbstractStart(eqx.Module):
    """Where the state comes from that the student is given at one of its times."""

    @abc.abstractmethod
    def __call__(
        self, student: AbstractFlow, ts: Array, index: Array, x0: State, args: Args = None, *, key: PRNGKey
    ) -> State:
        """A state at the time ts[index] of the falling times `ts`; at the first it is sigma eps, as in `sample`.

        **Arguments:** `x0`, `args`: one example of the data and its condition; `key`: for the noise, and the student's.
        """


class Renoised(AbstractStart):
    """Data with noise put on them, alpha x_0 + sigma eps; pure noise at the first time.

    One evaluation fewer than a simulation for every time but the first; the student trains on data, but samples from
    its own. Needs the data themselves, not only their number.
    """

    def __call__(
        self, student: AbstractFlow, ts: Array, index: Array, x0: State, args: Args = None, *, key: PRNGKey
    ) -> State:
        del args
        alpha, sigma = student.path.coefficients(ts[index])
        noise = student.source.sample(key, x0)
        return linear_combination((jnp.where(index == 0, 0, alpha), sigma), (x0, noise))


class SimulatedSDE(AbstractStart):
    """The student's own samples, with new noise put on them at each time: the steps of `ConsistencySampling`."""

    def __call__(
        self, student: AbstractFlow, ts: Array, index: Array, x0: State, args: Args = None, *, key: PRNGKey
    ) -> State:
        def step(t: Scalar, s: Scalar, x: State, key: PRNGKey) -> State:
            key_noise, key_network = jax.random.split(key)
            data = student.denoised(t, x, args, key=key_network)
            return student.path.interpolate(s, data, normal_like(key_noise, x))

        return _simulated(step, student, ts, index, x0, key)


class SimulatedODE(AbstractStart):
    """The student's own samples, with the noise put on them that it predicts: the steps of `DDIM`."""

    def __call__(
        self, student: AbstractFlow, ts: Array, index: Array, x0: State, args: Args = None, *, key: PRNGKey
    ) -> State:
        def step(t: Scalar, s: Scalar, x: State, key: PRNGKey) -> State:
            alpha, sigma = student.path.coefficients(s)
            return student.mixture((alpha, sigma, jnp.ones_like(s)), t, x, args, key=key)

        return _simulated(step, student, ts, index, x0, key)


def _simulated(
    step: Callable[[Scalar, Scalar, State, PRNGKey], State],
    student: AbstractFlow,
    ts: Array,
    index: Array,
    x0: State,
    key: PRNGKey,
) -> State:
    """The state at ts[index] after step(t, s, x, key) from each time to the next."""
    key_start, key_steps = jax.random.split(key)
    start = linear_combination((student.path.sigma(ts[0]),), (student.source.sample(key_start, x0),))

    def advance(x: State, n: Array) -> tuple[State, None]:
        new = step(ts[n], ts[n + 1], x, jax.random.fold_in(key_steps, n))
        return jax.tree.map(lambda after, before: jnp.where(n < index, after, before), new, x), None

    return jax.lax.scan(advance, start, jnp.arange(len(ts) - 2))[0]


class Adversarial(eqx.Module):
    r"""The adversarial part of `DMD2`: a head on the features of the fake tells data from samples, both noised.

    With D its logit, $x_t$ noised data and $\hat x_t$ noised samples of the student,

    $$L_\mathrm{student} \mathrel{+}= w_g\, \mathrm{softplus}(-D(\hat x_t)), \qquad
      L_\mathrm{fake} \mathrel{+}= w_d\, [\mathrm{softplus}(D(\hat x_t)) + \mathrm{softplus}(-D(x_t))]
      + w_r\, |D(x_t) - D(x_t + s z)|^2, \quad z \sim N(0, I)$$

    The fake's network is `nn.Features(network, head)`, whose head gives the logit, or several: then the mean is taken.

    **Arguments:** `generator_weight`: $w_g$; `discriminator_weight`: $w_d$; `r1_weight`: $w_r$ of the approximate R1
    penalty, None for none, which saves its evaluation; `r1_std`: s, in units of $x_t$. All are >= 0.

    Source: Yin et al. (2024), arXiv 2405.14867; Lin et al. (2025), arXiv 2501.08316 (approximate R1), who penalise at
    the data, where this does at noised data, which is what D sees.
    """

    generator_weight: Scalar = eqx.field(default=3e-3, converter=as_scalar)
    discriminator_weight: Scalar = eqx.field(default=1e-2, converter=as_scalar)
    r1_weight: Scalar | None = eqx.field(default=None, converter=optional_scalar)
    r1_std: Scalar = eqx.field(default=0.01, converter=as_scalar)

    def __check_init__(self):
        for name in ("generator_weight", "discriminator_weight", "r1_weight", "r1_std"):
            value = getattr(self, name)
            if value is not None and is_concrete(value) and not float(known(value)) >= 0:
                raise ValueError(f"Adversarial got {name} = {float(value):g}, but wants it >= 0.")


class DMD2(eqx.Module):
    r"""The loss of a `Distillation`: the fake's on every step, and the student's on every `every`-th.

    The gradient of the student's loss reaches the student alone, that of the fake's the fake alone, its head included.
    On the steps between, the student's gradient is zero and neither the teacher nor the student's backward pass is
    evaluated.

    **Arguments:**

    - `teacher`: a flow on the path of the student, guided or not; it is not trained;
    - `ts`: the student's times, falling, the last of them the clean end; each example takes one but the last at random.
      None: one step between the path's ends. The fake does not know which: it learns the law of all samples together;
    - `start`: `Renoised()`, `SimulatedSDE()` or `SimulatedODE()`: where the state at that time comes from;
    - `times`: the law of t in the student's loss; None: uniform over the middle 96 % between the path's ends. On `EDM`
      take one in noise levels, such as `times.LogNormal()`;
    - `every`: the student trains on the last of so many steps, static;
    - `fake_loss`: a `losses.Regression`, of the fake on the student's samples, with its own times and weight. It has no
      coupling, and no dropout, as the fake is not guided;
    - `adversarial`: None, or `Adversarial(...)`.

    **Raises:** `TypeError` for a teacher without a score or what is not of its kind; `ValueError` for times outside the
    path or `every` below 1. When it is called: `TypeError` for a flow that is no `Distillation` and for
    `couplings.Pairs`; `ValueError` for different paths, a student that says nothing about the data at one of its times
    (predicting the noise at alpha = 0), or an adversarial loss without features.

    Deviations: means over elements, as everywhere here; an example on which the teacher changes nothing,
    x = D_teacher, has no gradient; fake and student train on the same samples; the generator's logit is taken at the
    t and noise of the distribution matching gradient, that of the discriminator at those of the fake's loss, so that
    neither costs an evaluation.
    """

    teacher: AbstractFlow
    ts: Given
    start: AbstractStart
    times: AbstractTimes
    every: int = eqx.field(static=True)
    fake_loss: Regression
    adversarial: Adversarial | None

    def __init__(
        self,
        teacher: AbstractFlow,
        *,
        ts: Sequence[ScalarLike] | np.ndarray | Array | None = None,
        start: AbstractStart = Renoised(),
        times: AbstractTimes | None = None,
        every: int = 5,
        fake_loss: Regression = Regression(),
        adversarial: Adversarial | None = None,
    ):
        check_flow(teacher, "teacher")
        check_has_score(teacher, "The teacher's score")
        check_type(start, AbstractStart, "start", "an instance such as fs.distillation.Renoised()")
        check_type(fake_loss, Regression, "fake_loss", "a fs.losses.Regression()")
        if adversarial is not None:
            check_type(adversarial, Adversarial, "adversarial", "None or a fs.distillation.Adversarial()")
        if fake_loss.dropout is not None or not isinstance(fake_loss.coupling, Independent):
            raise ValueError(
                "fake_loss has a dropout or a coupling, but the fake learns from samples with their conditions and any "
                "noise: leave both out."
            )
        low, high = as_scalar(teacher.path.t_data), as_scalar(teacher.path.t_noise)
        if times is None:
            times = Uniform(t_min=low + 0.02 * (high - low), t_max=high - 0.02 * (high - low))
        check_type(times, AbstractTimes, "times", "an instance such as fs.times.Uniform()")
        given = Given(jnp.stack([high, low]) if ts is None else ts)
        inside = jax.vmap(teacher.path.contains)(given.ts)
        points = check(
            given.ts,
            ~inside,
            f"ts has times outside {type(teacher.path).__name__}: take them from t_noise down to t_data, or to the "
            "clean end below it, where sigma = 0.",
        )
        last = points[-1]
        points = check(
            points,
            ~((last == low) | (teacher.path.coefficients(last)[1] == 0)),
            "ts ends at t = {}, but wants the clean end as its last time, from which no student starts: add t_data.",
            last,
        )
        self.teacher = teacher
        self.ts = eqx.tree_at(lambda g: g.ts, given, points)
        self.start = start
        self.times = times
        self.every = check_count(every, "DMD2 got every")
        self.fake_loss = fake_loss
        self.adversarial = adversarial

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
        """The loss of a batch and the terms it is made of, as in `losses.Regression`; `Aux.t` is the fake's time.

        **Arguments:** `flow`: a `Distillation`; the rest as in `losses.Regression`. Without re-noised data or an
        adversarial loss only the shape of `x0` counts.
        """
        check_type(flow, Distillation, "flow", "a fs.distillation.Distillation(student, fake)")
        assert isinstance(flow, Distillation)
        if isinstance(x0, Pairs):
            raise TypeError("x0 is Pairs, but a student draws its own noise: give it the data alone.")
        _check_same_path(flow, self.teacher, "The student and the teacher")
        moved = (flow.count < 0) | (flow.count != jnp.round(flow.count))
        count = check(
            flow.count,
            moved,
            "Another optimiser than DMD2.optimiser moved the count of a Distillation, by which its two take turns: "
            "give fit the optimiser loss.optimiser(student=optax.adamw(1e-5), fake=optax.adamw(1e-5)).",
        )
        flow = eqx.tree_at(lambda f: f.count, flow, count)
        assert isinstance(flow, Distillation)
        ts = self._settled(flow.student)
        draw = flow.fake.source.sample if self.fake_loss.noise is None else self.fake_loss.noise

        def one(x0: State, noise: State, args: Args, t: tuple[Scalar, Scalar], key: PRNGKey, mask: PyTree | None):
            return self._one(flow, ts, x0, args, t, noise, key, mask)

        both = _Both(self.fake_loss.times, self.times)
        value, aux = over_batch(
            one,
            flow.path,
            both,
            Independent(),
            draw,
            x0,
            args,
            key=check_key(key, "a training loss"),
            example_weight=example_weight,
            mask=mask,
            dropout=None,
        )
        # Any other optimiser than that of `optimiser` moves the count down, and is found out in the next step.
        value = value + 1e-12 * (flow.count - jax.lax.stop_gradient(flow.count))
        # What networks handed out is the loss's own.
        return value, aux._replace(features=())

    def optimiser(
        self, *, student: optax.GradientTransformation, fake: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """The optimiser of a `Distillation` under this loss, for `training.fit`.

        On the steps between its own the student and its optimiser's state stay as they are, to the last bit: moments,
        schedules and weight decay see its own steps alone.

        **Arguments:** `student`, `fake`: an Optax optimiser for each, clipping and schedules included.
        """
        for optimiser, name in ((student, "student"), (fake, "fake")):
            check_type(optimiser, optax.GradientTransformation, name, "an optimiser of Optax, e.g. optax.adamw(1e-5)")
        of_student, of_fake = optax.with_extra_args_support(student), optax.with_extra_args_support(fake)

        def init(params: PyTree) -> PyTree:
            check_type(params, Distillation, "The flow", "a fs.distillation.Distillation(student, fake)")
            return _OptimiserState(of_student.init(params.student), of_fake.init(params.fake))

        def update(
            updates: PyTree, state: PyTree, params: PyTree = None, *, value: Scalar | None = None
        ) -> tuple[PyTree, PyTree]:
            if params is None:
                raise ValueError("The optimiser of DMD2 got no parameters: pass params to update.")
            trains = self._trains(params.count)

            def step() -> tuple[PyTree, PyTree]:
                return of_student.update(updates.student, state.student, params.student, value=value)

            def wait() -> tuple[PyTree, PyTree]:
                return jax.tree.map(jnp.zeros_like, updates.student), state.student

            on_student, of_student_state = jax.lax.cond(trains, step, wait)
            on_fake, of_fake_state = of_fake.update(updates.fake, state.fake, params.fake, value=value)
            # Back to 0 after each turn of the student: a float that went on would stop counting at 2^24.
            on_count = jnp.where(trains, -params.count, 1).astype(params.count.dtype)
            changed = eqx.tree_at(lambda f: (f.student, f.fake, f.count), updates, (on_student, on_fake, on_count))
            return changed, _OptimiserState(of_student_state, of_fake_state)

        return optax.GradientTransformationExtraArgs(init, update)

    def _trains(self, count: Scalar) -> Bool[Array, ""]:
        """Whether the student trains on the step before which `count` is this."""
        return count >= self.every - 1

    def _settled(self, student: AbstractFlow) -> Array:
        """The student's times, at which it must tell the data."""
        ts, path = self.ts.ts, student.path

        def silent(t: Scalar) -> Bool[Array, ""]:
            return is_singular(student.mixture_weights(t, Data().coefficients(path, t)))

        return check(
            ts,
            jax.vmap(silent)(ts[:-1]),
            f"A student that predicts {type(student.prediction).__name__} says nothing about the data at one of its "
            f"times ts on {type(path).__name__}: begin inside the path, or take a prediction that is regular there "
            "(Data, V, Velocity).",
        )

    def _one(
        self,
        flow: Distillation,
        ts: Array,
        x0: State,
        args: Args,
        t: tuple[Scalar, Scalar],
        noise: State,
        key: PRNGKey,
        mask: PyTree | None,
    ) -> Scalar:
        """The loss of one example; t are the fake's time and the student's, `noise` is the fake's."""
        key_index, key_start, key_student, key_fake, key_match, key_data = jax.random.split(key, 6)
        index = jax.random.randint(key_index, (), 0, len(ts) - 1)
        begin = jax.lax.stop_gradient(self.start(frozen(flow.student), ts, index, x0, args, key=key_start))

        def sample(student: AbstractFlow) -> State:
            return student.denoised(ts[index], begin, args, key=key_student)

        def student_loss() -> Scalar:
            # Once more, with its gradient: on the other steps nothing is kept for one.
            x = sample(flow.student)
            noise = flow.fake.source.sample(key_match, x0)
            return self._student_loss(flow, x, args, t[1], noise, mask)

        x = jax.lax.stop_gradient(sample(frozen(flow.student)))
        loss = self._fake_loss(flow.fake, x, x0, args, t[0], noise, (key_fake, key_data), mask)
        # `count` belongs to the batch, so that the branch is taken, not both of them and a choice.
        trains = self._trains(jax.lax.stop_gradient(flow.count))
        return loss + jax.lax.cond(trains, student_loss, lambda: jnp.zeros_like(loss))

    def _student_loss(
        self, flow: Distillation, x: State, args: Args, t: Scalar, noise: State, mask: PyTree | None
    ) -> Scalar:
        """The loss of the student's sample x."""
        x_t = flow.path.interpolate(t, x, noise)
        fake = frozen(flow.fake)
        denoised, logits = with_features(lambda: fake.denoised(t, x_t, args))
        wanted = self.teacher.denoised(t, jax.lax.stop_gradient(x_t), args)
        gradient = jax.lax.stop_gradient(matching_gradient(x, denoised, wanted, mask=mask))
        # x - sg(x - g), without rounding g away where x is large.
        error = jax.tree.map(lambda g, x: g + (x - jax.lax.stop_gradient(x)), gradient, x)
        loss = 0.5 * mean_of(squared, jnp.ones_like(t), error, mask)
        if self.adversarial is None:
            return loss
        return loss + self.adversarial.generator_weight * _softplus(-1, _logits(logits))

    def _fake_loss(
        self,
        fake: AbstractFlow,
        x: State,
        x0: State,
        args: Args,
        t: Scalar,
        noise: State,
        keys: tuple[PRNGKey, PRNGKey],
        mask: PyTree | None,
    ) -> Scalar:
        """The loss of the fake, its head included, on the student's sample x."""
        key, key_data = keys
        loss, logits = with_features(lambda: self.fake_loss.one(fake, x, args, t=t, noise=noise, key=key, mask=mask))
        if self.adversarial is None:
            return loss

        def of_data(x_t: State) -> PyTree:
            # With the key of the other evaluation, so that dropout is no difference.
            return _logits(with_features(lambda: fake.output(t, x_t, args, key=key))[1])

        key_noise, key_r1 = jax.random.split(key_data)
        x_t = fake.path.interpolate(t, x0, fake.source.sample(key_noise, x0))
        on_data = of_data(x_t)
        loss = loss + self.adversarial.discriminator_weight * (_softplus(1, _logits(logits)) + _softplus(-1, on_data))
        if self.adversarial.r1_weight is None:
            return loss
        moved = of_data(linear_combination((1, self.adversarial.r1_std), (x_t, normal_like(key_r1, x_t))))
        change = linear_combination((1, -1), (on_data, moved))
        return loss + self.adversarial.r1_weight * mean_of(squared, jnp.ones_like(t), change, None)


def matching_gradient(
    x: State, fake: State, teacher: State, *, mask: PyTree[Bool[Array, "..."]] | None = None
) -> State:
    """The distribution matching gradient at one sample x: (D_fake - D_teacher)/mean |x - D_teacher|.

    **Arguments:** `x`: the student's sample; `fake`, `teacher`: what both make of it after noise, D(t, x_t), alike;
    `mask`: booleans like x, False where an element does not count in the mean.

    **Returns:** a state like `x`; 0 where x = D_teacher, as there is no scale to divide by.
    """
    difference = linear_combination((1, -1), (x, teacher))
    size = mean_of(absolute, as_scalar(1.0), difference, mask)
    weight = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0)
    return linear_combination((weight, -weight), (fake, teacher))


class _OptimiserState(NamedTuple):
    """Optax's states of the two."""

    student: PyTree
    fake: PyTree


class _Both(AbstractTimePairs):
    """Two independent times of each example, in no order."""

    first: AbstractTimes
    second: AbstractTimes

    def sample(self, path: AbstractPath, key: PRNGKey, num: int) -> tuple[Array, Array]:
        return self.first.sample(path, key, num), self.second.sample(path, jax.random.fold_in(key, 1), num)


def _logits(features: tuple[PyTree, ...]) -> PyTree:
    """What the fake's head handed out in one evaluation."""
    if len(features) != 1:
        raise ValueError(
            f"The fake's network handed out {len(features)} features in one evaluation, but the adversarial loss wants "
            "the logit of its head: make it fs.nn.Features(network, head)."
        )
    leaves = jax.tree.leaves(features[0])
    if not leaves or not all(eqx.is_inexact_array(leaf) for leaf in leaves):
        raise TypeError(
            f"The head of the fake gave {describe(features[0])}, but wants a logit, or several: floating-point arrays."
        )
    return features[0]


def _softplus(sign: int, logits: PyTree) -> Scalar:
    """The mean of softplus(sign * logit)."""
    return mean_of(jax.nn.softplus, as_scalar(sign), logits, None)


def _check_same_path(first: AbstractFlow, second: AbstractFlow, who: str) -> None:
    if differ_in_path(first, second):
        raise ValueError(
            f"{who} are on different paths, {type(first.path).__name__} and {type(second.path).__name__}: move one of "
            "them with fs.OnPath(flow, path)."
        )
