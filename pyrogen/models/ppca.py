"""Probabilistic principal component analysis: the linear model with every answer in closed form."""

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrogen.arguments import checked
from pyrogen.distributions.bounds import bounded, finite_gradient, unbounded, widest
from pyrogen.distributions.normals import SafeMultivariateNormal, SafeNormal, triangle
from pyrogen.networks.mlp import as_shape

__all__ = ["ProbabilisticPCA"]

LIMIT = 40.0
"""What log σ is bounded to, smoothly: densities and their gradients divide by σ, at most by e^-40 twice."""


@checked()
class ProbabilisticPCA(PyroModule):
    r"""A linear map of a standard normal latent, with isotropic noise.

    .. math:: p(z) = \mathcal{N}(0, I_k), \quad p(x \mid z) = \mathcal{N}(W z + \mu, \sigma^2 I_D)

    Trained by any objective, or fitted exactly by :meth:`maximum_likelihood`; its posterior and its likelihood are
    known. Tipping & Bishop 1999, *Probabilistic principal component analysis*, J. R. Stat. Soc. B 61.

    σ is the exponential of the parameter ``log_scale``, which is bounded smoothly by ±40 (single precision sees no
    difference up to 14).

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
        return self._log_scale(self.log_scale.dtype).exp()

    def _log_scale(self, dtype: torch.dtype) -> Tensor:
        return bounded(finite_gradient(self.log_scale.to(dtype)), LIMIT)

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", SafeNormal(self.mean.new_zeros(self.latent), 1.0).to_event(1))
            loc = (z @ self.weight.T + self.mean).reshape(*z.shape[:-1], *self.shape)
            pyro.sample("x", SafeNormal(loc, self.scale).to_event(len(self.shape)), obs=x)
        return z

    @classmethod
    def maximum_likelihood(cls, x: Tensor, latent: int) -> "ProbabilisticPCA":
        r"""The model of highest likelihood for data ``(N, *event_shape)``.

        .. math:: \sigma^2 = \frac{1}{D-k} \sum_{i>k} \lambda_i, \quad W = U_k (\Lambda_k - \sigma^2 I)^{1/2}

        with the eigenvalues λ and eigenvectors U of the data's covariance, computed in float64 where the device has it.

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
            model.log_scale.copy_(unbounded(0.5 * variance.log(), LIMIT))
        return model.to(x.dtype)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        r"""The exact posterior, of batch shape ``(B,)`` and event shape ``(k,)``.

        .. math:: p(z \mid x) = \mathcal{N}(M^{-1} A^\top (x - \mu) / \sigma, M^{-1}),
            \quad M = I + A^\top A, \quad A = W / \sigma

        computed in float64 where the device has it.
        """
        residual, a, m = self._whitened(x)
        loc = torch.linalg.solve(m, residual @ a, left=False)
        scale, unit = triangle(dist.MultivariateNormal(loc, precision_matrix=m.expand(len(x), -1, -1)))
        return SafeMultivariateNormal(*(finite_gradient(each.to(self._type_of(x))) for each in (loc, scale, unit)))

    def log_likelihood(self, x: Tensor) -> Tensor:
        r"""The exact log-likelihood of each observation in nats, ``(B,)``, computed in float64 where the device has it.

        .. math:: \log p(x) = \log \mathcal{N}(x; \mu, W W^\top + \sigma^2 I)
            = -\tfrac12 \bigl(|r - A z|^2 + |z|^2 + \log \det M\bigr) - D \log \sigma - \tfrac{D}{2} \log 2\pi

        with :math:`r = (x - \mu) / \sigma`, and A, M and the mean z of the posterior as in :meth:`posterior`. In single
        precision it is -∞ below -3.4e38.
        """
        r, a, m = self._whitened(x)
        z = torch.linalg.solve(m, r @ a, left=False)
        quadratic = (r - z @ a.T).square().sum(-1) + z.square().sum(-1) + torch.linalg.slogdet(m).logabsdet
        log_det = a.shape[0] * (self._log_scale(a.dtype) + 0.5 * math.log(2 * math.pi))
        return (-0.5 * quadratic - log_det).to(self._type_of(x))

    def _whitened(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Data less their mean ``(B, D)`` and weights ``(D, k)`` in units of σ, and ``(k, k)`` M, in float64."""
        wide = widest(self.weight)
        scale = self._log_scale(wide).exp()
        a = self.weight.to(wide) / scale
        eye = torch.eye(self.latent, dtype=wide, device=a.device)
        return (x.flatten(1).to(wide) - self.mean) / scale, a, eye + a.T @ a

    def _type_of(self, x: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, self.weight.dtype)
