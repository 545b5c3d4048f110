r"""Moving averages of a flow's parameters, and any average of them after training.

After step n = 1, 2, ... with parameters theta_n,

$$\bar\theta_n = \beta_n \bar\theta_{n-1} + (1 - \beta_n)\, \theta_n, \qquad \bar\theta_0 = \theta_0,$$

| average | $\beta_n$ | weight of $\theta_k$ in $\bar\theta_n$ |
|---|---|---|
| `Constant` | d | $(1 - d)\, d^{\,n-k}$ |
| `HalfLife` | $2^{-1/\min(h,\, r n)}$ | halves in h steps |
| `PowerFunction` | $(1 - 1/n)^{\gamma+1}$ | $(k/n)^{\gamma+1} - ((k-1)/n)^{\gamma+1}$ |

The average begins with the parameters, so nothing is debiased. `PowerFunction` is named by its relative width, the
standard deviation of k under these weights in units of n,

$$\mathrm{std} = (\gamma + 1)^{1/2}\,(\gamma + 2)^{-1}\,(\gamma + 3)^{-1/2},$$

and it alone can be had for any width after training (`reconstruct`): averages of two widths, stored now and then, span
the others.

Source: Karras et al. (2023), arXiv 2312.02696 (power functions and their reconstruction); Karras et al. (2022), arXiv
2206.00364 (a half-life that grows at first).
"""

import abc
import math
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ._checks import check_count, check_positive, describe, is_concrete
from ._numerics import as_scalar, optional_scalar
from ._types import Scalar, ScalarLike

__all__ = ["AbstractAverage", "Constant", "HalfLife", "PowerFunction", "Snapshot", "reconstruct"]


class AbstractAverage(eqx.Module):
    """A moving average of a flow's parameters, given by the weights 1 - beta_n of what is new."""

    @abc.abstractmethod
    def fresh(self, step: Int[Array, ""]) -> Scalar:
        """1 - beta_n, the weight of the parameters after step n = 1, 2, ...

        It and not the decay, which float32 rounds to a multiple of 6e-8: a large part of the rest at long averages.
        """

    def decay(self, step: Int[Array, ""]) -> Scalar:
        """beta_n, the weight of the average before step n."""
        return 1 - self.fresh(step)

    def updated(self, average: PyTree, parameters: PyTree, step: Int[Array, ""]) -> PyTree:
        """The average after step n, from that before it and the parameters after it."""
        fresh = self.fresh(step)
        # In this form the average of a constant is the constant to the last bit.
        return jax.tree.map(lambda old, new: old + fresh.astype(old.dtype) * (new - old), average, parameters)


class Constant(AbstractAverage):
    """The exponential average of one decay d in [0, 1); its start keeps the weight d^n.

    **Arguments:** `d`: the decay; kept as `rest`, 1 - d, which is taken before anything is rounded to float32.
    """

    rest: Scalar

    def __init__(self, d: ScalarLike):
        if is_concrete(d) and not 0 <= float(d) < 1:
            raise ValueError(f"A moving average got the decay {float(d):g}, but wants 0 <= decay < 1.")
        self.rest = as_scalar(1 - d)

    def fresh(self, step: Int[Array, ""]) -> Scalar:
        del step
        return self.rest


class HalfLife(AbstractAverage):
    """The exponential average in which a weight halves in h steps.

    **Arguments:** `steps`: h > 0; `ramp_up`: None, or r > 0, with which the half-life is at most r times the steps
    done, so that the first parameters are forgotten early.

    Source: Karras et al. (2022), arXiv 2206.00364, where h counts images and r = 0.05.
    """

    steps: Scalar = eqx.field(converter=as_scalar)
    ramp_up: Scalar | None = eqx.field(default=None, converter=optional_scalar)

    def __check_init__(self):
        check_positive(self, "steps")
        if self.ramp_up is not None:
            check_positive(self, "ramp_up")

    def fresh(self, step: Int[Array, ""]) -> Scalar:
        half_life = self.steps
        if self.ramp_up is not None:
            half_life = jnp.minimum(half_life, self.ramp_up * step.astype(half_life.dtype))
        return -jnp.expm1(-math.log(2) / half_life)


class PowerFunction(AbstractAverage):
    """The average whose weights follow k^gamma, so that its width is the same share of any length of training.

    **Arguments:** `std`: the relative width, a number in (0, 0.2886), e.g. 0.05 or 0.1.

    Source: Karras et al. (2023), arXiv 2312.02696.
    """

    std: float = eqx.field(static=True)
    gamma: Scalar

    def __init__(self, std: float):
        self.std = std
        self.gamma = as_scalar(_exponent(std))

    def fresh(self, step: Int[Array, ""]) -> Scalar:
        # 1 - (1 - 1/n)^(gamma + 1); at n = 1 the logarithm is -inf and the weight 1.
        return -jnp.expm1((self.gamma + 1) * jnp.log1p(-1 / step.astype(self.gamma.dtype)))


def _exponent(std: float) -> float:
    """gamma of a relative width, the positive root of a cubic."""
    if not isinstance(std, float | int) or not 0 < std < _WIDEST:
        raise ValueError(
            f"PowerFunction got std = {std!r}, but wants a number with 0 < std < {_WIDEST:.4f}: the width of an "
            "average in units of the length of training, such as 0.05."
        )
    square = std**-2.0
    return float(np.roots([1, 7, 16 - square, 12 - square]).real.max())


#: The width of gamma = 0, the plain mean of all parameters.
_WIDEST = 12**-0.5


class Snapshot(NamedTuple):
    """A stored average of a power function: its relative width, the step it was stored after, and its parameters."""

    std: float
    step: int
    parameters: PyTree


def reconstruct(snapshots: Sequence[Snapshot], *, std: float, step: int | None = None) -> PyTree:
    """The power-function average of any width, from stored ones of other widths and steps.

    It is the combination of the snapshots, with weights of sum 1, whose weight over the steps is nearest, in the least
    squares sense, to that of the wanted average.

    **Arguments:** `snapshots`: two or more, best of two widths (0.05 and 0.1) every few percent of training; `std`: the
    relative width that is wanted; `step`: after which step, from 1 to that of the last snapshot, which is the default.

    **Returns:** parameters, like those of a snapshot, combined in float64 on the host.

    **Raises:** `ValueError` for no snapshots, trees that differ, or a step of which the snapshots know nothing.

    Source: Karras et al. (2023), arXiv 2312.02696, appendix C. Deviation: the weights sum to 1, so that parameters
    which did not change come out as they are.
    """
    if not snapshots:
        raise ValueError("reconstruct got no snapshots, but combines stored ones: keep state.averages now and then.")
    first = describe(snapshots[0].parameters)
    for snapshot in snapshots:
        if describe(snapshot.parameters) != first:
            raise ValueError(
                f"reconstruct got a snapshot of {describe(snapshot.parameters)} beside one of {first}, but wants the "
                "parameters of one flow."
            )
        if snapshot.step < 1:
            raise ValueError(f"reconstruct got a snapshot of step = {snapshot.step}, but wants steps of at least 1.")
    last = max(snapshot.step for snapshot in snapshots)
    step = last if step is None else check_count(step, "reconstruct got step", most=last)
    weights = _combination([(_exponent(s.std), s.step) for s in snapshots], (_exponent(std), step))

    def combine(*leaves: Array | np.ndarray) -> np.ndarray:
        total = sum(w * np.asarray(leaf, np.float64) for w, leaf in zip(weights, leaves, strict=True))
        return np.asarray(total, leaves[0].dtype)

    return jax.tree.map(combine, *(snapshot.parameters for snapshot in snapshots))


def _combination(stored: list[tuple[float, int]], wanted: tuple[float, int]) -> Float[np.ndarray, " stored"]:
    """The weights of profiles (gamma, step) that come nearest to another, with sum 1."""
    count = len(stored)
    # The stationary point of the squared distance under the constraint, with its multiplier as the last unknown.
    matrix = np.ones((count + 1, count + 1))
    matrix[:count, :count] = [[_overlap(a, b) for b in stored] for a in stored]
    matrix[count, count] = 0
    right = np.append([_overlap(a, wanted) for a in stored], 1)
    # In units in which the profiles have norm 1; nearly the same profiles are left to least squares.
    scale = np.append(np.sqrt(np.diagonal(matrix)[:count]), 1)
    solution, *_ = np.linalg.lstsq(matrix / np.outer(scale, scale), right / scale, rcond=None)
    return (solution / scale)[:count]


def _overlap(a: tuple[float, int], b: tuple[float, int]) -> float:
    r"""The inner product over time of two profiles $(\gamma + 1)\, s^\gamma / n^{\gamma + 1}$ on [0, n]."""
    (gamma_short, short), (gamma_long, long) = sorted((a, b), key=lambda profile: profile[1])
    shape = (gamma_short + 1) * (gamma_long + 1) / (gamma_short + gamma_long + 1)
    return shape * math.exp(gamma_long * math.log(short / long)) / long
