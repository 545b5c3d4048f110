"""What does a step of `fs.training.fit` cost beyond its arithmetic? And a coupling of a batch?

    python tests/benchmarks/training.py            # minutes on 2 CPU cores; with PyTorch's peers if they are there
    python tests/benchmarks/training.py --smoke

`step`: the median time of a step, of three loops of `--steps` steps each that are run in turn (see timing.py): `fit`
with its moving average, its check for NaN and its loss by t; a loop by hand around one jitted function of the same
loss, optimiser and average; and the loop of torchcfm with the same network in PyTorch (`pip install torch torchcfm`),
which gets the number of threads that suits it best. First the loss and the parameters of the loop by hand are compared
with those of `fit`, and the output of the network with that in PyTorch.

`coupling`: one coupling of 256 examples with 256 noises in 64 dimensions, jitted, against torchcfm's sampler of plans
on the same points, which calls POT. First the mean cost of the pairs is compared.
"""

import argparse
import functools
import itertools
import os
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from networks import Mlp
from pages import markdown, page_options, show
from timing import interleaved, ratio

import flowsolve as fs

try:
    import torch
    from peers_networks import twin
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.optimal_transport import OTPlanSampler
except ModuleNotFoundError:
    torch = None

HEADING = """\
# The cost of training

    python tests/benchmarks/training.py
"""

STEP = """\
## A step

Milliseconds of a step: `fs.training.fit`, a loop by hand around one jitted step of the same loss, optimiser and moving
average, and torchcfm with the same network. Medians of {rounds} interleaved rounds of {steps} steps, each on arrays
made for it. Bold: more than wanted, 1.02 of the loop by hand, 1 of torchcfm's.
"""

COUPLING = """\
## A coupling

Milliseconds for {num} examples and {num} noises in {dim} dimensions: ours jitted on the device, torchcfm's by POT.
Medians of {rounds} interleaved rounds. Cost: the mean squared distance of a pair. Bold: slower.
"""

OPTIMISER = optax.adam(1e-3)
DECAY = 0.999


class Case(NamedTuple):
    """A network, one example's shape, labels or None, and the batch's size."""

    network: Callable[[Key[Array, ""]], eqx.Module]
    shape: tuple[int, ...]
    classes: int | None
    batch: int


CASES = {
    "MLP 512, B 64": Case(lambda key: Mlp(64, 512, 3, key=key), (64,), None, 64),
    "MLP 512, B 256": Case(lambda key: Mlp(64, 512, 3, key=key), (64,), None, 256),
    "digits, B 256": Case(
        lambda key: fs.nn.ResidualMLP(
            jax.ShapeDtypeStruct((8, 8), jnp.float32), width=256, depth=3, num_classes=10, hidden=512, key=key
        ),
        (8, 8),
        10,
        256,
    ),
}
SMALL = {"MLP 32, B 8": Case(lambda key: Mlp(4, 32, 2, key=key), (4,), None, 8)}


def data(case: Case) -> tuple[Array, Array | None]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(case.batch, *case.shape)), jnp.float32)
    labels = None if case.classes is None else jnp.asarray(rng.integers(0, case.classes, case.batch))
    return x, labels


# --- our loop and the one by hand ------------------------------------------------------------------


def ours(
    case: Case, batch: tuple, every: int, optimiser: optax.GradientTransformation = OPTIMISER
) -> Iterator[fs.training.TrainState]:
    flow = fs.Flow(case.network(jax.random.key(0)), fs.paths.Linear(), fs.predictions.Velocity())
    return fs.training.fit(
        fs.losses.Regression(),
        flow,
        itertools.repeat(batch),
        optimiser,
        steps=10**9,
        key=jax.random.key(1),
        ema=DECAY,
        every=every,
        progress=False,
    )


class Carried(NamedTuple):
    """What the loop by hand carries."""

    parameters: Any
    average: Any
    optimiser_state: Any
    step: Array


def by_hand(
    case: Case, draws_of_fit: bool, optimiser: optax.GradientTransformation = OPTIMISER
) -> tuple[Carried, Callable[[Carried, tuple], tuple[Carried, Array]]]:
    """A start, and a jitted step. With `draws_of_fit` its times and noise are those of `fit`, to compare the two."""
    parameters, static = eqx.partition(case.network(jax.random.key(0)), eqx.is_inexact_array)
    start = Carried(parameters, parameters, optimiser.init(parameters), jnp.zeros((), jnp.int32))

    def draws(key: Key[Array, ""], x: Array) -> tuple[Float[Array, " batch"], Array]:
        num = len(x)
        if not draws_of_fit:
            key_t, key_noise = jax.random.split(key)
            return jax.random.uniform(key_t, (num,)), jax.random.normal(key_noise, x.shape)
        key_t, key_examples = jax.random.split(key)
        numbers = jnp.arange(num)
        t = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key_t, i)))(numbers) + 0.5 * jnp.finfo(float).eps
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key_examples, i)))(numbers)[:, 0]
        return t, jax.vmap(lambda key: jax.random.normal(jax.random.split(key, 1)[0], case.shape))(keys)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carried: Carried, batch: tuple) -> tuple[Carried, Array]:
        x, labels = batch
        t, noise = draws(jax.random.fold_in(jax.random.key(1), carried.step), x)

        def loss(parameters: Any) -> Array:
            network = eqx.combine(parameters, static)
            each_t = t.reshape(-1, *(1,) * (x.ndim - 1))
            x_t = (1 - each_t) * x + each_t * noise
            output = jax.vmap(network)(t, x_t, labels) if labels is not None else jax.vmap(network)(t, x_t)
            return jnp.mean((output - (noise - x)) ** 2)

        value, gradient = jax.value_and_grad(loss)(carried.parameters)
        updates, state = optimiser.update(gradient, carried.optimiser_state, carried.parameters)
        parameters = optax.apply_updates(carried.parameters, updates)
        average = jax.tree.map(lambda old, new: old + (1 - DECAY) * (new - old), carried.average, parameters)
        return Carried(parameters, average, state, carried.step + 1), value

    return jax.tree.map(jnp.copy, start), step


def check_step(case: Case, batch: tuple) -> None:
    """Raise unless both loops have the same losses, and move the parameters and their average by the same.

    The parameters are compared under gradient descent, which is linear in the gradient: Adam's first steps divide
    rounding by rounding wherever a gradient is 0 but for it.
    """
    for optimiser in (OPTIMISER, optax.sgd(0.1)):
        states = ours(case, batch, every=1, optimiser=optimiser)
        carried, step = by_hand(case, draws_of_fit=True, optimiser=optimiser)
        for _ in range(3):
            state = next(states)
            carried, value = step(carried, batch)
            np.testing.assert_allclose(state.metrics["loss"], value, rtol=1e-5)
    begun = jax.tree.leaves(eqx.filter(case.network(jax.random.key(0)), eqx.is_inexact_array))
    # The average moves by a thousandth of the parameters' way, and rounds to their last bit all the same.
    compared = {
        "parameters": (state.flow, carried.parameters, 1e-4),
        "average": (state.ema_flow, carried.average, 1e-3),
    }
    for name, (flow, by_hands, tolerance) in compared.items():
        trained = jax.tree.leaves(eqx.filter(flow.network, eqx.is_inexact_array))
        parts = zip(trained, jax.tree.leaves(by_hands), begun, strict=True)
        apart, moved = (sum(squares) ** 0.5 for squares in zip(*(_squares(*part) for part in parts), strict=True))
        if apart > tolerance * moved:
            raise AssertionError(f"The {name} of the loop by hand and of fit part by {apart / moved:.2g} of their way.")


def _squares(got: Array, want: Array, start: Array) -> tuple[float, float]:
    """The squared distances from `got` to `want` and to `start`."""
    return float(jnp.sum((got - want) ** 2)), float(jnp.sum((got - start) ** 2))


def torch_loop(case: Case, batch: tuple, steps: int) -> Callable[[], object]:
    """`steps` steps of torchcfm's training loop with the same network."""
    network = case.network(jax.random.key(0))
    model = twin(network).requires_grad_(True)
    x, labels = (None if part is None else torch.from_numpy(np.array(part)) for part in batch)
    conditions = () if labels is None else (labels.long(),)
    t = np.linspace(0.1, 0.9, len(x)).astype(np.float32)
    output = jax.vmap(network)(jnp.asarray(t), batch[0], *([] if labels is None else [batch[1]]))
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(t), x, *conditions), output, atol=1e-4)
    matcher = ConditionalFlowMatcher(sigma=0.0)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)

    def run() -> None:
        for _ in range(steps):
            optimiser.zero_grad()
            t, x_t, target = matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
            loss = torch.mean((model(t, x_t, *conditions) - target) ** 2)
            loss.backward()
            optimiser.step()

    return run


def step_part(options: argparse.Namespace) -> str:
    rows = []
    for name, case in options.cases.items():
        batch = data(case)
        check_step(case, batch)
        start, step = by_hand(case, draws_of_fit=False)

        def loop_by_hand(start: Carried = start, step: Callable = step, batch: tuple = batch) -> Callable[[], None]:
            carried = jax.tree.map(jnp.copy, start)

            def run() -> None:
                nonlocal carried
                for _ in range(options.steps):
                    carried, value = step(carried, batch)
                jax.block_until_ready(value)

            return run  # noqa: B023

        def loop_of_fit(case: Case = case, batch: tuple = batch) -> Callable[[], object]:
            states = ours(case, batch, every=options.steps)
            return lambda: next(states)

        competitors: dict[str, Callable[[], Callable[[], object]]] = {"fit": loop_of_fit, "by hand": loop_by_hand}
        threads = 0
        if torch is not None:
            run = torch_loop(case, batch, options.steps)
            threads = best_threads(run)
            competitors["torchcfm"] = lambda run=run: run
        # Each round in memory of its own: where the arrays come to lie makes some percent, for as long as a loop lasts.
        times: dict[str, list[float]] = {kind: [] for kind in competitors}
        for number in range(options.rounds):
            order = list(competitors)
            order = order[number % len(order) :] + order[: number % len(order)]
            for kind, seconds in interleaved(
                {kind: competitors[kind]() for kind in order}, rounds=1, least=0.0
            ).items():
                times[kind] += seconds
        row = [name, *(f"{1e3 * statistics.median(seconds) / options.steps:.2f}" for seconds in times.values())]
        over_hand = ratio(times, "fit", "by hand")
        row.append(f"{over_hand:.3f}" if over_hand <= 1.02 else f"**{over_hand:.3f}**")
        if torch is not None:
            over_torch = ratio(times, "fit", "torchcfm")
            row[3] += f" ({threads} threads)"
            row.append(f"{over_torch:.2f}" if over_torch < 1 else f"**{over_torch:.2f}**")
        print(*row, sep=" | ", flush=True)
        rows.append(row)
    peer = [] if torch is None else ["torchcfm"]
    header = ["network", "fit", "by hand", *peer, "fit / by hand", *(f"fit / {name}" for name in peer)]
    return STEP.format(rounds=options.rounds, steps=options.steps) + "\n" + markdown(header, rows)


def best_threads(run: Callable[[], object]) -> int:
    """The number of PyTorch's threads with which `run` is quickest, which is then set."""
    spent = {}
    for threads in {1, len(os.sched_getaffinity(0))}:
        torch.set_num_threads(threads)
        times = interleaved({"run": run}, rounds=3, least=0.0)["run"]
        spent[threads] = statistics.median(times)
    best = min(spent, key=spent.__getitem__)
    torch.set_num_threads(best)
    return best


# --- couplings -------------------------------------------------------------------------------------


def coupling_part(options: argparse.Namespace) -> str:
    num, dim = (16, 4) if options.smoke else (256, 64)
    rng = np.random.default_rng(0)
    x, z = (rng.normal(size=(num, dim)).astype(np.float32) for _ in range(2))
    epsilon = 0.05 * float(np.mean(((x[:, None] - z[None]) ** 2).sum(-1)))
    settings: dict[str, tuple[fs.couplings.AbstractCoupling, dict]] = {
        "exact": (fs.couplings.Assignment(), {"method": "exact"}),
        "Sinkhorn, a permutation": (fs.couplings.Sinkhorn(epsilon), {"method": "sinkhorn", "reg": epsilon}),
        "Sinkhorn, with replacement": (
            fs.couplings.Sinkhorn(epsilon, replace=True),
            {"method": "sinkhorn", "reg": epsilon},
        ),
    }
    key, points = jax.random.key(0), (jnp.asarray(x), jnp.asarray(z))
    order = eqx.filter_jit(lambda coupling, key, x, z: coupling.order(key, x, z))
    rows = []
    for name, (coupling, theirs) in settings.items():
        cost = float(np.mean(((x - z[np.asarray(order(coupling, key, *points))]) ** 2).sum(-1)))
        competitors = {"ours": lambda coupling=coupling: jax.block_until_ready(order(coupling, key, *points))}
        row = [name, f"{cost:.2f}"]
        if torch is not None:
            sampler = OTPlanSampler(**theirs)
            tensors = torch.from_numpy(x), torch.from_numpy(z)
            pairs = [a.numpy() for a in sampler.sample_plan(*tensors)]
            their_cost = float(np.mean(((pairs[0] - pairs[1]) ** 2).sum(-1)))
            # Theirs draws pairs with replacement, so that of an exact plan it has other pairs each time.
            if abs(their_cost / cost - 1) > 0.15:
                raise AssertionError(f"The pairs of {name} cost {cost:.3f}, those of torchcfm {their_cost:.3f}.")
            row.append(f"{their_cost:.2f}")
            competitors["torchcfm"] = lambda sampler=sampler, tensors=tensors: sampler.sample_plan(*tensors)
        times = interleaved(competitors, rounds=options.rounds)
        row += [f"{1e3 * statistics.median(seconds):.2f}" for seconds in times.values()]
        if torch is not None:
            over = ratio(times, "ours", "torchcfm")
            row.append(f"{over:.2f}" if over <= 1 else f"**{over:.2f}**")
        print(*row, sep=" | ", flush=True)
        rows.append(row)
    header = ["plan", "cost", "ours"] if torch is None else ["plan", "cost", "torchcfm's", "ours", "torchcfm", "ratio"]
    return COUPLING.format(rounds=options.rounds, num=num, dim=dim) + "\n" + markdown(header, rows)


PARTS: dict[str, Callable[[argparse.Namespace], str]] = {"step": step_part, "coupling": coupling_part}


def main() -> None:
    parser = page_options(__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=100, help="of a loop, the default interval of `fit`")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="ot")
    options.cases = CASES
    if options.smoke:
        options.cases, options.steps, options.rounds = SMALL, 5, 3
    show("training", HEADING, [PARTS[part](options) for part in options.parts], options)


if __name__ == "__main__":
    main()
