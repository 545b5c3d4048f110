"""How exact is posterior sampling? Methods and solvers against the exact posterior of two oracles.

python tests/benchmarks/posterior.py            # about 3 minutes on 2 CPU cores
python tests/benchmarks/posterior.py --smoke
"""

from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from pages import markdown, page_options, show

import flowsolve as fs

HEADING = """\
# Under a measurement

The mean and covariance of {num:,} samples against those of the exact posterior, on the linear path: the distance of the
means over the root of the posterior's total variance, and the Frobenius distance of the covariances over the norm of
the exact one. Sampling alone leaves about {floor:.3f} and {floor_covariance:.3f}. Gaussian: three dimensions, two
measured with noise 0.2. Mixture: three components in the plane, one combination measured with noise 0.3, so that the
posterior has {modes} modes. Particles: the mean over {runs} runs of the same distances, guided by PiGDM.

    python tests/benchmarks/posterior.py
"""

SOLVERS = {
    "Heun, 48 steps": {"solver": diffrax.Heun(), "grid": fs.grids.LogSNR(48)},
    "UniPC-3, 24": {"solver": fs.solvers.UniPC(3), "grid": fs.grids.LogSNR(24)},
    "DDPM, 100": {"solver": fs.solvers.DDIM(1.0), "grid": fs.grids.VPPower(100)},
    "SDE-DPM++ 2M, 64": {"solver": fs.solvers.SDEDPMSolverPP(2), "grid": fs.grids.LogSNR(64)},
}


class Problem(NamedTuple):
    """A law of the data, what is measured of it, and the exact moments given that."""

    oracle: fs.testing.AbstractOracle
    measurement: fs.posterior.Measurement
    mean: np.ndarray
    covariance: np.ndarray

    def distances(self, mean: np.ndarray, covariance: np.ndarray) -> tuple[float, float]:
        """Of a mean and a covariance from the exact ones."""
        off = np.linalg.norm(mean - self.mean) / np.sqrt(np.trace(self.covariance))
        return float(off), float(np.linalg.norm(covariance - self.covariance) / np.linalg.norm(self.covariance))


def gaussian() -> Problem:
    covariance = np.array([[1.5, 0.4, 0.0], [0.4, 0.6, -0.3], [0.0, -0.3, 0.9]])
    oracle = fs.testing.Gaussian(np.array([0.5, -1.0, 2.0]), covariance)
    matrix, y = jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]]), jnp.array([0.3, -2.0])
    exact = oracle.given(matrix, y, 0.2)
    measurement = fs.posterior.Measurement(lambda x: matrix @ x, y, std=0.2)
    return Problem(oracle, measurement, np.asarray(exact.mean), np.asarray(exact.covariance))


def mixture() -> Problem:
    means = np.array([[0.0, 0.0], [2.0, -1.0], [-1.5, 1.0]])
    oracle = fs.testing.GaussianMixture(np.array([0.5, 0.3, 0.2]), means, np.array([0.2, 0.1, 0.3]))
    matrix, y = jnp.array([[1.0, 0.5]]), jnp.array([0.3])
    exact = oracle.given(matrix, y, 0.3)
    weights, means = np.exp(exact.log_weights), np.asarray(exact.means)
    mean = weights @ means
    values, vectors = np.asarray(exact.eigenvalues), np.asarray(exact.eigenvectors)
    covariance = np.einsum("k,kij,kj,klj->il", weights, vectors, values, vectors)
    covariance += np.einsum("k,ki,kj->ij", weights, means - mean, means - mean)
    return Problem(oracle, fs.posterior.Measurement(lambda x: matrix @ x, y, std=0.3), mean, covariance)


METHODS: dict[str, Callable] = {
    "MMPS": fs.posterior.MMPS,
    "PiGDM": fs.posterior.PiGDM,
    "DPS, zeta = 1": lambda flow, measurement: fs.posterior.DPS(flow, measurement, 1.0),
    "DPS, zeta = 3": lambda flow, measurement: fs.posterior.DPS(flow, measurement, 3.0),
}


def flow_rows(problem: Problem, num: int) -> list[list[str]]:
    flow = problem.oracle.flow(fs.paths.Linear(), fs.predictions.Velocity())
    rows = []
    for name, method in METHODS.items():
        cells = []
        for settings in SOLVERS.values():
            guided = method(flow, problem.measurement)
            x = fs.sample(guided, problem.oracle.like, num=num, key=jax.random.key(0), **settings)
            off = problem.distances(np.mean(x, axis=0), np.cov(x, rowvar=False))
            cells.append("{:.3f}, {:.3f}".format(*off))
        rows.append([name, *cells])
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def particle_rows(problem: Problem, numbers: list[int], steps: list[int], runs: int) -> list[list[str]]:
    flow = problem.oracle.flow(fs.paths.Linear(), fs.predictions.Velocity())
    guided = fs.posterior.PiGDM(flow, problem.measurement)
    rows = []
    for num in numbers:
        cells = []
        for count in steps:

            @jax.jit
            @jax.vmap
            def run(key: jax.Array, num: int = num, count: int = count) -> tuple[jax.Array, jax.Array]:
                cloud = fs.particles.sample(guided, problem.oracle.like, num=num, key=key, grid=fs.grids.VPPower(count))
                weights = jnp.exp(cloud.log_weights)
                mean = weights @ cloud.x
                centred = cloud.x - mean
                return mean, (weights[:, None] * centred).T @ centred

            found = zip(*run(jax.random.split(jax.random.key(1), runs)), strict=True)
            off = np.mean([problem.distances(np.asarray(m), np.asarray(c)) for m, c in found], axis=0)
            cells.append("{:.3f}, {:.3f}".format(*off))
        rows.append([f"{num:,}", *cells])
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def main() -> None:
    options = page_options(__doc__.splitlines()[0]).parse_args()
    num, runs, numbers, steps = 8_000, 16, [64, 256, 1024, 4096], [50, 200]
    if options.smoke:
        num, runs, numbers, steps = 16, 2, [8], [4]
    problems = {"Gaussian": gaussian(), "Mixture": mixture()}
    sections = []
    for name, problem in problems.items():
        sections += [f"## {name}\n", markdown(["", *SOLVERS], flow_rows(problem, num))]
        header = ["particles", *(f"{count} steps" for count in steps)]
        sections.append(markdown(header, particle_rows(problem, numbers, steps, runs)))
    heading = HEADING.format(
        num=num, floor=1 / np.sqrt(num), floor_covariance=np.sqrt(2 / num), runs=runs, modes="two or three"
    )
    show("posterior", heading, sections, options)


if __name__ == "__main__":
    main()
