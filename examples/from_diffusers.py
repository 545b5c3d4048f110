"""From diffusers: samples from a noise-predicting network of one's own.

    python examples/from_diffusers.py

It prints the mean and the standard deviation of 20,000 samples in two dimensions, the data's own to 2%.
"""

import jax
import jax.numpy as jnp
import numpy as np

import flowsolve as fs

betas = np.linspace(0.0001, 0.02, 1000)  # beta_schedule="linear"
alphas_cumprod, mean, std = jnp.cumprod(1 - jnp.asarray(betas)), jnp.array([2.0, -1.0]), jnp.array([0.5, 0.1])


def unet(x, k):  # the exact noise of data N(mean, std^2): a batch x (B, 2) and integer timesteps k (B,), 0 to 999
    alpha, var = jnp.sqrt(alphas_cumprod[k])[:, None], 1 - alphas_cumprod[k][:, None]
    return jnp.sqrt(var) * (x - alpha * mean) / (alpha**2 * std**2 + var)


path = fs.paths.Discrete(betas)
flow = fs.Flow(lambda t, x, args, *, key=None: unet(x[None], path.timestep(t)[None])[0], path, fs.predictions.Noise())
like, grid = jax.ShapeDtypeStruct((2,), jnp.float32), fs.grids.ThenClean(fs.grids.LogSNR(20))  # use_lu_lambdas=True
x = fs.sample(flow, like, num=20_000, key=jax.random.key(0), solver=fs.solvers.DPMSolverPP(2), grid=grid)
print(x.mean(0), x.std(0))  # expected: [2, -1] and [0.5, 0.1], of which 20 steps make [0.507, 0.101]
