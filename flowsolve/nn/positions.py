r"""Where the patches of an image are: positions that are added to tokens, or that turn queries and keys.

The patch in row r and column c of the grid has the angles $\omega_i r$ and $\omega_i c$ with
$\omega_i = \theta^{-i/m}$, $i = 0, \ldots, m - 1$.

| positions | |
|---|---|
| `SincosPositions` | adds $(\sin \omega_i c, \cos \omega_i c, \sin \omega_i r, \cos \omega_i r)_i$, with m = width/4 |
| `RotaryPositions` | turns m pairs of each query and key by $\omega_i r$, m by $\omega_i c$; m = (width of a head)/4 |

After the turn the product of a query and a key depends on the difference of their positions alone. Nothing here trains,
and a grid may have any size. The angles are computed in float64, by NumPy, when a network is traced.
"""

import abc
from typing import TypeAlias

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

__all__ = ["AbstractPositions", "RotaryPositions", "SincosPositions"]

#: cos and sin of the angles of each token, by which it is turned.
Rotation: TypeAlias = tuple[Float[Array, "tokens pairs"], Float[Array, "tokens pairs"]]


def _angles(rows: int, columns: int, count: int, period: float) -> tuple[np.ndarray, np.ndarray]:
    """omega_i r and omega_i c of each patch, row by row, each of shape (tokens, count)."""
    frequencies = period ** (-np.arange(count) / count)
    row, column = (index.reshape(-1, 1) for index in np.mgrid[:rows, :columns])
    return row * frequencies, column * frequencies


class AbstractPositions(eqx.Module):
    """How a network with tokens in a grid is told where they are."""

    @abc.abstractmethod
    def added(self, rows: int, columns: int, width: int, dtype: DTypeLike) -> Float[Array, "tokens width"] | None:
        """What is added to the tokens before the first block, None for nothing."""

    @abc.abstractmethod
    def rotation(self, rows: int, columns: int, head_width: int, dtype: DTypeLike) -> Rotation | None:
        """What turns queries and keys in every block, None for nothing."""


class SincosPositions(AbstractPositions):
    """Fixed sines and cosines of row and column, added to the tokens, whose width must be a multiple of 4.

    **Arguments:** `period`: theta; the longest period is just below 2 pi theta patches.

    Source: Vaswani et al. (2017), arXiv 1706.03762; in two dimensions Dosovitskiy et al. (2020), arXiv 2010.11929,
    appendix D, in the order of Peebles & Xie (2022), arXiv 2212.09748: the column first.
    """

    period: float = eqx.field(static=True, default=10_000.0)

    def added(self, rows: int, columns: int, width: int, dtype: DTypeLike) -> Float[Array, "tokens width"]:
        """The table, a row for each token."""
        if width % 4:
            raise ValueError(f"SincosPositions got a width of {width}, but wants a multiple of 4.")
        row, column = _angles(rows, columns, width // 4, self.period)
        return jnp.asarray(np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], -1), dtype)

    def rotation(self, rows: int, columns: int, head_width: int, dtype: DTypeLike) -> None:
        """None: these positions turn nothing."""


class RotaryPositions(AbstractPositions):
    """Queries and keys turned by their row and column: attention sees differences of positions alone.

    **Arguments:** `period`: theta. The width of a head must be a multiple of 4.

    Source: Su et al. (2021), arXiv 2104.09864; in two dimensions, half the pairs for each axis, Heo et al. (2024),
    arXiv 2403.13298, with their period of 100.
    """

    period: float = eqx.field(static=True, default=100.0)

    def added(self, rows: int, columns: int, width: int, dtype: DTypeLike) -> None:
        """None: these positions add nothing."""

    def rotation(self, rows: int, columns: int, head_width: int, dtype: DTypeLike) -> Rotation:
        """cos and sin of all angles: those of the row, then those of the column."""
        if head_width % 4:
            raise ValueError(f"RotaryPositions got heads of width {head_width}, but wants a multiple of 4.")
        angles = np.concatenate(_angles(rows, columns, head_width // 4, self.period), -1)
        return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


def rotate(heads: Float[Array, "tokens heads width"], rotation: Rotation) -> Float[Array, "tokens heads width"]:
    """Every pair (x_i, x_{i + width/2}) of every head turned by the i-th angle of its token."""
    cos, sin = (part[:, None] for part in rotation)
    first, second = jnp.split(heads, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)
