"""Encoders and decoders: plain modules that know nothing of probability."""

from pyrogen.networks.convolutional import ConvDecoder, ConvEncoder, RoscaEncoder
from pyrogen.networks.critics import Critic
from pyrogen.networks.mlp import MLP
from pyrogen.networks.residual import ResidualBlock, ResNetDecoder, ResNetEncoder

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "Critic",
    "ResNetDecoder",
    "ResNetEncoder",
    "ResidualBlock",
    "RoscaEncoder",
]
