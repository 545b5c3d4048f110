"""The tables of all members: a new path, prediction, solver or loss gets the common checks from its row here.

`PATHS` holds one instance of each path, `REFERENCES` the same path in float64 numpy, written from the formulas of
its source and not from the library: t -> (alpha, sigma, alpha', sigma'). `PREDICTIONS` holds the predictions, `SOLVERS`
the solvers with what they claim.
"""

import jax.numpy as jnp
import numpy as np

from flowsolve import paths, predictions, solvers

# --- paths --------------------------------------------------------------------------------------------------

PATHS: dict[str, paths.AbstractPath] = {
    "linear": paths.Linear(),
    "linear_sigma_min": paths.Linear(sigma_min=0.01),
    "trigonometric": paths.Trigonometric(),
    "cosine": paths.Cosine(),
    "ornstein_uhlenbeck": paths.OrnsteinUhlenbeck(),
    "vp": paths.VP(),
    "sub_vp": paths.SubVP(),
    "ve": paths.VE(),
    "ve_root_find": paths.VE(lambda t: 0.02 + t + 10 * t**2),
    "edm": paths.EDM(),
    "discrete_linear": paths.Discrete.linear(),
    "discrete_cosine": paths.Discrete.cosine(100),
    "path": paths.Path(lambda t: 1 - t**2, lambda t: t + t**3),
    "shifted_linear": paths.Shifted(paths.Linear(), -1.5),
    "shifted_vp": paths.Shifted(paths.VP(), 1.0),
}


def _linear(sigma_min):
    return lambda t: (1 - t, sigma_min + (1 - sigma_min) * t, -np.ones_like(t), (1 - sigma_min) + 0 * t)


def _trigonometric(t):
    w = np.pi / 2
    return np.sin(w * (1 - t)), np.sin(w * t), -w * np.sin(w * t), w * np.sin(w * (1 - t))


def _cosine(t, s=0.008):
    w = np.pi / 2 / (1 + s)
    u, u_0 = (t + s) * w, s * w
    alpha, d_alpha = np.sin((1 - t) * w) / np.cos(u_0), -w * np.sin(u) / np.cos(u_0)
    sigma = np.sqrt(np.sin(u - u_0) * np.sin(u + u_0)) / np.cos(u_0)
    return alpha, sigma, d_alpha, -alpha * d_alpha / sigma


def _ornstein_uhlenbeck(t):
    alpha = np.sqrt((1 - t) * (1 + t))
    return alpha, t, -t / alpha, np.ones_like(t)


def _integrated_beta(t, b0=0.1, b1=20.0):
    """The integral of beta from 0 to t, and beta(t)."""
    return t * b0 + t**2 * (b1 - b0) / 2, b0 + t * (b1 - b0)


def _vp(t):
    total, beta = _integrated_beta(t)
    alpha, sigma = np.exp(-total / 2), np.sqrt(-np.expm1(-total))
    return alpha, sigma, -beta * alpha / 2, beta * alpha**2 / (2 * sigma)


def _sub_vp(t):
    total, beta = _integrated_beta(t)
    alpha, sigma = np.exp(-total / 2), -np.expm1(-total)
    return alpha, sigma, -beta * alpha / 2, beta * alpha**2


def _ve(t, low=0.01, high=50.0):
    sigma = low ** (1 - t) * high**t
    return np.ones_like(t), sigma, np.zeros_like(t), sigma * np.log(high / low)


def _discrete(betas):
    steps = len(betas)
    increments = -0.5 * np.log1p(-betas)
    table = np.concatenate([[0.0], np.cumsum(increments)])

    def reference(t):
        # A step's time, rounded to float32, begins the interval that follows.
        k = np.clip(np.floor(t * steps + 1e-4), 0, steps - 1).astype(int)
        log_alpha = -(table[k] + (t * steps - k) * increments[k])
        alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
        slope = -steps * increments[k]
        return alpha, sigma, alpha * slope, -(alpha**2) * slope / sigma

    return reference


def _cosine_betas(steps, s=0.008):
    alpha_bar = np.cos((np.linspace(0, 1, steps + 1) + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def _shifted_linear(t, shift=-1.5):
    k = np.exp(-shift / 2)
    below = 1 + (k - 1) * t
    return (1 - t) / below, k * t / below, -k / below**2, k / below**2


def _shifted_vp(t, shift=1.0):
    # On the circle alpha^2 + sigma^2 = 1, from the ratio sigma/alpha.
    total, beta = _integrated_beta(t)
    root = np.sqrt(np.expm1(total))
    ratio, d_ratio = np.exp(-shift / 2) * root, np.exp(-shift / 2) * beta * np.exp(total) / (2 * root)
    norm = np.sqrt(1 + ratio**2)
    return 1 / norm, ratio / norm, -ratio * d_ratio / norm**3, d_ratio / norm**3


REFERENCES = {
    "linear": _linear(0.0),
    "linear_sigma_min": _linear(0.01),
    "trigonometric": _trigonometric,
    "cosine": _cosine,
    "ornstein_uhlenbeck": _ornstein_uhlenbeck,
    "vp": _vp,
    "sub_vp": _sub_vp,
    "ve": _ve,
    "ve_root_find": lambda t: (np.ones_like(t), 0.02 + t + 10 * t**2, 0 * t, 1 + 20 * t),
    "edm": lambda t: (np.ones_like(t), t, np.zeros_like(t), np.ones_like(t)),
    "discrete_linear": _discrete(np.linspace(1e-4, 0.02, 1000)),
    "discrete_cosine": _discrete(_cosine_betas(100)),
    "path": lambda t: ((1 - t) * (1 + t), t + t**3, -2 * t, 1 + 3 * t**2),
    "shifted_linear": _shifted_linear,
    "shifted_vp": _shifted_vp,
}


def times(name: str, count: int = 12) -> np.ndarray:
    """Times of a path in float32, increasing: both ends, near them on a log scale, and between.

    On a discrete path those between are midway between two steps, where alpha' does not jump.
    """
    path = PATHS[name]
    low, high = float(path.t_data), float(path.t_noise)
    near = np.logspace(-6, -1.5, count // 3)
    inner = np.sort(np.concatenate([near, 1 - near, np.linspace(0.1, 0.9, count - 2 - 2 * len(near))]))
    inner = low + (high - low) * inner
    if name == "edm":
        inner = np.sort(np.concatenate([inner, np.geomspace(0.01, 10, 4)]))
    if isinstance(path, paths.Discrete):
        steps = len(path.betas)
        inner = (np.unique(np.clip(np.floor(inner * steps), 1, steps - 1)) + 0.5) / steps
    return np.concatenate([[low], inner, [high]]).astype(np.float32)


# --- predictions --------------------------------------------------------------------------------------------

PREDICTIONS: dict[str, predictions.AbstractPrediction] = {
    "data": predictions.Data(),
    "noise": predictions.Noise(),
    "velocity": predictions.Velocity(),
    "v": predictions.V(),
    "score": predictions.Score(),
}


# --- solvers ------------------------------------------------------------------------------------------------

#: name -> (solver, order on the probability flow from a start that has it, evaluations a step)
SOLVERS: dict[str, tuple[solvers.AbstractFlowSolver, int, int]] = {
    "ddim": (solvers.DDIM(), 1, 1),
    "dpm_2m": (solvers.DPMSolverPP(2), 2, 1),
    "dpm_3m": (solvers.DPMSolverPP(3), 3, 1),
    "dpm_3m_published": (solvers.DPMSolverPP(3, as_published=True), 2, 1),
    "dpm_2s": (solvers.DPMSolverPPSinglestep(2), 2, 2),
    "dpm_3s": (solvers.DPMSolverPPSinglestep(3), 3, 3),
    "unipc_1": (solvers.UniPC(1), 2, 1),
    "unipc_2": (solvers.UniPC(2), 3, 1),
    "unipc_3": (solvers.UniPC(3), 4, 1),
    "unipc_3_bh1": (solvers.UniPC(3, bh=1), 4, 1),
    "unipc_2_predictor": (solvers.UniPC(2, corrector=False), 2, 1),
    "unipc_3_predictor": (solvers.UniPC(3, corrector=False), 3, 1),
    "adaptive_unipc_3": (solvers.AdaptiveUniPC(3), 4, 1),
    "deis_3": (solvers.DEIS(3), 3, 1),
    "deis_4": (solvers.DEIS(), 4, 1),
    "lms_4": (solvers.LMS(4), 4, 1),
    "ab_2_data": (solvers.AdamsBashforth(2), 2, 1),
    "ab_4_data": (solvers.AdamsBashforth(4), 4, 1),
    "ab_3_noise": (solvers.AdamsBashforth(3, prediction=predictions.Noise(), variable=solvers.LogSNR()), 3, 1),
    "ab_3_velocity": (solvers.AdamsBashforth(3, prediction=predictions.Velocity()), 3, 1),
    "ipndm_2": (solvers.IPNDM(2), 2, 1),
    "ipndm_4": (solvers.IPNDM(4), 2, 1),
    "edm_heun": (solvers.EDMHeun(), 2, 2),
    "sde_dpm_2m": (solvers.SDEDPMSolverPP(2), 2, 1),
    "sa_3": (solvers.SASolver(3), 4, 1),
    "sa_2_predictor": (solvers.SASolver(2, corrector=False), 2, 1),
    "er_sde_3": (solvers.ERSDE(3), 3, 1),
    "seeds_2": (solvers.SEEDS2(), 2, 2),
}


# --- targets, in float64 numpy --------------------------------------------------------------------------------


def gaussian_truth(alpha, sigma, x, mean, covariance):
    """(E[x_0|x], E[eps|x], score, ln p_t(x)) of N(mean, covariance), by direct linear algebra."""
    total = alpha**2 * covariance + sigma**2 * np.eye(len(mean))
    solved = np.linalg.solve(total, x - alpha * mean)
    log_prob = -0.5 * ((x - alpha * mean) @ solved + np.linalg.slogdet(2 * np.pi * total)[1])
    return mean + alpha * covariance @ solved, sigma * solved, -solved, log_prob


def mixture_truth(alpha, sigma, x, weights, means, covariances):
    """The same for a mixture: (K,) weights, (K, d) means, (K, d, d) covariances."""
    parts = [gaussian_truth(alpha, sigma, x, m, c) for m, c in zip(means, covariances, strict=True)]
    data, noise, score, log_probs = map(np.array, zip(*parts, strict=True))
    logits = np.log(weights) + log_probs
    log_prob = np.logaddexp.reduce(logits)
    posterior = np.exp(logits - log_prob)
    return posterior @ data, posterior @ noise, posterior @ score, log_prob


_rng = np.random.default_rng(7)
_roots = _rng.normal(size=(3, 3, 3)) * np.array([0.6, 0.3, 0.9])[:, None, None]

#: name -> (weights, means, covariances); a Gaussian is a mixture of one.
TARGETS = {
    "gaussian": (
        np.ones(1),
        np.array([[0.5, -1.0, 2.0]]),
        np.array([[[1.5, 0.4, 0.0], [0.4, 0.6, -0.3], [0.0, -0.3, 0.9]]]),
    ),
    # Whitened data is the hardest for cancellation: the velocity is nearly 0 on a variance-preserving path.
    "standard": (np.ones(1), np.zeros((1, 3)), np.eye(3)[None]),
    "mixture": (
        np.array([0.5, 0.3, 0.2]),
        np.array([[0.0, 0.0, 0.0], [2.0, -1.0, 0.5], [-1.5, 1.0, 3.0]]),
        np.einsum("kij,klj->kil", _roots, _roots) + 0.05 * np.eye(3),
    ),
}


# --- closed forms that several tests share ------------------------------------------------------------------


def gaussian_flow_map(path, mean, covariance, t_from, t_to, x):
    """The probability flow of N(mean, covariance) from t_from to t_to, in float64 numpy.

    In the covariance's eigenbasis, (x - alpha m)/sqrt(alpha^2 lambda + sigma^2) is constant along the flow.
    """
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))

    def moments(t):
        alpha, sigma = (float(value) for value in path.coefficients(jnp.asarray(t, float)))
        return alpha * np.asarray(mean, np.float64), np.sqrt(alpha**2 * values + sigma**2)

    (mean_from, std_from), (mean_to, std_to) = moments(t_from), moments(t_to)
    return mean_to + vectors @ ((vectors.T @ (np.asarray(x, np.float64) - mean_from)) * std_to / std_from)
