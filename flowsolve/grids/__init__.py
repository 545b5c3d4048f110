r"""Inference grids: the times $t_0, \dots, t_n$ at which a solver steps.

A grid of n steps has n + 1 points, strictly monotone, whose ends are exactly the times asked for.
Data lives at small t, so sampling descends from `t_start` to `t_end`; with `t_start` < `t_end`
(encoding) the same points come in ascending order. With the fraction $f_i = i/n$, $i = 0..n$, and
$r = \sigma/\alpha$:

| grid | points |
|---|---|
| Uniform | $t_i = t_0 + f_i (t_n - t_0)$ |
| Power | $t_i = t_n + (1 - f_i)^p (t_0 - t_n)$ |
| Beta | $t_i = t_n + Q(1 - f_i) (t_0 - t_n)$, Q the quantiles of a Beta distribution |
| Karras | $\sqrt[\rho]{r_i}$ equally spaced |
| LogSNR | $\ln r_i$ equally spaced: uniform in log-SNR |
| PolyExponential | $\ln r_i = \ln r_n + (1 - f_i)^\rho (\ln r_0 - \ln r_n)$ |
| VPPower | `Power` in the time of `VP` at the same r |
| Shifted | another grid under the time shift of `flowsolve.times.shift_time` |
| ThenClean | another grid to `t_data`, then one step onto the clean data |
| Given | the user's |
| Leading, Trailing, Linspace, Quadratic | n integer timesteps of a `Discrete` path, then the clean data |

Infinite ends of `Karras`, `LogSNR` and `PolyExponential`. Where $r$ is infinite at the start
(`Linear` at t = 1) the first point is `t_start` itself and stands for $r_0$ = `sigma_max`. Where
$r = 0$ at the end, as on `Linear` at t = 0 and on `EDM` at t = 0, the first n points go down to
$r_{n-1}$ = `sigma_min` and the last step goes from there onto the end, as EDM's sampler does. Ends
of finite, positive $r$ are used as they are, and the two fields are not. `VPPower` needs only the
first of the two: its time is 0 where $r = 0$.
"""

from .base import AbstractGrid, AbstractPathGrid
from .in_noise import Karras, LogSNR, PolyExponential, VPPower
from .in_time import Beta, Power, Uniform
from .points import AbstractTimesteps, Given, Leading, Linspace, Quadratic, Trailing
from .wrappers import Shifted, ThenClean

__all__ = [
    "AbstractGrid",
    "AbstractPathGrid",
    "AbstractTimesteps",
    "Beta",
    "Given",
    "Karras",
    "Leading",
    "Linspace",
    "LogSNR",
    "PolyExponential",
    "Power",
    "Quadratic",
    "Shifted",
    "ThenClean",
    "Trailing",
    "Uniform",
    "VPPower",
]
