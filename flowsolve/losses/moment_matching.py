r"""Inductive moment matching: a flow map by the laws that it reaches, from one time and from a little earlier.

Jumps to the time r from t and from s, $r \le s < t$, end in one law. A group of M examples with the same times gives

$$y_i = x_{t}^i - (t - r)\, u(t, r, x_t^i), \qquad z_i = \mathrm{sg}\big(x_s^i - (s - r)\, u(s, r, x_s^i)\big)$$

with $x_t^i, x_s^i$ of the same pair of data and noise, and the squared maximum mean discrepancy of both

$$\frac{w(t)}{M^2} \sum_{ij} k(y_i, y_j) + k(z_i, z_j) - 2\, k(y_i, z_j), \qquad
  k(y, z) = \exp\Big(-\frac{\max(\lvert y - z\rvert, \mathrm{eps})}{(t - r)\, d}\Big)$$

with d the number of elements. As s is a little earlier than t, the law at r is matched from ever later times.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_count, check_positive, check_type, is_concrete
from .._features import without_features
from .._numerics import as_scalar, frozen, tree_dot, tree_size
from .._types import Args, PRNGKey, Scalar, ScalarLike, State
from ..couplings import Independent
from ..flowmaps import FlowMap
from ..paths import AbstractPath
from ..times import AbstractTimePairs, TimePairs, Uniform
from .batch import Aux, ConditionDropout, batch_size, check_batch_axis, check_dropout, over_batch
from .regression import check_source

__all__ = ["InductiveMomentMatching"]


class InductiveMomentMatching(eqx.Module):
    r"""Inductive moment matching (IMM): stable training of one to a few steps from scratch, without a teacher.

    **Arguments:**

    - `group`: M, how many examples of a batch share their times, 4 by default; it divides the batch;
    - `times`: the law of (t, r) of a group; t is kept below alpha = 0, where the weight has no limit. None: two uniform
      draws from the first 0.994 of the path;
    - `gap`: s is where the angle arctan(sigma/alpha) is smaller by this part of its range, or r: 2^-12 by default;
    - `bias`, `power`: b and a of the weight
      $w = \tfrac12\, \mathrm{sigmoid}(b - \lambda)\, (-\lambda')\, \alpha^a/(\alpha^2 + \sigma^2)$, with lambda the
      log-SNR;
    - `eps`: the least distance in the kernel, at which its gradient stops;
    - `dropout`: as in `Regression`, for each example of a group.

    Called as `Regression` is, without weights of examples and masks: examples of a group are compared with one another.

    **Raises:** `ValueError` for a batch that is not made of groups.

    Source: Zhou, Ermon & Song (2025), arXiv 2503.07565, for the flow of average velocity (their Euler
    parameterisation). Deviations: their s is a step in sigma/alpha, which has no end where alpha = 0.
    """

    group: int = eqx.field(static=True, default=4)
    times: AbstractTimePairs | None = None
    gap: Scalar = eqx.field(default=2.0**-12, converter=as_scalar)
    bias: Scalar = eqx.field(default=5.0, converter=as_scalar)
    power: Scalar = eqx.field(default=1.0, converter=as_scalar)
    eps: Scalar = eqx.field(default=1e-6, converter=as_scalar)
    dropout: ConditionDropout | None = None

    def __check_init__(self):
        check_count(self.group, "InductiveMomentMatching got group", least=2)
        if self.times is not None:
            check_type(self.times, AbstractTimePairs, "times", "a pair such as fs.times.TimePairs(fs.times.Uniform())")
        if is_concrete(self.power) and not float(self.power) >= 0:
            raise ValueError(f"InductiveMomentMatching got power = {float(self.power):g}, but wants it >= 0.")
        check_positive(self, "gap", "eps")
        check_dropout(self.dropout)

    def one(
        self,
        flow: FlowMap,
        x0: State,
        args: Args = None,
        *,
        t: ScalarLike,
        r: ScalarLike,
        noise: State,
        key: PRNGKey | None = None,
    ) -> Scalar:
        """The loss of one group, whose examples have a leading axis, at its times."""
        t, r = as_scalar(t), as_scalar(r)
        path = flow.path
        s = jnp.clip(self._earlier(path, t), r, t)
        size = tree_size(x0) // self.group

        def jump(flow: FlowMap, start: Scalar) -> State:
            def one(x0: State, noise: State, args: Args, key: PRNGKey | None) -> State:
                return flow.jump(start, r, path.interpolate(start, x0, noise), args, key=key)

            keys = None if key is None else jax.random.split(key, self.group)
            return eqx.filter_vmap(one)(x0, noise, args, keys)

        # Both with the same key: what a network drops is the same in both.
        y = jump(flow, t)
        z = without_features(lambda: jump(frozen(flow), s))
        apart = jnp.where(t > r, t - r, 1)

        def kernel(a: State, b: State) -> Scalar:
            difference = jax.tree.map(jnp.subtract, a, b)
            square = tree_dot(difference, difference)
            # The root has no derivative at 0, where the maximum is the other.
            far = square > (self.eps**2).astype(square.dtype)
            distance = jnp.where(far, jnp.sqrt(jnp.where(far, square, 1)), self.eps.astype(square.dtype))
            return jnp.exp(-as_scalar(distance) / (apart * size))

        def mean_of_pairs(a: State, b: State) -> Scalar:
            return jnp.mean(jax.vmap(lambda a: jax.vmap(lambda b: kernel(a, b))(b))(a))

        discrepancy = mean_of_pairs(y, y) + mean_of_pairs(z, z) - 2 * mean_of_pairs(y, z)
        return jnp.where(t > r, self._weight(path, t) * discrepancy, 0)

    def __call__(self, flow: FlowMap, x0: State, args: Args = None, *, key: PRNGKey) -> tuple[Scalar, Aux]:
        """The loss of a batch and the terms it is made of: `Aux` has one of each group.

        **Raises:** as `Regression`; `TypeError` for a flow that is no `FlowMap`.
        """
        check_type(flow, FlowMap, "flow", "a fs.flowmaps.FlowMap(network, path)")
        check_source(flow, x0, Independent())
        num = batch_size(x0)
        check_batch_axis(args, num)
        if num % self.group:
            raise ValueError(
                f"InductiveMomentMatching got a batch of {num} examples for groups of {self.group}: give a batch whose "
                "size is a multiple of the group."
            )

        def grouped(leaf: Any) -> Any:
            if not eqx.is_array(leaf):
                return leaf
            return leaf.reshape(leaf.shape[0] // self.group, self.group, *leaf.shape[1:])

        def one(x0: State, noise: State, args: Args, times: tuple[Scalar, Scalar], key: PRNGKey, mask: None) -> Scalar:
            del mask
            if self.dropout is not None:
                keys = jax.random.split(jax.random.fold_in(key, 1), self.group)
                args = eqx.filter_vmap(self.dropout)(keys, args)
            return self.one(flow, x0, args, t=times[0], r=times[1], noise=noise, key=key)

        def draw(key: PRNGKey, like: State) -> State:
            return jax.vmap(flow.source.sample)(jax.random.split(key, self.group), like)

        return over_batch(
            one,
            flow.path,
            self._times(flow.path),
            Independent(),
            draw,
            jax.tree.map(grouped, x0),
            jax.tree.map(grouped, args),
            key=key,
            example_weight=None,
            mask=None,
            dropout=None,
        )

    def _times(self, path: AbstractPath) -> AbstractTimePairs:
        if self.times is not None:
            return self.times
        low, high = as_scalar(path.t_data), as_scalar(path.t_noise)
        return TimePairs(Uniform(t_max=low + 0.994 * (high - low)), equal=0.0)

    def _earlier(self, path: AbstractPath, t: Scalar) -> Scalar:
        """The time s whose angle is smaller by `gap` of the path's range."""

        def angle(t: ScalarLike) -> Scalar:
            alpha, sigma = path.coefficients(as_scalar(t))
            return jnp.arctan2(sigma, alpha)

        low, high = angle(path.t_data), angle(path.t_noise)
        found = jnp.maximum(angle(t) - self.gap * (high - low), low)
        return path.time_at(jnp.cos(found), jnp.sin(found))

    def _weight(self, path: AbstractPath, t: Scalar) -> Float[Array, ""]:
        """w(t); of log-SNR' = 2 (alpha'/alpha - sigma'/sigma) the factor 1/alpha is joined with alpha^a."""
        alpha, sigma = path.coefficients(t)
        d_alpha, d_sigma = path.derivatives(t)
        falling = 2 * (d_sigma / sigma - d_alpha / alpha)
        gate = jax.nn.sigmoid(self.bias - path.log_snr(t))
        return 0.5 * gate * falling * alpha**self.power / (alpha**2 + sigma**2)
