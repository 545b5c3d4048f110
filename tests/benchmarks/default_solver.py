"""Which solver and grid should `fs.sample` use when nothing is said? Measured, not guessed.

    python tests/benchmarks/default_solver.py [--evaluations 64] [--seed 0]

On a Gaussian mixture in 4 dimensions, on eight paths, every solver and grid carries the same noise to data with
the same number of network evaluations; the error is the root mean square distance to an accurate solve of the same
noise, relative to the data's standard deviation. Prints a Markdown table of the error of each combination, the worst
and the geometric mean over paths, best worst first.
"""

import argparse
import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import flowsolve as fs

PATHS = {
    "Linear": fs.paths.Linear(),
    "Cosine": fs.paths.Cosine(),
    "VP": fs.paths.VP(),
    "SubVP": fs.paths.SubVP(),
    "Discrete": fs.paths.Discrete.linear(100),
    "OU": fs.paths.OrnsteinUhlenbeck(),
    "EDM": fs.paths.EDM(),
    "VE": fs.paths.VE(),
}
SOLVERS = {
    "DDIM": (fs.solvers.DDIM(), 1),
    "Heun": (diffrax.Heun(), 2),
    "Midpoint": (diffrax.Midpoint(), 2),
    "Ralston": (diffrax.Ralston(), 2),
}
GRIDS = {
    "Uniform": fs.grids.Uniform,
    "Power(3)": lambda n: fs.grids.Power(n, 3.0),
    "LogSNR": fs.grids.LogSNR,
}


def mixture(dim: int, seed: int) -> fs.testing.GaussianMixture:
    """Five components of different widths around the unit sphere."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(5, dim))
    means /= np.linalg.norm(means, axis=1, keepdims=True) / np.sqrt(dim / 2)
    return fs.testing.GaussianMixture(np.ones(5), means, rng.uniform(0.05, 0.4, size=(5, dim)) ** 2)


@eqx.filter_jit
def final(flow, x_start, solver, grid, controller):
    def one(x):
        return fs.solve(flow, x, solver=solver, grid=grid, controller=controller, throw=False).ys[-1]

    return jax.vmap(one)(x_start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=64)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    errors: dict[tuple[str, str], list[float]] = {}
    for path in PATHS.values():
        flow = mixture(4, options.seed).flow(path, fs.predictions.Velocity())
        noise = jax.random.normal(jax.random.key(options.seed), (options.examples, 4))
        x_start = noise * path.start()[1]
        exact = final(flow, x_start, diffrax.Dopri8(), None, diffrax.PIDController(rtol=1e-8, atol=1e-8))
        scale = jnp.std(exact)
        for solver_name, (solver, cost) in SOLVERS.items():
            for grid_name, make in GRIDS.items():
                steps = max(1, options.evaluations // cost)
                x = final(flow, x_start, solver, make(steps), None)
                error = float(jnp.sqrt(jnp.mean((x - exact) ** 2)) / scale)
                errors.setdefault((solver_name, grid_name), []).append(error)
    print(f"{options.evaluations} network evaluations, {options.examples} examples, seed {options.seed}\n")
    print("| solver | grid | worst | geometric mean | " + " | ".join(PATHS) + " |")
    print("|" + "---|" * (4 + len(PATHS)))
    ranked = sorted(errors.items(), key=lambda item: max(item[1]))
    for (solver_name, grid_name), values in ranked:
        cells = [f"{max(values):.1e}", f"{np.exp(np.mean(np.log(values))):.1e}", *(f"{v:.1e}" for v in values)]
        print(f"| {solver_name} | {grid_name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
