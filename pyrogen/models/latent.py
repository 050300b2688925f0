"""The latent-variable model: one latent, one observation."""

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrogen.arguments import checked
from pyrogen.models.plate import data_plate

__all__ = ["LatentVariableModel"]


@checked()
class LatentVariableModel(PyroModule):
    r"""A prior over a latent z and a likelihood of x given z: the model of every VAE.

    .. math:: p(x, z) = p(z) \, p(x \mid z)

    Args:
        prior: A conditional distribution called without a context, such as
            :class:`~pyrogen.distributions.StandardNormal`; its draws are the site ``"z"``.
        likelihood: A conditional distribution called with z, such as :class:`~pyrogen.distributions.Bernoulli`; its
            draws are the site ``"x"``.

    Shapes:
        x ``(B, *event_shape)``; z ``(B, D)``.

    Example:
        >>> import torch
        >>> from pyrogen.distributions import Bernoulli, StandardNormal
        >>> from pyrogen.networks import MLP
        >>> model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (1, 4, 4))))
        >>> model(torch.zeros(5, 1, 4, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(self, prior: nn.Module, likelihood: nn.Module) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood

    def forward(self, x: Tensor) -> Tensor:
        with data_plate(len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z), obs=x)
        return z
