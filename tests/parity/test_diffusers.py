"""Equal numbers in diffusers: tables, grids, steps of its schedulers. `docs/coming_from/diffusers.md` has the rows.

Both sides compute in float32. The steps differ by 1e-6 to 2e-6, and by 1e-5 at most (DEIS 3), of the size of an
example, with diffusers 0.42.1; other tables and grids by what is written behind a tolerance. The network of the
comparisons takes ln(sigma/alpha), so that neither side rounds a timestep.
"""

import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.alike import BATCH, DATA, RNG, X, check, difference, flow_of, importorskip, ours, toy

import flowsolve as fs

torch = importorskip("torch")
diffusers = importorskip("diffusers")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PATH = fs.paths.Discrete(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
FLOW = flow_of(PATH)
Z = RNG.normal(size=(24, BATCH, 2)).astype(np.float32)
LOG_SNR = fs.solvers.LogSNR()


def adams(order, prediction):
    return fs.solvers.AdamsBashforth(order, prediction=prediction, variable=LOG_SNR)


def noise_levels(path, ts):
    return np.asarray(jax.vmap(lambda t: path.sigma(t) / path.alpha(t))(jnp.asarray(ts)))


def times(sigmas, path=PATH):
    """The times of their sigmas, which are sigma/alpha."""
    return np.asarray(jax.vmap(lambda sigma: path.time_at(1.0, sigma))(jnp.asarray(np.array(sigmas), jnp.float32)))


def prepared(scheduler, steps=None, **settings):
    scheduler.set_timesteps(steps, **settings)
    return scheduler


def sigmas_of(scheduler):
    """sigma/alpha of each timestep and of the end, for schedulers with and without such a table."""
    if hasattr(scheduler, "sigmas"):
        return scheduler.sigmas
    kept = scheduler.alphas_cumprod[scheduler.timesteps]
    return torch.cat([((1 - kept) / kept) ** 0.5, torch.zeros(1)])


def theirs(scheduler, x=X, normal=None, **settings):
    """Their loop. `normal` are the numbers that stand in for what a step draws."""
    sigmas, x = sigmas_of(scheduler), torch.from_numpy(x.copy()) * scheduler.init_noise_sigma
    module, steps = __import__(type(scheduler).__module__, fromlist=["_"]), iter(()) if normal is None else iter(normal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(steps)), raising=False)
        for i, timestep in enumerate(scheduler.timesteps):
            output = toy(torch, scheduler.scale_model_input(x, timestep), sigmas[i].log())
            x = scheduler.step(output, timestep, x, **settings, return_dict=False)[0]
    return x.numpy()


def start(scheduler):
    """The same start on a path whose state has unit variance."""
    scale = float(scheduler.init_noise_sigma)
    first = float(sigmas_of(scheduler)[0])
    return X if scale == 1 else (X * scale / np.sqrt(1 + first**2)).astype(np.float32)


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"beta_schedule": "linear"}, fs.paths.Discrete.linear(1000, 0.0001, 0.02)),
        (SCALED, PATH),
        ({"beta_schedule": "squaredcos_cap_v2"}, fs.paths.Discrete.cosine(1000)),
        (
            {"beta_schedule": "sigmoid"},
            fs.paths.Discrete(0.0001 + 0.0199 / (1 + np.exp(-np.linspace(-6, 6, 1000)))),
        ),
    ],
    ids=["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"],
)
def test_schedules(settings, path):
    scheduler = diffusers.DDPMScheduler(**settings)
    kept = jax.vmap(lambda k: path.alpha(path.time_of(k)) ** 2)(jnp.arange(1000))
    check(scheduler.alphas_cumprod.numpy(), kept, 1e-5)  # 1e-6


def test_add_noise_and_velocity():
    scheduler = diffusers.DDPMScheduler(**SCALED)
    timesteps = torch.tensor([0, 17, 500, 999])
    noisy = scheduler.add_noise(torch.from_numpy(DATA), torch.from_numpy(X), timesteps).numpy()
    velocity = scheduler.get_velocity(torch.from_numpy(DATA), torch.from_numpy(X), timesteps).numpy()
    ts = jax.vmap(PATH.time_of)(jnp.asarray(timesteps.numpy()))
    x_t = jax.vmap(lambda t, x, z: fs.conversions.add_noise(PATH, t, x, z))(ts, DATA, X)
    v = jax.vmap(lambda t, x, z: fs.convert(PATH, t, x, z, fs.predictions.Noise(), fs.predictions.V()))(ts, x_t, X)
    check(noisy, x_t, 1e-5)
    check(velocity, v, 1e-4)  # 4e-6


def test_integer_timesteps():
    """DDIM's spacings for 20 of 1000, and trailing also of numbers that do not divide it."""
    for spacing, grid in (
        ("leading", fs.grids.Leading),
        ("trailing", fs.grids.Trailing),
        ("linspace", fs.grids.Linspace),
    ):
        scheduler = prepared(diffusers.DDIMScheduler(timestep_spacing=spacing), 20)
        assert scheduler.timesteps.tolist() == grid(20).timesteps(PATH).tolist(), spacing
    for steps in (3, 7, 18, 50):
        scheduler = prepared(diffusers.DDIMScheduler(timestep_spacing="trailing"), steps)
        assert scheduler.timesteps.tolist() == fs.grids.Trailing(steps).timesteps(PATH).tolist()


@pytest.mark.parametrize(
    ("settings", "grid", "path"),
    [
        ({"use_karras_sigmas": True}, fs.grids.Karras(20), PATH),
        ({"use_exponential_sigmas": True}, fs.grids.LogSNR(20), PATH),
        ({"use_lu_lambdas": True}, fs.grids.LogSNR(20), PATH),
        ({"use_beta_sigmas": True}, fs.grids.Beta(20, 0.6, 0.6), fs.OnPath(FLOW, fs.paths.EDM()).path),
    ],
    ids=["karras", "exponential", "lu", "beta"],
)
def test_sigmas(settings, grid, path):
    scheduler = prepared(diffusers.DPMSolverMultistepScheduler(**SCALED, **settings), 20)
    found = noise_levels(path, fs.grids.ThenClean(grid)(path))
    np.testing.assert_allclose(found[:-1], scheduler.sigmas[:-1], rtol=2e-4)  # 1.3e-5
    assert found[-1] == scheduler.sigmas[-1] == 0


def test_timesteps_of_karras_sigmas():
    """Theirs are rounded, and ours the nearest integer: the same but for a few, which are one apart."""
    scheduler = prepared(diffusers.DPMSolverMultistepScheduler(**SCALED, use_karras_sigmas=True), 20)
    found = jax.vmap(PATH.timestep)(fs.grids.ThenClean(fs.grids.Karras(20))(PATH)[:-1])
    assert np.max(np.abs(np.asarray(found) - scheduler.timesteps.numpy())) <= 1


def test_shift():
    """Of sigmas that are given, as the pipelines do; and what the scheduler's own table makes of it."""
    linear, sigmas = fs.paths.Linear(), np.linspace(1, 0.1, 10)
    scheduler = prepared(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), sigmas=sigmas)
    np.testing.assert_allclose(scheduler.sigmas, fs.grids.Shifted(fs.grids.Uniform(10), 3.0)(linear), rtol=1e-6)
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    grid = fs.grids.Shifted(fs.grids.Uniform(10), np.exp(0.8))
    np.testing.assert_allclose(prepared(dynamic, sigmas=sigmas, mu=0.8).sigmas, grid(linear), rtol=1e-6)
    kind = {"use_dynamic_shifting": True, "time_shift_type": "linear"}
    dynamic = prepared(diffusers.FlowMatchEulerDiscreteScheduler(**kind), sigmas=sigmas, mu=0.8)
    np.testing.assert_allclose(dynamic.sigmas, fs.grids.Shifted(fs.grids.Uniform(10), 0.8)(linear), rtol=1e-6)
    # Its own table is shifted, and the grid between the ends of that table once more.
    own = prepared(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 10).sigmas[-2]
    once = fs.times.shift_time(1 / 1000, 3.0)
    np.testing.assert_allclose(own, fs.times.shift_time(once, 3.0), rtol=1e-5)
    np.testing.assert_allclose([once, own], [0.00299, 0.00893], rtol=2e-3)


# --- steps ----------------------------------------------------------------------------------------

KARRAS = {**SCALED, "use_karras_sigmas": True}
EXPONENTIAL = {**SCALED, "use_exponential_sigmas": True}
TRAILING = {**SCALED, "timestep_spacing": "trailing"}
TO_SIGMA_MIN = {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
NOISE, DATA_PREDICTION = fs.predictions.Noise(), fs.predictions.Data()

# 20 steps: below 15 DPM-Solver++ also lowers the order of the last steps, and DDIM's steps are 1000 // 20 timesteps.
DETERMINISTIC = {
    "DDIM": (lambda: diffusers.DDIMScheduler(**TRAILING, clip_sample=False), fs.solvers.DDIM(), 3e-5),
    "DPM-Solver++ 1": (
        lambda: diffusers.DPMSolverMultistepScheduler(**KARRAS, solver_order=1),
        fs.solvers.DPMSolverPP(1),
        3e-5,
    ),
    "DPM-Solver++ 2M": (lambda: diffusers.DPMSolverMultistepScheduler(**KARRAS), fs.solvers.DPMSolverPP(2), 3e-5),
    "DPM-Solver++ 2M, heun": (
        lambda: diffusers.DPMSolverMultistepScheduler(**KARRAS, solver_type="heun"),
        adams(2, DATA_PREDICTION),
        3e-5,
    ),
    "DPM-Solver++ 3M": (
        lambda: diffusers.DPMSolverMultistepScheduler(**KARRAS, solver_order=3),
        fs.solvers.DPMSolverPP(3, as_published=True),
        3e-5,
    ),
    "DPM-Solver 2, heun": (
        lambda: diffusers.DPMSolverMultistepScheduler(
            **SCALED, **TO_SIGMA_MIN, algorithm_type="dpmsolver", solver_type="heun"
        ),
        adams(2, NOISE),
        3e-5,
    ),
    "UniPC 2, bh2": (lambda: diffusers.UniPCMultistepScheduler(**TRAILING), fs.solvers.UniPC(2), 3e-5),
    # Onto sigma = 0 theirs is NaN with bh1.
    "UniPC 2, bh1": (
        lambda: diffusers.UniPCMultistepScheduler(**SCALED, **TO_SIGMA_MIN, solver_type="bh1"),
        fs.solvers.UniPC(2, bh=1),
        3e-5,
    ),
    "UniPC 3, bh2": (lambda: diffusers.UniPCMultistepScheduler(**TRAILING, solver_order=3), fs.solvers.UniPC(3), 3e-5),
    "UniP 3": (
        lambda: diffusers.UniPCMultistepScheduler(**TRAILING, solver_order=3, disable_corrector=list(range(20))),
        fs.solvers.UniPC(3, corrector=False),
        3e-5,
    ),
    "DEIS 2": (lambda: diffusers.DEISMultistepScheduler(**SCALED), adams(2, NOISE), 3e-5),
    "DEIS 3": (lambda: diffusers.DEISMultistepScheduler(**SCALED, solver_order=3), adams(3, NOISE), 3e-5),
    "Euler": (lambda: diffusers.EulerDiscreteScheduler(**KARRAS), fs.solvers.DDIM(), 3e-5),
    "LMS": (lambda: diffusers.LMSDiscreteScheduler(**EXPONENTIAL), fs.solvers.LMS(4), 3e-5),
}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_steps(name):
    make, solver, tolerance = DETERMINISTIC[name]
    scheduler = prepared(make(), 20)
    found = ours(FLOW, solver, times(sigmas_of(scheduler)), start(scheduler))
    check(theirs(prepared(make(), 20)), found, tolerance)


def test_heun():
    """Their table has every sigma but the first and the last twice."""
    scheduler = prepared(diffusers.HeunDiscreteScheduler(**KARRAS), 12)
    sigmas = np.append(scheduler.sigmas[:1], scheduler.sigmas[1::2])
    assert len(sigmas) == 13
    check(theirs(scheduler), ours(FLOW, fs.solvers.EDMHeun(), times(sigmas), start(scheduler)), 3e-5)


def test_ddim_steps_where_the_number_does_not_divide():
    """18 of 1000, trailing: theirs steps to k - 55 from k, which is not its next timestep. Ours are the formula."""
    settings = {**TRAILING, "clip_sample": False}
    scheduler = prepared(diffusers.DDIMScheduler(**settings), 18)
    assert scheduler.timesteps[:3].tolist() == [999, 943, 888]
    sigmas = sigmas_of(scheduler).numpy().astype(np.float64)
    found = ours(FLOW, fs.solvers.DDIM(), times(sigmas))
    x = X.astype(np.float64)
    for sigma, after in itertools.pairwise(sigmas):
        alpha, alpha_after = 1 / np.sqrt(1 + sigma**2), 1 / np.sqrt(1 + after**2)
        eps = toy(np, x, np.log(sigma))
        x = alpha_after * ((x - alpha * sigma * eps) / alpha + after * eps)
    check(x, found, 3e-5)
    assert 0.01 < difference(found, theirs(scheduler)) < 0.1  # 3.7e-2


def test_singlestep():
    """On equal steps of log-SNR their stage is ours: every second of their timesteps is a step.

    (Of order 3 their stage at two thirds is by another formula than the paper's, which ours is tested with.)
    """
    settings = {**EXPONENTIAL, "final_sigmas_type": "sigma_min"}
    scheduler = prepared(diffusers.DPMSolverSinglestepScheduler(**settings), 12)
    # From the last timestep they go to the sigma of timestep 0, where they are already.
    sigmas, x = scheduler.sigmas[:11], torch.from_numpy(X.copy())
    for i in range(10):
        x = scheduler.step(toy(torch, x, sigmas[i].log()), scheduler.timesteps[i], x, return_dict=False)[0]
    check(x.numpy(), ours(FLOW, fs.solvers.DPMSolverPPSinglestep(2), times(sigmas[::2])), 3e-5)


def test_ipndm():
    """On a table of sigma that begins below 1: at alpha = 0 theirs divides 0 by 1e-8, so that its first x_0 is 0."""
    path, ts = fs.paths.Trigonometric(), np.linspace(0.97, 0, 19)
    scheduler = prepared(diffusers.IPNDMScheduler(trained_betas=np.sin(ts * np.pi / 2).tolist()), 18)
    x = torch.from_numpy(X.copy())

    def output(xp, x, t):
        return xp.tanh(0.9 * x + 0.4 * xp.roll(x, 1, -1) + t)

    for timestep in scheduler.timesteps:
        x = scheduler.step(output(torch, x, timestep), timestep, x, return_dict=False)[0]
    flow = fs.Flow(lambda t, x, args=None, *, key=None: output(jnp, x, t), path, fs.predictions.V())
    check(x.numpy(), ours(flow, fs.solvers.IPNDM(4), ts), 3e-5)


STOCHASTIC = {
    "DDPM": (
        lambda: diffusers.DDPMScheduler(**TRAILING, clip_sample=False),
        fs.solvers.Ancestral(),
        fs.ReverseSDE(1.0),
        {},
        3e-5,
    ),
    "DDPM, fixed_large": (
        # Leading ends at timestep 0, of which theirs draws no noise; after any other it does, in the last step.
        lambda: diffusers.DDPMScheduler(**SCALED, clip_sample=False, variance_type="fixed_large"),
        fs.solvers.Ancestral(fs.solvers.LargeVariance()),
        fs.ReverseSDE(1.0),
        {},
        3e-5,
    ),
    "DDIM, eta": (
        lambda: diffusers.DDIMScheduler(**TRAILING, clip_sample=False),
        fs.solvers.DDIM(0.7),
        fs.ReverseSDE(0.7),
        {"eta": 0.7},
        3e-5,
    ),
    "Euler ancestral": (
        lambda: diffusers.EulerAncestralDiscreteScheduler(**TRAILING),
        fs.solvers.DDIM(1.0),
        fs.ReverseSDE(1.0),
        {},
        3e-5,
    ),
    "SDE-DPM-Solver++ 2M": (
        lambda: diffusers.DPMSolverMultistepScheduler(**KARRAS, algorithm_type="sde-dpmsolver++"),
        fs.solvers.SDEDPMSolverPP(2),
        fs.ReverseSDE(1.0),
        {},
        3e-5,
    ),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_steps(name):
    make, solver, dynamics, settings, tolerance = STOCHASTIC[name]
    scheduler = prepared(make(), 20)
    found = ours(FLOW, solver, times(sigmas_of(scheduler)), start(scheduler), dynamics=dynamics, noise=Z[:20])
    check(theirs(prepared(make(), 20), normal=Z, **settings), found, tolerance)


def test_flow_match_steps():
    """Euler with shift, and Heun, from a velocity."""
    linear = fs.paths.Linear()

    def velocity(xp, x, t):
        return xp.tanh(0.9 * x + 0.4 * xp.roll(x, 1, -1)) - t

    flow = fs.Flow(lambda t, x, args=None, *, key=None: velocity(jnp, x, t), linear, fs.predictions.Velocity())
    euler = prepared(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), sigmas=np.linspace(1, 1 / 12, 12))
    heun = prepared(diffusers.FlowMatchHeunDiscreteScheduler(), 12)
    grid = fs.grids.Shifted(fs.grids.Uniform(12), 3.0)(linear)
    of_heun = np.append(heun.sigmas[:1], heun.sigmas[1::2])
    for scheduler, solver, ts in ((euler, diffrax.Euler(), grid), (heun, diffrax.Heun(), of_heun)):
        x = torch.from_numpy(X.copy())
        for i, timestep in enumerate(scheduler.timesteps):
            x = scheduler.step(velocity(torch, x, scheduler.sigmas[i]), timestep, x, return_dict=False)[0]
        if solver == diffrax.Heun():  # theirs ends with a step of Euler's
            found = ours(flow, diffrax.Heun(), ts[:-1])
            last = jax.vmap(lambda x: flow.velocity(ts[-2], x))(jnp.asarray(found))  # noqa: B023
            found = found - float(ts[-2]) * np.asarray(last)
        else:
            found = ours(flow, solver, ts)
        check(x.numpy(), found, 1e-5)


# --- clipping and guidance ------------------------------------------------------------------------


def test_clipping_and_thresholds():
    """One step of DDIM with `clip_sample`, and a threshold that is above 1."""
    t, s = (float(PATH.time_of(k)) for k in (600, 550))
    x = 3 * X
    output = toy(np, x, 0.3)

    def as_images(x):
        return torch.from_numpy(x)[:, :, None]

    def step(**settings):
        scheduler = prepared(diffusers.DDIMScheduler(**SCALED, **settings), 20)
        return scheduler.step(as_images(output), 600, as_images(x), use_clipped_model_output=True, return_dict=False)[
            0
        ][:, :, 0]

    def found(threshold):
        def one(x, output):
            flow = fs.Flow(lambda t, x, args=None, *, key=None: output, PATH, NOISE)
            flow = fs.guidance.Thresholded(flow, threshold)
            return fs.solve(flow, x, solver=fs.solvers.DDIM(), grid=fs.grids.Given([t, s])).ys[-1]

        return np.stack([np.asarray(one(jnp.asarray(a), jnp.asarray(b))) for a, b in zip(x, output, strict=True)])

    check(step(clip_sample=True), found(fs.guidance.Clip(-1.0, 1.0)), 1e-5)
    settings = {"clip_sample": False, "thresholding": True}
    high = step(**settings, sample_max_value=100.0, dynamic_thresholding_ratio=0.9)
    check(high, found(fs.guidance.DynamicThreshold(0.9)), 1e-5)
    # Their default for sample_max_value makes a plain clip of it.
    check(step(**settings, dynamic_thresholding_ratio=0.9), step(clip_sample=True), 1e-6)
