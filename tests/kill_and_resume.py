"""Training that is killed (SIGKILL) at random moments and resumed: at the end the same bits as without.

    python tests/kill_and_resume.py --kills 10

Every other kill waits for a checkpoint that is being written. Runs are children of one process that has imported
everything and used no device yet, so that a run takes a second. Prints what it saw; fails if a bit differs.
"""

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

# XLA complains of programs that it compiled itself, for the machine it runs on.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401

import flowsolve as fs

EVERY = 5


class Network(eqx.Module):
    """A small network that sees the time."""

    first: jax.Array
    second: jax.Array

    def __call__(self, t, x, args, *, key=None):
        del args, key
        return self.second @ jnp.tanh(self.first @ jnp.append(x, t))


def loss(flow, x, args, *, key):
    """Flow matching at the middle of the path."""
    del args
    noise = jax.random.normal(key, x.shape)
    output = jax.vmap(lambda x: flow.output(0.5, x))((x + noise) / 2)
    return jnp.mean((output - (noise - x)) ** 2), None


def train(directory: Path, result: Path, steps: int) -> None:
    """Go on in `directory` to the end, and write every array of the last state to `result`."""
    warnings.simplefilter("error")  # a resumed run never finds a corrupt checkpoint
    rng = np.random.default_rng(0)
    weights = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((32, 3), (2, 32)))
    flow = fs.Flow(Network(*weights), fs.paths.Linear(), fs.predictions.Velocity())
    optimiser = optax.adam(1e-3)
    x = rng.normal(size=(256, 2)).astype(np.float32)
    batches = fs.data.Batches(x, batch_size=32, key=jax.random.key(1))
    with fs.checkpoints.Checkpoints(directory, keep=2) as checkpoints:
        state = start = checkpoints.resume(fs.training.init(flow, optimiser, key=jax.random.key(2)), batches)
        if int(start.step) < steps:
            settings = {"steps": steps, "ema": 0.99, "every": EVERY, "progress": False}
            for state in fs.training.fit(loss, start, batches, optimiser, **settings):
                checkpoints.save(state, batches)
    leaves = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in arrays(state)]
    np.savez(result, *leaves, taken=batches.get_state()["taken"])


def arrays(state):
    return jax.tree.leaves(eqx.filter(state, eqx.is_array))


def child(directory: Path, result: Path, steps: int) -> int:
    """`train` in a process of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of forks, which matter once it has used a device
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        train(directory, result, steps)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def steps_in(directory: Path) -> list[int]:
    return sorted(int(entry.name.removeprefix("step-")) for entry in directory.glob("step-*"))


def unfinished(directory: Path, since: int) -> bool:
    """Whether a checkpoint is being written, by a run that began at `since`."""
    with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
        return any(entry.stat().st_mtime_ns > since for entry in directory.glob(".incomplete-step*"))
    return False


def comes(condition: Callable[[], bool], pid: int) -> bool:
    """Wait until a condition holds; False if the run has ended before."""
    while not condition():
        done, status = os.waitpid(pid, os.WNOHANG)
        if done and status:
            raise SystemExit(f"A run failed: {status}.")
        if done:
            return False
    return True


def killed(directory: Path, result: Path, steps: int, *, writing: bool, rng: random.Random) -> str:
    """Start a run and kill it, at random or while it writes; "ended" if it came to its end before."""
    began = time.time_ns()
    before = steps_in(directory)[-1:]
    pid = child(directory, result, steps)
    moment = time.monotonic() + rng.uniform(0, 2)
    if writing:
        # Not before it has written one itself, so that the runs come to an end.
        if not comes(lambda: steps_in(directory)[-1:] != before and unfinished(directory, began), pid):
            return "ended"
        moment = time.monotonic() + rng.uniform(0, 0.1)
    if not comes(lambda: time.monotonic() > moment, pid):
        return "ended"
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if not os.WIFSIGNALED(status):
        return "ended"
    return "while writing" if unfinished(directory, began) else "not while writing"


def finished(directory: Path, result: Path, steps: int) -> dict[str, np.ndarray]:
    pid = child(directory, result, steps)
    _, status = os.waitpid(pid, 0)
    if status:
        raise SystemExit(f"A run failed: {status}.")
    with np.load(result) as stored:
        return dict(stored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        # What the first run compiles the others read; they write nothing, as they are killed.
        jax.config.update("jax_compilation_cache_dir", str(place / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        wanted = finished(place / "uninterrupted", place / "wanted.npz", options.steps)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        kills, runs = [], 0
        while len(kills) < options.kills:
            runs += 1
            directory, result = place / f"run{runs}", place / f"run{runs}.npz"
            while len(kills) < options.kills:
                writing = len(kills) % 2 == 0
                moment = killed(directory, result, options.steps, writing=writing, rng=rng)
                if moment == "ended":
                    break
                kills.append(moment)
                print(f"kill {len(kills)}, {moment}: there are the steps {steps_in(directory)}", flush=True)
            found = finished(directory, result, options.steps)
            assert found.keys() == wanted.keys()
            for name in wanted:
                assert found[name].tobytes() == wanted[name].tobytes(), f"array {name} differs"
        during = kills.count("while writing")
        print(f"{len(kills)} kills, {during} of them while writing, {runs} runs: {len(wanted)} arrays bitwise equal.")


if __name__ == "__main__":
    main()
