r"""A network of images that predicts the variance of the ancestral step beside its output, as extra channels.

Of a network with twice as many channels out as in, the first half is the output and the second half v gives

$$\nu = (1 + v)/2$$

the weight between the two variances of `solvers.LearnedVariance`, in the middle where v = 0.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._checks import describe
from .._types import Args, Network, PRNGKey, TimeLike

__all__ = ["SplitVariance"]


class SplitVariance(eqx.Module):
    """A network with `out_channels` twice those of x, as the pair (output, nu) that `flow.VarianceFlow` takes.

        network = fs.nn.SplitVariance(fs.nn.DiT(4, fs.nn.DiT.SIZES["S/2"], out_channels=8, key=key))
        flow = fs.flow.VarianceFlow(network, path, prediction)

    **Arguments:** `network`: a network of images, channels first; a `Precision` goes inside of this wrapper.

    **Raises:** `ValueError` if its output has another shape.

    Nothing keeps nu in [0, 1], as in the source: Nichol & Dhariwal (2021), arXiv 2102.09672.
    """

    network: Network

    def __call__(
        self, t: TimeLike, x: Float[Array, "channels *size"], args: Args = None, *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "channels *size"], Float[Array, "channels *size"]]:
        """(output, nu) at (t, x), one example."""
        both = self.network(t, x, args, key=key)
        if both.shape != (2 * x.shape[0], *x.shape[1:]):
            raise ValueError(
                f"SplitVariance got an output of {describe(both)} for x of {describe(x)}, but wants twice as many "
                "channels: build the network with out_channels."
            )
        output, v = jnp.split(both, 2)
        return output, (1 + v) / 2
