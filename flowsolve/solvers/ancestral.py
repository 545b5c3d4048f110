r"""DDPM's ancestral step, with the variance of one's choice.

From t to s < t, with $\hat x_0 = E[x_0|x_t]$, $\hat\epsilon = E[\epsilon|x_t]$ and
$\rho = \alpha_t \sigma_s/(\alpha_s \sigma_t)$,

$$x_s = \alpha_s \hat x_0 + \sigma_s \rho\, \hat\epsilon + \sqrt{v}\, z$$

| variance | v |
|---|---|
| `PosteriorVariance` | $\sigma_s^2 (1 - \rho^2)$, of q(x_s given x_t, x_0): DDPM's beta-tilde; as `DDIM(1.0)` |
| `LargeVariance` | $\sigma_t^2 (1 - \rho^2)$, of q(x_t given x_s): DDPM's beta |
| `LearnedVariance` | $\sigma_t^{2\nu} \sigma_s^{2 (1 - \nu)} (1 - \rho^2)$, between the two, with nu from the network |

Onto sigma = 0 no noise is drawn.
"""

import abc
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

from .._checks import check_type, is_concrete, known
from .._numerics import as_scalar, linear_combination
from .._types import Args, Scalar, ScalarLike, State
from ..dynamics import AbstractDynamics, FlowField, ReverseSDE, network_output, unwrap
from ..flow import AbstractFlowWrapper, VarianceFlow
from ..paths import AbstractPath
from .base import AbstractMemorylessSolver, AbstractStochasticSolver, Evaluation
from .interpolation import StepInterpolation

__all__ = ["AbstractVariance", "Ancestral", "LargeVariance", "LearnedVariance", "PosteriorVariance"]


class AbstractVariance(eqx.Module):
    """A rule for the variance of the ancestral step."""

    @abc.abstractmethod
    def output_and_interpolation(
        self, field: FlowField, t: Scalar, x: State, args: Args
    ) -> tuple[State, State | Scalar]:
        """The network's output, and nu: 0 for the posterior's variance, 1 for the large one."""


class PosteriorVariance(AbstractVariance):
    """The variance of x_s given x_t and x_0: right for data that are one point. DDPM's beta-tilde.

    Source: Ho, Jain & Abbeel (2020), arXiv 2006.11239.
    """

    def output_and_interpolation(
        self, field: FlowField, t: Scalar, x: State, args: Args
    ) -> tuple[State, State | Scalar]:
        """nu = 0."""
        return network_output(field.flow, t, x, args), jnp.zeros_like(t)


class LargeVariance(AbstractVariance):
    """The variance of x_t given x_s: right for data that are standard normal. DDPM's beta; for many small steps.

    Source: Ho, Jain & Abbeel (2020), arXiv 2006.11239.
    """

    def output_and_interpolation(
        self, field: FlowField, t: Scalar, x: State, args: Args
    ) -> tuple[State, State | Scalar]:
        """nu = 1."""
        return network_output(field.flow, t, x, args), jnp.ones_like(t)


class LearnedVariance(AbstractVariance):
    """The geometric mean of the two with weights that the network predicts for each element, of a `VarianceFlow`.

    Around a `VarianceFlow` may be wrappers such as guidance: the output is the wrapper's, nu that of the network at
    the wrapper's own `args`, for which it is evaluated once more unless XLA finds that it has been. Those that make
    others of them will not do: `Composed`, and a measurement with `Observed`.

    Source: Nichol & Dhariwal (2021), arXiv 2102.09672.
    """

    def output_and_interpolation(
        self, field: FlowField, t: Scalar, x: State, args: Args
    ) -> tuple[State, State | Scalar]:
        """nu, from the same evaluation where no wrapper is around the network."""
        inner = field.flow
        while isinstance(inner, AbstractFlowWrapper):
            inner = inner.flow
        if not isinstance(inner, VarianceFlow):
            raise TypeError(
                f"LearnedVariance got a {type(inner).__name__}, which predicts no variance: make the flow a "
                "flow.VarianceFlow, whose network returns (output, nu), or use PosteriorVariance()."
            )
        output, nu = _output_and_interpolation(inner, t, x, args)
        return (output if inner is field.flow else network_output(field.flow, t, x, args)), nu


@eqx.filter_jit
def _output_and_interpolation(flow: VarianceFlow, t: Scalar, x: State, args: Args) -> tuple[State, State]:
    """Behind its own jit for the same reason as `network_output`."""
    return flow.output_and_interpolation(t, x, args)


class Ancestral(AbstractMemorylessSolver, AbstractStochasticSolver[None]):
    """DDPM's ancestral sampler, one network evaluation a step, on any path and grid.

    **Arguments:** `variance`: `PosteriorVariance()` by default, `LargeVariance()` or `LearnedVariance()`.

    It steps through `ReverseSDE(1.0)` alone; for other noise levels see `DDIM(eta)`. Dense output is linear. Source:
    Ho, Jain & Abbeel (2020), arXiv 2006.11239.
    """

    variance: AbstractVariance = PosteriorVariance()
    evaluations_per_step: ClassVar[int] = 1
    interpolation_cls: ClassVar[type] = StepInterpolation

    def __check_init__(self):
        check_type(self.variance, AbstractVariance, "Ancestral's variance", "an instance such as LargeVariance()")

    @property
    def default_dynamics(self) -> AbstractDynamics:
        """The reverse SDE with eta = 1."""
        return ReverseSDE(1.0)

    def check_dynamics(self, dynamics: AbstractDynamics) -> None:
        """Raise for any other noise level, where it is known."""
        level = dynamics.eta if isinstance(dynamics, ReverseSDE) and dynamics.interval is None else None
        if level is None or (is_concrete(level) and known(level) != 1):
            raise ValueError(
                "Ancestral steps through ReverseSDE(1.0) alone, but was given another equation: leave dynamics out, or "
                "use DDIM() or SDEDPMSolverPP() with it."
            )

    def order(self, terms: diffrax.AbstractTerm) -> int:
        """1, in the weak sense."""
        del terms
        return 1

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: ScalarLike,
        t1: ScalarLike,
        y0: State,
        args: Args,
        solver_state: None,
        made_jump: Any,
    ) -> tuple[State, None, dict[str, Any], None, diffrax.RESULTS]:
        """One step of the module's equation."""
        del solver_state, made_jump
        field, noise, direction = unwrap(terms, "Ancestral")
        assert noise is not None
        path = field.flow.path
        start, target = -direction * as_scalar(t0), -direction * as_scalar(t1)
        output, nu = self.variance.output_and_interpolation(field, start, y0, args)
        kept, _ = path.noise_split(target, start)
        alpha, sigma = path.coefficients(target)
        mean = Evaluation(field.flow, start, y0, output).mixture((alpha, sigma * kept, jnp.ones_like(alpha)))
        y1 = _add_noise(path, start, target, mean, nu, noise.normal(t0, t1))
        return y1, None, {"y0": y0, "y1": y1, "formula": None}, None, diffrax.RESULTS.successful


def _add_noise(
    path: AbstractPath, start: Scalar, target: Scalar, mean: State, nu: State | Scalar, normal: State
) -> State:
    """mean + sigma_t^nu sigma_s^(1 - nu) sqrt(1 - rho^2) z, with nu one number or of the structure of the state."""
    _, fresh = path.noise_split(target, start)
    sigma_from, sigma_to = path.coefficients(start)[1], path.coefficients(target)[1]
    clean = sigma_to == 0
    ratio = jnp.log(sigma_from / jnp.where(clean, 1, sigma_to))

    def scale(nu: Any) -> Any:
        return jnp.where(clean, 0, sigma_to * fresh).astype(nu.dtype) * jnp.exp(nu * ratio.astype(nu.dtype))

    if jax.tree.structure(nu) == jax.tree.structure(0) and jnp.ndim(nu) == 0:
        return linear_combination((1.0, scale(nu)), (mean, normal))
    return jax.tree.map(lambda m, v, z: m + scale(v) * z, mean, nu, normal)
