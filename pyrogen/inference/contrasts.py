"""What critics contrast: sites of a guide with those of a model, in latent and in visible space.

Each contrast is a module that holds its critics. What it gives a program to minimise is differentiated with the
critics' weights held (:func:`~pyrogen.inference.terms.frozen`), and what the critics minimise sees draws without
gradients, so that the two never mix.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from pyro.distributions.transforms import biject_to
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn

from pyrogen.distributions.implicit import is_implicit, lies_on_a_surface
from pyrogen.inference.adaptive import AdaptiveContrast, Covariance, Reference
from pyrogen.inference.draws import Draws, elements, from_elements
from pyrogen.inference.matching import check_unmasked
from pyrogen.inference.programs import before, is_real, per_row, repeat
from pyrogen.inference.ratios import OwnRatio, Ratio
from pyrogen.inference.terms import unmasked

__all__ = [
    "Contrast",
    "CriticBuilder",
    "LatentContrast",
    "RatioBuilder",
    "SiteContrast",
    "VisibleContrast",
    "build_ratio",
    "of_one",
]

MOMENT_DRAWS = 32
"""How many draws of a site at least give the moments of its adaptive contrast."""

RatioBuilder = Callable[[nn.Module], Ratio]
"""What makes a ratio of a critic, such as :class:`~pyrogen.inference.Logistic`."""

CriticBuilder = Callable[[int | tuple[int, ...], int], nn.Module]
"""What makes a critic of an event shape and the width of a context, such as :class:`~pyrogen.networks.Critic`."""


def build_ratio(ratio: RatioBuilder, critic: CriticBuilder, shape: Sequence[int], context: int) -> Ratio:
    """A ratio of a new critic for samples of a shape, which checks the critic's scores for it.

    Raises:
        TypeError: If either is no such builder.
    """
    for builder, what in ((critic, "critic, called as critic(event_shape, context)"), (ratio, "ratio of a critic")):
        if isinstance(builder, nn.Module) or not callable(builder):
            raise TypeError(
                f"expected what makes a {what}, got {_kind(builder)}; pass the class, or functools.partial of it with "
                "options"
            )
    try:
        made = critic(tuple(shape), context)
    except TypeError as error:
        raise TypeError(f"what makes a critic is called as critic(event_shape, context): {error}") from error
    built = ratio(made)
    if not isinstance(built, Ratio):
        built = OwnRatio(built)
    built.event_dim = len(shape)
    return built


def _kind(builder: Any) -> str:
    made = isinstance(builder, nn.Module)
    return f"a {type(builder).__name__} that is made already" if made else repr(builder)


class Contrast(nn.Module):
    """Base: what every contrast offers an objective."""

    settles: Collection[str] = ()
    """Those of its critics that are at chance where all is well."""

    def loss_and_accuracies(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """What its critics minimise, and the share of draws that each assigns to the right side, all ``()``; the first
        critic is called ``""``."""
        raise NotImplementedError(f"{type(self).__name__} must say what its critics minimise")


class SiteContrast(Contrast):
    r"""log q/p at one per-observation latent site of which a side is implicit, given all that it is drawn given.

    With contrast ``"adaptive"`` each side without a density gets an :class:`AdaptiveContrast` of its own, and an
    explicit side its density. With ``"none"`` one critic contrasts the guide's draws with the model's.

    The gradient of −E log p(z) with respect to the parameters of p is exact for an explicit p. An implicit p learns
    along its own draws :math:`z' = g_\theta(\epsilon)`,

    .. math:: -\nabla_\theta \operatorname{E}_q \log p_\theta(z)
              = -\operatorname{E}_{p_\theta} \frac{q(z')}{p_\theta(z')} \nabla_{z'} \log \frac{q(z')}{p_\theta(z')}
                \cdot \nabla_\theta z',

    with the ratio from a critic and its weights normalised over the draws.
    """

    def __init__(
        self,
        name: str,
        draws: Draws,
        ratio: RatioBuilder,
        critic: CriticBuilder,
        contrast: Literal["adaptive", "none"],
        covariance: Covariance,
    ) -> None:
        super().__init__()
        self.name = name
        z, context = self._values(draws, draws.model[name]["value"]), self._context(draws, draws.context(name))
        parents = self._context(draws, draws.parents(name))
        shape, self.event_dim = tuple(z.shape[3:]), z.dim() - 3
        self.moment_draws = MOMENT_DRAWS if covariance == "diagonal" else max(MOMENT_DRAWS, 2 * math.prod(shape))

        def build(given: Tensor | None) -> Ratio:
            return build_ratio(ratio, critic, shape, 0 if given is None else given.shape[-1])

        self.of_guide: AdaptiveContrast | None = None
        self.of_model: AdaptiveContrast | None = None
        self.of_both: Ratio | None = None
        self.of_prior: Ratio | None = None
        guide, model = draws.guide[name]["fn"], draws.model[name]["fn"]
        for whose, fn in (("guide", guide), ("model", model)):
            if lies_on_a_surface(fn):
                raise ValueError(
                    f"the {whose}'s draws at site '{name}' are functions of fewer noise inputs than they have values: "
                    "they lie on a surface, where every ratio of densities is infinite. Give Implicit at least as much "
                    "noise as features, or match the marginals (AAE, WAE, VGHPlusPlus)"
                )
        if contrast == "none":
            _check_order(draws, name)
            self.of_both = build(context)
        else:
            if is_implicit(guide):
                self.of_guide = AdaptiveContrast(build(context), covariance)
            if is_implicit(model):
                self.of_model = AdaptiveContrast(build(parents), covariance)
        if is_implicit(model):
            self.of_prior = build(parents)
        self.settles = () if contrast == "none" else ("", "_model")  # the normal may be all that there is

    def estimate(self, draws: Draws) -> Tensor:
        """log q − log p in nats, in the batch shape of the site, as if nothing of it were masked; its gradient is that
        along the guide's draws."""
        q, p = draws.guide[self.name], draws.model[self.name]
        z, context = self._values(draws, p["value"]), self._context(draws, draws.context(self.name))
        if self.of_both is not None:
            return from_elements(p, self.of_both.log_ratio(z, context))
        log_q = log_p = None
        if self.of_guide is not None:
            log_q = self._on_site(draws, p, self.of_guide.log_density(z, context, self._reference_of_guide(draws)))
        if self.of_model is not None:
            parents = self._context(draws, draws.parents(self.name))
            log_p = self._on_site(draws, p, self.of_model.log_density(z, parents, self._reference_of_model(draws)))
        log_q = q["fn"].log_prob(q["value"]) if log_q is None else log_q
        return log_q - (unmasked(p["fn"])[0].log_prob(p["value"]) if log_p is None else log_p)

    def prior_term(self, draws: Draws) -> Tensor | float:
        """What teaches the model's side, where :meth:`estimate` does not: its gradient is that of −E log p(z)."""
        if self.of_prior is None and self.of_both is None:
            return 0.0
        node = draws.detached_latents[self.name]
        if self.of_prior is None:
            return without_value(-per_row(node, node["fn"].log_prob(node["value"])).mean())
        fn, mask = unmasked(node["fn"])
        if not (draw := fn.rsample()).requires_grad:
            return 0.0
        parents = self._context(draws, draws.parents(self.name))
        given = None if parents is None else parents.detach()
        terms = from_elements(node, self_normalised(self.of_prior.log_ratio(self._values(draws, draw), given)))
        return without_value(per_row(node, scale_and_mask(terms, mask=mask)).mean())

    def loss_and_accuracies(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        z = self._values(draws, draws.model[self.name]["value"]).detach()
        context, parents = self._given(draws)
        found = {}
        if self.of_both is not None:
            found[""] = self.of_both.loss_and_accuracy(z, self._prior_draws(draws), context)
        if self.of_guide is not None:
            found[""] = self.of_guide.loss_and_accuracy(z, context, self._reference_of_guide(draws))
        if self.of_model is not None:
            reference = self._reference_of_model(draws)
            found["_model"] = self.of_model.loss_and_accuracy(self._prior_draws(draws), parents, reference)
        if self.of_prior is not None:
            found["_prior"] = self.of_prior.loss_and_accuracy(z, self._prior_draws(draws), parents)
        return torch.stack([loss for loss, _ in found.values()]).sum(), {key: each for key, (_, each) in found.items()}

    def _prior_draws(self, draws: Draws) -> Tensor:
        """A draw of the model's side for each of the guide's, as a constant, ``(K, B, P, *event)``."""
        return draws.once(
            f"prior draws of {self.name}",
            lambda: self._values(draws, draws.detached_latents[self.name]["fn"].sample()),
        )

    def _reference_of_guide(self, draws: Draws) -> Reference:
        """The normal that stands for q, of each observation.

        Moments of few draws are noise that the critic has to undo, so there are more draws than particles. They are
        taken over all particles also where these differ in sites drawn before: moments that depended on such a site
        would not be constants along it.
        """
        assert self.of_guide is not None
        covariance = self.of_guide.covariance

        def reference() -> Reference:
            own = self._values(draws, draws.model[self.name]["value"]).detach()
            more = math.ceil(self.moment_draws / draws.particles) - 1
            with torch.no_grad():
                fresh = draws.guide[self.name]["fn"].sample((more,)) if more > 0 else ()
                pool = torch.cat([own, *(self._values(draws, value) for value in fresh)])
            return Reference.of(pool, self.event_dim, covariance)

        return draws.once(f"reference of {self.name} in the guide", reference)

    def _reference_of_model(self, draws: Draws) -> Reference:
        """The normal that stands for an implicit p, of all its draws together; of a small batch there are more."""
        assert self.of_model is not None
        covariance = self.of_model.covariance

        def reference() -> Reference:
            own = self._prior_draws(draws).flatten(0, 1)
            more = math.ceil(self.moment_draws / len(own)) - 1
            fresh = draws.detached_latents[self.name]["fn"].sample((more,)) if more > 0 else ()
            pool = torch.cat([own, *(self._values(draws, value).flatten(0, 1) for value in fresh)])
            return Reference.of(pool, self.event_dim, covariance)

        return draws.once(f"reference of {self.name} in the model", reference)

    def _given(self, draws: Draws) -> tuple[Tensor | None, Tensor | None]:
        context, parents = draws.context(self.name), draws.parents(self.name)
        parents = None if parents is None else parents.detach()
        return self._context(draws, context.detach()), self._context(draws, parents)

    def _values(self, draws: Draws, value: Tensor) -> Tensor:
        """A site's unconstrained values, ``(K, B, P, *event)``."""
        site, node = draws.sites[self.name], draws.model[self.name]
        if not is_real(site.support):
            value = biject_to(site.support).inv(value)
        z = elements(node, value, draws.particles)
        return z if z.dim() > 3 else z.unsqueeze(-1)

    def _on_site(self, draws: Draws, node: dict[str, Any], log_density: Tensor) -> Tensor:
        """A log-density of unconstrained values as one of the values themselves, in the site's batch shape."""
        log_density = from_elements(node, log_density)
        if is_real(draws.sites[self.name].support):
            return log_density
        transform = biject_to(draws.sites[self.name].support)
        return log_density - transform.log_abs_det_jacobian(transform.inv(node["value"]), node["value"])

    def _context(self, draws: Draws, context: Tensor | None) -> Tensor | None:
        """A context for each element of the site, ``(K, B, P, C)``, with the place in nested plates."""
        places = elements(draws.model[self.name], draws.model[self.name]["value"], draws.particles).shape[2]
        if context is None and places == 1:
            return None
        rows = draws.particles, len(draws.batch[0])
        parts = []
        if context is not None:
            parts.append(context.reshape(*rows, 1, -1).expand(*rows, places, -1))
        if places > 1:
            like = draws.rows[0] if context is None else context
            parts.append(torch.eye(places, dtype=like.dtype, device=like.device).expand(*rows, places, places))
        return torch.cat(parts, -1)


class LatentContrast(Contrast):
    r"""log q(z)/p(z) of all per-observation latent sites together, their observations forgotten.

    .. math:: q(z) = \operatorname{E}_{p^*(x)} q(z \mid x)

    Sites need no density on either side. Makhzani et al. 2015, *Adversarial autoencoders*, 1511.05644.
    """

    def __init__(self, draws: Draws, ratio: RatioBuilder, critic: CriticBuilder) -> None:
        super().__init__()
        for name in draws.local:
            check_unmasked(name, draws.model[name])
        self.ratio = build_ratio(ratio, critic, draws.latents(draws.model, draws.local).shape[-1:], 0)

    def estimate(self, draws: Draws) -> Tensor:
        """log q(z) − log p(z) at the guide's draws in nats, ``(K, B)``."""
        return self.ratio.log_ratio(draws.latents(draws.model, draws.local)).view(draws.particles, -1)

    def prior_term(self, draws: Draws) -> Tensor | float:
        """What teaches the model's sites, see :class:`SiteContrast`, and the global ones that they depend on."""
        if any(is_implicit(draws.model[name]["fn"]) for name in draws.local):
            z = draws.latents(draws.prior_latents, draws.local)
            return without_value(self_normalised(self.ratio.log_ratio(z)).mean()) if z.requires_grad else 0.0
        # The first site is drawn given global ones alone, so its distribution is at hand.
        nodes = draws.model if len(draws.local) == 1 else draws.detached_local_latents
        log_p = [
            per_row(nodes[name], nodes[name]["fn"].log_prob(nodes[name]["value"].detach())).mean()
            for name in draws.local
        ]
        term = -torch.stack(log_p).sum()
        return without_value(term) if term.requires_grad else 0.0

    def loss_and_accuracies(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        z, prior = (draws.latents(nodes, draws.local).detach() for nodes in (draws.model, draws.prior_latents))
        return of_one(self.ratio.loss_and_accuracy(z, prior))


class VisibleContrast(Contrast):
    """Data against what the model shows: reconstructions, samples of the prior, or both.

    Of a discrete observed site the critic sees the distribution's mean, of any other one a draw with gradients; without
    either, or where some of it is masked, there is a ``ValueError``.
    """

    def __init__(
        self, draws: Draws, ratio: RatioBuilder, critic: CriticBuilder, *, reconstructions: bool, samples: bool
    ) -> None:
        super().__init__()
        self.reconstructions = reconstructions
        self.samples = samples
        self.ratio = build_ratio(ratio, critic, draws.data().shape[1:], 0)

    def loss_and_accuracies(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        data, rows, fakes = draws.data().detach(), len(draws.batch[0]), []
        if self.reconstructions:
            fakes.append(draws.reconstructions.detach()[:rows])
        if self.samples:
            fakes.append(draws.samples.detach()[:rows])
        if self.ratio.needs_pairs:
            data = repeat((data,), len(fakes))[0]
        return of_one(self.ratio.loss_and_accuracy(data, torch.cat(fakes)))


def of_one(loss_and_accuracy: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """What a contrast with one critic says of it."""
    loss, accuracy = loss_and_accuracy
    return loss, {"": accuracy}


def without_value(value: Tensor) -> Tensor:
    """Nothing, with the gradient of a value."""
    return value - value.detach()


def self_normalised(log_ratio: Tensor) -> Tensor:
    """−w log q/p at a model's own draws, with weights w ∝ q/p whose mean over all is 1."""
    weights = torch.softmax(log_ratio.detach().flatten(), 0) * log_ratio.numel()
    return -weights.view_as(log_ratio) * log_ratio


def _check_order(draws: Draws, name: str) -> None:
    """See that all on which the model's site depends stands before it in the guide too."""
    in_guide = before(draws.guide, name)
    if late := [other for other in before(draws.sites, name) if other not in in_guide]:
        raise ValueError(
            f"contrast='none' compares site '{name}' with the model's given the same sites before it, but the guide "
            f"draws {late} after it; use contrast='adaptive', or draw the sites in the model's order"
        )
