r"""Training-time distributions: which times t a loss is evaluated at.

Data lives at small t, noise at large t. A distribution is its quantile function on a path,

$$t = Q(u), \qquad u \sim U(0, 1)$$

increasing in u, so that independent times and stratified ones ($u_i = (i + U_i)/B$, permuted) are
the same mechanism with other numbers u. Two coordinates are used:

- the place $s = (t - t_\mathrm{data})/(t_\mathrm{noise} - t_\mathrm{data})$ between the path's
  ends;
- the noise level $\ln(\sigma/\alpha)$, which is minus half the log-SNR.

Losses of flow maps and of consistency want two times, t >= r: `AbstractTimePairs`.

`t_min` and `t_max` bound a distribution: it is conditioned on $t \in [t_\mathrm{min},
t_\mathrm{max}]$ (its quantile function is cut by its CDF). None means the path's own end.

The time shift $s' = k s/(1 + (k - 1) s)$ is written once, here, for training times (`Shifted`) and
for inference grids (`flowsolve.grids.Shifted`). All parameters are arrays: a new value does not
retrace.
"""

from .base import AbstractBoundedTimes, AbstractTimes, resolution_shift, shift_on_path, shift_time
from .distributions import (
    Beta,
    Given,
    LogitNormal,
    LogNormal,
    LogSNRUniform,
    Mode,
    Polynomial,
    Shifted,
    Stratified,
    Uniform,
    UShaped,
)
from .pairs import AbstractTimePairs, DyadicPairs, GridNeighbours, Tightening, TimePairs, doubling_points

__all__ = [
    "AbstractBoundedTimes",
    "AbstractTimePairs",
    "AbstractTimes",
    "Beta",
    "DyadicPairs",
    "Given",
    "GridNeighbours",
    "LogNormal",
    "LogSNRUniform",
    "LogitNormal",
    "Mode",
    "Polynomial",
    "Shifted",
    "Stratified",
    "Tightening",
    "TimePairs",
    "UShaped",
    "Uniform",
    "doubling_points",
    "resolution_shift",
    "shift_on_path",
    "shift_time",
]
