"""Networks: perceptrons, UNets, transformers and autoencoders, and what they are made of.

Every network here has the signature of the library, `network(t, x, args, *, key=None)` for ONE example; batch it with
`jax.vmap`. Nothing else in flowsolve depends on them: any callable of that signature is a network.
"""

from .attention import Attention
from .conditions import Condition
from .convolution import Convolution
from .dit import DiT
from .embeddings import FourierEmbedding, IntervalEmbedding, LabelEmbedding, SinusoidalEmbedding
from .features import Features, Projector
from .mlp import ResidualMLP
from .patches import TransformerSize
from .positions import AbstractPositions, RotaryPositions, SincosPositions
from .precision import Precision
from .unet import UNet
from .uvit import UViT
from .vae import MLPVAE, AbstractVAE, ConvolutionalVAE
from .variance import SplitVariance

__all__ = [
    "MLPVAE",
    "AbstractPositions",
    "AbstractVAE",
    "Attention",
    "Condition",
    "Convolution",
    "ConvolutionalVAE",
    "DiT",
    "Features",
    "FourierEmbedding",
    "IntervalEmbedding",
    "LabelEmbedding",
    "Precision",
    "Projector",
    "ResidualMLP",
    "RotaryPositions",
    "SincosPositions",
    "SinusoidalEmbedding",
    "SplitVariance",
    "TransformerSize",
    "UNet",
    "UViT",
]
