r"""How far two sets of samples are from each other.

Every metric takes two batches of examples, or of features of them: pytrees whose arrays have a leading axis, of which
each example is flattened to one vector of d numbers. With laws P and Q of the batches x and y, X and X' independent
draws of P, Y and Y' of Q,

| metric | of P and Q | estimated |
|---|---|---|
| `frechet_distance` | $\lvert m_P - m_Q\rvert^2 + \mathrm{tr}(C_P + C_Q - 2 (C_P C_Q)^{1/2})$ | biased up |
| `kernel_mmd` | $E\,k(X, X') + E\,k(Y, Y') - 2 E\,k(X, Y)$ | without bias |
| `energy_distance` | $2 E\lvert X - Y\rvert - E\lvert X - X'\rvert - E\lvert Y - Y'\rvert$ | without bias |
| `wasserstein` | $W_2 = \min_\pi (E_\pi \lvert X - Y\rvert^2)^{1/2}$ | biased up |
| `sliced_wasserstein` | $(E_\theta W_p^p(\theta\cdot X, \theta\cdot Y))^{1/p}$ | biased up |
| `sinkhorn_divergence` | $W_\varepsilon(P, Q) - (W_\varepsilon(P, P) + W_\varepsilon(Q, Q))/2$ | biased up |
| `classifier_two_sample` | the accuracy with which a network tells X from Y | held out |
| `precision_recall` | shares of each batch inside the other's support | by nearest neighbours |

An estimate without bias is about 0 for two batches of one law, and below 0 as often as above.

    real, fake = fs.metrics.Moments.of(features(x)), fs.metrics.Moments.of(features(samples))
    fs.metrics.frechet_distance(real, fake)

`Moments` takes a data set batch by batch. What is a mean over pairs is taken `block` rows at a time, so that memory
grows with the number of examples and not with its square; the number is the same to rounding. Everything is compiled,
and but for the last two differentiable.
"""

from .classifier import TwoSampleTest, classifier_two_sample
from .frechet import Moments, frechet_distance
from .kernels import AbstractKernel, Gaussian, Polynomial, energy_distance, kernel_mmd, median_distance
from .neighbours import PrecisionRecall, precision_recall
from .transport import sinkhorn_divergence, sliced_wasserstein, wasserstein

__all__ = [
    "AbstractKernel",
    "Gaussian",
    "Moments",
    "Polynomial",
    "PrecisionRecall",
    "TwoSampleTest",
    "classifier_two_sample",
    "energy_distance",
    "frechet_distance",
    "kernel_mmd",
    "median_distance",
    "precision_recall",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "wasserstein",
]
