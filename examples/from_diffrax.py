"""From Diffrax: samples from a network of one's own.

    python examples/from_diffrax.py

It prints the samples' mean, standard deviation and share in the right one of two modes: in theory 0.1, 1.407, 0.7.
"""

import diffrax
import jax

import flowsolve as fs

weight, mean = jax.numpy.asarray([[0.3, 0.7], [-2.0, 1.0]])  # data: 0.3 N(-2, 0.3^2) + 0.7 N(1, 0.3^2)


def network(t, x, args, *, key=None):  # E[noise - data | x at t]: each mode's own, weighted by its posterior
    var, z = t**2 + (1 - t) ** 2 * 0.3**2, x - (1 - t) * mean
    return jax.nn.softmax(jax.numpy.log(weight) - z**2 / (2 * var)) @ ((t - (1 - t) * 0.3**2) / var * z - mean)


flow = fs.Flow(network, fs.paths.Linear(), fs.predictions.Velocity())
like = jax.ShapeDtypeStruct((), "float32")
x = fs.sample(flow, like, num=10_000, key=jax.random.key(0), solver=diffrax.Heun(), grid=fs.grids.Uniform(50))
print(x.mean(), x.std(), (x > -0.5).mean())  # expected: 0.1, sqrt(1.98) = 1.407, 0.7
