"""Strictness for every test: no silent promotion, no silent broadcasting between ranks.

Warnings are errors, and jaxtyping with beartype checks every annotation of `flowsolve`: both are
set in pyproject.toml, so that they also hold in the workers of pytest-xdist. Diffrax runs under
these settings as it is: where its own code promotes, it says so locally.
"""

import gc
import itertools
import os

# Before JAX starts. The tolerances are those of float32 on a CPU, so that is where tests run unless
# told otherwise: `JAX_PLATFORMS=cuda pytest -n 0`.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A test compiles for longer than it runs. (Not `--xla_cpu_use_fusion_emitters=false` as well, which is quicker still:
# samples then depend in their last bit on how many there are.)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Several devices on one CPU, to compare sharded and unsharded results in the same process.
jax.config.update("jax_num_cpu_devices", 4)


_TESTS_SO_FAR = itertools.count(1)


@pytest.fixture(autouse=True)
def bounded_caches():
    """Drop compiled programs now and then: thousands in one process exhaust its memory maps, and XLA crashes."""
    yield
    if next(_TESTS_SO_FAR) % 40 == 0:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """float64 within one test, for the arrays that are made in it.

    Module-level arrays and those of wider fixtures stay float32.
    """
    with jax.enable_x64(True):
        yield


@pytest.fixture
def untyped():
    """Without jaxtyping's checks, which come before the library's own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_addoption(parser):
    parser.addoption("--screenshots", metavar="FOLDER", help="where tests/test_site.py leaves the browser's pictures")
