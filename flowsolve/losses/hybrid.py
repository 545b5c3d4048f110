r"""The loss of a network that predicts the variance of the ancestral step beside its output.

Over one step of a grid, from t to s, the solver `Ancestral(LearnedVariance())` draws from

$$p(x_s|x_t) = N\big(\alpha_s \hat x_0 + \sigma_s \rho\, \hat\epsilon,\; v\big), \qquad
  v = q\,(\sigma_t/\sigma_s)^{2\nu}, \quad q = \sigma_s^2 (1 - \rho^2), \quad
  \rho = \frac{\alpha_t \sigma_s}{\alpha_s \sigma_t} .$$

With $\delta$ the difference of its mean from that of $q(x_s|x_t, x_0)$, whose variance is q, each element has

$$\mathrm{KL}\,(q \,\Vert\, p) = \tfrac12 \left[\ln\frac{v}{q} - 1 + \frac{q + \delta^2}{v}\right] .$$
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Real

from .._checks import check_type, is_concrete, known
from .._numerics import as_scalar, linear_combination
from .._types import Args, PRNGKey, Scalar, ScalarLike, State
from ..flow import AbstractFlow, VarianceFlow
from ..predictions import error_scale
from ..times import Given
from .batch import Aux, mean_of, over_batch
from .regression import Regression, check_source

__all__ = ["Hybrid"]


class Hybrid(eqx.Module):
    r"""A regression loss plus the variational bound, which trains the variance alone.

    $$L = L_\mathrm{simple} + \lambda \sum_t L_t, \qquad L_t = \mathrm{mean}_i\; \mathrm{KL}_i$$

    in nats, with the sum over the n steps of a grid estimated by n times the term of a step drawn at random. In the KL
    the predicted mean is a constant: the network's output is trained by L_simple alone, and nu by the bound.

    **Arguments:**

    - `simple`: L_simple, a `Regression` at the points of the grid that will be sampled on,
      `Regression(times=times.Given(grid(path)))`;
    - `vlb_weight`: lambda >= 0, 0.001 by default.

    Not in the bound: the last step where it ends at sigma = 0, onto which the solver draws no noise.

    **Raises:** `TypeError` for a `simple` at other times and, when it is called, for a flow that is no `VarianceFlow`.

    Source: Nichol & Dhariwal (2021), arXiv 2102.09672. Deviations: the mean over elements, as everywhere here; no
    decoder term L_0.
    """

    simple: Regression
    vlb_weight: Scalar = eqx.field(default=1e-3, converter=as_scalar)

    def __check_init__(self):
        check_type(self.simple, Regression, "simple", "a fs.losses.Regression(times=fs.times.Given(grid(path)))")
        check_type(self.simple.times, Given, "the times of simple", "the points of a grid, fs.times.Given(grid(path))")
        if is_concrete(self.vlb_weight) and not float(known(self.vlb_weight)) >= 0:
            raise ValueError(f"Hybrid got vlb_weight = {float(self.vlb_weight):g}, but wants it >= 0.")

    def one(
        self,
        flow: VarianceFlow,
        x0: State,
        args: Args = None,
        *,
        t: ScalarLike,
        noise: State,
        key: PRNGKey | None = None,
        mask: PyTree[Bool[Array, "..."]] | None = None,
    ) -> Scalar:
        """The loss of one example at a point t of the grid, as `Regression.one`, from one evaluation."""
        t = as_scalar(t)
        x_t = flow.path.interpolate(t, x0, noise)
        output, nu = flow.output_and_interpolation(t, x_t, args, key=key)
        simple = self.simple.of_output(flow, output, x0, t=t, noise=noise, mask=mask)
        times = self._times
        # The nearest point, as the same one may have been rounded otherwise.
        target = times[jnp.minimum(jnp.argmin(jnp.abs(times - t)) + 1, times.size - 1)]
        bound = _divergence(flow, jax.lax.stop_gradient(output), nu, x0, t, target, noise, mask)
        return simple + self.vlb_weight * (times.size - 1) * bound

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
        """The loss of a batch and the terms it is made of, as in `Regression`."""
        check_type(flow, VarianceFlow, "flow", "a fs.flow.VarianceFlow, whose network returns (output, nu)")
        assert isinstance(flow, VarianceFlow)
        check_source(flow, x0, self.simple.coupling)

        def one(x0: State, noise: State, args: Args, t: Scalar, key: PRNGKey, mask: PyTree | None) -> Scalar:
            return self.one(flow, x0, args, t=t, noise=noise, key=key, mask=mask)

        return over_batch(
            one,
            flow.path,
            self.simple.times,
            self.simple.coupling,
            flow.source.sample if self.simple.noise is None else self.simple.noise,
            x0,
            args,
            key=key,
            example_weight=example_weight,
            mask=mask,
            dropout=self.simple.dropout,
        )

    @property
    def _times(self) -> Array:
        assert isinstance(self.simple.times, Given)
        return self.simple.times.ts


def _divergence(
    flow: VarianceFlow,
    output: State,
    nu: State,
    x0: State,
    t: Scalar,
    target: Scalar,
    noise: State,
    mask: PyTree | None,
) -> Scalar:
    """The mean over elements of KL(q(x_s|x_t, x_0), p(x_s|x_t)), s = target; 0 where no noise is drawn."""
    path = flow.path
    kept, fresh = path.noise_split(target, t)
    alpha, sigma = path.coefficients(target)
    # Onto sigma = 0 no noise is drawn, and at the last point of the grid there is no step.
    drawn = (sigma > 0) & (fresh > 0)
    width = jnp.where(drawn, sigma * fresh, 1)
    log_ratio = jnp.log(path.coefficients(t)[1] / jnp.where(drawn, sigma, 1))
    # The error of the mean, in standard deviations of q, from that of the output.
    a, b, c = flow.prediction.coefficients(path, t)
    scale = error_scale(path, t, (a, b), (alpha, sigma * kept, jnp.ones_like(t))) / width
    error = linear_combination((c * scale, -a * scale, -b * scale), (output, x0, noise))

    def element(error: Array, nu: Array) -> Array:
        log_variances = 2 * nu * log_ratio.astype(nu.dtype)
        return 0.5 * (log_variances + jnp.expm1(-log_variances) + jnp.exp(-log_variances) * error**2)

    terms = jax.tree.map(element, error, nu)
    return jnp.where(drawn, mean_of(_itself, jnp.ones_like(t), terms, mask), 0)


def _itself(term: Array) -> Array:
    return term
