r"""Precision and recall by nearest neighbours.

With $B_i$ the closed ball about the real example $x_i$ that reaches its k-th nearest real neighbour, and $B'_j$ that of
the fake example $y_j$ among fakes, n real and m fake examples,

$$\mathrm{precision} = \frac{1}{m} \sum_j 1[y_j \in \textstyle\bigcup_i B_i], \qquad
  \mathrm{recall} = \frac{1}{n} \sum_i 1[x_i \in \textstyle\bigcup_j B'_j],$$
$$\mathrm{density} = \frac{1}{k m} \sum_{i, j} 1[y_j \in B_i], \qquad
  \mathrm{coverage} = \frac{1}{n} \sum_i 1[\text{some } y_j \in B_i].$$
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import check_count
from .._numerics import squared_distances
from .._types import Scalar
from ._rows import Batch, Rows, over_rows, rows_of

__all__ = ["PrecisionRecall", "precision_recall"]


class PrecisionRecall(NamedTuple):
    """How well samples keep to the data (precision, density) and reach all of them (recall, coverage).

    All but the density, whose mean is 1 for samples of the same law, are shares from 0 to 1.
    """

    precision: Scalar
    recall: Scalar
    density: Scalar
    coverage: Scalar


def precision_recall(real: Batch, fake: Batch, *, neighbours: int = 3, block: int = 512) -> PrecisionRecall:
    """Precision, recall, density and coverage of samples; see the top of this module.

    **Arguments:** `real`: data; `fake`: samples; best as many of both, as recall and precision grow with the number of
    balls; `neighbours`: k, where 3 is usual for precision and recall, 5 for density and coverage; `block`: rows at a
    time.

    **Raises:** `ValueError` for batches that do not go together, numbers that are not finite, or no more than
    `neighbours` examples.

    Source: Kynkaanniemi et al. (2019), arXiv 1904.06991 (precision and recall); Naeem et al. (2020), arXiv 2002.09797
    (density and coverage; their code has open balls, which matters for repeated examples only).
    """
    neighbours = check_count(neighbours, "precision_recall got neighbours")
    block = check_count(block, "precision_recall got block")
    rows = rows_of(real, fake, "precision_recall", least=neighbours + 1)
    return _shares(*rows, neighbours, block)


@eqx.filter_jit
def _shares(real: Rows, fake: Rows, neighbours: int, block: int) -> PrecisionRecall:
    reach, fake_reach = _reaches(real, neighbours, block), _reaches(fake, neighbours, block)

    def of_real(row: tuple[Array, Array]) -> tuple[Array, Array]:
        x, squared_radius = row
        squares = squared_distances(x, fake)
        return jnp.any(squares <= fake_reach), jnp.any(squares <= squared_radius)

    def of_fake(y: Array) -> Array:
        return jnp.sum((squared_distances(y, real) <= reach).astype(y.dtype))

    recalled, covered = over_rows(of_real, (real, reach), block)
    balls = over_rows(of_fake, fake, block)

    def share(hits: Array) -> Scalar:
        return jnp.mean(hits.astype(real.dtype))

    return PrecisionRecall(share(balls > 0), share(recalled), jnp.mean(balls) / neighbours, share(covered))


def _reaches(rows: Rows, neighbours: int, block: int) -> Float[Array, " num"]:
    """The squared distance from each row to its k-th nearest other row."""
    places = jnp.arange(rows.shape[0])

    def nearest(row: tuple[Array, Array]) -> Float[Array, " neighbours"]:
        place, x = row
        squares = jnp.where(places == place, jnp.inf, squared_distances(x, rows))
        return -jax.lax.top_k(-squares, neighbours)[0]

    # The last is taken here: taken above, XLA sorts whole rows on a CPU, in forty times the time.
    return over_rows(nearest, (places, rows), block)[:, -1]
