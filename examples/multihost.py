"""Several processes: one program that draws samples and log-densities on a laptop, in N processes and on a cluster.

    python examples/multihost.py                        # one process, about 10 seconds
    python examples/multihost.py --devices 4            # one process, its CPU taken as four devices
    python examples/multihost.py --smoke                # everything tiny: a check that it runs

Two processes on one machine, each in a terminal of its own:

    python examples/multihost.py --coordinator 127.0.0.1:9876 --processes 2 --process 0 --devices 2
    python examples/multihost.py --coordinator 127.0.0.1:9876 --processes 2 --process 1 --devices 2

A cluster on which JAX finds the processes by itself (Slurm, Open MPI, Cloud TPU), here with Slurm:

    srun python examples/multihost.py --cluster

The flow is that of a perfect network for four Gaussians, so that the truth is known. Expect these numbers from every
one of the commands but the smoke test:

    4,096 samples; devices: 4, processes: 2
    mean          -0.000   0.002   +- 0.023    exact 0
    mean |x|^2     4.502           +- 0.032    exact 4.5
    mean ln p     -2.8207          +- 0.0148   exact at the same points -2.8208

docs/multihost.md says what goes on between the processes and what to mind.
"""

import argparse
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import flowsolve as fs


def join(options: argparse.Namespace) -> None:
    """Make this process one of several, before anything else of JAX is used."""
    if options.devices is not None:
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.cluster:
        jax.distributed.initialize()
    elif options.coordinator is not None:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)


def make_oracle() -> fs.testing.GaussianMixture:
    """Four round Gaussians of variance 1/4, at distance 2 from the origin."""
    means = jnp.array([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]])
    return fs.testing.GaussianMixture(jnp.ones(4), means, 0.25)


def on_every_device(tree, mesh: Mesh):
    """The arrays of a flow, copied to all devices once; raises if not all processes hold the same numbers."""
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())), rest)


def report(x: np.ndarray, log_p: np.ndarray, oracle: fs.testing.GaussianMixture, path: fs.paths.Linear) -> None:
    """Each number with its standard error, and what it should be."""
    exact = np.asarray(jax.vmap(lambda x: oracle.log_prob(path, path.t_data, x))(x))
    mean, square = np.mean(x, axis=0), np.sum(x**2, axis=1)
    errors = [np.max(np.std(values, axis=0)) / np.sqrt(len(x)) for values in (x, square, log_p)]
    print(f"{len(x):,} samples; devices: {jax.device_count()}, processes: {jax.process_count()}")
    print(f"mean          {mean[0]:6.3f}  {mean[1]:6.3f}   +- {errors[0]:.3f}    exact 0")
    print(f"mean |x|^2    {square.mean():6.3f}           +- {errors[1]:.3f}    exact 4.5")
    print(
        f"mean ln p     {log_p.mean():7.4f}          +- {errors[2]:.4f}   exact at the same points {exact.mean():.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="a free port of process 0, the same for all")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    parser.add_argument("--cluster", action="store_true", help="find coordinator and processes by itself")
    parser.add_argument("--devices", type=int, help="virtual CPU devices of each process")
    parser.add_argument("--num", type=int, default=4_096, help="samples, of all processes together")
    parser.add_argument("--chunk", type=int, default=512, help="samples that a device takes at a time")
    parser.add_argument("--save", type=Path, help="a file FILE.npz, written by process 0")
    parser.add_argument("--smoke", action="store_true", help="everything tiny: a check that it runs")
    options = parser.parse_args()
    num, chunk, steps = (16, 2, 4) if options.smoke else (options.num, options.chunk, 32)
    join(options)

    # All devices of all processes.
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))

    # Every process makes, or loads from a file, the same flow.
    oracle = make_oracle()
    flow = on_every_device(oracle.flow(fs.paths.Linear(), fs.predictions.Velocity()), mesh)

    grid = fs.grids.LogSNR(steps)
    x = fs.sample(flow, oracle.like, num=num, key=jax.random.key(0), grid=grid, mesh=mesh, chunk=chunk)
    controller = diffrax.PIDController(rtol=1e-5, atol=1e-5)
    log_prob = eqx.Partial(fs.log_prob, solver=diffrax.Tsit5(), controller=controller)
    log_p = fs.batched(log_prob, mesh=mesh, chunk=chunk)(flow, x)

    # Each process holds its part of both. All must make this call, after which all have the whole, in NumPy.
    x, log_p = process_allgather((x, log_p), tiled=True)
    if jax.process_index() == 0:
        report(x, log_p, oracle, flow.path)
        if options.save is not None:
            np.savez(options.save, x=x, log_p=log_p)


if __name__ == "__main__":
    main()
