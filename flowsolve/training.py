r"""The training loop: a pure, compiled step, and a generator around it.

With theta the floating-point arrays of the flow (of a `Flow`, those of its network: path parameters are plain
numbers and stay), an optimiser of Optax and the step n = 0, 1, ...,

$$\theta_{n+1} = \theta_n + \mathrm{update}(\nabla_\theta\, \mathrm{loss}(\mathrm{flow}_{\theta_n}, \mathrm{batch}_n;
  \mathrm{key}_n)), \qquad
  \bar\theta_{n+1} = \bar\theta_n + (1 - d)(\theta_{n+1} - \bar\theta_n), \quad \bar\theta_0 = \theta_0$$

where d is the decay `ema` and key_n is folded from one key and n: the same key and batches give the same weights. The
average starts from the weights, so it needs no debiasing, but the start keeps the weight d^n: choose d with
(1 - d) steps well above 1.

    for state in fs.training.fit(loss, flow, batches, optax.adamw(1e-3), steps=2_000, key=key, ema=0.999):
        print(int(state.step), float(state.metrics["loss"]))
    flow = state.ema_flow
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree

from ._checks import check_key, check_state
from ._numerics import all_finite, as_scalar
from ._progress import import_tqdm
from ._types import Args, PRNGKey, Scalar, ScalarLike, State
from .flow import AbstractFlow

__all__ = ["TrainState", "TrainingDiverged", "batches", "fit", "init", "train_step"]


class TrainState(eqx.Module):
    """Everything that training carries from one step to the next, a pytree.

    **Fields:**

    - `flow`: the flow as trained so far;
    - `ema`: the moving average of its parameters, None in the place of all other leaves; see `ema_flow`;
    - `optimiser_state`: Optax's;
    - `step`: the number of steps taken, an int32 scalar;
    - `key`: the key that each step's key is folded from; it does not change;
    - `metrics`: what `fit` measured since the state that it yielded before: "loss", the mean over those steps.
      NaN before the first.
    """

    flow: AbstractFlow
    ema: PyTree
    optimiser_state: PyTree
    step: Int[Array, ""]
    key: PRNGKey
    metrics: dict[str, Scalar]

    @property
    def ema_flow(self) -> AbstractFlow:
        """The flow with the moving average of its parameters: the one to sample from."""
        return eqx.combine(self.ema, eqx.filter(self.flow, eqx.is_inexact_array, inverse=True))


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


@eqx.filter_jit
def _copy(tree: PyTree) -> PyTree:
    """The same tree in buffers of its own, which no other tree shares, and with strong types."""
    return jax.tree.map(lambda x: jnp.array(x, x.dtype, copy=True) if eqx.is_array(x) else x, tree)


def init(flow: AbstractFlow, optimiser: optax.GradientTransformation, *, key: PRNGKey) -> TrainState:
    """The state before the first step; it shares no buffers with `flow`.

    **Arguments:** `flow`: the flow to train; `optimiser`: an Optax optimiser; `key`: for the loss.

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
    return _copy(TrainState(flow, parameters, optimiser.init(parameters), step, key, metrics))


def train_step(
    state: TrainState,
    batch: tuple[State, Args],
    *,
    loss: Callable[..., tuple[Scalar, Any]],
    optimiser: optax.GradientTransformation,
    ema: ScalarLike,
) -> tuple[TrainState, Scalar]:
    """One step of training, a pure function; `fit` compiles it with the state's buffers donated.

    **Arguments:** `state`: before the step; `batch`: (x, args), both with a leading batch axis, args or None;
    `loss`: `loss(flow, x, args, key=key) -> (value, aux)`; `optimiser`: an Optax optimiser; `ema`: the decay d.

    **Returns:** the state after the step, and the loss before it.
    """
    parameters, rest = eqx.partition(state.flow, eqx.is_inexact_array)
    x, args = batch
    key = jax.random.fold_in(state.key, state.step)

    def value_of(parameters):
        return loss(eqx.combine(parameters, rest), x, args, key=key)

    (value, _), gradient = jax.value_and_grad(value_of, has_aux=True)(parameters)
    # Optax promotes dtypes on its own (Adam raises a float to an integer power), which a user may have forbidden.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        update = optax.with_extra_args_support(optimiser).update  # some also want the loss
        updates, optimiser_state = update(gradient, state.optimiser_state, parameters, value=value)
    parameters = eqx.apply_updates(parameters, updates)
    keep = as_scalar(ema)
    average = jax.tree.map(lambda old, new: old + (1 - keep).astype(old.dtype) * (new - old), state.ema, parameters)
    flow = eqx.combine(parameters, rest)
    return TrainState(flow, average, optimiser_state, state.step + 1, state.key, state.metrics), value


@eqx.filter_jit(donate="all-except-first")
def _compiled_step(inputs: tuple, state: TrainState) -> tuple[TrainState, Scalar]:
    batch, loss, optimiser, ema = inputs
    return train_step(state, batch, loss=loss, optimiser=optimiser, ema=ema)


@eqx.filter_jit
def _finite_parameters(flow: AbstractFlow) -> Array:
    return all_finite(eqx.filter(flow, eqx.is_inexact_array))


def fit(
    loss: Callable[..., tuple[Scalar, Any]],
    flow: AbstractFlow,
    batches: Iterable,
    optimiser: optax.GradientTransformation,
    *,
    steps: int,
    key: PRNGKey,
    ema: ScalarLike = 0.999,
    every: int = 100,
    progress: bool = True,
) -> Iterator[TrainState]:
    """Train a flow; yields a `TrainState` every `every` steps and after the last one.

    What is yielded is yours to keep, save or drop; `break` to stop. Between two yields nothing waits for the device, so
    that the next batch is prepared while the last step still runs.

    **Arguments:**

    - `loss`: `loss(flow, x, args, key=key) -> (value, aux)` on a batch, e.g. `fs.losses.Regression()`;
    - `flow`: the flow to train, left as it is;
    - `batches`: an iterable of `x` or of tuples `(x, args)`, each with a leading batch axis, all of the same shape (a
      new shape is compiled anew); a state that is itself a tuple must come as `(x, args)`. See `batches`;
    - `optimiser`: an Optax optimiser, e.g. `optax.adamw(1e-3)`;
    - `steps`: number of steps; `every`: number of steps from one yield to the next;
    - `key`: for the loss: with the same batches, the same key gives the same weights;
    - `ema`: decay of the moving average of the weights, in [0, 1);
    - `progress`: whether to show a progress bar with the loss and the speed, which needs tqdm.

    **Returns:** an iterator over states. Memory holds three of them: that in training, the one you have, and the last
    good one.

    **Raises:** `TrainingDiverged`, with the last good state, if the loss or a parameter is not finite; `ValueError` if
    the batches end before the last step, after what was trained has been yielded; `ImportError` without tqdm.
    """
    if steps < 1 or every < 1:
        raise ValueError(f"fit got steps = {steps} and every = {every}, but wants both >= 1.")
    if isinstance(ema, float | int) and not 0 <= ema < 1:
        raise ValueError(f"fit got ema = {ema}, but wants a decay of the moving average with 0 <= ema < 1.")
    state = init(flow, optimiser, key=key)
    tqdm = import_tqdm("fit") if progress else None
    return _run(state, iter(batches), loss, optimiser, as_scalar(ema), steps, every, tqdm)


def _run(
    state: TrainState,
    batches: Iterator,
    loss: Callable[..., tuple[Scalar, Any]],
    optimiser: optax.GradientTransformation,
    ema: Scalar,
    steps: int,
    every: int,
    tqdm: Callable[..., Any] | None,
) -> Iterator[TrainState]:
    """The loop of `fit`. Of all states only `state` is donated, and nobody else ever holds its buffers."""
    good, values = _copy(state), []
    bar = None if tqdm is None else _ProgressBar(tqdm(total=steps, unit="step", dynamic_ncols=True))
    try:
        for step in range(1, steps + 1):
            batch = next(batches, None)
            if batch is not None:
                batch = _as_batch(batch, checked=step > 1)
                state, value = _compiled_step((batch, loss, optimiser, ema), state)
                values.append(value)
                if bar is not None:
                    bar.advance(value, len(jax.tree.leaves(batch[0])[0]))
            done = step - 1 if batch is None else step
            if values and (batch is None or step % every == 0 or step == steps):
                # The only point at which the host waits for the device.
                good = _finished(state, np.stack(jax.device_get(values)), done, good)
                values = []
                if bar is not None:
                    bar.show(good)
                yield good
                state = _copy(good)
            if batch is None:
                raise ValueError(
                    f"The batches ended after {done} steps of {steps}: pass an iterable that goes on, such as "
                    "flowsolve.training.batches(data, batch_size=..., key=...), or fewer steps."
                )
    finally:
        if bar is not None:
            bar.close()


def _as_batch(batch: Any, *, checked: bool) -> tuple[State, Args]:
    """(x, args) of arrays; x is checked unless `checked`."""
    x, args = batch if isinstance(batch, tuple) and len(batch) == 2 else (batch, None)
    x, args = jax.tree.map(jnp.asarray, (x, args))
    if not checked:
        check_state(x, "x of the first batch")
        if any(leaf.ndim == 0 for leaf in jax.tree.leaves(x)):
            raise ValueError("x of the first batch has a leaf without axes, but wants a leading batch axis.")
    return x, args


def _finished(state: TrainState, values: np.ndarray, done: int, good: TrainState) -> TrainState:
    """The state to yield after `done` steps, with the losses since the last yield; raises unless all is finite."""
    first = done - len(values) + 1
    good_step = int(good.step)
    kept = f"The last good state, after {good_step} steps, is the exception's `state`."
    advice = "Lower the learning rate, clip gradients (optax.clip_by_global_norm), or look for NaN in the batches."
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        step = first + int(bad[0])
        message = f"The loss is {values[bad[0]]} in step {step}. {kept} {advice}"
        raise TrainingDiverged(message, step, good)
    if not bool(_finite_parameters(state.flow)):
        message = f"A parameter is infinite or NaN after step {done}, though the loss was finite. {kept} {advice}"
        raise TrainingDiverged(message, done, good)
    return eqx.tree_at(lambda s: s.metrics, state, {"loss": as_scalar(values.mean(dtype=np.float64))})


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


def batches(data: PyTree, args: Args = None, *, batch_size: int, key: PRNGKey) -> Iterator[tuple[State, Args]]:
    """Endless batches of a data set in memory, in a new random order each epoch.

    Each epoch visits every example at most once: the examples that do not fill a last batch are left out of that epoch,
    others in each. The same key gives the same batches in the same order.

    **Arguments:** `data`: examples along the leading axis of every leaf; `args`: their labels or the like, any pytree
    of arrays with the same leading axis, or None; `batch_size`: examples per batch; `key`: for the order.

    **Returns:** an iterator without end over tuples (x, args), args None where there are none.

    **Raises:** `ValueError` if there are fewer examples than `batch_size`, or leading axes differ.
    """
    key = check_key(key, "the order of the batches")
    data, args = jax.tree.map(jnp.asarray, (data, args))
    check_state(data, "data")
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves((data, args))}
    if len(lengths) != 1:
        raise ValueError(
            f"The leaves of data and args have {sorted(lengths)} examples along their leading axes, but want the same."
        )
    (count,) = lengths
    if not 1 <= batch_size <= count:
        raise ValueError(
            f"batches got batch_size = {batch_size} for {count} examples, but wants 1 <= batch_size <= {count}."
        )
    return _epochs(data, args, batch_size, count, key)


def _epochs(data: State, args: Args, batch_size: int, count: int, key: PRNGKey) -> Iterator[tuple[State, Args]]:
    epoch = 0
    while True:
        order = _order(jax.random.fold_in(key, epoch), count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield _take((data, args), order, jnp.asarray(start, jnp.int32), batch_size)
        epoch += 1


@eqx.filter_jit
def _order(key: PRNGKey, count: int) -> Int[Array, " count"]:
    return jax.random.permutation(key, count)


@eqx.filter_jit
def _take(examples: PyTree, order: Int[Array, " count"], start: Int[Array, ""], batch_size: int) -> PyTree:
    """The examples at order[start : start + batch_size]; compiled, so that the host never waits for `order`."""
    indices = jax.lax.dynamic_slice(order, (start,), (batch_size,))
    return jax.tree.map(lambda leaf: jnp.take(leaf, indices, axis=0, unique_indices=True), examples)
