"""Networks for small problems, and the embeddings that larger ones need.

Every network here has the signature of the library, `network(t, x, args, *, key=None)` for ONE example; batch it with
`jax.vmap`. Nothing else in flowsolve depends on them: any callable of that signature is a network.
"""

from .convolution import Convolution
from .embeddings import FourierEmbedding, LabelEmbedding, SinusoidalEmbedding
from .mlp import ResidualMLP
from .precision import Precision
from .unet import UNet
from .vae import MLPVAE, AbstractVAE, ConvolutionalVAE

__all__ = [
    "MLPVAE",
    "AbstractVAE",
    "Convolution",
    "ConvolutionalVAE",
    "FourierEmbedding",
    "LabelEmbedding",
    "Precision",
    "ResidualMLP",
    "SinusoidalEmbedding",
    "UNet",
]
