"""Two processes of two devices each, over loopback, against one process: the same bits, and the same failures."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "multihost.py"
# 10 samples a device, in chunks of 4 that do not divide them.
AMOUNT = ("--num", "40", "--chunk", "4")

# A network that is NaN for three of ten labels, all of which the second process holds.
FAILING = """
import sys
import diffrax, equinox as eqx, jax, jax.numpy as jnp
import flowsolve as fs

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

class Network(eqx.Module):
    def __call__(self, t, x, args, *, key=None):
        return jnp.where(args == 1, jnp.nan, -x)

flow = fs.Flow(Network(), fs.paths.Linear(), fs.predictions.Velocity())
settings = {"solver": diffrax.Euler(), "grid": fs.grids.Uniform(2), "mesh": mesh}
like, key, labels = jax.ShapeDtypeStruct((2,), jnp.float32), jax.random.key(0), jnp.arange(10) // 7
log_prob = eqx.Partial(fs.log_prob, solver=diffrax.Euler(), grid=fs.grids.Uniform(2))

def sample():
    return fs.sample(flow, like, num=10, key=key, args=labels, **settings)

def log_probs():
    return fs.batched(log_prob, mesh=mesh)(flow, jnp.ones((10, 2)), labels)

for function in (sample, log_probs, jax.jit(sample), jax.jit(log_probs)):
    try:
        jax.block_until_ready(function())
    except RuntimeError as error:
        print("raised:", str(error).split("The solve failed")[1])
# Nobody was left behind: the next call, in which all take part, works.
x = fs.sample(flow, like, num=10, key=key, args=labels, throw=False, **settings)
print("failed:", int(jnp.isnan(x).any(axis=1).sum()))
"""


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run(*commands, seconds=240):
    """Run Python with each of these arguments at the same time; what they print, or fail with all of it."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    files = [tempfile.TemporaryFile("w+") for _ in commands]
    processes = [
        subprocess.Popen([sys.executable, *map(str, command)], env=environment, stdout=file, stderr=subprocess.STDOUT)
        for command, file in zip(commands, files, strict=True)
    ]
    stop = time.monotonic() + seconds
    try:
        # One that has failed leaves the others waiting for minutes.
        while any(process.poll() is None for process in processes) and time.monotonic() < stop:
            if any(process.poll() for process in processes):
                time.sleep(2)
                break
            time.sleep(0.1)
    finally:
        codes = [process.poll() for process in processes]
        texts = []
        for process, file in zip(processes, files, strict=True):
            process.kill()
            process.wait()
            file.seek(0)
            texts.append(file.read())
            file.close()
    if any(code != 0 for code in codes):
        ends = ["was stopped" if code is None else f"exited with {code}" for code in codes]
        pytest.fail(
            "\n".join(f"--- process {i} {end}\n{text}" for i, (end, text) in enumerate(zip(ends, texts, strict=True)))
        )
    return texts


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(tmp_path):
    together = ("--coordinator", free_address(), "--processes", 2, "--devices", 2, "--save", tmp_path / "two.npz")
    first, second, four, one = run(
        (EXAMPLE, *AMOUNT, *together, "--process", 0),
        (EXAMPLE, *AMOUNT, *together, "--process", 1),
        (EXAMPLE, *AMOUNT, "--devices", 4, "--save", tmp_path / "four.npz"),
        (EXAMPLE, *AMOUNT, "--save", tmp_path / "one.npz"),
    )
    assert "40 samples; devices: 4, processes: 2" in first and "samples" not in second
    assert "40 samples; devices: 4, processes: 1" in four and "40 samples; devices: 1, processes: 1" in one
    two, four, one = (np.load(tmp_path / f"{name}.npz") for name in ("two", "four", "one"))
    for name, size in (("x", (40, 2)), ("log_p", (40,))):
        assert two[name].shape == size and np.all(np.isfinite(two[name]))
        np.testing.assert_array_equal(two[name], four[name])
        np.testing.assert_array_equal(two[name], one[name])


@pytest.mark.slow
def test_a_failed_solve_raises_in_every_process():
    address = free_address()
    for text in run(("-c", FAILING, address, 0), ("-c", FAILING, address, 1)):
        assert text.count("raised:  for 3 of 10 examples, the first is number 7: the state became NaN") == 2
        assert text.count("raised: : the state became NaN") == 2  # in a jit
        assert "failed: 3" in text
