r"""Brownian paths: where the noise of a stochastic solve comes from.

All run in the increasing clock s = -t and are shaped like one example. `StepNoise` draws per step of a fixed grid,
`TreeNoise` is one path for steps of any length; a solver reads either through a `NoiseSource`.
"""

import dataclasses
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._numerics import as_scalar, linear_combination, normal_like
from ._types import Like, PRNGKey, Scalar, ScalarLike, State

__all__ = ["NoiseSource", "StepNoise", "TreeNoise"]


class StepNoise(diffrax.AbstractBrownianPath):
    """Independent Brownian increments for the steps of a fixed grid.

    The increment over a step is drawn from the key and the number of the step, so it is the same whatever the batch
    and whatever rounding did to the times, and a backward pass sees the noise of the forward pass: as cheap as
    `diffrax.UnsafeBrownianPath`, but open to every adjoint. Not for adaptive steps: increments over overlapping
    intervals are independent of each other.

    **Arguments:** `shape`: one example (arrays or their `jax.ShapeDtypeStruct`); `key`: a typed key; `ts`: the grid in
    the increasing clock; `levy_area`: what the solver needs beside the increment W, as in Diffrax:
    H ~ N(0, h/12), K ~ N(0, h/720).
    """

    shape: Like
    key: PRNGKey
    ts: Float[Array, " n"]
    levy_area: type = eqx.field(static=True)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, shape: Like, key: PRNGKey, ts: Float[Array, " n"], levy_area: type = diffrax.BrownianIncrement):
        self.shape = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shape)
        if len(ts) > 2**17:
            raise ValueError(
                f"StepNoise got a grid of {len(ts) - 1} steps, but tells {2**17 - 1} apart: take fewer, or a "
                "diffrax.VirtualBrownianTree."
            )
        self.key = key
        self.ts = ts
        self.levy_area = levy_area

    @property
    def t0(self) -> Scalar:
        """The start of the grid."""
        return self.ts[0]

    @property
    def t1(self) -> Scalar:
        """The end of the grid."""
        return self.ts[-1]

    def evaluate(self, t0: ScalarLike, t1: ScalarLike | None = None, left: bool = True, use_levy: bool = False) -> Any:
        """The increment over [t0, t1], with its Levy area if `use_levy`."""
        del left
        if t1 is None:
            raise ValueError("StepNoise gives increments over steps: pass both ends, evaluate(t0, t1).")
        length = as_scalar(t1) - as_scalar(t0)
        number = self._number(as_scalar(t0), as_scalar(t1))

        def draw(kind: int, variance: float) -> State:
            return linear_combination((jnp.sqrt(length * variance),), (self._normal(kind, number),))

        increment = draw(0, 1.0)
        if not use_levy:
            return increment
        dt = jax.tree.map(lambda leaf: length.astype(leaf.dtype), self.shape)
        if self.levy_area is diffrax.BrownianIncrement:
            return diffrax.BrownianIncrement(dt=dt, W=increment)
        if self.levy_area is diffrax.SpaceTimeLevyArea:
            return diffrax.SpaceTimeLevyArea(dt=dt, W=increment, H=draw(1, 1 / 12))
        return diffrax.SpaceTimeTimeLevyArea(dt=dt, W=increment, H=draw(1, 1 / 12), K=draw(2, 1 / 720))

    def normal(self, step: Int[Array, ""]) -> State:
        """The increment over a whole step of the grid, by its number, in unit variance."""
        return self._normal(0, _interval(step, jnp.zeros_like(step), jnp.full_like(step, 64)))

    def extra_normal(self, t0: ScalarLike, t1: ScalarLike, number: int | Int[Array, ""]) -> State:
        """Standard normal noise number `number` of a step, independent of its increment and of other numbers."""
        key = self._key(3, self._number(as_scalar(t0), as_scalar(t1)))
        return normal_like(jax.random.fold_in(key, number), self.shape)

    def _normal(self, kind: int, number: Int[Array, ""]) -> State:
        """Standard normal noise of the interval of this number: of kind 0 for W, 1 for H, 2 for K."""
        leaves, structure = jax.tree.flatten(self.shape)
        noise = [
            jax.random.normal(self._key(4 * place + kind, number), leaf.shape, leaf.dtype)
            for place, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, noise)

    def _key(self, use: int, number: Int[Array, ""]) -> PRNGKey:
        """A key for one of several uses of the noise over the interval of this number, which is below 2^31."""
        # What does not depend on the step is made once, before the loop, and for the use of most solvers not at all.
        key = self.key if use == 0 else jax.random.fold_in(self.key, 2**31 + use)
        return jax.random.fold_in(key, number)

    def _number(self, t0: Scalar, t1: Scalar) -> Int[Array, ""]:
        """A number for [t0, t1], from its grid cell and, to 1/64, its place inside the cell."""
        ts = jax.lax.stop_gradient(self.ts)
        t0, t1 = jax.lax.stop_gradient((t0, t1))
        middle = 0.5 * (t0 + t1)
        cell = jnp.clip(jnp.sum(ts <= middle) - 1, 0, ts.shape[0] - 2)
        start, end = ts[cell], ts[cell + 1]

        def place(t: Scalar) -> Int[Array, ""]:
            return jnp.round(64 * (t - start) / (end - start)).astype(int) % 128

        return _interval(cell, place(t0), place(t1))


def _interval(cell: Int[Array, ""], start: Int[Array, ""], end: Int[Array, ""]) -> Int[Array, ""]:
    """The number of an interval, from its cell and its two ends in 64ths of it."""
    return (cell * 128 + start) * 128 + end


class TreeNoise(diffrax.AbstractBrownianPath):
    """A `diffrax.VirtualBrownianTree` for any pytree, dictionaries included: one Brownian path for adaptive steps.

    **Arguments:** `t0`, `t1`: the interval in the increasing clock; `tolerance`: the spacing below which the path is
    interpolated; `shape`: one example; `key`: a typed key; `levy_area`: what the solver needs beside the increment.
    """

    tree: diffrax.VirtualBrownianTree
    structure: Any = eqx.field(static=True)
    levy_area: type = eqx.field(static=True)  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        t0: ScalarLike,
        t1: ScalarLike,
        tolerance: ScalarLike,
        shape: Like,
        key: PRNGKey,
        levy_area: type = diffrax.BrownianIncrement,
    ):
        leaves, self.structure = jax.tree.flatten(shape)
        leaves = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        start, end, spacing = as_scalar(t0), as_scalar(t1), as_scalar(tolerance)
        self.tree = diffrax.VirtualBrownianTree(start, end, spacing, leaves, key, levy_area=levy_area)
        self.levy_area = levy_area

    @property
    def t0(self) -> Any:
        """The start of the interval."""
        return self.tree.t0

    @property
    def t1(self) -> Any:
        """The end of the interval."""
        return self.tree.t1

    def evaluate(self, t0: ScalarLike, t1: ScalarLike | None = None, left: bool = True, use_levy: bool = False) -> Any:
        """The increment over [t0, t1], with its Levy area if `use_levy`."""
        increment: Any = self.tree.evaluate(as_scalar(t0), None if t1 is None else as_scalar(t1), left, use_levy)
        if not use_levy:
            return jax.tree.unflatten(self.structure, increment)
        parts = {
            field.name: jax.tree.unflatten(self.structure, getattr(increment, field.name))
            for field in dataclasses.fields(increment)
        }
        return type(increment)(**parts)


class NoiseSource(eqx.Module):
    """The random numbers of a solver that steps through a flow: the Brownian path of its terms, in unit variance."""

    term: diffrax.AbstractTerm

    def normal(self, s0: ScalarLike, s1: ScalarLike) -> State:
        """(W(s1) - W(s0)) / sqrt(s1 - s0), in the clock that the solver is given."""
        start, end = as_scalar(s0), as_scalar(s1)
        # An interval that rounding has closed holds no noise.
        length = jnp.where(end > start, end - start, 1)
        return linear_combination((1 / jnp.sqrt(length),), (self.term.contr(start, end),))

    def step_normal(self, step: Int[Array, ""]) -> State:
        """The same over a whole step of a fixed grid, by its number, see `StepNoise.normal`."""
        return self._step_noise().normal(step)

    def extra_normal(self, s0: ScalarLike, s1: ScalarLike, number: int | Int[Array, ""]) -> State:
        """Standard normal noise of the step beyond its Brownian increment, see `StepNoise.extra_normal`."""
        return self._step_noise().extra_normal(as_scalar(s0), as_scalar(s1), number)

    def _step_noise(self) -> Any:
        control = getattr(getattr(self.term, "term", self.term), "control", None)
        if not hasattr(control, "extra_normal"):
            raise TypeError(
                f"A solver that draws several noises in a step got a Brownian path of type {type(control).__name__}, "
                "but wants brownian.StepNoise, on a fixed grid."
            )
        return control
