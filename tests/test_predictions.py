"""Every conversion between predictions, on every path, against closed forms in float64.

The condition number. A conversion is

    out = [(a b2 - a2 b) x + (a2 sigma - b2 alpha) c o] / [c2 (a sigma - b alpha)],

so in floating point it cannot be better than one ulp of each of its terms, nor than what one ulp of t does to it:

    cond ulp |out| = ulp S + T,
    S = (|a b2 x| + |a2 b x| + |a2 sigma c o| + |b2 alpha c o|) / |c2 (a sigma - b alpha)|,   element by element,
    T = the change of out at the same x and o when t moves by one ulp (to the inside, at the ends),

with ulp = 2^-23. The tests ask for |error| <= 8 (ulp S + T) in the whole closed interval; `python
tests/test_predictions.py` prints the worst |error| / (ulp S + T) of each path.
"""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import PATHS, PREDICTIONS, REFERENCES, TARGETS, mixture_truth, times

from flowsolve.predictions import AbstractPrediction, combine, conversion_weights, convert
from flowsolve.testing import GaussianMixture

ULP = 2.0**-23
NAMES = list(PREDICTIONS)
PAIRS = [(source, target) for source in NAMES for target in NAMES if source != target]
# What has no finite value: (source, target) where alpha = 0, and where sigma = 0.
SINGULAR_AT_NO_DATA = {(s, t) for s in ("noise", "score") for t in ("data", "velocity", "v")}
SINGULAR_AT_NO_NOISE = {("data", t) for t in ("noise", "velocity", "v", "score")} | {
    (s, "score") for s in ("noise", "velocity", "v")
}


@functools.cache
def converter(name):
    """All 20 conversions on one path, compiled once: times (n,), x and outputs (n, d) -> values and gradients.

    The gradients in (t, x, outputs) are those of the sum of every finite value: one nan in them is one too many.
    """
    path = PATHS[name]
    # `convert` of every pair at once: its two steps, vectorised over sources and targets, compile in a fraction of
    # the time. That they are what `convert` does is tested below, pair by pair.
    weights = jax.vmap(jax.vmap(conversion_weights, (None, None, None, 0)), (None, None, 0, None))
    mix = jax.vmap(jax.vmap(combine, (0, None, None)), (0, None, 0))

    def one(t, x, outputs):
        def total(t, x, outputs):
            triples = [prediction.coefficients(path, t) for prediction in PREDICTIONS.values()]
            triples = jax.tree.map(lambda *leaves: jnp.stack(leaves), *triples)
            found = mix(weights(path, t, triples, triples), x, jnp.stack([outputs[name] for name in NAMES]))
            return jnp.sum(jnp.where(jnp.isfinite(found), found, 0.0)), found

        grads, found = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(t, x, outputs)
        return found, grads

    compiled = jax.jit(jax.vmap(one))

    def call(t, x, outputs):
        found, grads = compiled(t, x, outputs)
        return {(s, o): np.asarray(found)[:, NAMES.index(s), NAMES.index(o)] for s, o in PAIRS}, grads

    return call


def coefficients(name, prediction, t):
    """(a, b, c) and (alpha, sigma) in float64."""
    alpha, sigma, d_alpha, d_sigma = REFERENCES[name](t)
    one, zero = np.ones_like(t), np.zeros_like(t)
    table = {
        "data": (one, zero, one),
        "noise": (zero, one, one),
        "velocity": (d_alpha, d_sigma, one),
        "v": (-sigma, alpha, one),
        "score": (zero, -one, sigma),
    }
    return table[prediction], (alpha, sigma)


@functools.cache
def examples(name, target, count=24):
    """Times (n,), x (n, d) in float32, drawn from p_t, and the exact predictions there in float64."""
    t = times(name, count)
    alpha, sigma, d_alpha, d_sigma = REFERENCES[name](np.float64(t))
    weights, means, covariances = TARGETS[target]
    rng = np.random.default_rng(len(t))
    xs, exact = [], {name: [] for name in NAMES}
    for a, s, da, ds in zip(alpha, sigma, d_alpha, d_sigma, strict=True):
        k = rng.choice(len(weights), p=weights)
        data = rng.multivariate_normal(means[k], covariances[k])
        x = np.float64(np.float32(a * data + s * rng.normal(size=3)))
        data, noise, score, _ = mixture_truth(a, s, x, weights, means, covariances)
        xs.append(x)
        values = {
            "data": data,
            "noise": noise,
            "velocity": da * data + ds * noise,
            "v": a * noise - s * data,
            "score": score,
        }
        for key, value in values.items():
            exact[key].append(value)
    return t, np.array(xs, np.float32), {key: np.array(value) for key, value in exact.items()}


def error_unit(name, source, target, t, x, o):
    """ulp S + T of the module's docstring, (n, d), all in float64."""

    def terms(t):
        (a, b, c), (alpha, sigma) = coefficients(name, source, t)
        (a2, b2, c2), _ = coefficients(name, target, t)
        below = c2 * (a * sigma - b * alpha)
        return [
            (weight / below)[:, None] * value
            for weight, value in [
                (a * b2, x),
                (-a2 * b, x),
                (a2 * sigma * c, o),
                (-b2 * alpha * c, o),
            ]
        ]

    t64 = np.float64(t)
    here = terms(t64)
    inside = np.where(t == t[-1], np.nextafter(t, t[0]), np.nextafter(t, np.float32(np.inf)))
    moved = terms(np.float64(inside))
    size = sum(np.abs(term) for term in here)
    drift = np.abs(sum(moved) - sum(here))
    return ULP * size, np.where(np.isfinite(drift), drift, 0.0)


def is_regular(name, source, target, t):
    """(n,) booleans: where the conversion has a finite value."""
    alpha, sigma, *_ = REFERENCES[name](np.float64(t))
    bad = (alpha == 0) & ((source, target) in SINGULAR_AT_NO_DATA)
    return ~(bad | ((sigma == 0) & ((source, target) in SINGULAR_AT_NO_NOISE)))


def ratios(name, target_name, source, target, found):
    """|error| / (ulp S + T) of one conversion at all times, the same with T left out, and the condition number."""
    t, x, exact = examples(name, target_name)
    o = np.float64(np.float32(exact[source]))
    regular = is_regular(name, source, target, t)
    truth = exact[target][regular]
    with np.errstate(divide="ignore", invalid="ignore"):
        size, drift = error_unit(name, source, target, t, np.float64(x), o)
    error = np.abs(np.float64(found)[regular] - truth)
    error[np.isnan(error)] = np.inf
    # 0/0 where noise and score are known from each other although alpha = 0.
    size = np.where(np.isfinite(size), size, ULP * np.abs(exact[target]))[regular] + 1e-30
    unit = size + drift[regular]
    condition = np.linalg.norm(unit, axis=1) / (ULP * np.linalg.norm(truth, axis=1) + 1e-30)
    return error / unit, error / size, condition


def float32(values):
    return {key: np.float32(value) for key, value in values.items()}


def worst_conversion_errors(names=tuple(PATHS)):
    """Path -> the largest |error| / (ulp S + T) of all conversions of all targets, and with T left out."""
    found = {}
    for name in names:
        rows = []
        for target_name in TARGETS:
            t, x, exact = examples(name, target_name)
            values, _ = converter(name)(t, x, float32(exact))
            for source, target in PAIRS:
                with_t, without_t, _ = ratios(name, target_name, source, target, values[source, target])
                rows.append((with_t.max(), without_t.max(), f"{source} -> {target}, {target_name}"))
        found[name] = (max(rows)[0], max(row[1] for row in rows), max(rows)[2])
    return found


def check_worst(name):
    with_t, without_t, where = worst_conversion_errors((name,))[name]
    print(f"{name:20s} {with_t:6.2f} ulp x condition ({without_t:6.2f} without ulp(t)); {where}")
    return with_t


@pytest.mark.parametrize("name", PATHS)
def test_conversions_are_as_good_as_their_condition_number(name):
    """All pairs, all targets, the closed interval: 8 ulp times the condition number."""
    assert check_worst(name) <= 8


@pytest.mark.parametrize("name", PATHS)
def test_never_nan_at_the_ends(name):
    """Values and gradients in x, the output and t, under jit: finite where the value is, inf where there is none."""
    t, x, exact = examples(name, "mixture")
    values, gradients = converter(name)(t, x, float32(exact))
    for source, target in PAIRS:
        regular = is_regular(name, source, target, t)
        assert np.isfinite(values[source, target][regular]).all(), (source, target)
        assert np.isposinf(values[source, target][~regular]).all(), (source, target)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), gradients))


@pytest.mark.parametrize("name", PATHS)
def test_round_trips(name):
    """There and back: the error of the way back, and that of the way there carried through it."""
    t, x, exact = examples(name, "gaussian")
    x64 = np.float64(x)
    outputs = float32(exact)
    there, _ = converter(name)(t, x, outputs)
    for source in NAMES:
        others = [target for target in NAMES if target != source]
        middle = {target: there[source, target] for target in others}
        back, _ = converter(name)(t, x, {**middle, source: outputs[source]})
        for target in others:
            use = is_regular(name, source, target, t) & is_regular(name, target, source, t)
            # Noise and score at alpha = 0: the general formula, which gives the bound, is 0/0 there.
            use &= REFERENCES[name](np.float64(t))[0] > 0
            o, m = np.float64(outputs[source]), np.float64(middle[target])
            with np.errstate(divide="ignore", invalid="ignore"):
                first = sum(error_unit(name, source, target, t, x64, o))
                second = sum(error_unit(name, target, source, t, x64, m))
                (a, b, c), (alpha, sigma) = coefficients(name, target, np.float64(t))
                (a2, b2, c2), _ = coefficients(name, source, np.float64(t))
                carried = np.abs((a2 * sigma - b2 * alpha) * c / (c2 * (a * sigma - b * alpha)))[:, None] * first
            error = np.abs(np.float64(back[target, source]) - o)[use]
            assert (error <= 8 * (second + carried)[use]).all(), (source, target)


@functools.cache
def oracle_outputs(name):
    """The float32 outputs of an oracle's flow of every prediction on one path, compiled once."""

    def one(oracle, t, x):
        return {key: oracle.flow(PATHS[name], p).output(t, x) for key, p in PREDICTIONS.items()}

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))


def mixture(target_name):
    """The target as an oracle; a Gaussian with two more components of weight 0, to share the compiled function."""
    weights, means, covariances = TARGETS[target_name]
    copies = 3 // len(weights)
    weights = np.concatenate([weights, np.zeros(3 - len(weights))])
    return GaussianMixture(weights, jnp.float32(np.tile(means, (copies, 1))), np.tile(covariances, (copies, 1, 1)))


@pytest.mark.parametrize("name", PATHS)
def test_flows_of_every_prediction_agree_with_the_truth(name):
    """float32 from the oracle's output to each quantity: 1e-5 relative where the condition number is below 10."""
    for target_name in ("gaussian", "mixture"):
        t, x, exact = examples(name, target_name)
        outputs = oracle_outputs(name)(mixture(target_name), t, x)
        values, _ = converter(name)(t, x, outputs)
        well = total = 0
        for source, target in PAIRS:
            regular = is_regular(name, source, target, t)
            condition = ratios(name, target_name, source, target, values[source, target])[2]
            truth = exact[target][regular]
            error = np.linalg.norm(np.float64(values[source, target])[regular] - truth, axis=1)
            allowed = 1e-5 * np.linalg.norm(truth, axis=1)
            assert (error <= allowed)[condition < 10].all(), (source, target, error, condition)
            well, total = well + (condition < 10).sum(), total + condition.size
        assert well > 0.6 * total, (well, total)


@pytest.mark.quick
def test_singular_conversions_raise_where_t_is_concrete():
    path, x = PATHS["linear"], jnp.ones(2)
    for prediction in PREDICTIONS.values():  # the same comes back, even where it could not be had from another
        assert convert(path, 0.0, x, x, prediction, prediction) is x
    for source, target in PAIRS:
        for t, singular in ((0.0, SINGULAR_AT_NO_NOISE), (1.0, SINGULAR_AT_NO_DATA), (0.5, ())):
            call = functools.partial(convert, path, t, x, x, PREDICTIONS[source], PREDICTIONS[target])
            if (source, target) in singular:
                with pytest.raises(ValueError, match=rf"cannot be had from .* t = {t:g}, where alpha"):
                    call()
            else:
                assert jnp.isfinite(call()).all()


@pytest.mark.quick
def test_beyond_the_ends_is_inf_or_an_error():
    """VP's velocity coefficients are infinite at t = 0, which is outside of its ends: still no nan."""
    path, x = PATHS["vp"], jnp.ones(2)
    v, velocity = PREDICTIONS["v"], PREDICTIONS["velocity"]
    with pytest.raises(ValueError, match="Velocity cannot be had from V"):
        convert(path, 0.0, x, x, v, velocity)
    assert jnp.isposinf(jax.jit(lambda t: convert(path, t, x, x, v, velocity))(0.0)).all()


class Residual(AbstractPrediction):
    """A user's own: o = (x_0 - eps)/2, whose coefficients are not normalised."""

    time_reversal_sign: ClassVar[int] = 1

    def coefficients(self, path, t):
        del path
        return jnp.ones_like(t), -jnp.ones_like(t), 2 * jnp.ones_like(t)


@pytest.mark.quick
def test_a_prediction_of_ones_own():
    path, t = PATHS["vp"], 0.3
    rng = np.random.default_rng(0)
    data, noise = jnp.float32(rng.normal(size=(2, 4)))
    x = path.interpolate(t, data, noise)
    output = (data - noise) / 2
    np.testing.assert_allclose(convert(path, t, x, output, Residual(), PREDICTIONS["data"]), data, rtol=1e-5)
    np.testing.assert_allclose(convert(path, t, x, noise, PREDICTIONS["noise"], Residual()), output, rtol=1e-5)


@pytest.mark.quick
def test_definitions():
    """Each prediction of a given pair (x_0, eps), on a path where nothing is 0 or 1."""
    path, t, data, noise = PATHS["sub_vp"], 0.4, 1.7, -0.6
    alpha, sigma, d_alpha, d_sigma = REFERENCES["sub_vp"](np.float64(t))
    expected = {
        "data": data,
        "noise": noise,
        "velocity": d_alpha * data + d_sigma * noise,
        "v": alpha * noise - sigma * data,
        "score": -noise / sigma,
    }
    x = jnp.asarray(alpha * data + sigma * noise)
    for source, target in PAIRS:
        found = convert(path, t, x, jnp.asarray(expected[source]), PREDICTIONS[source], PREDICTIONS[target])
        assert found == pytest.approx(expected[target], rel=2e-5)
    outputs = {key: np.full((1, 1), value, np.float32) for key, value in expected.items()}
    values, _ = converter("sub_vp")(np.float32([t]), np.full((1, 1), x, np.float32), outputs)
    for source, target in PAIRS:
        assert values[source, target] == pytest.approx(expected[target], rel=2e-5)


def test_pytrees_and_dtypes(x64):
    """A pytree comes back as it went in, float64 and float32 leaves side by side."""
    x = {"a": jnp.ones((2, 3)), "b": [jnp.ones((), jnp.float32)]}
    found = convert(PATHS["vp"], 0.5, x, x, PREDICTIONS["v"], PREDICTIONS["velocity"])
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), x
    )


if __name__ == "__main__":
    for path_name in PATHS:
        check_worst(path_name)
