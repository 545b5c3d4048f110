"""Is fully sharded training that of one device, on eight devices and in two processes?

    python tests/sharded_losses.py                          # about a minute on 2 CPU cores
    python tests/sharded_losses.py --devices 4 --steps 10   # what tests/test_sharding.py runs

Three runs of the same training: on one device; on `--devices` virtual devices, parameters and optimiser in as many
parts; and on as many in two processes over loopback, each of which reads its part of every batch. Prints the bytes on a
device against those of one, and the largest relative difference of the losses of all steps.
"""

import argparse
import json
import tempfile
from pathlib import Path

from test_multihost import free_address, run

STEPS, BATCH = 200, 64


def train(devices: int, steps: int, process: int | None, address: str | None, out: Path) -> None:
    """One run, in this process; process 0 writes what it measured."""
    import jax

    jax.config.update("jax_num_cpu_devices", devices if process is None else devices // 2)
    if process is not None:
        jax.distributed.initialize(address, 2, process)
    import equinox as eqx
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowsolve as fs

    key = jax.random.key(0)
    data = np.random.default_rng(0).normal(size=(1_024, 8)).astype(np.float32)
    network = fs.nn.ResidualMLP(jax.ShapeDtypeStruct((8,), jnp.float32), width=128, depth=3, key=key)
    flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
    layout = None
    if devices > 1:
        layout = fs.sharding.Layout(jax.make_mesh((devices,), ("shards",)), parameters="shards", least=256)
    part = None if process is None else (process, 2)
    states = fs.training.fit(
        fs.losses.Regression(),
        flow,
        fs.data.Batches(data, batch_size=BATCH, key=key, part=part),
        optax.adamw(1e-3),
        steps=steps,
        key=key,
        every=1,
        layout=layout,
        progress=False,
    )
    losses = []
    for state in states:
        losses.append(float(state.metrics["loss"]))
    arrays = [
        leaf for leaf in jax.tree.leaves((state.flow, state.averages, state.optimiser_state)) if eqx.is_array(leaf)
    ]
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in arrays)
    if not process:
        out.write_text(json.dumps({"losses": losses, "bytes": on_one, "all": sum(leaf.nbytes for leaf in arrays)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        devices, process, address = options.run
        process = None if process == "-" else int(process)
        return train(int(devices), options.steps, process, address, options.out)
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        address = free_address()
        runs = {
            "one device": [("1", "-", "-")],
            f"{options.devices} devices": [(str(options.devices), "-", "-")],
            f"{options.devices} devices in 2 processes": [(str(options.devices), str(i), address) for i in range(2)],
        }
        found = {}
        for name, processes in runs.items():
            file = Path(folder) / f"{len(found)}.json"
            common = ("--steps", options.steps, "--out", file)
            run(*[(__file__, *common, "--run", *arguments) for arguments in processes])
            found[name] = json.loads(file.read_text())
    one = np.asarray(found["one device"]["losses"])
    for name, measured in found.items():
        apart = np.max(np.abs(np.asarray(measured["losses"]) / one - 1))
        share = measured["bytes"] / measured["all"]
        print(f"{name}: {share:.3f} of the bytes on a device; losses of {len(one)} steps within {apart:.1e}")


if __name__ == "__main__":
    main()
