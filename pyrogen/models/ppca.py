"""Probabilistic principal component analysis: the linear model with every answer in closed form."""

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrogen.networks.mlp import as_shape

__all__ = ["ProbabilisticPCA"]


class ProbabilisticPCA(PyroModule):
    r"""A linear map of a standard normal latent, with isotropic noise.

    .. math:: p(z) = \mathcal{N}(0, I_k), \quad p(x \mid z) = \mathcal{N}(W z + \mu, \sigma^2 I_D)

    Trained by any objective, or fitted exactly by :meth:`maximum_likelihood`; its posterior and its likelihood are
    known. Tipping & Bishop 1999, *Probabilistic principal component analysis*, J. R. Stat. Soc. B 61.

    Args:
        latent: Number ``k`` of latent dimensions.
        observed: Event shape of the data, or its length ``D``; ``k < D``.

    Shapes:
        x ``(B, *event_shape)``; z ``(B, k)``.

    Example:
        >>> x = torch.randn(100, 5)
        >>> model = ProbabilisticPCA.maximum_likelihood(x, latent=2)
        >>> model.posterior(x).mean.shape, model.log_likelihood(x).shape
        (torch.Size([100, 2]), torch.Size([100]))
    """

    def __init__(self, latent: int, observed: int | Sequence[int]) -> None:
        super().__init__()
        self.latent = latent
        self.observed = observed
        self.shape = as_shape(observed)
        size = math.prod(self.shape)
        if not 1 <= latent < size:
            raise ValueError(f"latent must be between 1 and {size - 1}, one less than the data's size, got {latent}")
        self.weight = nn.Parameter(torch.randn(size, latent) / math.sqrt(latent))
        self.mean = nn.Parameter(torch.zeros(size))
        self.log_scale = nn.Parameter(torch.zeros(()))

    @property
    def scale(self) -> Tensor:
        """Standard deviation σ of the noise."""
        return self.log_scale.exp()

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mean.new_zeros(self.latent), 1.0).to_event(1))
            loc = (z @ self.weight.T + self.mean).reshape(*z.shape[:-1], *self.shape)
            pyro.sample("x", dist.Normal(loc, self.scale).to_event(len(self.shape)), obs=x)
        return z

    @classmethod
    def maximum_likelihood(cls, x: Tensor, latent: int) -> "ProbabilisticPCA":
        r"""The model of highest likelihood for data ``(N, *event_shape)``.

        .. math:: \sigma^2 = \frac{1}{D-k} \sum_{i>k} \lambda_i, \quad W = U_k (\Lambda_k - \sigma^2 I)^{1/2}

        with the eigenvalues λ and eigenvectors U of the data's covariance, computed in float64.

        Raises:
            ValueError: If the data have no more dimensions of non-zero variance than ``latent``.
        """
        model = cls(latent, tuple(x.shape[1:]))
        flat = x.flatten(1).double()
        values, vectors = torch.linalg.eigh(torch.cov(flat.T, correction=0))
        values, vectors = values.flip(0), vectors.flip(1)
        variance = values[latent:].mean()
        if variance <= 0:
            raise ValueError(
                f"the data vary in no more than latent={latent} dimensions, so no noise is left; use a smaller latent"
            )
        weight = vectors[:, :latent] * (values[:latent] - variance).clamp(min=0).sqrt()
        with torch.no_grad():
            model.weight.copy_(weight)
            model.mean.copy_(flat.mean(0))
            model.log_scale.copy_(0.5 * variance.log())
        return model.to(x.dtype)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        r"""The exact posterior, of batch shape ``(B,)`` and event shape ``(k,)``.

        .. math:: p(z \mid x) = \mathcal{N}(M^{-1} W^\top (x - \mu), \sigma^2 M^{-1}), \quad M = W^\top W + \sigma^2 I
        """
        eye = torch.eye(self.latent, dtype=self.weight.dtype, device=self.weight.device)
        m = self.weight.T @ self.weight + self.scale**2 * eye
        loc = torch.linalg.solve(m, self.weight.T @ (x.flatten(1) - self.mean).T).T
        return dist.MultivariateNormal(loc, precision_matrix=(m / self.scale**2).expand(len(x), -1, -1))

    def log_likelihood(self, x: Tensor) -> Tensor:
        r"""The exact log-likelihood of each observation in nats, ``(B,)``.

        .. math:: \log p(x) = \log \mathcal{N}(x; \mu, W W^\top + \sigma^2 I)
        """
        diagonal = (self.scale**2).expand_as(self.mean)
        return dist.LowRankMultivariateNormal(self.mean, self.weight, diagonal).log_prob(x.flatten(1))
