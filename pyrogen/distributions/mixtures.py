"""Mixtures: of normals with learned components, and of the guide's own posteriors (the VampPrior)."""

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import ReshapeTransform
from torch import Tensor, nn

from pyrogen.arguments import checked
from pyrogen.distributions.families import Parameters, positive_scale
from pyrogen.distributions.normals import SafeMixture, SafeMixtureOfDiagNormals, SafeNormal
from pyrogen.networks.mlp import as_shape

__all__ = ["EqualMixture", "Mixture", "Vamp"]


@checked()
class Mixture(nn.Module):
    r"""A mixture of normals with diagonal covariances, with pathwise gradients for its samples.

    .. math:: q(z \mid c) = \sum_k \pi_k(c) \, \mathcal{N}(z; \mu_k(c), \operatorname{diag} \sigma_k(c)^2)

    Jankowiak & Karaletsos 2019, *Pathwise derivatives for multivariate distributions*, 1806.01856, give the gradient
    of samples with respect to the weights. It needs at least two values in the event; a mixture over a single value
    can be a prior but, having no reparameterised sample, not a posterior.

    Args:
        features: Event shape, or its length ``D``.
        context: Width ``C`` of the context; 0 makes the parameters free.
        components: How many normals. They start with unit scale at locations drawn from N(0, I).

    Shapes:
        context ``(..., C)`` gives batch shape ``(...)`` and event shape ``(D,)``.

    Example:
        >>> Mixture(2, components=5)().rsample((4,)).shape
        torch.Size([4, 2])
    """

    def __init__(self, features: int | Sequence[int], context: int = 0, *, components: int = 10) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self.features = features
        self.context = context
        self.components = components
        self.shape = as_shape(features)
        d = math.prod(self.shape)
        self.parameters_of = Parameters(components * (2 * d + 1), context)
        self.parameters_of.start_at(torch.zeros(components * (d + 1)), components * d)
        with torch.no_grad():  # apart from each other, since equal components would get equal gradients
            self.parameters_of.initial[: components * d].normal_()

    def forward(self, context: Tensor | None = None) -> dist.Distribution:
        k, d = self.components, math.prod(self.shape)
        loc, raw, logits = self.parameters_of(context).split([k * d, k * d, k], -1)
        loc, scale = loc.unflatten(-1, (k, d)), positive_scale(raw.unflatten(-1, (k, d)))
        logits = logits.log_softmax(-1)  # which torch and Pyro normalise by a difference of large numbers
        if d > 1:
            mixture: dist.Distribution = SafeMixtureOfDiagNormals(loc, scale, logits)
        else:
            mixture = SafeMixture(dist.Categorical(logits=logits), SafeNormal(loc, scale).to_event(1))
        if len(self.shape) == 1:
            return mixture
        return dist.TransformedDistribution(mixture, [ReshapeTransform(torch.Size((d,)), torch.Size(self.shape))])


class EqualMixture(SafeMixture):
    """What a :class:`Vamp` returns."""


@checked()
class Vamp(nn.Module):
    r"""The VampPrior: the prior is the equal mixture of the guide's posteriors at learned pseudo-inputs.

    .. math:: p(z) = \frac{1}{K} \sum_{k=1}^{K} q(z \mid u_k)

    Tomczak & Welling 2018, *VAE with a VampPrior*, 1705.07120. The pseudo-inputs :math:`u_k` are learned without
    constraint. The prior needs to know the posterior: :class:`~pyrogen.inference.AmortizedGuide` binds itself to every
    ``Vamp`` it finds in its model; with a guide of your own call :meth:`bind`.

    Args:
        features: Event shape of the latent, or its length ``D``.
        inputs: Event shape of the data (pseudo-inputs then start uniform in [0, 1]), or a tensor ``(N, *event_shape)``
            of at least one observation, whose rows in turn start the pseudo-inputs.
        components: How many pseudo-inputs ``K``.

    Raises:
        RuntimeError: When called before a posterior was bound.

    Example:
        >>> prior = Vamp(2, inputs=(1, 4, 4), components=8)
        >>> prior.bind(lambda u: dist.Normal(u.flatten(1)[:, :2], 1.0).to_event(1))
        >>> prior().sample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(self, features: int | Sequence[int], inputs: Sequence[int] | Tensor, *, components: int = 500) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self.shape = as_shape(features)
        self.features = features
        self.components = components
        if isinstance(inputs, Tensor):
            if not (inputs.is_floating_point() and inputs.dim() and len(inputs) and inputs.isfinite().all()):
                raise ValueError(
                    f"inputs must be a non-empty tensor (N, *event_shape) of finite floats, got {inputs.dtype} of "
                    f"shape {tuple(inputs.shape)}; convert stored data with pyrogen.data.as_float"
                )
            start = inputs[torch.arange(components) % len(inputs)].detach().clone()
        else:
            start = torch.rand(components, *as_shape(inputs))
        self.inputs = tuple(start.shape[1:])
        self.pseudo_inputs = nn.Parameter(start)
        self._posterior: Callable[[Tensor], dist.Distribution] | None = None

    def bind(self, posterior: Callable[[Tensor], dist.Distribution]) -> None:
        """Say what the posterior of this prior's site is: a callable from ``(K, *event_shape)`` to q(z | u)."""
        self._posterior = posterior

    def forward(self, context: Tensor | None = None) -> dist.Distribution:
        if self._posterior is None:
            raise RuntimeError(
                "a Vamp prior is a mixture of the guide's posteriors and no guide is bound to it yet; build an "
                "AmortizedGuide for the model, or call prior.bind(posterior)"
            )
        posterior = self._posterior(self.pseudo_inputs)
        weights = dist.Categorical(logits=self.pseudo_inputs.new_zeros(self.components))
        return EqualMixture(weights, posterior)

    def extra_repr(self) -> str:
        return f"{self.features}, inputs={self.inputs}, components={self.components}"
