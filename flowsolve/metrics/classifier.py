r"""A classifier two-sample test: how often a network that was trained to tells one law from the other.

The examples of both batches are split into folds; of each fold in turn a network learns, on all others, the logit
$f \approx \ln p_b/p_a$, and answers for the fold. With the shares $s_a$, $s_b$ of answers that are right,

$$\mathrm{accuracy} = (s_a + s_b)/2, \qquad
  \mathrm{standard\ error} = \frac{1}{2} \sqrt{s_a (1 - s_a)/n_a + s_b (1 - s_b)/n_b}.$$

The accuracy is 1/2 for one law, whatever the sizes of the batches, and at most 1/2 + TV/2 with the total variation TV
between two.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from .._checks import check, check_count, check_key
from .._numerics import as_scalar
from .._types import PRNGKey, Scalar, ScalarLike
from ._rows import Batch, Rows, rows_of

__all__ = ["TwoSampleTest", "classifier_two_sample"]


class TwoSampleTest(NamedTuple):
    """The accuracy on held-out examples, 0.5 where the laws are the same, and its standard error."""

    accuracy: Scalar
    standard_error: Scalar


def classifier_two_sample(
    a: Batch,
    b: Batch,
    *,
    key: PRNGKey,
    folds: int = 5,
    width: int = 64,
    depth: int = 2,
    steps: int = 1000,
    batch_size: int = 128,
    learning_rate: ScalarLike = 1e-3,
) -> TwoSampleTest:
    """The classifier two-sample test (C2ST) of a multilayer perceptron, cross-validated; see the top of this module.

    Numbers are standardised over both batches together. All folds are trained at once, in one compiled loop.

    **Arguments:** `a`, `b`: batches of at least `folds` examples each; `key`: for the folds, the networks and their
    batches; `width`, `depth`: of the networks' hidden layers; `steps`: of AdamW, whose `learning_rate` falls to 0 along
    a cosine; `batch_size`: examples of each law in a step, drawn with replacement.

    **Returns:** `TwoSampleTest(accuracy, standard_error)`. One law gives 0.5 within its error; a number above says that
    the laws differ, a number near 0.5 that this network did not see it.

    **Raises:** `ValueError` for batches that do not go together, numbers that are not finite, or too few examples.

    Source: Lopez-Paz & Oquab (2017), arXiv 1610.06545. Deviation: cross-validated, and both laws count the same.
    """
    key = check_key(key, "classifier_two_sample")
    folds = check_count(folds, "classifier_two_sample got folds", least=2)
    counts = {"width": width, "depth": depth, "steps": steps, "batch_size": batch_size}
    for name, count in counts.items():
        check_count(count, f"classifier_two_sample got {name}")
    rate = as_scalar(learning_rate)
    rate = check(rate, ~(rate > 0), "classifier_two_sample got a learning_rate that is not positive.")
    rows = rows_of(a, b, "classifier_two_sample", least=folds)
    return _test(*rows, key, rate, folds, width, depth, steps, batch_size)


@eqx.filter_jit
def _test(
    a: Rows,
    b: Rows,
    key: PRNGKey,
    learning_rate: Scalar,
    folds: int,
    width: int,
    depth: int,
    steps: int,
    batch_size: int,
) -> TwoSampleTest:
    key_a, key_b, key_folds = jax.random.split(key, 3)
    both = jnp.concatenate([a, b])
    mean, std = jnp.mean(both, axis=0)[None], jnp.std(both, axis=0)[None]
    # A number that never changes tells nothing.
    a, b = (jnp.where(std > 0, (rows - mean) / jnp.where(std > 0, std, 1), 0) for rows in (a, b))
    laws = _Folded(jax.random.permutation(key_a, a), folds), _Folded(jax.random.permutation(key_b, b), folds)
    schedule = optax.cosine_decay_schedule(1.0, steps)
    optimiser = optax.chain(optax.adamw(learning_rate, weight_decay=_WEIGHT_DECAY), optax.scale_by_schedule(schedule))

    def one_fold(fold: Int[Array, ""], key: PRNGKey) -> tuple[Scalar, Scalar]:
        key_network, key_steps = jax.random.split(key)
        network = eqx.nn.MLP(a.shape[1], "scalar", width, depth, key=key_network)
        parameters, static = eqx.partition(network, eqx.is_inexact_array)

        def logits(parameters, rows: Rows) -> Float[Array, " num"]:
            return jax.vmap(eqx.combine(parameters, static))(rows)

        def loss(parameters, key: PRNGKey) -> Scalar:
            # log(1 + e^f) for examples of the first law, log(1 + e^-f) for those of the second.
            levels = jax.random.uniform(key, (2, batch_size))
            terms = [
                jax.nn.softplus(sign * logits(parameters, law.train(fold, u)))
                for sign, law, u in zip((1, -1), laws, levels, strict=True)
            ]
            return jnp.mean(jnp.concatenate(terms))

        def step(carry, index: Int[Array, ""]):
            parameters, state = carry
            gradient = jax.grad(loss)(parameters, jax.random.fold_in(key_steps, index))
            # Optax promotes dtypes on its own, which a user may have forbidden.
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                updates, state = optimiser.update(gradient, state, parameters)
            return (eqx.apply_updates(parameters, updates), state), None

        (parameters, _), _ = jax.lax.scan(step, (parameters, optimiser.init(parameters)), jnp.arange(steps))
        hits = []
        for sign, law in zip((-1, 1), laws, strict=True):
            held_out, present = law.held_out(fold)
            # Half an answer where the network has none.
            right = 0.5 * (1 + jnp.sign(sign * logits(parameters, held_out)))
            hits.append(jnp.sum(jnp.where(present, right, 0)))
        return hits[0], hits[1]

    hits = jax.vmap(one_fold)(jnp.arange(folds), jax.random.split(key_folds, folds))
    shares = [jnp.sum(right) / rows.shape[0] for right, rows in zip(hits, (a, b), strict=True)]
    variance = sum(share * (1 - share) / rows.shape[0] for share, rows in zip(shares, (a, b), strict=True))
    return TwoSampleTest((shares[0] + shares[1]) / 2, jnp.sqrt(variance) / 2)


_WEIGHT_DECAY = 1e-2


class _Folded(eqx.Module):
    """Rows in folds of nearly one size: fold f holds those from floor(f n/folds) up to the next fold's."""

    rows: Rows
    folds: int = eqx.field(static=True)

    def _bounds(self, fold: Int[Array, ""]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        starts = jnp.asarray([f * self.rows.shape[0] // self.folds for f in range(self.folds + 1)])
        return starts[fold], starts[fold + 1]

    def train(self, fold: Int[Array, ""], levels: Float[Array, " batch"]) -> Rows:
        """Rows that are not in the fold, at levels in [0, 1) of their number."""
        num = self.rows.shape[0]
        start, end = self._bounds(fold)
        others = num - (end - start)
        # A product that is rounded up must not reach the fold.
        places = jnp.minimum((levels * others.astype(levels.dtype)).astype(others.dtype), others - 1)
        return self.rows[(end + places) % num]

    def held_out(self, fold: Int[Array, ""]) -> tuple[Rows, Array]:
        """The rows of the fold, filled up to the size of the largest, and which are of it."""
        num = self.rows.shape[0]
        start, end = self._bounds(fold)
        places = start + jnp.arange(-(-num // self.folds))
        return self.rows[jnp.minimum(places, num - 1)], places < end
