r"""The training loop: a pure, compiled step, and a generator around it.

With theta the floating-point arrays of the flow (of a `Flow`, those of its network: path parameters are plain
numbers and stay), an optimiser of Optax and the step n = 0, 1, ...,

$$\theta_{n+1} = \theta_n + \mathrm{update}(\nabla_\theta\, \mathrm{loss}(\mathrm{flow}_{\theta_n}, \mathrm{batch}_n;
  \mathrm{key}_n)), \qquad
  \bar\theta_{n+1} = \bar\theta_n + (1 - d)(\theta_{n+1} - \bar\theta_n), \quad \bar\theta_0 = \theta_0$$

where d is the decay of the moving average (see `averages` for others) and key_n is folded from one key and n: the same
key and batches give the same weights. The average starts from the weights, so it needs no debiasing, but the start
keeps the weight d^n: choose d with (1 - d) steps well above 1.

    batches = fs.data.Batches(x, labels, batch_size=256, key=key)
    for state in fs.training.fit(loss, flow, batches, optax.adamw(1e-3), steps=2_000, key=key, ema=0.999):
        print(int(state.step), float(state.metrics["loss"]))
    flow = state.ema_flow

Everything else is the loop's body, an `if`: evaluate, save (`checkpoints`), stop early, keep an average for later.
Gradients are clipped, accumulated over batches and given a schedule by the optimiser (`optax.clip_by_global_norm`,
`optax.MultiSteps`). A network computes in half precision with its parameters in float32 as `nn.Precision(network)`.
`fit` takes the state of an earlier run in place of the flow and goes on with it, to the last bit.
"""

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ._checks import check_count, check_key, check_state, check_type, describe
from ._numerics import all_finite, as_scalar
from ._progress import import_tqdm
from ._types import Args, PRNGKey, Scalar, ScalarLike
from .averages import AbstractAverage, Constant
from .flow import AbstractFlow
from .losses import Aux
from .paths import AbstractPath
from .sharding import Layout

__all__ = ["Measured", "TrainState", "TrainingDiverged", "fit", "init", "train_step"]


class TrainState(eqx.Module):
    """Everything that training carries from one step to the next, a pytree.

    **Fields:**

    - `flow`: the flow as trained so far;
    - `averages`: the moving averages of its parameters, each None in the place of all other leaves; see `ema_flow`;
    - `optimiser_state`: Optax's;
    - `step`: the number of steps taken, an int32 scalar;
    - `key`: the key that each step's key is folded from; it does not change;
    - `metrics`: what `fit` measured since the state that it yielded before: "loss", the mean over those steps, NaN
      before the first. Where the loss gives `losses.Aux`, "loss_by_t", its mean in each of eight bins of the time, with
      the weights of the examples, NaN in an empty one, and "t_edges", their nine edges: the bins are equally wide in
      arctan(sigma/alpha).
    """

    flow: AbstractFlow
    averages: tuple[PyTree, ...]
    optimiser_state: PyTree
    step: Int[Array, ""]
    key: PRNGKey
    metrics: dict[str, Array]

    @property
    def ema_flow(self) -> AbstractFlow:
        """The flow with the first moving average of its parameters: the one to sample from."""
        if not self.averages:
            raise ValueError("This state has no moving average, as fit got ema=None: use its flow.")
        return self.with_parameters(self.averages[0])

    def with_parameters(self, parameters: PyTree) -> AbstractFlow:
        """The flow with other parameters, such as one of `averages` or what `averages.reconstruct` gives."""
        parameters = jax.tree.map(jnp.asarray, parameters)
        return eqx.combine(parameters, eqx.filter(self.flow, eqx.is_inexact_array, inverse=True))


class Measured(NamedTuple):
    """What a step measures: its loss; the weighted sum of the examples' losses and their weight by bins of the time."""

    loss: Scalar
    sums: Float[Array, " bins"]
    weights: Float[Array, " bins"]


class TrainingDiverged(FloatingPointError):
    """The loss or a parameter became infinite or NaN.

    **Fields:** `step`: the first step seen to fail, counted from 1; `state`: the last good state, that which `fit`
    yielded before or the one it began with.
    """

    step: int
    state: TrainState

    def __init__(self, message: str, step: int, state: TrainState):
        Exception.__init__(self, message)
        self.step = step
        self.state = state


def _copied(tree: PyTree) -> PyTree:
    """The same tree in buffers of its own, which no other tree shares, and with strong types."""
    return jax.tree.map(lambda x: jnp.array(x, x.dtype, copy=True) if eqx.is_array(x) else x, tree)


_copy = eqx.filter_jit(_copied)


def init(
    flow: AbstractFlow,
    optimiser: optax.GradientTransformation | optax.MultiSteps,
    *,
    key: PRNGKey,
    averages: int = 1,
) -> TrainState:
    """The state before the first step; it shares no buffers with `flow`.

    **Arguments:** `flow`: the flow to train; `optimiser`: an Optax optimiser; `key`: for the loss; `averages`: how many
    moving averages are kept.

    **Raises:** `ValueError` if the flow has no floating-point arrays to train.
    """
    key = check_key(key, "training")
    parameters = eqx.filter(flow, eqx.is_inexact_array)
    if not jax.tree.leaves(parameters):
        raise ValueError(
            "The flow has no floating-point arrays, so there is nothing to train: parameters must be JAX arrays "
            "in the fields of its network."
        )
    step = jnp.zeros((), jnp.int32)
    metrics = {"loss": as_scalar(jnp.nan)}
    state = optimiser.init(parameters)
    return _copy(TrainState(flow, (parameters,) * averages, state, step, key, metrics))


def train_step(
    state: TrainState,
    batch: tuple[PyTree, Args],
    *,
    loss: Callable[..., tuple[Scalar, Any]],
    optimiser: optax.GradientTransformation | optax.MultiSteps,
    averages: Sequence[AbstractAverage],
) -> tuple[TrainState, Measured]:
    """One step of training, a pure function; `fit` compiles it with the state's buffers donated.

    **Arguments:** `state`: before the step; `batch`: (x, args), both with a leading batch axis, args or None;
    `loss`: `loss(flow, x, args, key=key) -> (value, aux)`; `optimiser`: an Optax optimiser; `averages`: as many as the
    state has.

    **Returns:** the state after the step, and what was measured before it.
    """
    parameters, rest = eqx.partition(state.flow, eqx.is_inexact_array)
    x, args = batch
    key = jax.random.fold_in(state.key, state.step)

    def value_of(parameters):
        out = loss(eqx.combine(parameters, rest), x, args, key=key)
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(f"The loss returned {describe(out)}, but wants (value, aux): aux may be None.")
        return out

    (value, aux), gradient = jax.value_and_grad(value_of, has_aux=True)(parameters)
    # Optax promotes dtypes on its own (Adam raises a float to an integer power), which a user may have forbidden.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        transformation = optimiser.gradient_transformation() if isinstance(optimiser, optax.MultiSteps) else optimiser
        update = optax.with_extra_args_support(transformation).update  # some also want the loss
        updates, optimiser_state = update(gradient, state.optimiser_state, parameters, value=value)
    parameters = eqx.apply_updates(parameters, updates)
    step = state.step + 1
    kept = tuple(average.updated(old, parameters, step) for average, old in zip(averages, state.averages, strict=True))
    flow = eqx.combine(parameters, rest)
    new = TrainState(flow, kept, optimiser_state, step, state.key, state.metrics)
    return new, _measured(flow.path, value, aux)


#: Bins of the time in which the loss is measured.
_BINS = 8


def _measured(path: AbstractPath, value: Scalar, aux: Any) -> Measured:
    if not isinstance(aux, Aux):
        return Measured(value, jnp.zeros((0,), value.dtype), jnp.zeros((0,), value.dtype))
    # The edges are few and increasing: counting those below a time is quicker than a search.
    inner = _edges(path)[1:-1].astype(aux.t.dtype)
    bins = jnp.sum((aux.t[:, None] >= inner[None, :]).astype(jnp.int32), axis=1)
    weights = jnp.ones_like(aux.losses) if aux.weights is None else aux.weights
    member = (bins[:, None] == jnp.arange(_BINS)[None, :]).astype(aux.losses.dtype) * weights[:, None]
    # An infinite loss must not make NaN of the bins that it is not in.
    sums = jnp.sum(jnp.where(member > 0, member * aux.losses[:, None], 0), axis=0)
    return Measured(value, sums, jnp.sum(member, axis=0))


@eqx.filter_jit
def _edges(path: AbstractPath) -> Float[Array, " edges"]:
    """The edges of the bins of the time, equally far apart in arctan(sigma/alpha)."""
    low, high = as_scalar(path.t_data), as_scalar(path.t_noise)

    def angle(t: Scalar) -> Scalar:
        alpha, sigma = path.coefficients(t)
        return jnp.arctan2(sigma, alpha)

    angles = jnp.linspace(angle(low), angle(high), _BINS + 1)
    inner = jax.vmap(lambda angle: path.time_at(jnp.cos(angle), jnp.sin(angle)))(angles[1:-1])
    return jnp.concatenate([low[None], inner, high[None]])


class _Record(NamedTuple):
    """What the steps since the last yield measured, kept on the device."""

    losses: Float[Array, " every"]
    sums: Float[Array, " bins"]
    weights: Float[Array, " bins"]
    number: Int[Array, ""]

    def with_step(self, measured: Measured) -> "_Record":
        losses = self.losses.at[self.number].set(measured.loss.astype(self.losses.dtype))
        sums, weights = self.sums, self.weights
        if measured.weights.size:
            sums = sums + measured.sums.astype(sums.dtype)
            weights = weights + measured.weights.astype(weights.dtype)
        return _Record(losses, sums, weights, self.number + 1)


def _empty_record(every: int, layout: Layout | None) -> _Record:
    # Buffers of their own, as they are donated.
    sums, weights = jnp.zeros((_BINS,), float), jnp.zeros((_BINS,), float)
    record = _Record(jnp.zeros((every,), float), sums, weights, jnp.zeros((), jnp.int32))
    return record if layout is None else layout.on_all(record)


class _Static:
    """What a compiled step holds besides arrays, to be hashed."""

    def __init__(self, value: PyTree):
        self.value = value
        leaves, structure = jax.tree.flatten(value)
        # A NumPy array that a network holds as a constant is its own only by identity.
        self._key = tuple(id(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves), structure
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._key == other._key


@lru_cache(maxsize=64)
def _compiled_step(static: _Static) -> Callable[[list[Any], list[Any], list[Any]], tuple[list[Array], Scalar]]:
    """The compiled step from lists of arrays to a list of arrays: what Python flattens at every call costs time.

    The lists are of the state and the record, which is donated, of the batch, and of loss, optimiser and averages.
    """
    (carried_structure, carried_rest), batch_structure, (setting_structure, setting_rest), layout = static.value

    @partial(jax.jit, donate_argnums=0)
    def step(carried: list[Any], batch: list[Any], setting: list[Any]) -> tuple[list[Array], Scalar]:
        state, record = eqx.combine(jax.tree.unflatten(carried_structure, carried), carried_rest)
        loss, optimiser, averages = eqx.combine(jax.tree.unflatten(setting_structure, setting), setting_rest)
        x, args = jax.tree.unflatten(batch_structure, batch)
        state, measured = train_step(state, (x, args), loss=loss, optimiser=optimiser, averages=averages)
        record = record.with_step(measured)
        if layout is not None:
            state, record, measured = layout.constrain(state), layout.on_all(record), layout.on_all(measured)
        return jax.tree.leaves(eqx.filter((state, record), eqx.is_array)), measured.loss

    return step


class _Yielded(NamedTuple):
    """What a yield needs besides the state that the last step left."""

    carried: list[Array]  # a copy of that state, with which to go on, and an empty record
    finite_losses: Array
    finite_parameters: Array
    by_time: Array  # whether the loss has been measured by time
    metrics: dict[str, Array]


@lru_cache(maxsize=64)
def _compiled_yield(static: _Static) -> Callable[[list[Any]], _Yielded]:
    """All that a yield computes, in one program, as the device waits for the host meanwhile."""
    (carried_structure, carried_rest), layout = static.value

    @jax.jit
    def yielded(carried: list[Any]) -> _Yielded:
        state, record = eqx.combine(jax.tree.unflatten(carried_structure, carried), carried_rest)
        # Places of steps that were not made hold 0.
        number = record.number.astype(record.losses.dtype)
        counted = record.weights > 0
        by_t = jnp.where(counted, record.sums / jnp.where(counted, record.weights, 1), jnp.nan)
        return _Yielded(
            jax.tree.leaves(eqx.filter((_copied(state), _empty_record(len(record.losses), layout)), eqx.is_array)),
            all_finite(record.losses),
            all_finite(eqx.filter(state.flow, eqx.is_inexact_array)),
            jnp.any(counted),
            {
                "loss": as_scalar(jnp.sum(record.losses / number)),
                "loss_by_t": by_t.astype(float),
                "t_edges": _edges(state.flow.path),
            },
        )

    return yielded


def _arrays_and_rest(tree: PyTree) -> tuple[list[Array], tuple[Any, PyTree]]:
    """The arrays of a tree; their structure, and the tree without them."""
    arrays, rest = eqx.partition(tree, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)
    return leaves, (structure, rest)


def fit(
    loss: Callable[..., tuple[Scalar, Any]],
    flow: AbstractFlow | TrainState,
    batches: Iterable,
    optimiser: optax.GradientTransformation | optax.MultiSteps,
    *,
    steps: int,
    key: PRNGKey | None = None,
    ema: ScalarLike | AbstractAverage | Sequence[AbstractAverage] | None = 0.999,
    every: int = 100,
    layout: Layout | None = None,
    progress: bool = True,
) -> Iterator[TrainState]:
    """Train a flow; yields a `TrainState` every `every` steps and after the last one.

    What is yielded is yours to keep, save or drop; `break` to stop. Between two yields nothing waits for the device, so
    that the next batch is prepared while the last step still runs.

    **Arguments:**

    - `loss`: `loss(flow, x, args, key=key) -> (value, aux)` on a batch, e.g. `fs.losses.Regression()`;
    - `flow`: the flow to train, left as it is; or the state of an earlier run, with which to go on;
    - `batches`: an iterable of `x` or of tuples `(x, args)`, each with a leading batch axis, all of the same shape; a
      state that is itself a tuple must come as `(x, args)`. See `data.Batches`;
    - `optimiser`: an Optax optimiser, e.g. `optax.adamw(1e-3)`;
    - `steps`: number of steps, those of an earlier run counted, so that a state that has done them all yields nothing;
      `every`: number of steps from one yield to the next;
    - `key`: for the loss: with the same batches, the same key gives the same weights. None for an earlier state, which
      has its own;
    - `ema`: the moving average of the weights: a decay in [0, 1), one of `averages` or several, or None for none;
    - `layout`: None for one device, or where arrays go on a mesh, see `sharding`;
    - `progress`: whether to show a progress bar with the loss and the speed, which needs tqdm.

    **Returns:** an iterator over states. Memory holds three of them: that in training, the one you have, and the last
    good one.

    **Raises:** `TrainingDiverged`, with the last good state, if the loss or a parameter is not finite; `ValueError` if
    the batches end before the last step or change their shape, after what was trained has been yielded; `ImportError`
    without tqdm.
    """
    steps, every = check_count(steps, "fit got steps"), check_count(every, "fit got every")
    averages = _as_averages(ema)
    _check_kinds(loss, flow, batches, optimiser, layout)
    if isinstance(flow, TrainState):
        if key is not None:
            raise ValueError("fit got a key for a state that goes on with its own: leave key out.")
        if len(flow.averages) != len(averages):
            raise ValueError(
                f"fit got {len(averages)} moving averages for a state that has {len(flow.averages)}: give ema as in "
                "the run before."
            )
        if int(flow.step) > steps:
            raise ValueError(
                f"fit got steps = {steps} for a state that has done {int(flow.step)}: steps counts from the beginning."
            )
        wanted = jax.eval_shape(optimiser.init, eqx.filter(flow.flow, eqx.is_inexact_array))
        if describe(wanted) != describe(flow.optimiser_state):
            raise ValueError(
                "fit got a state of another optimiser than it got now: give the one of the run before, or begin anew "
                "from the state's flow."
            )
        state = _copy(flow)
    else:
        state = init(flow, optimiser, key=check_key(key, "training"), averages=len(averages))
    if layout is not None:
        state = layout.place(state)
    tqdm = import_tqdm("fit") if progress else None
    return _run(state, iter(batches), (loss, optimiser, averages), steps, every, layout, tqdm)


def _check_kinds(loss: Any, flow: Any, batches: Any, optimiser: Any, layout: Any) -> None:
    if isinstance(loss, type) or not callable(loss):
        given = f"the class {loss.__name__}" if isinstance(loss, type) else f"a {type(loss).__name__}"
        raise TypeError(f"loss is {given}, but wants a callable (flow, x, args, key=key), e.g. fs.losses.Regression().")
    check_type(flow, eqx.Module, "flow", "a fs.Flow, or the state of an earlier run")
    if not isinstance(optimiser, optax.GradientTransformation | optax.MultiSteps):
        raise TypeError(f"optimiser is a {type(optimiser).__name__}, but wants Optax's, e.g. optax.adamw(1e-3).")
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is a {type(batches).__name__}, but wants an iterable of batches, e.g. fs.data.Batches(x, "
            "batch_size=..., key=...)."
        )
    if layout is not None:
        check_type(layout, Layout, "layout", "a fs.sharding.Layout(mesh)")


def _as_averages(ema: Any) -> tuple[AbstractAverage, ...]:
    if ema is None:
        return ()
    if isinstance(ema, AbstractAverage):
        return (ema,)
    if isinstance(ema, Sequence):
        for average in ema:
            check_type(average, AbstractAverage, "One of ema", "an instance such as fs.averages.PowerFunction(0.05)")
        return tuple(ema)
    if not isinstance(ema, float | int | np.number | np.ndarray | jax.Array):
        check_type(ema, AbstractAverage, "ema", "a decay in [0, 1), or an instance such as fs.averages.HalfLife(1e3)")
    return (Constant(ema),)


def _run(
    state: TrainState,
    batches: Iterator,
    setting: tuple,
    steps: int,
    every: int,
    layout: Layout | None,
    tqdm: Callable[..., Any] | None,
) -> Iterator[TrainState]:
    """The loop of `fit`. Of all states only that of the loop is donated, and nobody else ever holds its buffers."""
    good, unread = state, 0
    every = min(every, steps)

    carried, carried_rest = _arrays_and_rest((_copy(_unmeasured(state)), _empty_record(every, layout)))
    yielded_of = _compiled_yield(_Static((carried_rest, layout)))
    setting_arrays, setting_rest = _arrays_and_rest(setting)
    begun = done = int(state.step)
    checked = _checked_batches(batches, begun, steps, layout)
    step = problem = None
    bar = None if tqdm is None else _ProgressBar(tqdm(total=steps, initial=begun, unit="step", dynamic_ncols=True))
    try:
        while done < steps and problem is None:
            try:
                batch, structure = next(checked)
            except Exception as error:
                # What was trained before is yielded first.
                problem = error
            else:
                if step is None:
                    step = _compiled_step(_Static((carried_rest, structure, setting_rest, layout)))
                carried, loss = step(carried, batch, setting_arrays)
                done, unread = done + 1, unread + 1
                if bar is not None:
                    bar.advance(loss, len(batch[0]))
            if unread and (problem is not None or done % every == 0 or done == steps):
                # The only point at which the host waits for the device.
                trained, record = eqx.combine(jax.tree.unflatten(carried_rest[0], carried), carried_rest[1])
                yielded = yielded_of(carried)
                good = _finished(trained, record, yielded, done, good)
                carried, unread = yielded.carried, 0
                if bar is not None:
                    bar.show(good)
                yield good
    except (ValueError, RuntimeError) as error:
        # What `eqx.error_if` says inside a compiled step comes wrapped in what its callback went through.
        said = re.search(r"_EquinoxRuntimeError: (.+)", str(error))
        if said is None:
            raise
        raise ValueError(f"{said[1]} This came up after step {int(good.step)}, whose state is good.") from None
    finally:
        if bar is not None:
            bar.close()
    if problem is not None:
        raise problem


def _checked_batches(
    batches: Iterator, begun: int, steps: int, layout: Layout | None
) -> Iterator[tuple[list[Any], Any]]:
    """The arrays and the structure of each batch, placed; raises if there are too few or they are not alike."""
    first, described = None, ""
    for number in range(begun + 1, steps + 1):
        try:
            batch = next(batches)
        except StopIteration:
            raise ValueError(
                f"The batches ended after {number - 1} steps of {steps}: pass an iterable that goes on, such as "
                "flowsolve.data.Batches(data, batch_size=..., key=...), or fewer steps."
            ) from None
        batch = _as_batch(batch, checked=first is not None)
        leaves, structure = jax.tree.flatten(batch)
        kind = structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
        if first is None:
            first, described = kind, describe(batch)
        elif kind != first:
            raise ValueError(
                f"The batch of step {number} is {describe(batch)}, but those before were {described}: give every batch "
                "the same shapes, as each new one is compiled anew; drop a smaller last one, or pad and mask it."
            )
        yield leaves if layout is None else layout.place_batch(leaves), structure


def _unmeasured(state: TrainState) -> TrainState:
    """The state without its metrics, whose kinds differ before the first step and after."""
    return eqx.tree_at(lambda s: s.metrics, state, {})


def _as_batch(batch: Any, *, checked: bool) -> tuple[PyTree, Args]:
    """(x, args) of arrays, of which NumPy's stay on the host; x is checked unless `checked`."""
    x, args = batch if isinstance(batch, tuple) and len(batch) == 2 else (batch, None)
    x, args = jax.tree.map(lambda leaf: leaf if eqx.is_array(leaf) else np.asarray(leaf), (x, args))
    if not checked:
        check_state(x, "x of the first batch")
        if any(leaf.ndim == 0 for leaf in jax.tree.leaves(x)):
            raise ValueError("x of the first batch has a leaf without axes, but wants a leading batch axis.")
    return x, args


def _finished(state: TrainState, record: _Record, yielded: _Yielded, done: int, good: TrainState) -> TrainState:
    """The state to yield after `done` steps, with what was measured since the last; raises unless all is finite."""
    finite_losses, finite_parameters, by_time = jax.device_get(
        (yielded.finite_losses, yielded.finite_parameters, yielded.by_time)
    )
    if not (finite_losses and finite_parameters):
        kept = f"The last good state, after {int(good.step)} steps, is the exception's `state`."
        advice = (
            "Lower the learning rate, clip gradients (optax.clip_by_global_norm), or look in the batches for NaN, "
            "labels out of range and negative weights."
        )
        if finite_losses:
            message = f"A parameter is infinite or NaN after step {done}, though the loss was finite. {kept} {advice}"
            raise TrainingDiverged(message, done, good)
        values = jax.device_get(record.losses)
        bad = int(np.flatnonzero(~np.isfinite(values))[0])
        step = done - int(record.number) + 1 + bad
        raise TrainingDiverged(f"The loss is {values[bad]} in step {step}. {kept} {advice}", step, good)
    metrics = yielded.metrics if by_time else {"loss": yielded.metrics["loss"]}
    return TrainState(state.flow, state.averages, state.optimiser_state, state.step, state.key, metrics)


class _ProgressBar:
    """One line: steps done, loss, examples per second. It counts steps that have been computed, not dispatched."""

    def __init__(self, bar: Any):
        self.bar = bar
        self.pending = deque()
        self.examples = 0
        self.began = 0.0

    def advance(self, value: Array, examples: int) -> None:
        """Note a dispatched step, and show those that have finished, without waiting for any."""
        if not self.examples:
            self.began = time.perf_counter()
        self.examples += examples
        self.pending.append(value)
        while self.pending and self.pending[0].is_ready():
            self.pending.popleft()
            self.bar.update()

    def show(self, state: TrainState) -> None:
        """All dispatched steps have finished: show the loss, and the speed since the last time."""
        rate = self.examples / (time.perf_counter() - self.began)
        self.bar.set_postfix_str(f"loss {float(state.metrics['loss']):.4g}, {rate:,.0f} examples/s", refresh=False)
        self.bar.update(len(self.pending))
        self.pending.clear()
        self.examples = 0

    def close(self) -> None:
        self.bar.close()
