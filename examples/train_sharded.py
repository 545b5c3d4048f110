"""Training on a mesh of eight devices that is killed and goes on: fully sharded, with checkpoints.

    python examples/train_sharded.py            # about 2 minutes on 2 CPU cores
    python examples/train_sharded.py --smoke    # everything tiny: a check that it runs

Needs `pip install "flowsolve[examples,train]"`. The devices are virtual ones of the CPU; on a machine with eight others
leave `XLA_FLAGS` out. The script starts itself three times: a run to the end; a run that is killed (SIGKILL) in the
middle; and one that goes on from the last checkpoint of that. The last has the bits of the first. Then its flow is read
by one device, which draws samples. Expect:

    8 devices; parameters and optimiser 3.50 MiB, on each device 0.126 of it
    killed after step 450, went on at step 400
    loss of the last 50 steps: 2.027089, resumed 2.027089
    parameters of both runs the same to the last bit: True
    Wasserstein distance of samples to fresh data: 0.317 (of data to data: 0.165)

Written to `outputs/train_sharded/`: checkpoints, and the loss of the three runs with the samples, train_sharded.png.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

DEVICES = 8


class Size(NamedTuple):
    """How much of everything."""

    steps: int
    every: int  # steps from one checkpoint to the next
    kill_after: int  # the step whose checkpoint must be there
    batch: int
    width: int
    samples: int


FULL = Size(steps=1_000, every=50, kill_after=400, batch=256, width=128, samples=1_000)
SMOKE = Size(steps=12, every=3, kill_after=3, batch=16, width=32, samples=16)


def train(directory: Path, size: Size) -> None:
    """One run: from its last checkpoint, if there is one, to the end. A line of JSON every few steps."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowsolve as fs

    mesh = jax.make_mesh((2, DEVICES // 2), ("replicas", "shards"))
    layout = fs.sharding.Layout(mesh, parameters=("replicas", "shards"), least=256)
    like = jax.ShapeDtypeStruct((2,), jnp.float32)
    network = fs.nn.ResidualMLP(like, width=size.width, depth=3, key=jax.random.key(0))
    flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
    batches = fs.data.Batches(ring(np.random.default_rng(0), 4_096), batch_size=size.batch, key=jax.random.key(1))
    optimiser = optax.adam(optax.cosine_decay_schedule(2e-3, size.steps))
    loss = fs.losses.Regression(times=fs.times.LogitNormal())
    with fs.checkpoints.Checkpoints(directory / "steps", keep=3) as checkpoints:
        start = fs.training.init(flow, optimiser, key=jax.random.key(2))
        start = checkpoints.resume(start, batches, layout=layout)
        settings = {"steps": size.steps, "ema": 0.99, "every": size.every, "layout": layout, "progress": False}
        for state in fs.training.fit(loss, start, batches, optimiser, **settings):
            checkpoints.save(state, batches)
            print(json.dumps({"step": int(state.step), "loss": float(state.metrics["loss"])}), flush=True)
    fs.checkpoints.save(directory / "flow", state.ema_flow)
    trained = [leaf for leaf in jax.tree.leaves((state.flow, state.optimiser_state)) if isinstance(leaf, jax.Array)]
    here = sum(shard.data.nbytes for leaf in trained for shard in leaf.addressable_shards[:1])
    whole = sum(leaf.nbytes for leaf in trained)
    print(json.dumps({"bytes": whole, "bytes_per_device": here}), flush=True)


def ring(rng, num: int):
    """(num, 2) points of eight Gaussians on a ring."""
    import numpy as np

    angle = np.pi / 4 * rng.integers(8, size=num)
    points = 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return (points + 0.15 * rng.normal(size=points.shape)).astype(np.float32)


def run(directory: Path, options: argparse.Namespace, kill_after: int | None) -> list[dict]:
    """A run in a process of its own; the lines that it printed until its end, or until it was killed."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    command = [sys.executable, __file__, "--run", str(directory), *(["--smoke"] if options.smoke else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(json.loads(line))
        if kill_after is not None and lines[-1].get("step", 0) > kill_after:
            process.send_signal(signal.SIGKILL)
            break
    code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"A run failed with exit code {code}.")
    return lines


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="everything tiny: a check that it runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/train_sharded"), help="folder for what is written")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SMOKE if options.smoke else FULL
    if options.run is not None:
        train(options.run, size)
        return
    shutil.rmtree(options.out, ignore_errors=True)
    straight = run(options.out / "straight", options, None)
    killed = run(options.out / "killed", options, size.kill_after)
    resumed = run(options.out / "killed", options, None)

    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import matplotlib
    import numpy as np

    import flowsolve as fs

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    like = jax.ShapeDtypeStruct((2,), jnp.float32)
    network = fs.nn.ResidualMLP(like, width=size.width, depth=3, key=jax.random.key(0))
    flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
    flows = [fs.checkpoints.load(options.out / name / "flow", flow) for name in ("straight", "killed")]
    parameters = [jax.tree.leaves(eqx.filter(flow, eqx.is_array)) for flow in flows]
    same = all(np.array_equal(a, b) for a, b in zip(*parameters, strict=True))
    memory = straight[-1]
    print(f"{DEVICES} devices; parameters and optimiser {memory['bytes'] / 2**20:.2f} MiB, ", end="")
    print(f"on each device {memory['bytes_per_device'] / memory['bytes']:.3f} of it")
    print(f"killed after step {killed[-1]['step']}, went on at step {resumed[0]['step'] - size.every}")
    print(f"loss of the last {size.every} steps: {straight[-2]['loss']:.6f}, resumed {resumed[-2]['loss']:.6f}")
    print(f"parameters of both runs the same to the last bit: {same}")
    x = fs.sample(flows[1], like, num=size.samples, key=jax.random.key(3), solver=fs.solvers.UniPC(2))
    real = ring(np.random.default_rng(1), size.samples)
    other = ring(np.random.default_rng(2), size.samples)
    distances = [float(fs.metrics.wasserstein(jnp.asarray(a), jnp.asarray(real))) for a in (x, other)]
    print(f"Wasserstein distance of samples to fresh data: {distances[0]:.3f} (of data to data: {distances[1]:.3f})")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for lines, name, style in ((straight, "straight", "-"), (killed, "killed", "o"), (resumed, "resumed", ".")):
        points = [(line["step"], line["loss"]) for line in lines if "step" in line]
        left.plot(*zip(*points, strict=True), style, label=name, markersize=7 if style == "o" else 4)
    left.set(xlabel="step", ylabel=f"loss, mean of {size.every} steps")
    left.legend()
    right.plot(*real.T, ".", color="0.8", markersize=3, label="data")
    right.plot(*np.asarray(x).T, ".", color="tab:red", markersize=2, label="samples")
    right.set_aspect("equal")
    right.legend()
    file = options.out / "train_sharded.png"
    figure.savefig(file, dpi=100)
    print(f"picture: {file}\ntotal {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
