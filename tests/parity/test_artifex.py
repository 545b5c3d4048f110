"""Equal numbers in artifex 0.1.3: tables, steps, schedules, laws of times. `docs/coming_from/artifex.md` has the rows.

Its models are called as functions on stand-ins that hold the table and the exact noise, as their backbones have no part
in the comparison. Where artifex is wrong, ours is compared with the truth and its number is in a comment.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.alike import DATA, X, importorskip

import flowsolve as fs

importorskip("artifex")
DDIMModel = importorskip("artifex.generative_models.models.diffusion.ddim").DDIMModel
guidance = importorskip("artifex.generative_models.models.diffusion.guidance")
schedules = importorskip("artifex.generative_models.core.noise_schedule")
config = importorskip("artifex.generative_models.core.configuration.diffusion_config")
diffusion = importorskip("artifex.generative_models.training.trainers.diffusion_trainer")
flows = importorskip("artifex.generative_models.training.trainers.flow_trainer")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

TIMES = jnp.arange(1, 1001) / 1000
KS = np.asarray([1, 300, 700, 999])  # one timestep an example
LIKE = jax.ShapeDtypeStruct((2,), jnp.float32)
PATH = fs.paths.Discrete.linear(1000)
TS = jax.vmap(PATH.time_of)(jnp.asarray(KS))


@pytest.fixture(autouse=True)
def their_promotion():
    """artifex promotes dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def table(kind="linear"):
    return schedules.create_noise_schedule(config.NoiseScheduleConfig(name="table", schedule_type=kind))


def close(ours, theirs, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("linear", PATH),
        ("quadratic", fs.paths.Discrete(np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2)),
        ("sqrt", fs.paths.Discrete(1e-4 + (0.02 - 1e-4) * np.sqrt(np.linspace(0, 1, 1000)))),
    ],
)
def test_tables(kind, path):
    theirs = table(kind)
    alpha, sigma = jax.vmap(path.coefficients)(TIMES)
    close(alpha, theirs.sqrt_alphas_cumprod, rtol=1e-4)
    close(sigma, theirs.sqrt_one_minus_alphas_cumprod, rtol=1e-4)
    close(jax.vmap(path.alpha)(TIMES - 1 / 1000) ** 2, theirs.alphas_cumprod_prev, rtol=1e-4)
    close(sigma / alpha, theirs.sqrt_recipm1_alphas_cumprod, rtol=1e-4)


def test_cosine_table():
    # Theirs raises the first 13 betas to 1e-4; behind them both are the same.
    theirs = np.asarray(table("cosine").betas)
    ours = np.asarray(fs.paths.Discrete.cosine(1000, beta_limit=0.9999).betas)
    assert (theirs <= 1.0001e-4).sum() == 13 and (ours[:13] < 1e-4).all()
    close(ours[13:], theirs[13:], rtol=5e-3)


def test_forward_and_posterior():
    theirs, x = table(), jax.vmap(PATH.interpolate)(TS, jnp.asarray(DATA), jnp.asarray(X))
    close(x, theirs.q_sample(DATA, KS, X))
    close(x, theirs.add_noise(DATA, X, KS))
    mean, variance, _ = theirs.q_posterior_mean_variance(DATA, x, KS)
    ours = jax.vmap(PATH.posterior)(jax.vmap(PATH.time_of)(jnp.asarray(KS - 1)), TS, x, jnp.asarray(DATA))
    close(ours[0], mean, rtol=1e-3, atol=1e-5)
    close(ours[1], variance[:, 0], rtol=1e-3)


def test_data_from_noise():
    theirs, ks = table(), KS[:-1]  # at k = 999 the data is the noise's rounding times 157
    ours = jax.vmap(lambda t, x, z: fs.convert(PATH, t, x, z, fs.predictions.Noise(), fs.predictions.Data()))
    close(
        ours(TS[:-1], jnp.asarray(DATA[:3]), jnp.asarray(X[:3])),
        theirs.predict_start_from_noise(DATA[:3], ks, X[:3]),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("steps", [10, 37, 50])
def test_timesteps(steps):
    stand_in = SimpleNamespace(skip_type="uniform", noise_steps=1000)
    theirs = np.asarray(DDIMModel.get_ddim_timesteps(stand_in, steps))
    assert abs(fs.grids.Linspace(steps).timesteps(PATH) - theirs).max() <= 1  # they cut off, we round
    stand_in.skip_type = "quadratic"
    theirs = np.asarray(DDIMModel.get_ddim_timesteps(stand_in, steps))
    ours = fs.grids.Quadratic(steps, scale=0.8).timesteps(PATH)
    assert abs(ours - theirs).max() <= 1 and len(set(ours.tolist())) == steps


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_ddim_step(eta):
    """Of small data, which their clipping leaves alone; of the noisy step the mean over many."""
    theirs, std, num = table(), 0.1, 20_000
    oracle = fs.testing.Gaussian.isotropic(jnp.zeros(2), std).flow(PATH, fs.predictions.Noise())
    t, s = PATH.time_of(600), PATH.time_of(500)
    x = jnp.tile(jnp.asarray([[0.4, -0.2]]), (num, 1))
    noise = jnp.tile(oracle.noise(t, x[0])[None], (num, 1))
    stand_in = SimpleNamespace(
        eta=eta,
        rngs=SimpleNamespace(sample=lambda: jax.random.key(0)),
        alphas_cumprod=theirs.alphas_cumprod,
        _extract_into_tensor=theirs._extract_into_tensor,
        predict_start_from_noise=theirs.predict_start_from_noise,
    )
    stepped = np.asarray(DDIMModel.ddim_step(stand_in, x, np.full(num, 600), np.full(num, 500), noise))
    _, fresh = PATH.noise_split(s, t)
    alpha, sigma = PATH.coefficients(s)
    mean = alpha * oracle.denoised(t, x[0]) + sigma * jnp.sqrt(1 - (eta * fresh) ** 2) * noise[0]
    spread = float(eta * sigma * fresh)
    close(stepped.mean(axis=0), mean, atol=1e-4 + 4 * spread / num**0.5)
    close(stepped.std(axis=0), np.full(2, spread), rtol=0.03, atol=1e-4)


def test_reverse_sde():
    # ScoreDiffusionModel.sample with the exact score and 300 steps: standard deviation 11.0 in the place of 0.5.
    oracle = fs.testing.Gaussian.isotropic(jnp.zeros(2), 0.5).flow(fs.paths.VE(), fs.predictions.Score())
    settings = {"dynamics": fs.dynamics.ReverseSDE(), "solver": fs.solvers.DDIM(), "grid": fs.grids.LogSNR(300)}
    x = fs.sample(oracle, LIKE, num=4_000, key=jax.random.key(0), **settings)
    assert abs(float(x.std()) - 0.5) < 0.02


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({"time_sampling": "uniform"}, fs.times.Uniform()),
        ({"time_sampling": "u_shaped"}, fs.times.UShaped()),
        ({"time_sampling": "logit_normal", "logit_normal_loc": 0.5}, fs.times.LogitNormal(mean=-0.5)),
        ({"time_sampling": "logit_normal", "logit_normal_scale": 0.7}, fs.times.LogitNormal(std=0.7)),
    ],
)
def test_times_of_flows(settings, times):
    """The quantiles of 200 000 draws, whose error is below 0.005; their time is 1 - t."""
    trainer = flows.FlowTrainer(flows.FlowTrainingConfig(**settings))
    drawn = 1 - np.asarray(trainer.sample_time(200_000, jax.random.key(0)))[:, 0]
    levels = np.linspace(0.1, 0.9, 9)
    ours = jax.vmap(lambda u: times.quantile(fs.paths.Linear(), u))(jnp.asarray(levels, jnp.float32))
    close(ours, np.quantile(drawn, levels), rtol=0, atol=0.005)


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        ("uniform", fs.times.Uniform()),
        ("logit_normal", fs.times.LogitNormal(mean=-0.5)),
        ("mode", fs.times.Beta(1.0, 0.5)),
    ],
)
def test_times_of_diffusions(kind, times):
    trainer = diffusion.DiffusionTrainer(table(), diffusion.DiffusionTrainingConfig(timestep_sampling=kind))
    drawn = np.asarray(trainer.sample_timesteps(200_000, jax.random.key(0))) / 1000
    levels = np.linspace(0.1, 0.9, 9)
    ours = jax.vmap(lambda u: times.quantile(PATH, u))(jnp.asarray(levels, jnp.float32))
    close(ours, np.quantile(drawn, levels), rtol=0, atol=0.005)


def test_flow_matching():
    x, velocity = flows.FlowTrainer().compute_conditional_vector_field(X, DATA, 1 - np.asarray(TS)[:, None])
    path = fs.paths.Linear()
    close(jax.vmap(path.interpolate)(TS, jnp.asarray(DATA), jnp.asarray(X)), x)
    convert = jax.vmap(lambda t, x, d: fs.convert(path, t, x, d, fs.predictions.Data(), fs.predictions.Velocity()))
    close(convert(TS[1:], x[1:], jnp.asarray(DATA[1:])), -velocity[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [
        ("epsilon", fs.predictions.Noise()),
        ("x_start", fs.predictions.Data()),
        ("v_prediction", fs.predictions.V()),
    ],
)
def test_targets_and_min_snr(kind, prediction):
    trainer = diffusion.DiffusionTrainer(
        table(), diffusion.DiffusionTrainingConfig(prediction_type=kind, loss_weighting="min_snr")
    )
    a, b, c = jax.vmap(lambda t: prediction.coefficients(PATH, t))(TS)
    ours = (a[:, None] * DATA + b[:, None] * X) / c[:, None]
    close(ours, trainer.compute_target(DATA, X, KS), rtol=1e-4)

    # min(SNR, 5) over the factor from the data loss to that of the prediction, 1, SNR or SNR + 1. Theirs has SNR
    # for each of them, so that of x_start is 5e-4 at k = 0 where it should be 5.
    bar = np.asarray(table().alphas_cumprod, np.float64)[KS]
    snr = bar / (1 - bar)
    below = {"epsilon": snr, "x_start": np.ones(4), "v_prediction": snr + 1}[kind]
    plain, weighted = (fs.losses.Regression(target=prediction, weight=w) for w in (None, fs.weights.MinSNR(5.0)))
    flow = fs.Flow(lambda t, x, args, *, key=None: 0.3 * x, PATH, fs.predictions.V())

    def ratio(t, x, z):
        return weighted.one(flow, x, t=t, noise=z) / plain.one(flow, x, t=t, noise=z)

    ratios = jax.vmap(ratio)(TS, jnp.asarray(DATA), jnp.asarray(X))
    close(ratios, np.minimum(snr, 5) / below, rtol=2e-3)
    if kind == "epsilon":
        close(ratios, trainer.get_loss_weight(KS), rtol=2e-3)


def test_guidance_schedules():
    for theirs, ours in (
        (guidance.linear_guidance_schedule, fs.guidance.Linear(1.0, 7.5)),
        (guidance.cosine_guidance_schedule, fs.guidance.Cosine(1.0, 7.5)),
    ):
        for step in (0, 3, 7, 10):
            close(ours(fs.paths.Linear(), jnp.asarray(1 - step / 10)), theirs(step, 10), rtol=1e-5)
    # Their ClassifierGuidance takes the gradient of a mean over the batch and of the raw logit: 0.343 in a batch of 1
    # becomes 0.0034 in one of 100. Ours is that of the posterior, whatever the batch.
    path = fs.paths.Linear()
    mixture = fs.testing.GaussianMixture(jnp.ones(2), jnp.asarray([[-1.0, 0.0], [1.0, 0.0]]), 0.3)
    whole = mixture.flow(path, fs.predictions.Velocity())

    def logits(t, x, args, *, key=None):
        return jnp.stack([mixture.log_prob(path, t, x, jnp.asarray(label)) for label in range(2)])

    unlabelled = fs.guidance.ClassifierFree(whole, 0.0, jnp.asarray(-1))
    guided = fs.guidance.AddedScore.from_classifier(unlabelled, logits, 1.0)
    for batch in (1, 4):
        x = jnp.tile(jnp.asarray([[0.2, -0.4]]), (batch, 1))
        label = jnp.ones(batch, int)
        wanted = jax.vmap(lambda x, y: mixture.score(path, 0.5, x, y))(x, label)
        close(jax.vmap(lambda x, y: guided.score(0.5, x, y))(x, label), wanted, rtol=1e-4, atol=1e-4)
