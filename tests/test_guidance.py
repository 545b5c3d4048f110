"""Guidance on the labelled mixture: every wrapper against its paper's formula, in float64 numpy, and in use.

`KINDS` is the table of all wrappers. Each comes with the denoised prediction that its paper states, written from c and
u, the conditional and the unconditional one; a new wrapper gets a row, and with it all checks below.
"""

import functools
import itertools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import REFERENCES, gaussian_truth, mixture_truth

import flowsolve as fs
from flowsolve import guidance, paths, predictions

MEANS = np.array([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]])
WEIGHTS, VARIANCES = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.3])
WEAK_MEAN, WEAK_VARIANCE = np.array([0.3, -0.2]), 0.8
CENTRE = np.array([1.0, 1.0])
#: The oracle takes any negative label for the whole mixture.
NULL = jnp.asarray(-1, jnp.int32)
X, T, LABEL = jnp.array([0.3, -0.4]), 0.6, jnp.asarray(1)


def oracle():
    return fs.testing.GaussianMixture(WEIGHTS, MEANS, VARIANCES)


def exact_classifier(path):
    """Logits ln p(label, x_t) of the mixture, for the whole of which the flow is called with no label."""

    def classifier(t, x, args, *, key=None):
        given = jax.vmap(lambda label: oracle().log_prob(path, t, x, label))(jnp.arange(3))
        return given + jnp.log(jnp.asarray(WEIGHTS, x.dtype))

    return classifier


class Picked(fs.flow.AbstractFlowWrapper):
    """The flow for args = (label, label): only `Composed` takes both."""

    flow: fs.AbstractFlow

    def output(self, t, x, args=None, *, key=None):
        return self.flow.output(t, x, args[0], key=key)


# --- the table ----------------------------------------------------------------------------------------------------


class Point:
    """One (t, x) on a path, with every prediction of the mixture there, in float64."""

    def __init__(self, path_name, t, x, labels):
        self.t = float(t)
        self.alpha, self.sigma, self.d_alpha, self.d_sigma = (float(v) for v in REFERENCES[path_name](np.float64(t)))
        self.x = np.float64(x)
        self.c = self.denoised([labels[0]])
        self.other = self.denoised([labels[1]])
        self.u = self.denoised([0, 1, 2])
        self.weak = gaussian_truth(self.alpha, self.sigma, self.x, WEAK_MEAN, WEAK_VARIANCE * np.eye(2))[0]

    def denoised(self, labels):
        covariances = [VARIANCES[k] * np.eye(2) for k in labels]
        weights = WEIGHTS[labels] / WEIGHTS[labels].sum()
        return mixture_truth(self.alpha, self.sigma, self.x, weights, MEANS[labels], covariances)[0]

    def noise(self, data):
        return (self.x - self.alpha * data) / self.sigma

    def v(self, data):
        return self.alpha * self.noise(data) - self.sigma * data

    def from_v(self, v):
        return (self.alpha * self.x - self.sigma * v) / (self.alpha**2 + self.sigma**2)

    def velocity(self, data):
        return self.d_alpha * data + self.d_sigma * self.noise(data)

    def from_velocity(self, velocity):
        return (self.sigma * velocity - self.d_sigma * self.x) / (self.d_alpha * self.sigma - self.d_sigma * self.alpha)

    def progress(self, path):
        return (path.t_noise - self.t) / (path.t_noise - path.t_data)


def cfg(p, scale, weak=None):
    u = p.u if weak is None else weak
    return u + scale * (p.c - u)


def apg(p, scale, eta, radius, u):
    difference = p.c - u
    difference = difference * min(1, radius / np.linalg.norm(difference))
    unit = p.c / np.linalg.norm(p.c)
    parallel = sum(d * e for d, e in zip(difference, unit, strict=True)) * unit
    return p.c + (scale - 1) * (difference - parallel + eta * parallel)


def rescaled(p, scale, phi):
    guided = p.v(cfg(p, scale))
    return p.from_v(phi * guided * np.std(p.v(p.c)) / np.std(guided) + (1 - phi) * guided)


def zero_star(p, scale, above):
    c, u = p.velocity(p.c), p.velocity(p.u)
    star = (c @ u) / (u @ u)
    return p.from_velocity(0 * c if p.t > above else (1 - scale) * star * u + scale * c)


def dynamic(data, quantile, bound):
    sizes = np.sort(np.abs(data))
    position = quantile * (len(sizes) - 1)
    low = int(np.floor(position))
    q = sizes[low] + (position - low) * (sizes[min(low + 1, len(sizes) - 1)] - sizes[low])
    limit = max(q, bound)
    return np.array([min(max(element, -limit), limit) * bound / limit for element in data])


def middle(path):
    """A time and a noise level inside the path, between two of `TIMES`."""
    return {"Linear": 0.5, "VP": 0.4, "EDM": 1.0}[type(path).__name__]


def inside(p, path, variable=lambda p: p.t):
    return middle(path) / 4 <= variable(p) <= 2 * middle(path)


def interval(path, variable=guidance.time):
    return guidance.Interval(3.0, middle(path) / 4, 2 * middle(path), variable=variable)


def unconditional(flow):
    return guidance.ClassifierFree(flow, 0.0, NULL)


def weak(path):
    """It predicts another quantity than the flow."""
    return fs.testing.Gaussian(WEAK_MEAN, WEAK_VARIANCE).flow(path, predictions.V())


def pull(t, x, args, *, key=None):
    """An energy, and not one that fades with the data."""
    return -0.5 * jnp.sum((x - jnp.asarray(CENTRE, x.dtype)) ** 2)


def pushing(t, x, args, *, key=None):
    return jnp.asarray([0.2, -0.1], x.dtype) * (1 + t)


def cfg_plus_plus_scale(p, path):
    grid = sorted((float(t) for t in fs.grids.Power(5)(path)), reverse=True)
    for start, end in itertools.pairwise(grid):
        if end < p.t <= start:
            (a_t, s_t), (a_s, s_s) = ([float(v) for v in path.coefficients(jnp.asarray(t))] for t in (start, end))
            return 0.6 / (1 - a_t * s_s / (a_s * s_t))
    raise AssertionError(p.t)


CFG = functools.partial(guidance.ClassifierFree, null=NULL)
# name -> (flow -> guided flow, (point, path) -> its denoised prediction)
KINDS = {
    "cfg": (lambda flow: CFG(flow, 3.0), lambda p, path: cfg(p, 3)),
    "cfg_two_calls": (lambda flow: CFG(flow, 3.0, batched=False), lambda p, path: cfg(p, 3)),
    "cfg_from_weight": (
        lambda flow: guidance.ClassifierFree.from_weight(flow, 0.7, NULL),
        lambda p, path: 1.7 * p.c - 0.7 * p.u,
    ),
    "interval": (
        lambda flow: CFG(flow, interval(flow.path), batched=False),
        lambda p, path: cfg(p, 3 if inside(p, path) else 1),
    ),
    "interval_in_noise": (
        lambda flow: CFG(flow, interval(flow.path, guidance.noise_level)),
        lambda p, path: cfg(p, 3 if inside(p, path, lambda p: p.sigma / p.alpha) else 1),
    ),
    "linear": (lambda flow: CFG(flow, guidance.Linear(0.5, 4.0)), lambda p, path: cfg(p, 0.5 + 3.5 * p.progress(path))),
    "cosine": (
        lambda flow: CFG(flow, guidance.Cosine(0.0, 4.0)),
        # 2404.13040's (cos(pi t/T) + 1) times 2.
        lambda p, path: cfg(p, 2 * (np.cos(np.pi * (1 - p.progress(path))) + 1)),
    ),
    "cfg_plus_plus": (
        lambda flow: CFG(flow, guidance.CFGPlusPlus(0.6, fs.grids.Power(5)(flow.path))),
        lambda p, path: cfg(p, cfg_plus_plus_scale(p, path)),
    ),
    "rescaled": (
        lambda flow: CFG(flow, 4.0, rule=guidance.Rescaled(0.6)),
        lambda p, path: rescaled(p, 4, 0.6),
    ),
    "projected": (
        lambda flow: CFG(flow, 5.0, rule=guidance.Projected(0.2, radius=0.3)),
        lambda p, path: apg(p, 5, 0.2, 0.3, p.u),
    ),
    "projected_unlimited": (
        lambda flow: CFG(flow, 5.0, rule=guidance.Projected(), batched=False),
        lambda p, path: apg(p, 5, 0, np.inf, p.u),
    ),
    "zero_star": (
        lambda flow: CFG(flow, 2.5, rule=guidance.ZeroStar(2.5 * middle(flow.path) if flow.path.t_noise > 2 else 0.9)),
        lambda p, path: zero_star(p, 2.5, 2.5 * middle(path) if path.t_noise > 2 else 0.9),
    ),
    "autoguidance": (
        lambda flow: guidance.Autoguidance(flow, weak(flow.path), 2.0),
        lambda p, path: cfg(p, 2, p.weak),
    ),
    "autoguidance_projected": (
        lambda flow: guidance.Autoguidance(flow, weak(flow.path), 2.0, rule=guidance.Projected(0.5)),
        lambda p, path: apg(p, 2, 0.5, np.inf, p.weak),
    ),
    "composed": (
        lambda flow: guidance.Composed(flow, [1.5, -0.5], NULL),
        lambda p, path: p.u + 1.5 * (p.c - p.u) - 0.5 * (p.other - p.u),
    ),
    "composed_one_by_one": (
        lambda flow: guidance.Composed(flow, [1.0, 1.0], NULL, batched=False),
        lambda p, path: p.c + p.other - p.u,
    ),
    "classifier": (
        lambda flow: guidance.AddedScore.from_classifier(unconditional(flow), exact_classifier(flow.path), 2.0),
        lambda p, path: cfg(p, 2),
    ),
    "energy_and_score": (
        lambda flow: guidance.AddedScore(
            guidance.AddedScore(flow, guidance.Gradient(pull), guidance.Interval(0.5, 0.0, 0.99, outside=0.0)), pushing
        ),
        lambda p, path: p.c + p.sigma**2 / p.alpha
        * (0.5 * (CENTRE - p.x) * (p.t <= 0.99) + np.array([0.2, -0.1]) * (1 + p.t)),
    ),
    "clip": (
        lambda flow: guidance.Thresholded(CFG(flow, 3.0), guidance.Clip(-0.7, 0.8)),
        lambda p, path: np.array([min(max(element, -0.7), 0.8) for element in cfg(p, 3)]),
    ),
    "dynamic": (
        lambda flow: guidance.Thresholded(CFG(flow, 3.0), guidance.DynamicThreshold(0.4, bound=0.6)),
        lambda p, path: dynamic(cfg(p, 3), 0.4, 0.6),
    ),
    "nested": (
        lambda flow: guidance.AddedScore(
            guidance.Thresholded(CFG(flow, 4.0, rule=guidance.Rescaled(0.6)), guidance.Clip()), pushing, 0.3
        ),
        lambda p, path: np.clip(rescaled(p, 4, 0.6), -1, 1)
        + 0.3 * p.sigma**2 / p.alpha * np.array([0.2, -0.1]) * (1 + p.t),
    ),
}  # fmt: skip


def guided(kind, flow):
    """A row's flow, for args = (label, label)."""
    made = KINDS[kind][0](flow)
    return made if isinstance(made, guidance.Composed) else Picked(made)


PATHS = {"linear": paths.Linear(), "vp": paths.VP(), "edm": paths.EDM()}
TIMES = {"linear": [0.04, 0.3, 0.7, 0.95], "vp": [0.03, 0.3, 0.7, 0.95], "edm": [0.05, 0.4, 1.5, 9.0]}
LABELS = [[1, 0], [0, 2], [2, 1], [1, 2]]


@pytest.mark.parametrize(
    ("path_name", "prediction"),
    [("linear", predictions.Velocity()), ("vp", predictions.Score()), ("edm", predictions.Data())],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_wrapper_is_its_papers_formula(path_name, prediction, x64):
    """And consistent: its velocity, noise and score are those of its denoised prediction."""
    path = PATHS[path_name]
    flow = oracle().flow(path, prediction)

    @jax.jit
    @jax.vmap
    def everything(t, x, labels):
        def values(kind):
            made = guided(kind, flow)
            output = made.output(t, x, labels)
            converted = (fs.convert(path, t, x, output, prediction, target) for target in (
                predictions.Data(), predictions.Velocity(), predictions.Noise(), predictions.Score()
            ))  # fmt: skip
            return tuple(converted)

        return {kind: values(kind) for kind in KINDS}

    rng = np.random.default_rng(3)
    times = jnp.asarray(TIMES[path_name], float)
    alpha, sigma = jax.vmap(path.coefficients)(times)
    x = alpha[:, None] * rng.normal(size=(4, 2)) + sigma[:, None] * rng.normal(size=(4, 2))
    found = everything(times, x, jnp.asarray(LABELS, jnp.int32))
    for i in range(4):
        p = Point(path_name, times[i], x[i], LABELS[i])
        for kind, (_, formula) in KINDS.items():
            data = formula(p, path)
            wanted = data, p.velocity(data), p.noise(data), -p.noise(data) / p.sigma
            for value, truth in zip(found[kind], wanted, strict=True):
                tolerance = 1e-7 * max(1, np.abs(truth).max())
                np.testing.assert_allclose(value[i], truth, rtol=1e-6, atol=tolerance, err_msg=f"{kind} {times[i]}")


# --- scales -------------------------------------------------------------------------------------------------------


class Counted(fs.flow.AbstractFlowWrapper):
    """A flow that keeps count of its evaluations, by the label that each was asked for."""

    flow: fs.AbstractFlow
    calls: list = eqx.field(static=True)

    def output(self, t, x, args=None, *, key=None):
        jax.debug.callback(lambda label: self.calls.append(int(label)), args)
        return self.flow.output(t, x, args, key=key)


def counting():
    calls = []
    return Counted(oracle().flow(paths.Linear(), predictions.Velocity()), calls), calls


@pytest.mark.quick
def test_scale_zero_is_unconditional_and_one_conditional():
    """The convention u + scale (c - u), which others write 1 + w: to the last bit, and then with one evaluation."""
    flow, calls = counting()
    conditional, unconditional = flow.velocity(T, X, LABEL), flow.velocity(T, X, NULL)
    assert not np.allclose(conditional, unconditional, atol=0.1)
    p = Point("linear", T, X, [1, 0])
    for scale, wanted_calls in [(0.0, [-1]), (1.0, [1]), (3.0, [-1, 1]), (jnp.asarray(1.0), [1])]:
        for batched in (True, False):
            made = CFG(flow, scale, batched=batched)
            jax.effects_barrier()
            calls.clear()
            found = made.velocity(T, X, LABEL)
            jax.effects_barrier()
            assert sorted(calls) == wanted_calls, (scale, batched)
            exact = {0.0: unconditional, 1.0: conditional}.get(float(scale))
            if exact is not None:
                np.testing.assert_array_equal(found, exact)
            truth = p.velocity(cfg(p, float(scale)))
            np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)
            print(f"scale {float(scale)}: off the closed form by {np.abs(found - truth).max():.1e}, {len(calls)} calls")
    # A scale of 1 or 0 is known under a jit as well, where it was given as a number.
    for scale, wanted_calls in [(0.0, [-1]), (1.0, [1])]:
        calls.clear()
        eqx.filter_jit(CFG(flow, scale).velocity)(T, X, LABEL)
        jax.effects_barrier()
        assert calls == wanted_calls
    with pytest.raises(AssertionError):  # a wrong convention would be seen
        np.testing.assert_allclose(p.velocity(cfg(p, 2)), p.velocity(cfg(p, 3)), rtol=1e-5)


@pytest.mark.parametrize("rule", [None, guidance.Rescaled(), guidance.Projected(radius=0.1), guidance.ZeroStar()])
def test_a_traced_scale_of_one_or_zero_is_exact_too(rule):
    flow = oracle().flow(paths.Linear(), predictions.Velocity())
    two_labels = jnp.stack([LABEL, NULL])

    @jax.jit
    def values(scales):
        batched, alone = (
            jax.lax.map(lambda s, b=b: CFG(flow, s, rule=rule, batched=b).velocity(T, X, LABEL), scales)
            for b in (True, False)
        )
        return (
            batched,
            alone,
            jax.vmap(lambda label: flow.velocity(T, X, label))(two_labels),
            flow.velocity(T, X, LABEL),
        )

    batched, alone, pair, conditional = values(jnp.asarray([1.0, 0.0]))
    np.testing.assert_array_equal(batched[0], pair[0])
    np.testing.assert_array_equal(alone[0], conditional)
    if rule is None:
        np.testing.assert_array_equal(batched[1], pair[1])


def test_off_the_interval_no_second_network_is_evaluated():
    """On a grid that the examples of a batch share, at run time; and what comes out is the conditional flow."""
    flow, calls = counting()
    made = CFG(flow, guidance.Interval(3.0, 0.35, 0.65), batched=False)
    settings = {"num": 2, "key": jax.random.key(0), "args": jnp.stack([LABEL, LABEL])}
    fs.sample(made, oracle().like, solver=fs.solvers.DDIM(), grid=fs.grids.Uniform(10), **settings)
    jax.effects_barrier()
    assert calls.count(1) == 20  # two examples, ten steps, from t = 1, 0.9, ..., 0.1
    assert calls.count(-1) == 3  # at 0.6, 0.5 and 0.4, where the null is one for both
    for t in (0.2, 0.8):
        np.testing.assert_array_equal(made.velocity(t, X, LABEL), flow.velocity(t, X, LABEL))
    assert not np.allclose(made.velocity(0.5, X, LABEL), flow.velocity(0.5, X, LABEL), atol=0.1)


def test_new_scales_do_not_retrace():
    flow = oracle().flow(paths.Linear(), predictions.Velocity())

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def velocities(*flows):
        labels = jnp.stack([LABEL, LABEL])
        return [Picked(f).velocity(T, X, labels) for f in flows[:-1]], flows[-1].velocity(T, X, labels)

    for s in (2.0, 3.5, np.float32(7)):
        velocities(
            CFG(flow, s),
            CFG(flow, s, rule=guidance.Rescaled(s / 10)),
            CFG(flow, guidance.Interval(s, 0.1 * s, 0.2 * s), rule=guidance.Projected(s / 10, radius=s)),
            CFG(flow, guidance.Linear(0, s), rule=guidance.ZeroStar(s / 10)),
            CFG(flow, guidance.CFGPlusPlus(s / 10, jnp.asarray([1.0, 0.5, 0.1]))),
            guidance.Autoguidance(flow, weak(flow.path), s),
            guidance.AddedScore(flow, pushing, s),
            guidance.Thresholded(flow, guidance.Clip(-s, s)),
            guidance.Thresholded(flow, guidance.DynamicThreshold(s / 10, s)),
            guidance.Composed(flow, [s, -s], NULL),
        )


# --- energies and products ----------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_exact_classifier_gives_the_conditional_score():
    """Per example: the other examples of a batch have no part in it (pitfall 27)."""
    path = paths.VP()
    flow = oracle().flow(path, predictions.Noise())
    made = guidance.AddedScore.from_classifier(unconditional(flow), exact_classifier(path))
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.normal(size=(12, 2)), jnp.float32), jnp.asarray(rng.integers(0, 3, 12), jnp.int32)
    times = jnp.linspace(0.05, 1, 12)
    found = jax.jit(jax.vmap(made.score))(times, x, labels)
    truth = jax.jit(jax.vmap(functools.partial(oracle().score, path)))(times, x, labels)
    error = np.abs(found - truth).max() / np.abs(truth).max()
    print(f"score with the exact classifier off the conditional one by {error:.1e} of the largest")
    assert error < 1e-5
    others = jax.jit(jax.vmap(made.score))(times, x.at[:3].add(5), labels.at[:3].set(0))
    np.testing.assert_array_equal(found[3:], others[3:])


def test_guided_score_is_that_of_the_tilted_density():
    """score_u + s (score_c - score_u) = grad [ln p + s ln p(label|x)], by differentiating the densities."""
    scale, path = 2.5, paths.Linear()
    guided = CFG(oracle().flow(path, predictions.Velocity()), scale)

    def tilted(x):
        marginal, conditional = (oracle().log_prob(path, T, x, label) for label in (None, LABEL))
        return marginal + scale * (conditional - marginal)

    np.testing.assert_allclose(guided.score(T, X, LABEL), jax.grad(tilted)(X), rtol=1e-4)


def test_a_product_of_gaussian_conditions_is_a_gaussian():
    """Every condition a Gaussian: so is p_u prod (p_k/p_u)^s_k, with precisions that add up. Also at sigma = 0."""
    variances = np.array([[0.5, 0.2], [0.3, 0.6], [1.5, 1.2]])
    flow = fs.testing.GaussianMixture(np.ones(3), MEANS, variances).flow(paths.Linear(), predictions.Velocity())
    scales = np.array([1.0, 0.7])
    # The last component plays the unconditional one.
    made = guidance.Composed(flow, scales, jnp.asarray(2, jnp.int32))
    weights = np.array([1.0, 0.7, 1 - 1.7])[:, None]
    for t in (0.02, 0.4, 0.9):
        precisions = 1 / ((1 - t) ** 2 * variances + t**2)
        precision = (weights * precisions).sum(axis=0)
        mean = (weights * precisions * (1 - t) * MEANS).sum(axis=0) / precision
        found = made.score(t, X, jnp.asarray([0, 1], jnp.int32))
        np.testing.assert_allclose(found, -precision * (np.float64(X) - mean), rtol=2e-4, atol=1e-4)


def test_dynamic_threshold_takes_the_whole_of_one_example():
    """A pytree in a batch against a loop over its examples; one that is within bounds stays to the last bit."""
    rng = np.random.default_rng(5)
    size = np.array([0.1, 1.0, 3.0])
    batch = {"a": rng.normal(size=(3, 4)) * size[:, None], "b": rng.normal(size=(3, 2, 2)) * size[:, None, None]}
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), batch)
    found = jax.vmap(guidance.DynamicThreshold(0.7, 1.5))(batch)
    for i in range(3):
        flat = np.concatenate([np.ravel(np.float64(leaf[i])) for leaf in jax.tree.leaves(batch)])
        ours = np.concatenate([np.ravel(leaf[i]) for leaf in jax.tree.leaves(found)])
        np.testing.assert_allclose(ours, dynamic(flat, 0.7, 1.5), rtol=1e-6)
    np.testing.assert_array_equal(found["a"][0], batch["a"][0])


# --- in use -------------------------------------------------------------------------------------------------------


def test_the_sampler_of_cfg_plus_plus():
    """DDIM on the grid of the scale, against the steps of 2406.08070 (algorithm 2): renoised by the null noise."""
    path = paths.VP()
    flow = oracle().flow(path, predictions.Noise())
    grid = fs.grids.ThenClean(fs.grids.Power(6))
    times = np.float64(grid(path, None, 0.0))
    made = CFG(flow, guidance.CFGPlusPlus(0.7, grid(path, None, 0.0)))
    found = fs.solve(made, X, LABEL, solver=fs.solvers.DDIM(), grid=grid, t_end=0.0).ys[0]
    x = np.float64(X)
    for t, s in itertools.pairwise(times):
        p, q = (Point("vp", max(time, 1e-12), x, [1, 0]) for time in (t, s))
        mixed = p.noise(p.u) + 0.7 * (p.noise(p.c) - p.noise(p.u))
        data = (x - p.sigma * mixed) / p.alpha
        x = q.alpha * data + q.sigma * p.noise(p.u)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)


class Switched(fs.flow.AbstractFlowWrapper):
    """One of several flows, picked by an index that is traced: a whole table runs as one program."""

    flow: fs.AbstractFlow
    others: tuple
    index: jax.Array

    def output(self, t, x, args=None, *, key=None):
        branches = [lambda f=f: f.output(t, x, args, key=key) for f in (self.flow, *self.others)]
        return jax.lax.switch(self.index, branches)


LABEL_PAIR, X4 = jnp.asarray([1, 0], jnp.int32), jnp.array([0.6, -0.8, 0.3, 1.0])
MEANS4 = np.array([[-1.0, 0.0, 0.5, 0.2], [1.0, 0.5, -0.3, 0.8], [0.0, -1.0, 0.0, -0.5]])


def table_of_flows():
    """Index -> one of the flows, which have every wrapper among them. Of four elements: rules are not smooth in two."""
    path = paths.Linear()
    mixture = fs.testing.GaussianMixture(WEIGHTS, MEANS4, VARIANCES + 0.2)
    flow = mixture.flow(path, predictions.Velocity())
    worse = fs.testing.Gaussian(np.zeros(4), 1.2).flow(path, predictions.V())

    def classifier(t, x, args, *, key=None):
        return (1 - t) * x[:3]

    rescaled = CFG(flow, 2.0, rule=guidance.Rescaled())
    better = guidance.Autoguidance(rescaled, worse, 1.5)
    bounded = guidance.Thresholded(better, lambda data: 2 * jnp.tanh(data / 2))
    flows = {
        "projected": Picked(CFG(flow, guidance.Cosine(0.0, 3.0), rule=guidance.Projected(0.2), batched=False)),
        "zero_star": Picked(CFG(flow, 2.0, rule=guidance.ZeroStar())),
        "composed": guidance.Composed(flow, [1.5, -0.5], NULL),
        "nested": Picked(guidance.AddedScore.from_classifier(bounded, classifier, 0.5)),
    }
    names, flows = list(flows), list(flows.values())
    return names, lambda index: Switched(flows[0], tuple(flows[1:]), index)


HIGH, LOW = 0.9, 0.1
DIRECTION = jnp.array([0.5, -0.2, 0.7, 0.4])
NUDGED = jnp.stack([X4 + h * DIRECTION for h in (0.0, -0.02, 0.02)])


def test_every_solver_takes_them_all():
    """DDIM, UniPC and Tsit5 meet; a gradient through a solve is that of differences."""
    names, table = table_of_flows()
    tolerance = diffrax.PIDController(rtol=1e-5, atol=1e-5)

    @jax.jit
    @jax.vmap
    def results(index):
        def solved(x, **settings):
            return fs.solve(table(index), x, LABEL_PAIR, t_start=HIGH, t_end=LOW, **settings).ys[0]

        def ddim(x):
            return solved(x, solver=fs.solvers.DDIM(), grid=fs.grids.Uniform(40))

        return (
            solved(X4, solver=diffrax.Tsit5(), controller=tolerance),
            solved(X4, solver=fs.solvers.UniPC(order=3), grid=fs.grids.Uniform(40)),
            jax.vmap(ddim)(NUDGED),
            jax.grad(lambda x: jnp.sum(ddim(x) ** 2))(X4) @ DIRECTION,
        )

    tsit, unipc, nudged, slope = results(jnp.arange(len(names)))
    unipc, ddim = (np.abs(x - tsit).max(axis=1) for x in (unipc, nudged[:, 0]))
    squares = jnp.sum(nudged**2, axis=2)
    difference = (squares[:, 2] - squares[:, 1]) / 0.04
    for name, *errors, own, wanted in zip(names, unipc, ddim, slope, difference, strict=True):
        print(f"{name}: UniPC off Tsit5 by {errors[0]:.1e}, DDIM by {errors[1]:.1e}; slopes {own:.3f} {wanted:.3f}")
        assert errors[0] < 3e-3 and errors[1] < 4e-2, name
        np.testing.assert_allclose(own, wanted, rtol=0.01, atol=2e-3, err_msg=name)


class WithVariance(eqx.Module):
    """An output and a nu that depend on the condition: (args - x) t, and a fraction of x and args."""

    def __call__(self, t, x, args, *, key=None):
        label = args.astype(x.dtype)
        return (label - x) * t, jax.nn.sigmoid(x + label)


class GuidedWithVariance(eqx.Module):
    """By hand: the guided output, and nu of the condition."""

    network: WithVariance
    scale: float

    def __call__(self, t, x, args, *, key=None):
        conditional, nu = self.network(t, x, args)
        unconditional, _ = self.network(t, x, NULL)
        return unconditional + self.scale * (conditional - unconditional), nu


def test_a_guided_learned_variance_is_that_of_the_condition():
    """Also inside of two wrappers; without any variance it is refused by the name of the flow inside."""
    settings = {"solver": fs.solvers.Ancestral(fs.solvers.LearnedVariance()), "grid": fs.grids.Uniform(5)}
    path = paths.Linear()

    def sampled(flow):
        like = jax.ShapeDtypeStruct((2,), jnp.float32)
        labels = jnp.arange(6, dtype=jnp.int32) % 3
        return fs.sample(flow, like, num=6, key=jax.random.key(0), args=labels, **settings)

    flow = fs.flow.VarianceFlow(WithVariance(), path, predictions.Velocity())
    by_hand = fs.flow.VarianceFlow(GuidedWithVariance(WithVariance(), 2.5), path, predictions.Velocity())
    nested = guidance.Thresholded(CFG(flow, 2.5), guidance.Clip(-1e3, 1e3))
    want = sampled(by_hand)
    np.testing.assert_allclose(sampled(CFG(flow, 2.5)), want, atol=1e-5)
    np.testing.assert_allclose(sampled(nested), want, atol=1e-4)
    assert np.abs(want - sampled(flow)).max() > 0.1
    with pytest.raises(TypeError, match="LearnedVariance got a Flow, which predicts no variance"):
        sampled(CFG(fs.Flow(lambda t, x, args, *, key=None: x, path, predictions.Velocity()), 2.5))


def test_the_density_takes_them_all():
    """ln p against the change of variables along the flow."""
    names, table = table_of_flows()

    @jax.jit
    @jax.vmap
    def densities(index):
        settings = {"solver": diffrax.Heun(), "grid": fs.grids.Uniform(64), "t_start": LOW, "t_end": HIGH}
        return fs.log_prob(table(index), X4, LABEL_PAIR, divergence=fs.divergence.Exact(), **settings)

    @jax.jit
    @jax.vmap
    def by_change_of_variables(index):
        flow, h = table(index), (HIGH - LOW) / 64

        def step(x, t):
            a = flow.velocity(t, x, LABEL_PAIR)
            b = flow.velocity(t + h / 2, x + h / 2 * a, LABEL_PAIR)
            return x + h * flow.velocity(t + h / 2, x + h / 2 * b, LABEL_PAIR), None

        def noise(x):
            return jax.lax.scan(step, x, LOW + h * jnp.arange(64, dtype=jnp.float32))[0]

        z, jacobian = noise(X4), jax.jacfwd(noise)(X4)
        prior = -0.5 * jnp.sum((z / HIGH) ** 2) - 4 * np.log(HIGH * np.sqrt(2 * np.pi)).astype(np.float32)
        return prior + jnp.linalg.slogdet(jacobian)[1]

    indices = jnp.arange(len(names))
    for name, value, truth in zip(names, densities(indices), by_change_of_variables(indices), strict=True):
        print(f"{name}: ln p {value:.4f}, by change of variables {truth:.4f}")
        np.testing.assert_allclose(value, truth, atol=0.03, err_msg=name)


def test_ends_of_the_path():
    """On the closed interval everything is finite, derivatives too, and each output at an end is its limit there."""
    flow = oracle().flow(paths.Trigonometric(), predictions.Velocity())
    # Data within the thresholds, so that sigma = 0 is no jump for them.
    x = jnp.array([0.3, -0.4])
    singular = {"energy_and_score", "nested"}  # they do not fade with the data: infinite at alpha = 0 by nature
    kinds = [kind for kind in KINDS if kind not in ("zero_star", "interval", "interval_in_noise", "cfg_plus_plus")]

    @jax.jit
    @jax.vmap
    def outputs(t):
        def at(kind):
            return jax.jvp(lambda x: guided(kind, flow).output(t, x, LABEL_PAIR), (x,), (jnp.ones(2),))

        return {kind: at(kind) for kind in kinds}

    near = 1e-4
    found = outputs(jnp.asarray([0.0, near, 1 - near, 1.0]))
    for kind, values in found.items():
        for value in values:
            assert np.all(np.isfinite(value)), kind
            scale = 1 + np.abs(value).max()
            np.testing.assert_allclose(value[0], value[1], atol=3e-2 * scale, err_msg=f"{kind} at the data")
            if kind not in singular:
                np.testing.assert_allclose(value[3], value[2], atol=3e-2 * scale, err_msg=f"{kind} at the noise")


@pytest.mark.parametrize("zero_above", [None, 0.96])
def test_zero_star_of_a_score_at_the_data(zero_above):
    """All velocities are -x at t = 0 of `Linear`; the limit is s c + (1 - s) (u + x <c - u, x>/|x|^2)."""
    flow = oracle().flow(paths.Linear(), predictions.Score())
    made = CFG(flow, 3.0, rule=guidance.ZeroStar(zero_above))
    value, slope = jax.jit(jax.value_and_grad(lambda x: made.output(0.0, x, LABEL)[0]))(X)
    c, u, x = (np.float64(v) for v in (flow.output(0.0, X, LABEL), flow.output(0.0, X, NULL), X))
    np.testing.assert_allclose(value, (3 * c - 2 * (u + x * ((c - u) @ x) / (x @ x)))[0], rtol=1e-5)
    assert np.all(np.isfinite(slope))


def test_a_flow_without_a_score_is_mixed_but_given_none():
    """Mixtures of velocities need no score; what adds to one refuses."""
    source = fs.sources.CoupledNormal()

    def network(t, x, args, *, key=None):
        return jnp.tanh(x) * t + args.astype(x.dtype)

    flow = fs.Flow(network, paths.Linear(), predictions.Velocity(), source=source)
    c, u = np.tanh(np.float64(X)) * T + 1, np.tanh(np.float64(X)) * T - 1
    for made in (CFG(flow, 3.0), guidance.Thresholded(CFG(flow, 3.0), guidance.Clip(-50.0, 50.0))):
        np.testing.assert_allclose(made.velocity(T, X, LABEL), u + 3 * (c - u), rtol=1e-5)
        with pytest.raises(TypeError, match="score was asked of a flow whose source is CoupledNormal"):
            made.score(T, X, LABEL)
    with pytest.raises(TypeError, match=r"AddedScore, .*source is CoupledNormal"):
        guidance.AddedScore(flow, pushing)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_bad_input_is_named(untyped):
    flow = oracle().flow(paths.Linear(), predictions.Velocity())
    classified = guidance.AddedScore.from_classifier(
        unconditional(flow), lambda t, x, args, *, key=None: jnp.append(x, t)
    )
    label_of = guidance.LogProbability(lambda t, x, args, *, key=None: jnp.zeros(3))
    for error, message, call in [
        (ValueError, "null is int32", lambda: CFG(flow, 2.0).velocity(T, X, jnp.ones(3))),
        (ValueError, "condition args of None", lambda: CFG(flow, 2.0).velocity(T, X)),
        (ValueError, "null condition without arrays", lambda: guidance.ClassifierFree(flow, 2.0, None)),
        (ValueError, "low = 0.8 and high = 0.2.*low < high", lambda: guidance.Interval(2.0, 0.8, 0.2)),
        (ValueError, "low < high", lambda: guidance.Interval(2.0, 0.5, 0.5)),
        (ValueError, "times that do not decrease", lambda: guidance.CFGPlusPlus(0.5, jnp.asarray([0.0, 1.0]))),
        (ValueError, "two or more", lambda: guidance.CFGPlusPlus(0.5, jnp.asarray([1.0]))),
        (TypeError, "rule is the class Rescaled", lambda: CFG(flow, 2.0, rule=guidance.Rescaled)),
        (ValueError, "radius = 0", lambda: guidance.Projected(radius=0.0)),
        (ValueError, "one number a condition", lambda: guidance.Composed(flow, 2.0, NULL)),
        (
            ValueError,
            r"2 conditions args of int32\[3\], but its null is int32\[2\]",
            lambda: guidance.Composed(flow, [1.0, 2.0], NULL).velocity(T, X, jnp.asarray([0, 1, 2], jnp.int32)),
        ),
        (
            ValueError,
            "wants one path: move the weak one",
            lambda: guidance.Autoguidance(flow, oracle().flow(paths.VP(), predictions.Velocity()), 2.0),
        ),
        (
            ValueError,
            "Label 3 is out of range.*from 0 to 2",
            lambda: classified.velocity(T, X, jnp.asarray(3, jnp.int32)),
        ),
        (TypeError, "label is float32.*ONE integer", lambda: label_of(T, X, jnp.asarray(0.5))),
        (TypeError, "label is None.*ONE integer", lambda: label_of(T, X)),
        (TypeError, "score of type float", lambda: guidance.AddedScore(flow, 1.0)),
        (
            ValueError,
            r"returned float32\[3\] for one example x of float32\[2\]",
            lambda: guidance.AddedScore(flow, lambda t, x, args, *, key=None: jnp.zeros(3)).velocity(T, X),
        ),
        (TypeError, "threshold of type float", lambda: guidance.Thresholded(flow, 1.0)),
        *(
            (TypeError, rf"{name}'s flow is a function, but wants an AbstractFlow", make)
            for name, make in {
                "ClassifierFree": lambda: CFG(pushing, 2.0),
                "Autoguidance": lambda: guidance.Autoguidance(pushing, flow, 2.0),
                "Composed": lambda: guidance.Composed(pushing, [1.0], NULL),
                "AddedScore": lambda: guidance.AddedScore(pushing, pushing),
                "Thresholded": lambda: guidance.Thresholded(pushing, guidance.Clip()),
            }.items()
        ),
        (TypeError, "scale is a str, but wants a number or a schedule", lambda: CFG(flow, "3")),
        (TypeError, "scale is a NoneType", lambda: guidance.Interval(None, 0.2, 0.8)),
        (TypeError, "variable of type str", lambda: guidance.Interval(2.0, 0.2, 0.8, variable="sigma")),
        (TypeError, "energy of type float", lambda: guidance.Gradient(1.0)),
        (
            TypeError,
            "from_weight got a schedule",
            lambda: guidance.ClassifierFree.from_weight(flow, guidance.Linear(0.0, 1.0), NULL),
        ),
        (TypeError, "Autoguidance's weak is a function", lambda: guidance.Autoguidance(flow, pushing, 2.0)),
        (ValueError, "low = 1 and high = -1", lambda: guidance.Clip(1.0, -1.0)),
        (ValueError, "quantile = 99.5", lambda: guidance.DynamicThreshold(99.5)),
    ]:
        with pytest.raises(error, match=message):
            call()
    # Traced, a label that is out of range is NaN in the gradient as well: never unguided, never another class.
    assert np.all(np.isnan(eqx.filter_jit(classified.velocity)(T, X, jnp.asarray(3, jnp.int32))))
    assert np.all(np.isfinite(eqx.filter_jit(classified.velocity)(T, X, jnp.asarray(2, jnp.int32))))


def test_guidance_is_per_example_in_a_batch():
    """Also of rules and thresholds that look at the whole of an example."""
    flow = oracle().flow(paths.Linear(), predictions.Velocity())
    made = guidance.Thresholded(
        CFG(flow, 3.0, rule=guidance.Projected(radius=0.5)), guidance.DynamicThreshold(0.5, 0.3)
    )
    labels = jnp.array([0, 1, 2, 1], jnp.int32)
    settings = {"solver": fs.solvers.DDIM(), "grid": fs.grids.Uniform(6), "key": jax.random.key(0)}
    batch = fs.sample(made, oracle().like, num=4, args=labels, **settings)
    other = fs.sample(made, oracle().like, num=4, args=labels.at[0].set(2), **settings)
    np.testing.assert_array_equal(batch[1:], other[1:])
    assert not np.allclose(batch[0], other[0], atol=0.01)
