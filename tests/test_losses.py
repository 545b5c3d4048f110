"""Regression losses against the papers' formulas and explicit loops, in numpy and float64."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from members import PATHS, PREDICTIONS, REFERENCES

import flowsolve as fs
from flowsolve import couplings, losses, paths, predictions, times, weights
from flowsolve.losses import Regression

LINEAR, VP, EDM = paths.Linear(), paths.VP(), paths.EDM()
KEY = jax.random.key(0)


class Net(eqx.Module):
    """A small network on a vector of 3: nonlinear in x, t and a label."""

    matrix: jax.Array
    bias: jax.Array

    def __init__(self, key=None):
        rng = np.random.default_rng(0)
        self.matrix = jnp.asarray(rng.normal(size=(3, 3)) / 2, float)
        self.bias = jnp.asarray(rng.normal(size=3), float)

    def __call__(self, t, x, args, *, key=None):
        shift = 0.0 if args is None else 0.3 * args.astype(x.dtype)
        return jnp.tanh(self.matrix @ x + self.bias * jnp.sin(3 * t)) + shift


def net64(net, t, x, label=0.0):
    """The same in float64."""
    matrix, bias = np.float64(net.matrix), np.float64(net.bias)
    return np.tanh(matrix @ x + bias * np.sin(3 * t)) + 0.3 * label


def batch(num=5):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(num, 3)), float), jnp.asarray(rng.integers(0, 4, num))


def known_noise(key, like):
    """Not random: a numpy loop can repeat it."""
    del key
    return jax.tree.map(lambda leaf: jnp.cos(5 * leaf + 1), like)


def known_noise64(x0):
    return np.cos(5 * x0 + 1)


run = eqx.filter_jit(
    lambda loss, flow, x0, args, key, example_weight=None, mask=None: loss(
        flow, x0, args, key=key, example_weight=example_weight, mask=mask
    )
)
one = eqx.filter_jit(lambda loss, flow, x0, t, noise, args=None: loss.one(flow, x0, args, t=t, noise=noise))


def loop(flow, x0, labels, t, target64, rho=np.square, mask=None):
    """The loss of each example: explicit, in float64. `target64`(t, x0, eps) is what the network should say."""
    result = []
    for i in range(len(x0)):
        x, ti = np.float64(x0[i]), np.float64(t[i])
        eps = known_noise64(x)
        alpha, sigma = (float(c) for c in flow.path.coefficients(t[i]))
        terms = rho(net64(flow.network, ti, alpha * x + sigma * eps, float(labels[i])) - target64(ti, x, eps))
        terms = terms if mask is None else terms[np.asarray(mask[i])]
        result.append(terms.mean() if terms.size else 0.0)
    return np.array(result)


def flow_matching_target(t, x0, eps):
    del t
    return eps - x0


VELOCITY = fs.Flow(Net(), LINEAR, predictions.Velocity())


@pytest.mark.quick
def test_equals_an_explicit_loop():
    """Pitfalls 8 and 9: one time and one noise per example, in x_t and in the target; a mean over B numbers."""
    x0, labels = batch()
    value, aux = run(Regression(noise=known_noise), VELOCITY, x0, labels, KEY)
    expected = loop(VELOCITY, x0, labels, aux.t, flow_matching_target)
    assert aux.losses.shape == aux.t.shape == (5,) and value.shape == ()
    assert value.dtype == aux.losses.dtype == jnp.float32
    np.testing.assert_allclose(aux.losses, expected, rtol=2e-6)
    np.testing.assert_allclose(value, expected.mean(), rtol=2e-6)
    assert len(set(aux.t.tolist())) == 5


@pytest.mark.quick
def test_example_weights_and_masks():
    x0, labels = batch(6)
    loss = Regression(noise=known_noise)
    weight = jnp.asarray([1, 0, 3, 2, 1, 5])
    elements = jnp.asarray(np.random.default_rng(2).random((6, 3)) < 0.6).at[2].set(False)
    examples = jnp.asarray([True, True, False, True, False, True])
    for example_weight, mask in [
        (None, None),
        (weight, None),
        (None, elements),
        (weight, elements),
        (weight, examples),
    ]:
        value, aux = run(loss, VELOCITY, x0, labels, KEY, example_weight, mask)
        rows = None if mask is None else np.broadcast_to(mask.reshape(6, -1), (6, 3))
        expected = loop(VELOCITY, x0, labels, aux.t, flow_matching_target, mask=rows)
        weights = np.ones(6) if example_weight is None else np.float64(example_weight)
        weights = weights if rows is None else weights * rows.any(axis=1)
        np.testing.assert_allclose(aux.losses, expected, rtol=2e-6)
        np.testing.assert_allclose(value, (weights * expected).sum() / weights.sum(), rtol=2e-6)
    # A padded batch has the loss of the batch without its padding.
    keep = jnp.asarray([True] * 4 + [False] * 2)
    padded, _ = run(loss, VELOCITY, x0, labels, KEY, None, keep)
    short, _ = run(loss, VELOCITY, x0[:4], labels[:4], KEY)
    np.testing.assert_allclose(padded, short, rtol=1e-6)


def test_nothing_counts():
    x0, labels = batch()
    network_gradient = eqx.filter_jit(
        eqx.filter_grad(lambda flow, mask, w: Regression()(flow, x0, labels, key=KEY, mask=mask, example_weight=w)[0])
    )
    nothing = jnp.zeros((5, 3), bool)
    value, aux = run(Regression(), VELOCITY, x0, labels, KEY, None, nothing)
    assert value == 0 and np.all(aux.losses == 0)
    for mask, weight in [(nothing, jnp.ones(5)), (~nothing, jnp.zeros(5))]:
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(network_gradient(VELOCITY, mask, weight)))


def test_gradient_depends_on_every_example():
    """Pitfall 9: the gradient is the mean of the examples' own gradients."""
    x0, labels = batch()
    loss = Regression(noise=known_noise)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(flow, weight):
        return loss(flow, x0, labels, key=KEY, example_weight=weight)[0]

    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    own = np.array([flat(gradient(VELOCITY, jnp.eye(5)[i])) for i in range(5)])
    assert np.all(np.abs(own).max(axis=1) > 1e-3)
    np.testing.assert_allclose(flat(gradient(VELOCITY, jnp.ones(5))), own.mean(axis=0), rtol=1e-4, atol=1e-6)
    assert np.linalg.matrix_rank(own) == 5
    # Only the network is trained: the path's and the loss's numbers are no leaves of the flow.
    assert len(jax.tree.leaves(gradient(VELOCITY, jnp.ones(5)))) == 2


@pytest.mark.quick
def test_target_and_input_share_their_noise():
    """Pitfall 9: with data 0, x_t = sigma eps, and a network that divides by sigma is perfect."""

    class Scaled(eqx.Module):
        scale: jax.Array

        def __call__(self, t, x, args, *, key=None):
            return self.scale * x / t

    def losses_of(scale):
        flow = fs.Flow(Scaled(jnp.asarray(scale)), LINEAR, predictions.Noise())
        return run(Regression(), flow, jnp.zeros((4096, 3)), None, KEY)[1].losses

    assert np.all(losses_of(1.0) < 1e-12)
    silent = losses_of(0.0)
    assert abs(silent.mean() - 1) < 4 * np.sqrt(2 / 3 / 4096)  # E eps^2 = 1
    assert len(np.unique(silent)) > 4000


@pytest.mark.quick
def test_network_gets_its_own_key():
    """Another one for every example and call, and not the noise's."""

    def guess(t, x, args, *, key):
        return losses.NormalNoise()(key, x)

    _, aux = run(Regression(), fs.Flow(guess, LINEAR, predictions.Noise()), jnp.zeros((8, 3)), None, KEY)
    assert len(np.unique(aux.losses)) == 8
    assert np.all(aux.losses > 1e-3)


@pytest.mark.quick
def test_examples_do_not_depend_on_the_batch():
    x0, labels = batch(9)
    large, small = (
        run(Regression(), VELOCITY, x0, labels, KEY)[1],
        run(Regression(), VELOCITY, x0[:4], labels[:4], KEY)[1],
    )
    np.testing.assert_array_equal(large.t[:4], small.t)
    np.testing.assert_allclose(large.losses[:4], small.losses, rtol=1e-6)


# --- the published losses -----------------------------------------------------------------------------------


def pair():
    rng = np.random.default_rng(4)
    return rng.normal(size=3), rng.normal(size=3)


def test_flow_matching(x64):
    x0, eps = pair()
    flow = fs.Flow(Net(), LINEAR, predictions.Velocity())
    for t in (0.0, 0.3, 1.0):
        expected = np.mean((net64(flow.network, t, (1 - t) * x0 + t * eps) - (eps - x0)) ** 2)
        np.testing.assert_allclose(one(Regression(), flow, jnp.asarray(x0), t, jnp.asarray(eps)), expected, rtol=1e-12)


def test_denoising_score_matching(x64):
    """lambda(t) |s(x_t) - grad ln p(x_t|x_0)|^2 with lambda = sigma^2 (2011.13456, equation 7)."""
    x0, eps = pair()
    flow = fs.Flow(Net(), VP, predictions.Score())
    loss = Regression(weight=weights.SNR())
    for t in (1e-4, 0.3, 1.0):
        integral = 0.1 * t + t**2 * (20 - 0.1) / 2
        mean, variance = np.exp(-integral / 2) * x0, 1 - np.exp(-integral)
        x_t = mean + np.sqrt(variance) * eps
        score = -(x_t - mean) / variance
        expected = variance * np.mean((net64(flow.network, t, x_t) - score) ** 2)
        np.testing.assert_allclose(one(loss, flow, jnp.asarray(x0), t, jnp.asarray(eps)), expected, rtol=1e-9)


def test_ddpm(x64):
    """|eps - eps_theta(sqrt(abar) x_0 + sqrt(1 - abar) eps)|^2 (2006.11239, equation 14)."""
    x0, eps = pair()
    path = paths.Discrete.linear()
    flow = fs.Flow(Net(), path, predictions.Noise())
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for k in (0, 400, 999):
        x_t = np.sqrt(abar[k]) * x0 + np.sqrt(1 - abar[k]) * eps
        expected = np.mean((eps - net64(flow.network, (k + 1) / 1000, x_t)) ** 2)
        found = one(Regression(), flow, jnp.asarray(x0), path.time_of(k), jnp.asarray(eps))
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def edm_terms(sigma, data_std):
    """Table 1 of 2206.00364: c_in, c_skip, c_out, c_noise and lambda."""
    variance = sigma**2 + data_std**2
    return (
        1 / np.sqrt(variance),
        data_std**2 / variance,
        sigma * data_std / np.sqrt(variance),
        np.log(sigma) / 4,
        variance / (sigma * data_std) ** 2,
    )


def test_edm(x64):
    """lambda(sigma) |D(x_0 + n; sigma) - x_0|^2, in both forms of the paper (equations 2 and 8)."""
    x0, eps = pair()
    for data_std in (0.5, 1.7):
        flow = fs.Flow(Net(), EDM, predictions.Data(), fs.EDMPreconditioner(data_std))
        loss = Regression(times.LogNormal(), weight=weights.EDM(data_std))
        for sigma in (0.002, 0.5, 80.0):
            c_in, c_skip, c_out, c_noise, weight = edm_terms(sigma, data_std)
            x = x0 + sigma * eps
            raw = net64(flow.network, c_noise, c_in * x)
            denoised = weight * np.mean((c_skip * x + c_out * raw - x0) ** 2)
            effective = np.mean((raw - (x0 - c_skip * x) / c_out) ** 2)
            np.testing.assert_allclose(denoised, effective, rtol=1e-8)
            found = one(loss, flow, jnp.asarray(x0), sigma, jnp.asarray(eps))
            np.testing.assert_allclose(found, effective, rtol=1e-8)


@pytest.mark.quick
def test_edm_golden_values():
    """Pitfall 7: the paper's defaults, the weight's form, and weight c_out^2 = 1 on any path."""
    assert (times.LogNormal().mean, times.LogNormal().std) == (np.float32(-1.2), np.float32(1.2))
    weight = weights.EDM()
    assert weight.data_std == 0.5
    for sigma, expected in [(0.5, 8.0), (0.002, 250004.0), (80.0, 4.00015625)]:
        np.testing.assert_allclose(weight(EDM, sigma), expected, rtol=2e-6)
    for path, t in [(EDM, 0.3), (LINEAR, 0.3), (VP, 0.6)]:
        _, _, c_out = fs.EDMPreconditioner(0.5).coefficients(path, jnp.asarray(t))
        np.testing.assert_allclose(weight(path, t) * c_out**2, 1, rtol=1e-6)
    assert np.isinf(weight(LINEAR, 0.0)) and np.isfinite(weight(LINEAR, 1.0))
    np.testing.assert_allclose(weights.SNR()(LINEAR, 0.25), 9, rtol=1e-6)
    np.testing.assert_allclose(weights.Weight(lambda path, t: 1 + t)(LINEAR, 0.25), 1.25, rtol=1e-6)


def test_p2_at_the_clean_end():
    """With gamma < 1 infinite on the data, with gamma > 1 zero; on the noise zero in any case."""
    x0, eps = (jnp.asarray(v, jnp.float32) for v in pair())
    for gamma, on_data in [(0.5, np.inf), (1.5, 0.0)]:
        loss = Regression(weight=weights.P2(gamma=gamma))
        for prediction, expected in [(predictions.Data(), on_data), (predictions.Noise(), 0.0)]:
            assert one(loss, fs.Flow(Net(), LINEAR, prediction), x0, 0.0, eps) == expected


def test_soft_min_snr_is_a_sigmoid():
    for t in (0.05, 0.4, 0.9):
        snr, gamma = float(jnp.exp(VP.log_snr(t))), 5.0
        np.testing.assert_allclose(weights.Sigmoid(np.log(gamma))(VP, t), gamma * snr / (gamma + snr), rtol=1e-5)


@pytest.mark.parametrize("path", [EDM, LINEAR], ids=["edm", "linear"])
def test_edm_starts_at_one(path):
    """A preconditioned network that says 0 has loss 1 at every t: its target has unit variance."""
    silent = lambda t, x, args, *, key=None: 0 * x  # noqa: E731
    noise_level = fs.preconditioning.angle if path is LINEAR else fs.preconditioning.quarter_log_ratio
    flow = fs.Flow(silent, path, predictions.Data(), fs.EDMPreconditioner(0.5, noise_level))
    loss = Regression(times.Uniform() if path is LINEAR else times.LogNormal(), weight=weights.EDM(0.5))
    x0 = 0.5 * jax.random.normal(jax.random.key(1), (20_000, 4))
    _, aux = run(loss, flow, x0, None, KEY)
    order = np.argsort(aux.t)
    for part in np.split(np.asarray(aux.losses)[order], 5):
        assert abs(part.mean() - 1) < 4 * np.sqrt(2 / 4 / len(part))


# --- weights and targets ------------------------------------------------------------------------------------


def weight_table():
    return {
        "edm": weights.EDM(0.7),
        "snr": weights.SNR(),
        "uniform": weights.Uniform(),
        "truncated": weights.TruncatedSNR(),
        "min_snr": weights.MinSNR(3.0),
        "sigmoid": weights.Sigmoid(-0.7),
        "p2": weights.P2(0.8),
        "p2_half": weights.P2(1.2, 0.5),
        "user": weights.Weight(lambda path, t: 2 + jnp.sin(path.log_snr(t))),
    }


def weight64(name, alpha, sigma):
    r = sigma / alpha
    snr = r**-2.0
    return {
        "edm": (r**2 + 0.49) / (0.7 * r) ** 2,
        "snr": snr,
        "uniform": 1.0,
        "truncated": max(snr, 1.0),
        "min_snr": min(snr, 3.0),
        "sigmoid": snr / (1 + np.exp(0.7 + np.log(snr))),
        "p2": snr / (0.8 + snr),
        "p2_half": snr / (1.2 + snr) ** 0.5,
        "user": 2 + np.sin(2 * np.log(alpha / sigma)),
    }[name]


def table64(name, t):
    """(a, b, c) of each prediction, alpha and sigma."""
    alpha, sigma, d_alpha, d_sigma = (float(v) for v in REFERENCES[name](np.float64(t)))
    return {
        "data": (1, 0, 1),
        "noise": (0, 1, 1),
        "velocity": (d_alpha, d_sigma, 1),
        "v": (-sigma, alpha, 1),
        "score": (0, -1, sigma),
    }, (alpha, sigma)


def test_targets_and_weights(x64):
    """Every loss for every own prediction and target is that of the same denoiser, written out."""
    name, path = "vp", PATHS["vp"]
    net = Net()
    x0, eps = pair()
    huber = losses.Huber(0.3)

    def own_network(prediction):
        """One denoiser D, put into the words of each prediction."""

        def network(t, x, args, *, key=None):
            alpha, sigma = path.coefficients(t)
            data = net(t, x, args)
            a, b, c = prediction.coefficients(path, t)
            return (a * data + b * (x - alpha * data) / sigma) / c

        return network

    @jax.jit
    def all_losses(t):
        found = {}
        for own, own_prediction in PREDICTIONS.items():
            flow = fs.Flow(own_network(own_prediction), path, own_prediction)
            for target, target_prediction in PREDICTIONS.items():
                settings = {"none": {}, "edm": {"weight": weight_table()["edm"]}}
                if own == "velocity":
                    settings |= {kind: {"weight": weight} for kind, weight in weight_table().items()}
                    settings["huber"] = {"weight": weight_table()["edm"], "elementwise": huber}
                for kind, setting in settings.items():
                    loss = Regression(target=target_prediction, **setting)
                    found[f"{own} {target} {kind}"] = loss.one(flow, jnp.asarray(x0), t=t, noise=jnp.asarray(eps))
        return found

    for t in np.array([0.02, 0.5, 0.97]) * (path.t_noise - path.t_data) + path.t_data:
        table, (alpha, sigma) = table64(name, t)
        denoised = net64(net, t, alpha * x0 + sigma * eps)
        error = denoised - x0
        for which, found in all_losses(t).items():
            _, target, kind = which.split()
            a, b, c = table[target]
            # The error of the target: x_0 off by e puts eps off by -alpha e / sigma.
            target_error = (a - b * alpha / sigma) / c * error
            if kind == "none":
                expected = np.mean(target_error**2)
            elif kind == "huber":
                size = np.abs(target_error)
                terms = np.where(size < 0.3, size**2 / 2, 0.3 * (size - 0.15))
                expected = weight64("edm", alpha, sigma) * np.mean(terms) * np.mean(error / target_error) ** 2
            else:
                # Stated on the x_0 loss: the same number for every target and every own prediction.
                expected = weight64(kind, alpha, sigma) * np.mean(error**2)
            np.testing.assert_allclose(found, expected, rtol=1e-7, err_msg=f"{which} at {t}")


def test_the_gradient_of_a_weighted_loss_is_that_of_the_data_loss(x64):
    """For every own prediction and target, the derivative in the network's parameters, for weights of both forms."""
    path, net = PATHS["vp"], Net()
    x0, eps = (jnp.asarray(v) for v in pair())
    direction = jax.tree.map(jnp.cos, net)
    kinds = {"min_snr": weights.MinSNR(3.0), "edm": weights.EDM(0.7)}

    def predicted(net, prediction, t, x):
        """The denoiser `net` in the words of a prediction."""
        alpha, sigma = path.coefficients(t)
        data = net(t, x, None)
        a, b, c = prediction.coefficients(path, t)
        return (a * data + b * (x - alpha * data) / sigma) / c

    @jax.jit
    def derivatives(t):
        def all_losses(net):
            found = {}
            for own, own_prediction in PREDICTIONS.items():

                def network(t, x, args, *, key=None, own_prediction=own_prediction):
                    return predicted(net, own_prediction, t, x)

                flow = fs.Flow(network, path, own_prediction)
                for target, target_prediction in PREDICTIONS.items():
                    for kind, weight in kinds.items():
                        loss = Regression(target=target_prediction, weight=weight)
                        found[f"{own} {target} {kind}"] = loss.one(flow, x0, t=t, noise=eps)
            return found

        return jax.jvp(all_losses, (net,), (direction,))[1]

    def data_loss(net, t, kind):
        alpha, sigma = path.coefficients(t)
        error = net(t, alpha * x0 + sigma * eps, None) - x0
        return weight64(kind, float(alpha), float(sigma)) * jnp.mean(error**2)

    for t in (0.05, 0.4):
        found = derivatives(jnp.asarray(t))
        assert len(found) == 2 * len(PREDICTIONS) ** 2
        for kind in kinds:
            wanted = jax.jvp(lambda net, t=t, kind=kind: data_loss(net, jnp.asarray(t), kind), (net,), (direction,))[1]
            assert abs(wanted) > 1e-3
            for which, value in found.items():
                if which.endswith(kind):
                    np.testing.assert_allclose(value, wanted, rtol=1e-7, err_msg=f"{which} at {t}")


# kind: the end at which its weight on the data's loss, or on the noise's, is infinite.
ENDS_OF_WEIGHTS = {
    "edm": ("data", "noise"),
    "snr": ("data", None),
    "uniform": (None, "noise"),
    "truncated": ("data", "noise"),
    "min_snr": (None, None),
    "sigmoid": (None, None),
    "p2": (None, None),
}


@functools.cache
def at_the_ends():
    """(path, own, target, weight) -> losses and a derivative at both ends, and a little inside of them."""
    x0, eps = (jnp.asarray(v, jnp.float32) for v in pair())
    net = Net()
    direction = jax.tree.map(jnp.cos, net)
    losses_of = {f"{name} none": Regression(target=target) for name, target in {"own": None, **PREDICTIONS}.items()}
    for kind in ENDS_OF_WEIGHTS:
        losses_of[f"own {kind}"] = Regression(weight=weight_table()[kind])
    losses_of["score edm"] = Regression(target=predictions.Score(), weight=weight_table()["edm"])
    found = {}
    for path, own_names in [(LINEAR, list(PREDICTIONS)), (paths.Trigonometric(), ["velocity"])]:

        @jax.jit
        @jax.vmap
        def all_losses(t, path=path, own_names=own_names):
            def of(net, own_prediction):
                flow = fs.Flow(net, path, own_prediction)
                return {which: loss.one(flow, x0, t=t, noise=eps) for which, loss in losses_of.items()}

            return {
                own: jax.jvp(lambda net, own=own: of(net, PREDICTIONS[own]), (net,), (direction,)) for own in own_names
            }

        for own, (values, derivatives) in all_losses(jnp.asarray([0, 2e-4, 1 - 2e-4, 1])).items():
            for which, value in values.items():
                found[f"{type(path).__name__} {own} {which}"] = np.asarray(value), np.asarray(derivatives[which])
    return found


def test_ends():
    """At the ends: the limit where there is one, else inf; never NaN, and no NaN gradient of a finite loss."""
    no_data = {(own, target) for own in ("noise", "score") for target in ("data", "velocity", "v")}
    no_noise = {("data", target) for target in ("noise", "velocity", "v")} | {
        (own, "score") for own in PREDICTIONS
    } | {("score", "own")}  # fmt: skip
    for which, (value, derivative) in at_the_ends().items():
        _, own, target, kind = which.split()
        for end, inside, singular in [(0, 1, no_noise), (3, 2, no_data)]:
            if kind == "none":
                infinite = (own, target) in singular
            else:
                at_data, at_noise = ENDS_OF_WEIGHTS[kind]
                infinite = own == at_data if end == 0 else at_noise is not None and own in ("noise", "score")
            if infinite:
                assert value[end] == np.inf, (which, end)
            else:
                np.testing.assert_allclose(value[end], value[inside], rtol=0.01, atol=2e-6, err_msg=f"{which} {end}")
                assert np.isfinite(derivative[end]), (which, end)


@pytest.mark.parametrize("name", ["linear", "vp"])
def test_the_optimum_is_the_conditional_mean(name):
    """Gaussian data: the exact denoiser beats perturbed ones in every prediction, by more than chance."""
    path = PATHS[name]
    mean, std = 0.6, 0.8
    x0 = mean + std * jax.random.normal(jax.random.key(2), (20_000, 2))
    deltas = jnp.asarray([[0, 0], [0.1, 0], [-0.1, 0], [0, 0.1], [0, -0.1]], float)

    @jax.jit
    def all_losses(deltas):
        def of(delta):
            found = {}
            for own, prediction in PREDICTIONS.items():

                def network(t, x, args, *, key=None, prediction=prediction):
                    alpha, sigma = path.coefficients(t)
                    gain = alpha * std**2 / (sigma**2 + alpha**2 * std**2)
                    data = mean + gain * (x - alpha * mean)
                    noise = sigma / (sigma**2 + alpha**2 * std**2) * (x - alpha * mean)
                    a, b, c = prediction.coefficients(path, t)
                    return (1 + delta[0]) * (a * data + b * noise) / c + delta[1]

                loss = Regression(times.Uniform(t_min=0.1, t_max=0.9))
                found[own] = loss(fs.Flow(network, path, prediction), x0, key=KEY)[1].losses
            return found

        return jax.lax.map(of, deltas)

    for own, found in all_losses(deltas).items():
        difference = np.float64(found[1:]) - np.float64(found[0])
        standard_error = difference.std(axis=1) / np.sqrt(len(x0))
        assert np.all(difference.mean(axis=1) > 2 * standard_error), own


# --- the null condition, now and then -----------------------------------------------------------------------


def test_condition_dropout():
    """Independent per example, by key and index; all of a condition together; nothing else changes."""
    num, chance = 4000, 0.3
    condition = {"label": jnp.arange(num), "context": jnp.tile(jnp.arange(num, dtype=float)[:, None], (1, 2))}
    null = {"label": jnp.asarray(-1), "context": jnp.full(2, -1.0)}

    def telling(t, x, args, *, key=None):
        """What it was told, and its input, so that the losses say both."""
        return jnp.concatenate([x[:1], args["label"].astype(x.dtype)[None], args["context"]])

    flow = fs.Flow(telling, LINEAR, predictions.Noise())

    def seen(key, count, dropout):
        told = jax.tree.map(lambda leaf: leaf[:count], condition)
        loss = Regression(noise=lambda key, like: 0 * like, elementwise=lambda e: e, dropout=dropout)
        masks = jnp.tile(jnp.eye(4, dtype=bool)[:, None], (1, count, 1))
        return np.array([run(loss, flow, jnp.ones((count, 4)), told, key, None, m)[1].losses for m in masks])

    x, label, first, second = seen(KEY, num, losses.ConditionDropout(chance, null))
    dropped = label == -1
    np.testing.assert_array_equal(label, np.where(dropped, -1, np.arange(num)))
    np.testing.assert_array_equal(first, label)
    np.testing.assert_array_equal(second, label)
    assert abs(dropped.mean() - chance) < 4 * np.sqrt(chance * (1 - chance) / num)
    # Neighbours are independent.
    together = (dropped[1:] & dropped[:-1]).mean()
    assert abs(together - chance**2) < 4 * np.sqrt(chance**2 / num)
    # By key and index: not by the size of the batch; another key, another draw; times and noise are as without.
    few = seen(KEY, 50, losses.ConditionDropout(chance, null))[1]
    np.testing.assert_array_equal(few, label[:50])
    assert np.any((seen(jax.random.key(5), 50, losses.ConditionDropout(chance, null))[1] == -1) != dropped[:50])
    np.testing.assert_array_equal(seen(KEY, num, None)[0], x)
    for chance, wanted in [(0.0, np.arange(50)), (1.0, -np.ones(50))]:
        np.testing.assert_array_equal(seen(KEY, 50, losses.ConditionDropout(chance, null))[1], wanted)


# --- the variance beside the output ---------------------------------------------------------------------------


class VarianceNet(eqx.Module):
    net: Net
    nu: jax.Array

    def __call__(self, t, x, args, *, key=None):
        return self.net(t, x, args), jax.nn.sigmoid(self.nu * x + t)


def gaussian_kl(mean, variance, mean_p, variance_p):
    return 0.5 * (np.log(variance_p / variance) + (variance + (mean - mean_p) ** 2) / variance_p - 1)


def test_hybrid(x64):
    """L_simple + lambda sum_t KL of 2102.09672, element by element, with DDPM's posterior by its betas."""
    path = paths.Discrete.linear(8, 0.02, 0.4)
    betas = np.linspace(0.02, 0.4, 8)
    abar = np.cumprod(1 - betas)
    net = VarianceNet(Net(), jnp.asarray([0.5, -1.0, 2.0]))
    loss = losses.Hybrid(Regression(times=times.Given(fs.grids.ThenClean(fs.grids.Uniform(8))(path))), 0.01)
    value_of = jax.jit(lambda net, t, x0, eps: loss.one(
        fs.flow.VarianceFlow(net, path, predictions.Noise()), x0, t=t, noise=eps))  # fmt: skip
    gradient_of = jax.jit(jax.grad(lambda net, t, x0, eps, weight: losses.Hybrid(loss.simple, weight).one(
        fs.flow.VarianceFlow(net, path, predictions.Noise()), x0, t=t, noise=eps)))  # fmt: skip
    x0, eps = pair()
    for k in range(8):
        t = (k + 1) / 8
        x_t = np.sqrt(abar[k]) * x0 + np.sqrt(1 - abar[k]) * eps
        predicted = net64(net.net, t, x_t)
        simple = np.mean((predicted - eps) ** 2)
        bound = 0.0
        if k > 0:
            nu = 1 / (1 + np.exp(-(np.float64(net.nu) * x_t + t)))
            tilde = (1 - abar[k - 1]) / (1 - abar[k]) * betas[k]
            for i in range(3):
                # Equations 10 and 11 of the paper, and 15: exp(nu ln beta + (1 - nu) ln beta tilde).
                posterior = (np.sqrt(abar[k - 1]) * betas[k] / (1 - abar[k]) * x0[i]
                             + np.sqrt(1 - betas[k]) * (1 - abar[k - 1]) / (1 - abar[k]) * x_t[i])  # fmt: skip
                mean = (x_t[i] - betas[k] / np.sqrt(1 - abar[k]) * predicted[i]) / np.sqrt(1 - betas[k])
                variance = np.exp(nu[i] * np.log(betas[k]) + (1 - nu[i]) * np.log(tilde))
                bound += gaussian_kl(posterior, tilde, mean, variance) / 3
        arguments = (path.time_of(k), jnp.asarray(x0), jnp.asarray(eps))
        np.testing.assert_allclose(value_of(net, *arguments), simple + 0.01 * 8 * bound, rtol=1e-9)
        with_bound, without = (gradient_of(net, *arguments, weight) for weight in (0.01, 0.0))
        # The bound does not train the mean, through which nu does not go; L_simple does not train nu.
        np.testing.assert_array_equal(with_bound.net.matrix, without.net.matrix)
        np.testing.assert_array_equal(with_bound.net.bias, without.net.bias)
        assert np.all(without.nu == 0) and (np.abs(with_bound.nu).min() > 1e-7) == (k > 0)
    with pytest.raises(TypeError, match=r"flow is a Flow, but wants a fs.flow.VarianceFlow"):
        loss(fs.Flow(net.net, path, predictions.Noise()), jnp.ones((2, 3)), key=KEY)
    with pytest.raises(TypeError, match="times of simple is a Uniform"):
        losses.Hybrid(Regression())


def test_hybrid_at_the_last_point_of_a_grid_that_ends_in_noise():
    """No step leaves it, so no variance is drawn with: what is left is the loss of the output."""
    flow = fs.flow.VarianceFlow(VarianceNet(Net(), jnp.ones(3)), LINEAR, predictions.Noise())
    loss = losses.Hybrid(Regression(times=times.Given([0.9, 0.5, 0.1])))
    x0, eps = (jnp.asarray(x, jnp.float32) for x in pair())
    of = eqx.filter_jit(eqx.filter_value_and_grad(lambda flow, loss: loss.one(flow, x0, t=0.1, noise=eps)))
    value, gradient = of(flow, loss)
    np.testing.assert_allclose(value, of(flow, loss.simple)[0], rtol=1e-6)
    np.testing.assert_array_equal(gradient.network.nu, np.zeros(3))


def test_the_optimal_variance_of_a_gaussian_is_the_exact_one():
    """The gradient in nu vanishes where v is the variance of x_s given x_t in the solver's step, and not near it."""
    path, std = paths.Linear(), 0.4
    grid = np.array([0.9, 0.6, 0.35, 0.15])
    oracle = fs.testing.Gaussian.isotropic(jnp.asarray([0.3, -0.2]), std)
    exact = oracle.flow(path, predictions.Velocity())

    def optimum(t, s):
        """nu at which sigma_t^(2 nu) sigma_s^(2 - 2 nu) (1 - rho^2) is var(x_s|x_t) under the forward process."""
        rho = (1 - t) * s / ((1 - s) * t)
        joint = (1 - s) ** 2 * std**2 + s**2, (1 - t) * (1 - s) * std**2 + t * s * rho, (1 - t) ** 2 * std**2 + t**2
        variance = joint[0] - joint[1] ** 2 / joint[2]
        return np.log(variance / (s**2 * (1 - rho**2))) / (2 * np.log(t / s))

    best = np.array([optimum(t, s) for t, s in itertools.pairwise(grid)])
    assert np.all((best > 0) & (best < 1))
    loss = losses.Hybrid(Regression(times=times.Given(grid)))
    x0 = jax.vmap(oracle.sample_data)(jax.random.split(KEY, 20_000))

    @jax.jit
    def slopes(nus):
        def one(x0, key):
            step, noise = jax.random.split(key)
            index = jax.random.randint(step, (), 0, 3)
            noise = jax.random.normal(noise, x0.shape)

            def of(nus):
                network = lambda t, x, args, *, key=None: (exact.output(t, x), jnp.full_like(x, nus[index]))  # noqa: E731
                flow = fs.flow.VarianceFlow(network, path, predictions.Velocity())
                return loss.one(flow, x0, t=jnp.asarray(grid, jnp.float32)[index], noise=noise)

            return jax.grad(of)(nus)

        return jax.vmap(one)(x0, jax.random.split(jax.random.key(3), len(x0)))

    def in_standard_errors(nus):
        found = np.float64(slopes(jnp.asarray(nus, jnp.float32)))
        return found.mean(axis=0) / (found.std(axis=0) / np.sqrt(len(found)))

    print("slopes at the exact variance, in standard errors:", in_standard_errors(best))
    assert np.all(np.abs(in_standard_errors(best)) < 4)
    assert np.all(in_standard_errors(best - 0.1) < -10) and np.all(in_standard_errors(best + 0.1) > 10)


# --- parts --------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_elementwise():
    e = np.array([-3.0, -0.4, 0.0, 1e-4, 0.5, 2.0])
    error = jnp.asarray(e, jnp.float32)
    delta = 0.5
    huber = np.where(np.abs(e) <= delta, e**2 / 2, delta * (np.abs(e) - delta / 2))
    for function, expected in [
        (losses.squared, e**2),
        (losses.absolute, np.abs(e)),
        (losses.Huber(delta), huber),
        (losses.PseudoHuber(delta), delta**2 * (np.sqrt(1 + (e / delta) ** 2) - 1)),
        (lambda error: error**4, e**4),
    ]:
        np.testing.assert_allclose(function(error), expected, rtol=2e-6)
        assert np.all(np.isfinite(jax.vmap(jax.grad(function))(error)))
    x0, labels = batch()
    rho = losses.Huber(delta)
    _, aux = run(Regression(noise=known_noise, elementwise=rho), VELOCITY, x0, labels, KEY)
    rho64 = lambda e: np.where(np.abs(e) <= delta, e**2 / 2, delta * (np.abs(e) - delta / 2))  # noqa: E731
    np.testing.assert_allclose(aux.losses, loop(VELOCITY, x0, labels, aux.t, flow_matching_target, rho64), rtol=2e-6)


@pytest.mark.quick
def test_normal_noise():
    like = {"a": jax.ShapeDtypeStruct((4000,), jnp.float32), "b": jax.ShapeDtypeStruct((3, 2), jnp.bfloat16)}
    noise = losses.NormalNoise(mean=2.0, scale=0.5)(KEY, like)
    assert noise["b"].shape == (3, 2) and noise["b"].dtype == jnp.bfloat16
    assert abs(noise["a"].mean() - 2) < 4 * 0.5 / np.sqrt(4000)
    assert abs(noise["a"].std() - 0.5) < 4 * 0.5 / np.sqrt(2 * 4000)


@pytest.mark.quick
def test_pytrees_of_any_shape():
    """The mean is over all elements of all leaves, masked or not."""

    def network(t, x, args, *, key=None):
        return jax.tree.map(lambda leaf: t * leaf, x)

    flow = fs.Flow(network, LINEAR, predictions.Velocity())
    rng = np.random.default_rng(3)
    x0 = {"image": jnp.asarray(rng.normal(size=(4, 2, 3)), float), "label": jnp.asarray(rng.normal(size=4), float)}
    mask = {"image": jnp.asarray(rng.random((4, 2, 3)) < 0.5), "label": jnp.asarray([True, False, True, False])}
    _, aux = run(Regression(noise=known_noise), flow, x0, None, KEY, None, mask)
    for i in range(4):
        x = np.append(np.float64(x0["image"][i]).ravel(), np.float64(x0["label"][i]))
        t, eps = np.float64(aux.t[i]), known_noise64(x)
        terms = (t * ((1 - t) * x + t * eps) - (eps - x)) ** 2
        counts = np.append(np.asarray(mask["image"][i]).ravel(), mask["label"][i])
        np.testing.assert_allclose(aux.losses[i], terms[counts].mean(), rtol=2e-6)
    one_per_example = run(Regression(), flow, x0, None, KEY, None, jnp.asarray([True, False, True, True]))[1]
    assert one_per_example.losses[1] == 0 and np.all(one_per_example.losses[jnp.array([0, 2, 3])] > 0)


def test_new_values_do_not_retrace():
    x0, labels = batch()

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def value(loss, flow, key, weight, mask):
        return loss(flow, x0, labels, key=key, example_weight=weight, mask=mask)

    for i in range(3):
        loss = Regression(
            times=times.LogitNormal(0.1 * i, 1.0 + i),
            weight=weights.EDM(0.5 + i),
            elementwise=losses.Huber(1.0 + i),
            noise=losses.NormalNoise(scale=1.0 + i),
        )
        flow = eqx.tree_at(lambda f: f.network.bias, VELOCITY, jnp.full(3, 0.1 * i))
        value(loss, flow, jax.random.key(i), jnp.full(5, 1.0 + i), jnp.full((5, 3), i == 0))


@pytest.mark.quick
def test_errors(untyped):
    x0, labels = batch()
    loss = Regression()
    for error, message, arguments in [
        (TypeError, "x0 has dtype int32", {"x0": jnp.ones((5, 3), jnp.int32)}),
        (ValueError, "x0 is an empty batch", {"x0": jnp.zeros((0, 3)), "args": None}),
        (ValueError, "x0 has no arrays", {"x0": {}, "args": None}),
        (ValueError, "wants a batch", {"x0": jnp.asarray(1.0), "args": None}),
        (ValueError, "wants a batch", {"x0": [x0, x0[:3]], "args": None}),
        (ValueError, "args is int32.4., but x0 has 5 examples", {"args": labels[:4]}),
        (ValueError, "args is", {"args": {"label": labels, "scale": jnp.asarray(1.0)}}),
        (ValueError, "example_weight has shape .5, 1.", {"example_weight": jnp.ones((5, 1))}),
        (ValueError, "example_weight has a negative number", {"example_weight": jnp.asarray([1.0, 1, 1, 1, -1])}),
        (TypeError, "mask is .* wants booleans", {"mask": jnp.ones((5, 3))}),
        (ValueError, "mask is .* wants booleans like x0", {"mask": jnp.ones((5, 1), bool)}),
        (ValueError, "mask is .* wants booleans like x0", {"mask": [jnp.ones((5, 3), bool)]}),
        (ValueError, "key is missing: a training loss draws", {"key": None}),
        (TypeError, "a typed key is wanted", {"key": jnp.zeros(2, jnp.uint32)}),
        (ValueError, "one key is wanted", {"key": jax.random.split(KEY)}),
    ]:
        arguments = {"x0": x0, "args": labels, "key": KEY, **arguments}
        with pytest.raises(error, match=message):
            loss(VELOCITY, arguments.pop("x0"), arguments.pop("args"), **arguments)
    for bad in (
        {"times": 0.5},
        {"target": predictions.Velocity},
        {"weight": lambda path, t: t},
        {"coupling": couplings.Assignment},
        {"dropout": 0.1},
    ):
        with pytest.raises(TypeError, match=f"Regression got {next(iter(bad))}"):
            Regression(**bad)
    for make, name in [
        (lambda: losses.Huber(0.0), "delta = 0"),
        (lambda: losses.PseudoHuber(-1.0), "c = -1"),
        (lambda: weights.EDM(0.0), "data_std = 0"),
        (lambda: weights.MinSNR(-1.0), "gamma = -1"),
        (lambda: weights.P2(k=0.0), "k = 0"),
        (lambda: losses.ConditionDropout(1.5, jnp.asarray(4)), "probability = 1.5"),
        (lambda: losses.ConditionDropout(0.1, None), "null condition without arrays"),
        (lambda: losses.Hybrid(Regression(times=times.Given([1.0, 0.5, 0.0])), -1.0), "vlb_weight = -1"),
        (
            lambda: Regression(dropout=losses.ConditionDropout(0.1, jnp.asarray(4.0)))(VELOCITY, x0, labels, key=KEY),
            r"args of one example are int32\[\], but the null of ConditionDropout is float32\[\]",
        ),
    ]:
        with pytest.raises(ValueError, match=name):
            make()


@pytest.mark.quick
def test_half_precision_and_numpy(untyped):
    """Data in bfloat16 is brought to float32; numpy arrays are mapped over like JAX's."""
    x0, labels = batch()
    half = x0.astype(jnp.bfloat16)
    value, aux = Regression()(VELOCITY, half, labels, key=KEY)
    expected, _ = Regression()(VELOCITY, half.astype(jnp.float32), labels, key=KEY)
    assert value.dtype == aux.losses.dtype == jnp.float32 and value == expected
    from_numpy, _ = Regression()(VELOCITY, np.asarray(half.astype(jnp.float32)), np.asarray(labels), key=KEY)
    assert from_numpy == expected
