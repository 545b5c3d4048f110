r"""Sampling under a measurement by particles: guided draws, weighted so that they are right as their number grows.

The flow's own ancestral chain from t_noise to t_data draws, with $\rho$ the part of the noise that is kept,

$$x_s \sim N(m, v^2 I), \qquad m = \frac{\sigma_s \rho}{\sigma_t} x_t + \alpha_s (1 - \rho^2) D(x_t), \qquad
v = \sigma_s \sqrt{1 - \rho^2} .$$

Under a measurement y each particle draws from the chain moved by $c\,\delta$, with $\delta$ what a posterior flow adds
to D and $c = \rho\, \alpha_s (1 - \rho^2)$, and is weighted by what that changes, with $\psi_t$ the flow's
approximation of p(y|x_t):

$$w_s = w_t\, \frac{N(x_s; m, v^2 I)}{N(x_s; m + c\, \delta, v^2 I)}\, \frac{\psi_s(x_s)}{\psi_t(x_t)}, \qquad
\psi = p(y|x_0) \text{ at the end} .$$

Where the weights have become uneven the particles are drawn anew from them. For any guidance the weighted particles
tend to the exact law of the chain's data given y; the better the guidance, the fewer are needed. The chain's data tends
to the flow's as the steps get smaller.

Source: Wu et al. (2023), "Practical and asymptotically exact conditional sampling in diffusion models" (the twisted
diffusion sampler), arXiv 2306.17775. Deviation: there $c = \alpha_s (1 - \rho^2)$. The chain's law of x_s, with D for
the data, is narrower than the flow's, so that with large steps this moves too far and the weights have no variance; the
factor rho, which is 1 for small steps, moves by the geometric mean of that and of what would be right where D follows
x_t entirely. (Six steps on a Gaussian: 0.2% of the particles effective without it, 56% with it.)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._checks import check, check_count, check_key, check_state, check_type, known
from ._numerics import as_scalar, linear_combination, normal_like, state_like, tree_dot
from ._settings import Settings, draw_prior, settle
from ._types import Args, Like, PRNGKey, Scalar, ScalarLike, State
from .grids import AbstractGrid, VPPower
from .posterior import AbstractPosterior
from .predictions import Data, combine
from .solvers import Ancestral

__all__ = ["Particles", "sample"]


class Particles(eqx.Module):
    """Weighted draws of the data given a measurement."""

    #: One example in each row.
    x: State
    #: ln of their weights, which sum to 1.
    log_weights: Float[Array, " num"]
    #: ln of an unbiased estimate of the mean of exp(-|y - A(x_0)|^2/2), in the metric of the noise: the density of y
    #: but for the normaliser of the noise.
    log_evidence: Scalar

    @property
    def effective_number(self) -> Scalar:
        """1 over the sum of the squared weights: as many independent draws are worth as much."""
        return _effective_number(self.log_weights)

    def draw(self, key: PRNGKey, num: int) -> State:
        """`num` particles drawn by their weights, equally likely (and some of them the same)."""
        chosen = _systematic(check_key(key, "drawing particles"), self.log_weights, check_count(num, "draw got num"))
        return jax.tree.map(lambda leaf: leaf[chosen], self.x)


def sample(
    flow: AbstractPosterior,
    like: Like,
    *,
    num: int,
    key: PRNGKey,
    args: Args = None,
    grid: AbstractGrid | None = None,
    resample_below: ScalarLike = 0.5,
) -> Particles:
    """`num` weighted particles of the data given ONE measurement; for several measurements, `jax.vmap`.

    **Arguments:**

    - `flow`: a posterior flow, whose measurement has noise: `MMPS(flow, measurement)`, `PiGDM` or `DPS`;
    - `like`: one example's shape and dtype; `num`: how many particles, all in memory at once; `key`: a typed key;
    - `args`: those of the flow for one example, the same for all particles;
    - `grid`: the steps of the chain, `grids.VPPower(100)` by default. One evaluation of the flow a step, and one more;
    - `resample_below`: particles are drawn anew where their effective number falls below this fraction of `num`; 0 for
      never.

    **Returns:** `Particles`. Means are `jnp.exp(log_weights) @ x`.

    **Raises:** `TypeError` for a flow without a measurement, `ValueError` for a measurement without noise.
    """
    check_type(flow, AbstractPosterior, "flow", "a posterior flow such as fs.posterior.MMPS(flow, measurement)")
    flow.measurement.check_noisy("particles.sample")
    check_state(like, "like")
    key = check_key(key, "particles.sample")
    num = check_count(num, "particles.sample got num")
    fraction = as_scalar(resample_below)
    fraction = check(
        fraction,
        ~((known(fraction) >= 0) & (known(fraction) <= 1)),
        f"particles.sample got resample_below = {resample_below}, but wants a fraction from 0 to 1.",
    )
    settings = settle(
        flow,
        solver=Ancestral(),
        grid=VPPower(100) if grid is None else grid,
        controller=None,
        dynamics=None,
        t_start=None,
        t_end=None,
        moments=(0.0, 0.0),
    )
    return _sample(flow, state_like(like), num, key, args, settings, fraction)


class _Cloud(eqx.Module):
    """All particles at one time."""

    x: State
    denoised: State
    #: How far the measurement moves the denoised data.
    shift: State
    #: ln psi.
    log_likelihood: Float[Array, " num"]


@eqx.filter_jit
def _sample(
    flow: AbstractPosterior,
    like: Like,
    num: int,
    key: PRNGKey,
    args: Args,
    settings: Settings,
    fraction: Scalar,
) -> Particles:
    path, inner = flow.path, flow.flow
    assert settings.ts is not None
    times = -settings.ts

    def evaluate(t: Scalar, x: State) -> _Cloud:
        def one(x: State) -> tuple[State, State, Scalar]:
            at = flow.guide(t, x, args)
            alpha, sigma = path.coefficients(at.t)
            denoised = combine(inner.mixture_weights(at.t, Data().coefficients(path, at.t)), at.x, at.output)
            return denoised, linear_combination((sigma**2 / alpha,), (at.score,)), at.log_likelihood

        return _Cloud(x, *jax.vmap(one)(x))

    def normals(key: PRNGKey) -> State:
        return jax.vmap(lambda i: normal_like(jax.random.fold_in(key, i), like))(jnp.arange(num))

    def step(carried: tuple[_Cloud, Array, Scalar], inputs: tuple[Scalar, Scalar, PRNGKey]):
        cloud, log_weights, log_evidence = carried
        t, s, key = inputs
        choice_key, noise_key = jax.random.split(key)
        few = _effective_number(log_weights) < fraction * num
        chosen = jnp.where(few, _systematic(choice_key, log_weights, num), jnp.arange(num))
        cloud = jax.tree.map(lambda leaf: leaf[chosen], cloud)
        log_evidence = log_evidence + jnp.where(few, _log_mean(log_weights), 0)
        log_weights = jnp.where(few, 0, log_weights)

        alpha_t, sigma_t = path.coefficients(t)
        alpha_s, sigma_s = path.coefficients(s)
        kept, fresh = path.noise_split(s, t)
        on_data = alpha_s * fresh**2
        scales = (sigma_s * kept / sigma_t, on_data, kept * on_data, sigma_s * fresh)
        noise = normals(noise_key)
        x = linear_combination(scales, (cloud.x, cloud.denoised, cloud.shift, noise))
        # ln N(x; m, v^2) - ln N(x; m + c delta, v^2) = -(c/v) z.delta - (c/v)^2 |delta|^2/2. Onto clean data c = v = 0.
        ratio = jnp.where(sigma_s == 0, 0, alpha_t * fresh / sigma_t)

        def log_ratio(noise: State, shift: State) -> Scalar:
            return as_scalar(-ratio * tree_dot(noise, shift) - 0.5 * ratio**2 * tree_dot(shift, shift))

        moved = evaluate(s, x)
        log_weights = (
            log_weights + jax.vmap(log_ratio)(noise, cloud.shift) + moved.log_likelihood - cloud.log_likelihood
        )
        return (moved, log_weights, log_evidence), None

    start_key, steps_key = jax.random.split(key)
    x = jax.vmap(lambda i: draw_prior(flow, settings, jax.random.fold_in(start_key, i), like))(jnp.arange(num))
    cloud = evaluate(times[0], x)
    keys = jax.random.split(steps_key, len(times) - 1)
    initial = (cloud, cloud.log_likelihood, jnp.zeros_like(times[0]))
    (cloud, log_weights, log_evidence), _ = jax.lax.scan(step, initial, (times[:-1], times[1:], keys))

    y, _ = flow.measurement.given(args)
    exact = jax.vmap(lambda x: flow.measurement.log_likelihood(x, y))(cloud.x)
    log_weights = log_weights + exact - cloud.log_likelihood
    return Particles(cloud.x, jax.nn.log_softmax(log_weights), log_evidence + _log_mean(log_weights))


def _log_mean(log_weights: Float[Array, " num"]) -> Scalar:
    """ln of the mean of the weights."""
    return jax.nn.logsumexp(log_weights) - jnp.log(as_scalar(log_weights.size))


def _effective_number(log_weights: Float[Array, " num"]) -> Scalar:
    return jnp.exp(-jax.nn.logsumexp(2 * jax.nn.log_softmax(log_weights)))


def _systematic(key: PRNGKey, log_weights: Float[Array, " num"], count: int) -> Int[Array, " {count}"]:
    """`count` indices: each of about count times its weight, rounded up or down, from one uniform number."""
    ends = jnp.cumsum(jax.nn.softmax(log_weights))
    points = (jnp.arange(count, dtype=ends.dtype) + jax.random.uniform(key, (), ends.dtype)) / count
    # Rounding must not carry a point past the last end.
    return jnp.searchsorted(ends / ends[-1], jnp.minimum(points, 1 - jnp.finfo(ends.dtype).epsneg), side="right")
