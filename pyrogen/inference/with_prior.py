"""Programs around other programs: a model with another prior at one of its sites, and the guide of two stages."""

from collections.abc import Callable
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyrogen.arguments import checked
from pyrogen.inference.programs import modules_of, unregistered
from pyrogen.models.latent import LatentVariableModel

__all__ = ["SECOND", "TwoStageGuide", "WithPrior"]

SECOND = "u"
"""The name of the second stage's latent site."""


@checked()
class WithPrior(nn.Module):
    r"""A model with another prior at one of its latent sites.

    .. math:: p'(x, z) = p'(z) \, p(x \mid z), \quad \text{or} \quad
        p'(x, z, u) = p(u) \, p'(z \mid u) \, p(x \mid z)

    where the prior is itself a :class:`~pyrogen.models.LatentVariableModel` whose observation is z: the model of two
    stages. Whatever else the program does stays as it is, and plates around the site hold for what stands in its place.

    Args:
        model: A program.
        site: The name of the latent site.
        prior: A conditional distribution called without a context, of the site's event shape; or a
            :class:`~pyrogen.models.LatentVariableModel` of such values, whose latent is then drawn as the site ``"u"``.

    Raises:
        ValueError: When called, if the prior is of another event shape than the site.

    Example:
        >>> import torch
        >>> from pyrogen.distributions import Flow
        >>> from pyrogen.models import ProbabilisticPCA
        >>> model = WithPrior(ProbabilisticPCA(latent=2, observed=5), "z", Flow(2))
        >>> model(torch.zeros(7, 5)).shape
        torch.Size([7, 2])
    """

    def __init__(self, model: Callable, site: str, prior: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.site = site
        self.prior = prior
        if not isinstance(model, nn.Module):  # else the modules that a function refers to would be nobody's
            self.modules_of = nn.ModuleList(modules_of(model))

    def forward(self, *batch: Tensor) -> Any:
        with _Placed(self.site, self.prior):
            return self.model(*batch)

    def extra_repr(self) -> str:
        return f"site={self.site!r}"


class _Placed(Messenger):
    """Let one site be drawn from a prior in place of its own."""

    def __init__(self, site: str, prior: nn.Module) -> None:
        super().__init__()
        self.site = site
        self.prior = prior

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != self.site:
            return
        # The plates stand inside of this handler, so that they have expanded the site's own distribution already.
        batch, event = msg["fn"].batch_shape, msg["fn"].event_shape
        p: Any
        if isinstance(self.prior, LatentVariableModel):
            u = pyro.sample(SECOND, self.prior.prior())
            p = self.prior.likelihood(u)
        else:
            p = self.prior()
        if p.event_shape != event:
            raise ValueError(
                f"the prior is one of values of shape {tuple(p.event_shape)}, but the latent site '{self.site}' has "
                f"shape {tuple(event)}; build it for that"
            )
        msg["fn"] = p.expand(batch)


@checked()
class TwoStageGuide(nn.Module):
    r"""The guide of a model of two stages, :class:`WithPrior` with a ``LatentVariableModel`` for a prior.

    .. math:: q(z, u \mid x) = q(z \mid x) \, q(u \mid z)

    Dai & Wipf 2019, *Diagnosing and enhancing VAE models*, 1903.05789.

    Args:
        first: The guide of the first stage, a program from observations to the latents of the model.
        second: The guide of the second, a program from the values of ``site`` to the site ``"z"`` of the
            ``LatentVariableModel``, which is drawn as the site ``"u"`` here.
        site: The latent site for which the second stage stands.

    Example:
        >>> import torch
        >>> from pyrogen.distributions import NormalLikelihood, StandardNormal
        >>> from pyrogen.inference import AmortizedGuide
        >>> from pyrogen.models import ProbabilisticPCA
        >>> model = ProbabilisticPCA(latent=2, observed=5)
        >>> prior = LatentVariableModel(StandardNormal(2), NormalLikelihood(nn.Linear(2, 2)))
        >>> guide = TwoStageGuide(AmortizedGuide(model, nn.Linear(5, 8)), AmortizedGuide(prior, nn.Linear(2, 8)), "z")
        >>> trace = poutine.trace(guide).get_trace(torch.zeros(7, 5))
        >>> trace.nodes["u"]["value"].shape
        torch.Size([7, 2])
    """

    def __init__(self, first: Callable, second: nn.Module, site: str) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.site = site
        if not isinstance(first, nn.Module):
            self.modules_of = nn.ModuleList(modules_of(first))

    def forward(self, *batch: Tensor) -> None:
        with poutine.trace() as drawn:
            self.first(*batch)
        z: Any = drawn.trace.nodes[self.site]["value"]
        # The second encoder's rows differ where the observations are copies of one, so its work is no matter of those
        # who spare the repeated work of the first; and the plate "data" has been announced once already.
        with poutine.block(hide_fn=_is_its_own), _Renamed():
            unregistered(self.second)(z)

    def extra_repr(self) -> str:
        return f"site={self.site!r}"


def _is_its_own(msg: Any) -> bool:
    return msg["type"] == "encode" or site_is_subsample(msg)


class _Renamed(Messenger):
    """Give the sites of the second stage names that are not the first's."""

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            msg["name"] = SECOND if msg["name"] == "z" else f"{SECOND}.{msg['name']}"
