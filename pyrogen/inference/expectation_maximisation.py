"""Maximum likelihood without gradients, for the families where that is better: scikit-learn's mixtures of normals."""

import math
import warnings
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from pyrogen.distributions.families import SMALLEST_SCALE, UNIT_OFFSET, MultivariateNormal, Normal, Parameters
from pyrogen.distributions.flow import Flow
from pyrogen.distributions.mixtures import Mixture

__all__ = ["FAMILIES", "expectation_maximisation", "start_at_moments"]

FAMILIES = (Normal, MultivariateNormal, Mixture)
"""The families that :func:`expectation_maximisation` fits."""

TOLERANCE = 1e-4
"""The gain of an iteration, in nats for each draw, at which it ends."""


def expectation_maximisation(
    prior: Normal | MultivariateNormal | Mixture, z: Tensor, *, iterations: int = 100, seed: int = 0
) -> int:
    r"""Fit a prior to draws by maximum likelihood, in place.

    .. math:: \max \; \frac{1}{n} \sum_i \log p(z_i)

    One normal is fitted exactly; a mixture goes up from k-means to a local maximum (Dempster, Laird & Rubin 1977,
    *Maximum likelihood from incomplete data via the EM algorithm*, J. R. Stat. Soc. B 39). Draws are brought to mean 0
    and variance 1 first, and a millionth of that is added to every variance.

    Args:
        prior: Without a context.
        z: Draws ``(n, *event_shape)``.
        iterations: How many at most.
        seed: Of k-means.

    Returns:
        The number of iterations.

    Raises:
        ValueError: If there are fewer draws than components.

    Example:
        >>> prior = Mixture(1, components=2)
        >>> _ = expectation_maximisation(prior, torch.tensor([[-5.1], [-4.9], [4.9], [5.1]]))
        >>> prior().component_distribution.mean.flatten().sort().values
        tensor([-5.,  5.], grad_fn=<SortBackward0>)
    """
    components = prior.components if isinstance(prior, Mixture) else 1
    if len(z) < components:
        raise ValueError(f"{components} components need as many draws at least, got {len(z)}")
    flat = z.detach().flatten(1).double().cpu()
    loc, scale = _moments(flat)
    found = GaussianMixture(
        components,
        covariance_type="full" if isinstance(prior, MultivariateNormal) else "diag",
        tol=TOLERANCE,
        max_iter=iterations,
        random_state=seed % 2**32,
    )
    with warnings.catch_warnings():
        # To end at the last iteration is as good here as at the last step of an optimizer.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found.fit(((flat - loc) / scale).numpy())
    means, covariances, weights = map(torch.as_tensor, (found.means_, found.covariances_, found.weights_))
    means = loc + scale * means
    if isinstance(prior, MultivariateNormal):
        tril = scale.unsqueeze(-1) * torch.linalg.cholesky(covariances[0])
        scales = tril.diagonal()
        below = (tril / scales.unsqueeze(-1))[tuple(prior.lower.cpu())]
        _write(prior.parameters_of, means, raw_scale(scales), below)
    else:
        logits = weights.log() if isinstance(prior, Mixture) else weights[:0]
        _write(prior.parameters_of, means, raw_scale(scale * covariances.sqrt()), logits)
    return found.n_iter_


def start_at_moments(prior: Flow, z: Tensor) -> None:
    """Let a flow start at the location and the scale of draws ``(n, *event_shape)``, value by value."""
    loc, scale = _moments(z.detach().flatten(1).double().cpu())
    _write(prior.affine, loc, raw_scale(scale))


def raw_scale(scale: Tensor) -> Tensor:
    """The inverse of :func:`~pyrogen.distributions.families.positive_scale`.

    Example:
        >>> from pyrogen.distributions.families import positive_scale
        >>> positive_scale(raw_scale(torch.tensor([1e-3, 1.0, 50.0])))
        tensor([1.0000e-03, 1.0000e+00, 5.0000e+01])
    """
    above = (scale - SMALLEST_SCALE).clamp_min(math.sqrt(torch.finfo(scale.dtype).tiny))
    return above + (-torch.expm1(-above)).log() - UNIT_OFFSET


def _moments(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each value; 1 where it is the same in all draws."""
    deviation = flat.std(0, correction=0)
    return flat.mean(0), torch.where(deviation > 0, deviation, 1.0)


def _write(parameters: Parameters, *values: Tensor) -> None:
    whole: Any = torch.cat([value.flatten() for value in values])
    parameters.start_at(whole.to(parameters.initial), 0)
