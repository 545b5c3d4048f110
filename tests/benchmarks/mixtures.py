"""The problem of the benchmarks: anisotropic Gaussian mixtures, whose probability flow is known in closed form.

Ten components in d = 16, of zero mean and standard deviation 0.5 per element overall. Components overlap at high noise
and separate at low noise, and a component is up to 50 times as wide in one direction as in another: a sample may end in
the wrong component (a large error, seen in the root mean square) or be off inside the right one (seen in the median).
"""

import numpy as np
from jaxtyping import Float

import flowsolve as fs

COMPONENTS, DIM, STD = 10, 16, 0.5
# Scales before all is scaled to STD: of the means, and of the smallest and largest standard deviation of a component.
BETWEEN, LOW, HIGH = 1.5, 0.02, 1.0


def mixture(seed: int) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, "K d"], Float[np.ndarray, "K d d"]]:
    """Weights, means and covariances, in float64.

    Weights are uniform on the simplex, means normal; a covariance is a random rotation of eigenvalues whose square
    roots are log-uniform. Then all is shifted to zero mean and scaled to mean variance STD^2 per element.
    """
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(COMPONENTS))
    means = BETWEEN * rng.standard_normal((COMPONENTS, DIM))
    stds = np.exp(rng.uniform(np.log(LOW), np.log(HIGH), (COMPONENTS, DIM)))
    q, r = np.linalg.qr(rng.standard_normal((COMPONENTS, DIM, DIM)))
    q = q * np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
    covariances = np.einsum("kij,kj,klj->kil", q, stds**2, q)
    means = means - weights @ means
    variances = weights @ (means**2 + np.diagonal(covariances, axis1=1, axis2=2))
    scale = STD / np.sqrt(variances.mean())
    return weights, means * scale, covariances * scale**2


def oracle(seed: int) -> fs.testing.GaussianMixture:
    """The mixture as an oracle, in JAX's default float type."""
    return fs.testing.GaussianMixture(*mixture(seed))


def start_noise(seed: int, count: int) -> Float[np.ndarray, "count d"]:
    """N(0, I), the start of the samples of a mixture: the noise on which solvers are judged."""
    return np.random.default_rng(1000 + seed).standard_normal((count, DIM))
