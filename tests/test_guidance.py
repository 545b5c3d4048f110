"""Guidance on the oracle: the scale's convention, and the closed form that a guided flow has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowsolve as fs

MEANS = np.array([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]])
ORACLE = fs.testing.GaussianMixture(np.ones(3), MEANS, 0.2)
FLOW = ORACLE.flow(fs.paths.Linear(), fs.predictions.Velocity())
# The oracle takes any negative label for the whole mixture.
NULL = jnp.asarray(-1)
X, T, LABEL = jnp.array([0.3, -0.4]), 0.6, jnp.asarray(1)


@pytest.mark.quick
def test_scale_zero_is_unconditional_and_one_conditional():
    """The convention u + scale (c - u), which others write 1 + w."""
    conditional, unconditional = FLOW.velocity(T, X, LABEL), FLOW.velocity(T, X, NULL)
    assert not np.allclose(conditional, unconditional, atol=0.1)
    for scale, expected in (
        (0.0, unconditional),
        (1.0, conditional),
        (3.0, unconditional + 3 * (conditional - unconditional)),
    ):
        guided = fs.guidance.ClassifierFree(FLOW, scale, null=NULL)
        np.testing.assert_allclose(guided.velocity(T, X, LABEL), expected, rtol=1e-5, atol=1e-6)


def test_guided_score_is_that_of_the_tilted_density():
    """score_u + s (score_c - score_u) = grad [ln p + s ln p(label|x)], by differentiating the densities."""
    scale = 2.5
    guided = fs.guidance.ClassifierFree(FLOW, scale, null=NULL)

    def tilted(x):
        marginal, conditional = (ORACLE.log_prob(FLOW.path, T, x, label) for label in (None, LABEL))
        return marginal + scale * (conditional - marginal)

    np.testing.assert_allclose(guided.score(T, X, LABEL), jax.grad(tilted)(X), rtol=1e-4)


def test_guidance_is_per_example_in_a_batch_and_takes_every_solver():
    guided = fs.guidance.ClassifierFree(FLOW, 2.0, null=NULL)
    labels = jnp.array([0, 1, 2, 1])
    settings = {"solver": fs.solvers.DDIM(), "grid": fs.grids.Uniform(6), "key": jax.random.key(0)}
    batch = fs.sample(guided, ORACLE.like, num=4, args=labels, **settings)
    other = fs.sample(guided, ORACLE.like, num=4, args=labels.at[0].set(2), **settings)
    np.testing.assert_array_equal(batch[1:], other[1:])
    assert not np.allclose(batch[0], other[0], atol=0.1)


@pytest.mark.quick
def test_a_condition_unlike_null_is_named():
    guided = fs.guidance.ClassifierFree(FLOW, 2.0, null=NULL)
    with pytest.raises(ValueError, match="null is int32"):
        guided.velocity(T, X, jnp.ones(3))
    with pytest.raises(ValueError, match="condition args of None"):
        guided.velocity(T, X)
