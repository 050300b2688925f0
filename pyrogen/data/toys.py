"""Toy problems whose posterior or evidence is known exactly: oracles for guides, objectives and estimates."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrogen.arguments import checked
from pyrogen.data.dataset import as_float

__all__ = ["EightSchools", "EightSchoolsPosterior", "FourPoints", "LinearGaussian"]


@checked()
@dataclass(frozen=True, eq=False)
class LinearGaussian:
    r"""A linear Gaussian model, whose posterior and evidence are Gaussian.

    .. math::
        z \sim N(0, I), \quad x = W z + \sigma \epsilon, \quad \epsilon \sim N(0, I), \qquad
        p(z \mid x) = N(M^{-1} W^\top x,\; \sigma^2 M^{-1}), \quad M = W^\top W + \sigma^2 I

    The entries of W are drawn from N(0, 1) with ``seed`` and the observations with ``seed + 1``. This is
    probabilistic PCA with a given W (Tipping and Bishop 1999, "Probabilistic principal component analysis").

    Args:
        latent: The size d of z.
        observed: The size D of x.
        scale: The standard deviation σ of the noise.
        seed: The seed of W.
        observations: The number N of observations in :attr:`x`.

    Raises:
        ValueError: If a size is below 1 or ``scale`` is not positive.

    Example:
        >>> toy = LinearGaussian(latent=2, observed=4)
        >>> toy.x.shape, toy.posterior(toy.x[:3]).mean.shape, toy.log_likelihood(toy.x[:3]).shape
        (torch.Size([1000, 4]), torch.Size([3, 2]), torch.Size([3]))
    """

    latent: int = 2
    observed: int = 4
    scale: float = 0.5
    seed: int = 0
    observations: int = 1000
    weight: Tensor = field(init=False, repr=False)
    x: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("latent", "observed", "observations"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1, got {getattr(self, name)}")
        if not self.scale > 0:
            raise ValueError(f"expected scale, a standard deviation, to be positive, got {self.scale}")
        generator = torch.Generator().manual_seed(self.seed)
        object.__setattr__(self, "weight", torch.randn(self.observed, self.latent, generator=generator))
        object.__setattr__(self, "x", self.sample(self.observations, seed=self.seed + 1))

    def model(self, x: Tensor) -> None:
        """The program: sites ``z`` (d,) and ``x`` (D,) in the plate ``data`` of size B.

        Args:
            x: Observations, shape ``(B, D)``.
        """
        # Only the batch's length matters when x is not observed, so integers must not spoil the weight's
        # type.
        weight = self.weight.to(x) if x.is_floating_point() else self.weight.to(x.device)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(weight.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T, self.scale).to_event(1), obs=x)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """The exact posterior of z given x.

        Args:
            x: Observations, shape ``(..., D)``.

        Returns:
            A distribution of batch shape ``(...)`` and event shape ``(d,)``.
        """
        weight = self.weight.to(x)
        eye = torch.eye(self.latent).to(x)
        inverse = torch.linalg.inv(weight.T @ weight + self.scale**2 * eye)
        return dist.MultivariateNormal(x @ weight @ inverse, covariance_matrix=self.scale**2 * inverse)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """The exact log p(x) in nats.

        Args:
            x: Observations, shape ``(..., D)``.

        Returns:
            Shape ``(...)``.
        """
        weight = self.weight.to(x)
        covariance = weight @ weight.T + self.scale**2 * torch.eye(self.observed).to(x)
        return dist.MultivariateNormal(x.new_zeros(self.observed), covariance_matrix=covariance).log_prob(x)

    def sample(self, n: int, seed: int) -> Tensor:
        """Draw n observations.

        Args:
            n: How many.
            seed: The seed.

        Returns:
            Shape ``(n, D)``.
        """
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, self.latent, generator=generator)
        return z @ self.weight.T + self.scale * torch.randn(n, self.observed, generator=generator)


@dataclass(frozen=True)
class EightSchoolsPosterior:
    """Exact values of :class:`EightSchools`: the evidence in nats, and moments of the posterior."""

    log_evidence: float
    mean_mu: float
    sd_mu: float
    mean_tau: float
    mean_abs_tau: float


@dataclass(frozen=True, eq=False)
class EightSchools:
    r"""Eight schools as a test of implicit guides: a posterior with two mirrored modes in τ.

    .. math::
        \mu, \tau, \eta_j \sim N(0, 1), \quad \theta_j = \mu + \tau \eta_j, \quad y_j \sim N(\theta_j, s_j)

    The data are one observation of eight values, so :attr:`x` is a batch of one row. Source: the code of
    Mescheder, Nowozin and Geiger (2017, "Adversarial variational Bayes", arXiv 1701.04722).

    Example:
        >>> toy = EightSchools()
        >>> toy.x.shape
        torch.Size([1, 8])
        >>> round(toy.exact.log_evidence, 3)
        -12.711
    """

    x: Tensor = field(init=False, repr=False)
    scale: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "x", torch.tensor([[2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2]]))
        object.__setattr__(self, "scale", torch.tensor([0.8, 0.5, 0.8, 0.6, 0.5, 0.6, 0.5, 0.4]))

    def model(self, x: Tensor) -> None:
        """The program: sites ``mu``, ``tau``, ``eta`` (8,) and ``x`` (8,) in the plate ``data`` of size B.

        Args:
            x: Observations, shape ``(B, 8)``.
        """
        scale = self.scale.to(x) if x.is_floating_point() else self.scale.to(x.device)
        zeros = scale.new_zeros(8)
        with pyro.plate("data", len(x)):
            mu = pyro.sample("mu", dist.Normal(zeros[0], 1.0))
            tau = pyro.sample("tau", dist.Normal(zeros[0], 1.0))
            eta = pyro.sample("eta", dist.Normal(zeros, 1.0).to_event(1))
            theta = mu.unsqueeze(-1) + tau.unsqueeze(-1) * eta
            pyro.sample("x", dist.Normal(theta, scale).to_event(1), obs=x)

    @cached_property
    def exact(self) -> EightSchoolsPosterior:
        r"""Exact values, by quadrature in double precision.

        With η integrated out, :math:`y_j \mid \mu, \tau \sim N(\mu, \sqrt{s_j^2 + \tau^2})`. What remains is
        smooth and falls off like a Gaussian, where the trapezoidal rule on a grid over (μ, τ) converges
        exponentially.
        """
        step, edge = 0.02, 8.0
        grid = torch.linspace(-edge, edge, round(2 * edge / step) + 1, dtype=torch.float64)
        mu, tau = grid[:, None], grid[None, :]
        log_p = -0.5 * (mu**2 + tau**2) - math.log(2 * math.pi)
        for y, s in zip(self.x[0].tolist(), self.scale.tolist(), strict=True):
            variance = s**2 + tau**2
            log_p = log_p - 0.5 * ((y - mu) ** 2 / variance + variance.log() + math.log(2 * math.pi))
        log_z = log_p.flatten().logsumexp(0)
        weights = (log_p - log_z).exp()
        mean = (weights * mu).sum()
        return EightSchoolsPosterior(
            log_evidence=float(log_z) + 2 * math.log(step),
            mean_mu=float(mean),
            sd_mu=float((weights * (mu - mean) ** 2).sum().sqrt()),
            mean_tau=float((weights * tau).sum()),
            mean_abs_tau=float((weights * tau.abs()).sum()),
        )


@checked()
@dataclass(frozen=True, eq=False)
class FourPoints:
    r"""Four one-hot images of 2×2 pixels; no model can do better than :math:`-\log 4` nats on average.

    :meth:`model` is a program with a two-dimensional latent that attains the bound but for 1e-8 nats: the
    quadrant of z says which pixel is on. Its posterior is N(0, I) cut to one quadrant, which no Gaussian
    guide can match. Source: Mescheder, Nowozin and Geiger (2017, "Adversarial variational Bayes", arXiv
    1701.04722).

    Args:
        repeats: How often each image stands in :attr:`x`, of shape ``(4 * repeats, 1, 2, 2)``, binary.

    Raises:
        ValueError: If ``repeats`` is below 1.

    Example:
        >>> toy = FourPoints(repeats=8)
        >>> toy.x.shape, round(toy.log_likelihood_bound, 3)
        (torch.Size([32, 1, 2, 2]), -1.386)
    """

    repeats: int = 64
    x: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"expected repeats to be at least 1, got {self.repeats}")
        points = torch.eye(4, dtype=torch.bool).reshape(4, 1, 2, 2)
        object.__setattr__(self, "x", points.repeat(self.repeats, 1, 1, 1))

    @property
    def log_likelihood_bound(self) -> float:
        """The best mean log-likelihood of any model, in nats: minus the entropy of the data."""
        return -math.log(4)

    def model(self, x: Tensor) -> None:
        """The program: sites ``z`` (2,) and ``x`` (1, 2, 2) in the plate ``data`` of size B.

        Args:
            x: Images, shape ``(B, 1, 2, 2)``, binary.
        """
        pixels = as_float(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pixels.new_zeros(2), 1.0).to_event(1))
            down, right = (z > 0).unbind(-1)
            on = torch.nn.functional.one_hot(2 * down.long() + right.long(), 4)
            logits = (40.0 * on - 20.0).to(pixels).reshape(*on.shape[:-1], 1, 2, 2)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(3), obs=pixels)
