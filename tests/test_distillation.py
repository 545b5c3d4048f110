"""DMD2 on Gaussians: the teacher an oracle, the student x_0 = m + s x_t, the fake an oracle of its own parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowsolve as fs
from flowsolve import distillation, paths, predictions
from flowsolve.distillation import DMD2, Adversarial, Distillation, Renoised, SimulatedODE, SimulatedSDE

KEY = jax.random.key(0)
PATH = paths.Linear()
MEAN, STD = np.array([1.0, -0.5]), np.array([0.3, 0.6])
LIKE = jax.ShapeDtypeStruct((2,), jnp.float32)


def gaussian(mean=MEAN, std=STD) -> fs.testing.Gaussian:
    return fs.testing.Gaussian(jnp.asarray(mean, float), jnp.asarray(std, float) ** 2)


TEACHER = gaussian().flow(PATH, predictions.Data())


class Affine(eqx.Module):
    """x_0 = m + s x_t, with numbers of its own below t = 0.8."""

    mean: jax.Array
    scale: jax.Array

    def __call__(self, t, x, args, *, key=None):
        late = (t < 0.8).astype(int)
        return self.mean[late] + self.scale[late] * x


def student(mean=MEAN, std=STD) -> fs.Flow:
    both = [jnp.stack([jnp.asarray(value, float)] * 2) for value in (mean, std)]
    return fs.Flow(Affine(*both), PATH, predictions.Data())


@eqx.filter_jit
def value_and_gradient(flow, loss, x0, args=None, key=KEY, mask=None):
    def value_of(flow):
        return loss(flow, x0, args, key=key, mask=mask)

    return eqx.filter_value_and_grad(value_of, has_aux=True)(flow)


def draws(loss: DMD2, num: int, key=KEY):
    """What a one-step student and the two losses draw: z, (t, eps) of the fake, (t, eps) of the gradient, the rest."""
    key_times, key_examples = jax.random.split(key)
    t_fake = loss.fake_loss.times.sample(PATH, key_times, num)
    t_match = loss.times.sample(PATH, jax.random.fold_in(key_times, 1), num)
    like = LIKE
    for i in range(num):
        key_noise, key = jax.random.split(jax.random.fold_in(key_examples, i))
        _, key_start, _, _, key_match, key_data = jax.random.split(key, 6)
        normal = fs._numerics.normal_like
        key_real, key_r1 = jax.random.split(key_data)
        z, noise_fake, noise_match = normal(key_start, like), normal(key_noise, like), normal(key_match, like)
        of_data = normal(key_real, like), normal(key_r1, like)
        yield jax.tree.map(np.asarray, (z, (t_fake[i], noise_fake), (t_match[i], noise_match), of_data))


def denoised(t, x, mean, std):
    """E[x_0|x_t = x] of N(mean, std^2) on the linear path, in NumPy."""
    return mean + (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * mean)


# --- the distribution matching gradient ----------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1, 1), (1, 0)], ids=["all", "masked"])
def test_loss_and_gradient_are_an_explicit_loop(counts):
    m, s, m_fake, s_fake = np.array([0.2, 0.4]), np.array([1.2, 0.7]), np.array([0.1, 0.5]), np.array([0.9, 0.8])
    loss = DMD2(TEACHER, every=1)
    flow = Distillation(student(m, s), gaussian(m_fake, s_fake).flow(PATH, predictions.Data()))
    mask = jnp.broadcast_to(jnp.asarray(counts, bool), (6, 2))
    (value, aux), gradient = value_and_gradient(flow, loss, jnp.zeros((6, 2)), mask=mask)

    share = np.asarray(counts) / np.sum(counts)  # the mean over the elements that count
    values, on_mean, on_scale = [], np.zeros(2), np.zeros(2)
    for z, (t_fake, noise_fake), (t, noise), _ in draws(loss, 6):
        x = m + s * z
        of_fake = denoised(t_fake, (1 - t_fake) * x + t_fake * noise_fake, m_fake, s_fake)
        x_t = (1 - t) * x + t * noise
        teacher, fake = denoised(t, x_t, MEAN, STD), denoised(t, x_t, m_fake, s_fake)
        g = (fake - teacher) / np.sum(share * np.abs(x - teacher))
        values.append(np.sum(share * (of_fake - x) ** 2) + 0.5 * np.sum(share * g**2))
        on_mean += share * g / 6
        on_scale += share * g * z / 6
    np.testing.assert_allclose(aux.losses, values, rtol=2e-5)
    np.testing.assert_allclose(value, np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(gradient.student.network.mean[0], on_mean, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradient.student.network.scale[0], on_scale, rtol=2e-5, atol=1e-6)
    # At t = 0.75 a one-step student is never asked.
    assert np.all(np.asarray(gradient.student.network.mean[1]) == 0)


def test_matching_gradient_of_a_pytree_and_a_mask():
    rng = np.random.default_rng(0)
    x, fake, teacher = ({"a": rng.normal(size=3), "b": rng.normal(size=(2, 2))} for _ in range(3))
    mask = {"a": np.array([True, False, True]), "b": np.ones((2, 2), bool)}
    flat = [np.concatenate([tree["a"], tree["b"].ravel()]) for tree in (x, fake, teacher)]
    size = np.mean(np.abs(flat[0] - flat[2])[[0, 2, 3, 4, 5, 6]])
    as_float32 = [jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree) for tree in (x, fake, teacher)]
    found = distillation.matching_gradient(*as_float32, mask=jax.tree.map(jnp.asarray, mask))
    np.testing.assert_allclose(found["b"], (fake["b"] - teacher["b"]) / size, rtol=1e-5, atol=1e-6)
    still = distillation.matching_gradient(as_float32[2], as_float32[1], as_float32[2])
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(still))


def test_its_zero_is_the_teacher():
    """With the exact fake the gradient vanishes at the teacher's law, and leads there from any other."""
    loss = DMD2(TEACHER, every=1)

    def mean_gradient(m, s):
        flow = Distillation(student(m, s), gaussian(m, s).flow(PATH, predictions.Data()))
        network = value_and_gradient(flow, loss, jnp.zeros((4096, 2)))[1].student.network
        return np.asarray(network.mean[0]), np.asarray(network.scale[0])

    on_mean, on_scale = mean_gradient(MEAN, STD)
    assert np.abs(on_mean).max() < 1e-6 and np.abs(on_scale).max() < 1e-6
    for offset in (0.3, -0.3):
        on_mean, _ = mean_gradient(MEAN + offset, STD)
        assert np.all(np.sign(on_mean) == np.sign(offset)) and np.all(np.abs(on_mean) > 1e-2)
        _, on_scale = mean_gradient(MEAN, STD * (1 + offset))
        assert np.all(np.sign(on_scale) == np.sign(offset)) and np.all(np.abs(on_scale) > 1e-3)


def test_guided_teacher_with_conditions():
    """The teacher's denoised data are u + 2 (c - u), each example with its label."""
    means = np.array([[1.0, 1.0], [-1.0, 0.5]])
    mixture = fs.testing.GaussianMixture(np.ones(2), jnp.asarray(means, jnp.float32), 0.09)
    flow = mixture.flow(PATH, predictions.Data())
    loss = DMD2(fs.guidance.ClassifierFree(flow, scale=2.0, null=jnp.asarray(-1)), every=1)
    labels = jnp.asarray([0, 1, 1, 0])
    both = Distillation(student(), TEACHER)
    gradient = value_and_gradient(both, loss, jnp.zeros((4, 2)), labels)[1]

    exact = eqx.filter_jit(lambda t, x, label: mixture.denoised(PATH, t, x, label))
    on_mean = np.zeros(2)
    for label, (z, _, (t, noise), _) in zip(labels, draws(loss, 4), strict=True):
        x = MEAN + STD * z
        x_t = (1 - t) * x + t * noise
        of_label = [np.asarray(exact(t, jnp.asarray(x_t), given)) for given in (label, jnp.asarray(-1))]
        teacher = of_label[1] + 2 * (of_label[0] - of_label[1])
        on_mean += (denoised(t, x_t, MEAN, STD) - teacher) / np.mean(np.abs(x - teacher)) / 8
    np.testing.assert_allclose(gradient.student.network.mean[0], on_mean, rtol=1e-4, atol=1e-6)


# --- who is trained when --------------------------------------------------------------------------------------


class WithHidden(eqx.Module):
    """A denoiser that also gives hidden features: D(t, x) = w x + b, hidden = tanh(v x + t)."""

    w: jax.Array
    b: jax.Array
    v: jax.Array

    def __call__(self, t, x, args, *, key=None):
        return self.w * x + self.b, jnp.tanh(self.v * x + t)


class Head(eqx.Module):
    """One logit of the hidden features."""

    weight: jax.Array

    def __call__(self, hidden):
        return jnp.sum(self.weight * hidden)


def judged_fake() -> fs.Flow:
    arrays = ([0.5, 0.4], [0.2, -0.1], [1.5, -0.8])
    network = WithHidden(*(jnp.asarray(a, float) for a in arrays))
    return fs.Flow(fs.nn.Features(network, Head(jnp.asarray([0.7, -1.1], float))), PATH, predictions.Data())


def test_gradients_reach_their_own_part_only():
    loss = DMD2(TEACHER, every=2, adversarial=Adversarial(0.5, 0.3, 2.0, 0.1))
    x0 = jax.random.normal(KEY, (8, 2))
    between = value_and_gradient(Distillation(student([0.0, 0.0], [1.0, 1.0]), judged_fake()), loss, x0)[1]
    own = value_and_gradient(Distillation(student([0.0, 0.0], [1.0, 1.0]), judged_fake(), 1.0), loss, x0)[1]
    for leaf in jax.tree.leaves(between.student):
        assert np.all(np.asarray(leaf) == 0)
    # By this an optimiser that is not the loss's own is found out.
    assert 0 < between.count < 1e-9 and 0 < own.count < 1e-9
    assert np.all(np.asarray(own.student.network.mean[0]) != 0)
    # The student's loss goes through the fake and the head, and leaves nothing there.
    for one, other in zip(jax.tree.leaves(between.fake), jax.tree.leaves(own.fake), strict=True):
        assert np.all(np.asarray(one) != 0) and np.array_equal(one, other)


@pytest.mark.parametrize("other", [optax.sgd(1e-3), optax.adam(1e-3)])
def test_another_optimiser_is_found_out(other):
    """One that does not count would leave the student untrained for ever."""
    both = Distillation(
        student([0.0, 0.0], [1.0, 1.0]), gaussian([0.0, 0.0], [1.0, 1.0]).flow(PATH, predictions.Data())
    )
    batches = [jnp.zeros((4, 2))] * 4
    with pytest.raises(ValueError, match="Another optimiser than"):
        list(fs.training.fit(DMD2(TEACHER), both, batches, other, steps=4, key=KEY, progress=False))


def test_times_end_clean():
    with pytest.raises(ValueError, match="wants the clean end"):
        DMD2(TEACHER, ts=(1.0, 0.5))


def test_alternation_under_fit():
    """The student and its optimiser's state move on every third step alone, for which alone the teacher is asked."""
    calls = []

    class Counted(eqx.Module):
        def __call__(self, t, x, args, *, key=None):
            jax.debug.callback(lambda: calls.append(1))
            return TEACHER.output(t, x, args)

    loss = DMD2(fs.Flow(Counted(), PATH, predictions.Data()), every=3)
    both = Distillation(
        student([0.0, 0.0], [1.0, 1.0]), gaussian([0.0, 0.0], [1.0, 1.0]).flow(PATH, predictions.Data())
    )
    optimiser = loss.optimiser(student=optax.adamw(1e-2), fake=optax.adamw(1e-2))
    batches = [jnp.zeros((4, 2))] * 7

    def arrays(tree):
        return [np.asarray(leaf) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]

    def moved(tree, before):
        return [not np.array_equal(a, b) for a, b in zip(arrays(tree), before, strict=True)]

    states, asked = [], []
    run = fs.training.fit(loss, both, batches, optimiser, steps=7, key=KEY, every=1, progress=False, ema=0.5)
    for state in run:
        jax.effects_barrier()
        states.append(state)
        asked.append(len(calls))
    assert asked == [0, 0, 1, 1, 1, 2, 2]
    assert [float(state.flow.count) for state in states] == [1, 2, 0, 1, 2, 0, 1]
    before = (
        arrays(both.student),
        arrays(optimiser.init(eqx.filter(both, eqx.is_inexact_array)).student),
        arrays(both.fake),
    )
    for number, state in enumerate(states, start=1):
        of_optimiser = moved(state.optimiser_state.student, before[1])
        assert any(moved(state.flow.student, before[0])) == any(of_optimiser) == (number % 3 == 0)
        assert any(moved(state.flow.fake, before[2]))
        before = arrays(state.flow.student), arrays(state.optimiser_state.student), arrays(state.flow.fake)
    # Its own steps alone are counted by its optimiser: Adam's first is 1e-2, whatever came between.
    counts = [leaf for leaf in jax.tree.leaves(states[-1].optimiser_state.student) if leaf.dtype == jnp.int32]
    assert all(int(count) == 2 for count in counts)
    averaged = states[2].ema_flow.student.network.mean[0]
    np.testing.assert_allclose(averaged, 0.5 * states[2].flow.student.network.mean[0], rtol=1e-6)

    # Going on from the fourth state gives the same bits.
    run = fs.training.fit(loss, states[3], batches[4:], optimiser, steps=7, every=3, progress=False, ema=0.5)
    *_, resumed = run
    for one, other in zip(
        arrays((resumed.flow, resumed.averages, resumed.optimiser_state)),
        arrays((states[-1].flow, states[-1].averages, states[-1].optimiser_state)),
        strict=True,
    ):
        assert np.array_equal(one, other)


class OwnMap(eqx.Module):
    """The consistency function of a Gaussian of its own: where its probability flow ends, m + s x_t at t = 1."""

    law: fs.testing.Gaussian

    def __call__(self, t, x, args, *, key=None):
        return self.law.flow_map(PATH, t, 0.0, x)


@pytest.mark.parametrize(
    ("ts", "start"), [((1.0, 0.0), Renoised()), ((1.0, 0.5, 0.0), SimulatedSDE())], ids=["one step", "two steps"]
)
def test_fit_reaches_the_teacher(ts, start):
    """From N(0, 1), with a fake of free mean and variance: mean and std within 2 %."""
    loss = DMD2(TEACHER, ts=ts, start=start, every=5)
    law = gaussian([0.0, 0.0], [1.0, 1.0])
    both = Distillation(fs.Flow(OwnMap(law), PATH, predictions.Data()), law.flow(PATH, predictions.Data()))
    optimiser = loss.optimiser(
        student=optax.adam(optax.cosine_decay_schedule(3e-2, 200)),
        fake=optax.adam(optax.cosine_decay_schedule(2e-2, 1_000, 0.1)),
    )
    # Without data: nothing but their number counts here.
    batches = [jnp.zeros((256, 2))] * 1_000
    run = fs.training.fit(loss, both, batches, optimiser, steps=1_000, key=KEY, every=1_000, progress=False, ema=0.98)
    *_, state = run
    grid, solver = fs.grids.Given(ts), fs.solvers.ConsistencySampling()
    for flow in (state.ema_flow.student, state.flow):
        x = np.asarray(fs.sample(flow, LIKE, num=100_000, key=KEY, solver=solver, grid=grid))
        np.testing.assert_allclose(x.mean(0), MEAN, rtol=0.02)
        np.testing.assert_allclose(x.std(0), STD, rtol=0.02)


# --- the start of later steps ---------------------------------------------------------------------------------


TS = jnp.asarray([1.0, 0.7, 0.4, 0.0])


@eqx.filter_jit
def starts(start, x0, index):
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(len(x0)))
    flow = fs.Flow(OwnMap(gaussian()), PATH, predictions.Data())
    return jax.vmap(lambda x0, key: start(flow, TS, index, x0, key=key))(x0, keys)


@pytest.mark.parametrize("start", [Renoised(), SimulatedSDE()], ids=["renoised", "sde"])
def test_states_of_an_exact_student_have_the_marginal_law(start):
    num = 20_000
    # A simulation looks at no data.
    data = (
        jax.vmap(gaussian().sample)(jax.random.split(KEY, num)) if isinstance(start, Renoised) else jnp.zeros((num, 2))
    )
    for index in range(3):
        t = float(TS[index])
        x = np.asarray(starts(start, data, jnp.asarray(index)))
        std = np.sqrt((1 - t) ** 2 * STD**2 + t**2)
        assert np.all(np.abs(x.mean(0) - (1 - t) * MEAN) < 4 * std / np.sqrt(num))
        assert np.all(np.abs(x.std(0) - std) < 4 * std / np.sqrt(2 * num))
        assert abs(np.corrcoef(x.T)[0, 1]) < 4 / np.sqrt(num)


def test_states_of_the_ode_are_those_of_ddim():
    """x_1 = eps at first, then alpha f + sigma (x - alpha f)/sigma of both times, in NumPy."""
    x0 = jnp.zeros((5_000, 2))
    start = SimulatedODE()
    x = np.asarray(starts(start, x0, jnp.asarray(0)))
    assert np.all(np.abs(x.std(0) - 1) < 4 / np.sqrt(2 * len(x))) and np.all(np.abs(x.mean(0)) < 4 / np.sqrt(len(x)))
    for index in (1, 2):
        t, s = (float(t) for t in TS[index - 1 : index + 1])
        data = MEAN + STD / np.sqrt((1 - t) ** 2 * STD**2 + t**2) * (x - (1 - t) * MEAN)
        x = (1 - s) * data + s * (x - (1 - t) * data) / t
        np.testing.assert_allclose(starts(start, x0, jnp.asarray(index)), x, atol=2e-5)


def test_a_student_starts_from_its_own_source():
    """Noise of another law than the normal one, which a student may have though a fake may not; without any data."""
    source = fs.sources.Source(lambda key, like: jnp.full(like.shape, 3.0, like.dtype))
    flow = fs.Flow(Affine(jnp.zeros((2, 2)), jnp.ones((2, 2))), PATH, predictions.Data(), source=source)
    for start in (Renoised(), SimulatedSDE(), SimulatedODE()):
        x = start(flow, jnp.asarray([0.5, 0.25, 0.0]), jnp.asarray(0), jnp.ones(2), key=KEY)
        np.testing.assert_array_equal(x, [1.5, 1.5])


# --- the adversarial head --------------------------------------------------------------------------------------


def test_adversarial_losses_are_an_explicit_loop():
    m, s = np.array([0.2, 0.4]), np.array([1.2, 0.7])
    x0 = np.random.default_rng(0).normal(size=(3, 2))
    w, b, v, u = np.array([0.5, 0.4]), np.array([0.2, -0.1]), np.array([1.5, -0.8]), np.array([0.7, -1.1])

    def logit(t, x):
        return np.sum(u * np.tanh(v * x + t))

    def softplus(value):
        return np.log1p(np.exp(value))

    for count, generator in ((0.0, 0.5), (1.0, 0.5), (1.0, 0.0)):
        loss = DMD2(TEACHER, every=2, adversarial=Adversarial(generator, 0.3, 2.0, 0.1))
        flow = Distillation(student(m, s), judged_fake(), count)
        (_, aux), gradient = value_and_gradient(flow, loss, jnp.asarray(x0, float))
        values, on_mean = [], np.zeros(2)
        for i, (z, (t, noise), (t_match, noise_match), (noise_data, change)) in enumerate(draws(loss, 3)):
            x = m + s * z
            x_t, data_t = (1 - t) * x + t * noise, (1 - t) * x0[i] + t * noise_data
            value = np.mean((w * x_t + b - x) ** 2)
            value += 0.3 * (softplus(logit(t, x_t)) + softplus(-logit(t, data_t)))
            value += 2.0 * (logit(t, data_t) - logit(t, data_t + 0.1 * change)) ** 2
            if count == 1:
                x_t = (1 - t_match) * x + t_match * noise_match
                teacher = denoised(t_match, x_t, MEAN, STD)
                g = (w * x_t + b - teacher) / np.mean(np.abs(x - teacher))
                value += 0.5 * np.mean(g**2) + generator * softplus(-logit(t_match, x_t))
                slope = (1 - t_match) * u * v / np.cosh(v * x_t + t_match) ** 2
                on_mean += (g / 2 - generator * slope / (1 + np.exp(logit(t_match, x_t)))) / 3
            values.append(value)
        np.testing.assert_allclose(aux.losses, values, rtol=1e-4)
        np.testing.assert_allclose(gradient.student.network.mean[0], on_mean, rtol=1e-4, atol=1e-6)


def test_discriminator_against_finite_differences(x64):
    loss = DMD2(gaussian().flow(PATH, predictions.Data()), every=2, adversarial=Adversarial(0.5, 0.3, 2.0, 0.1))
    flow = Distillation(student(), judged_fake())
    x0 = jax.random.normal(KEY, (4, 2))
    assert x0.dtype == jnp.float64
    gradient = value_and_gradient(flow, loss, x0)[1]
    places = [
        lambda f: f.fake.network.head.weight,
        lambda f: f.fake.network.network.v,
        lambda f: f.fake.network.network.w,
    ]
    for place in places:
        step = 1e-5 * jnp.asarray([1.0, 0.0])
        values = [
            value_and_gradient(eqx.tree_at(place, flow, place(flow) + sign * step), loss, x0)[0][0] for sign in (1, -1)
        ]
        np.testing.assert_allclose(place(gradient)[0], (values[0] - values[1]) / 2e-5, rtol=1e-6)


# --- bad input --------------------------------------------------------------------------------------------------


BOTH = Distillation(student(), TEACHER)
COUPLED = fs.Flow(
    Affine(jnp.zeros((2, 2)), jnp.ones((2, 2))), PATH, predictions.Data(), source=fs.sources.CoupledNormal()
)
PAIRS = fs.couplings.Pairs(jnp.zeros((2, 2)), jnp.zeros((2, 2)))
NOISE = fs.Flow(Affine(jnp.zeros((2, 2)), jnp.ones((2, 2))), PATH, predictions.Noise())
ELSEWHERE = gaussian().flow(paths.VP(), predictions.Data())


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: DMD2(COUPLED), TypeError, "The teacher's score was asked of a flow whose source is CoupledNormal"),
        (lambda: DMD2(TEACHER, ts=(1.5, 0.0)), ValueError, "ts has times outside Linear"),
        (lambda: DMD2(TEACHER, ts=(0.5, 1.0)), ValueError, "times that do not fall"),
        (lambda: DMD2(TEACHER, every=0), ValueError, "DMD2 got every = 0, but wants an integer of at least 1"),
        (lambda: DMD2(TEACHER, start=Renoised), TypeError, "start is the class Renoised, but wants an instance"),
        (
            lambda: DMD2(TEACHER, fake_loss=fs.losses.Regression(coupling=fs.couplings.Assignment())),
            ValueError,
            "fake_loss has a dropout or a coupling",
        ),
        (lambda: Adversarial(-1.0), ValueError, "Adversarial got generator_weight = -1, but wants it >= 0"),
        (lambda: Distillation(student(), COUPLED), TypeError, "The fake's score was asked of a flow"),
        (lambda: Distillation(student(), ELSEWHERE), ValueError, "The student and the fake are on different paths"),
        (
            lambda: DMD2(ELSEWHERE)(BOTH, jnp.zeros((2, 2)), key=KEY),
            ValueError,
            "are on different paths, Linear and VP",
        ),
        (
            lambda: DMD2(TEACHER)(TEACHER, jnp.zeros((2, 2)), key=KEY),
            TypeError,
            "flow is a OracleFlow, but wants a fs.dis",
        ),
        (lambda: DMD2(TEACHER)(BOTH, PAIRS, key=KEY), TypeError, "x0 is Pairs, but a student draws its own noise"),
        (
            lambda: DMD2(TEACHER)(Distillation(NOISE, TEACHER), jnp.zeros((2, 2)), key=KEY),
            ValueError,
            "A student that predicts Noise says nothing about the data at one of its times ts on Linear",
        ),
        (
            lambda: jax.eval_shape(
                lambda x: DMD2(TEACHER, adversarial=Adversarial())(BOTH, x, key=KEY), jnp.zeros((2, 2))
            ),
            ValueError,
            "handed out 0 features in one evaluation",
        ),
        (
            lambda: DMD2(TEACHER).optimiser(student=optax.adam, fake=optax.adam(1e-3)),
            TypeError,
            "student is a function, but wants an optimiser of Optax",
        ),
        (
            lambda: DMD2(TEACHER).optimiser(student=optax.sgd(1.0), fake=optax.sgd(1.0)).init(TEACHER),
            TypeError,
            "The flow is a OracleFlow, but wants a fs.distillation.Distillation",
        ),
    ],
)
def test_bad_input(untyped, call, kind, message):
    with pytest.raises(kind, match=message):
        call()
