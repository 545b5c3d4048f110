"""Is this JAX computing correctly at all?

jax 0.10.2 on CPU returns wrong numbers under jit for some vmapped matrix-vector products followed
by a reduction (jax issue 39103): silently, from a batch of a few ten thousand on. The installation
excludes that version; this test is for the next one.
"""

import warnings

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

pytestmark = pytest.mark.quick


# As users compile, and not as quickly as the other tests, see conftest.py.
OPTIMISED = {"xla_backend_optimization_level": 3}


def square(y):
    return y**2


# (batch, rows, columns). The known bug appears at (32_769, 3, 3) and not at (16_385, 3, 3).
SHAPES = [
    (5, 2, 2),
    (64, 3, 3),
    (257, 16, 8),
    (1_000, 2, 64),
    (16_385, 3, 3),
    (32_769, 3, 3),
    (40_000, 4, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("jax_fn", "numpy_fn"), [(jnp.tanh, np.tanh), (square, square)], ids=["tanh", "square"])
@pytest.mark.parametrize("own_matrix", [False, True], ids=["shared", "own"])
def test_vmapped_matvec_and_reduction(shape, jax_fn, numpy_fn, own_matrix):
    batch, rows, columns = shape
    rng = np.random.default_rng(0)
    w = rng.normal(size=(batch, rows, columns) if own_matrix else (rows, columns)).astype(np.float32)
    x = rng.normal(size=(batch, columns)).astype(np.float32)

    in_axes = (0 if own_matrix else None, 0)
    got = jax.jit(jax.vmap(lambda w, x: jnp.sum(jax_fn(w @ x)), in_axes), compiler_options=OPTIMISED)(w, x)

    terms = numpy_fn(np.einsum("...rc,...c->...r", np.float64(w), np.float64(x)))
    # Relative to the sum of magnitudes: a sum of tanh may cancel.
    error = np.abs(np.float64(got) - terms.sum(axis=1)) / (1 + np.abs(terms).sum(axis=1))
    assert error.max() < 1e-4, (
        f"jax {jax.__version__} is wrong by {error.max():.2g} in example {error.argmax()} "
        f"of {batch}: do not use this version; exclude it in pyproject.toml."
    )


def test_x64_fixture_gives_float64(x64):
    assert jnp.ones(2).dtype == jnp.float64
    assert jax.jit(lambda x: 2 * x)(jnp.ones(2)).dtype == jnp.float64


def test_float32_is_the_default():
    assert jnp.ones(2).dtype == jnp.float32


def test_strictness_is_on():
    with pytest.raises(ValueError, match="promotion"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.int32)
    with pytest.raises(ValueError, match="rank"):
        jnp.ones(2) + jnp.ones((2, 2))
    with pytest.raises(UserWarning, match="an error"):
        warnings.warn("a warning is an error", stacklevel=1)


def test_annotations_are_checked():
    from flowsolve._numerics import normal_like

    with pytest.raises(jaxtyping.TypeCheckError):
        normal_like("not a key", jnp.ones(2))  # pyright: ignore
