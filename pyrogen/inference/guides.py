"""An amortized guide for any program: one encoder, one conditional distribution for each latent site."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import CondIndepStackFrame, IndepMessenger
from torch import Tensor, nn
from torch.distributions import Distribution

from pyrogen.arguments import checked, shown
from pyrogen.distributions.families import Delta, Normal, StandardNormal
from pyrogen.distributions.mixtures import EqualMixture, Vamp
from pyrogen.distributions.supports import to_support
from pyrogen.inference.checks import same_support
from pyrogen.inference.programs import (
    Site,
    check_takes,
    describe_example,
    encode,
    evaluation_mode,
    is_real,
    latent_sites,
    make_example,
    module_name,
    observed_sites,
    prototype,
    sample_sites,
)
from pyrogen.inference.turns import seeded
from pyrogen.models.plate import data_plate

__all__ = ["AmortizedGuide", "Family", "flattened", "stand_in_batch"]

Family = Callable[[int | tuple[int, ...], int], nn.Module] | nn.Module
"""What builds a conditional distribution from ``(features, context)``, or one already built."""


@checked()
class AmortizedGuide(PyroModule):
    r"""A guide for any Pyro program, amortised by an encoder.

    .. math:: q(z, \theta \mid x) = q(\theta) \prod_i \prod_s q_s(z_{i,s} \mid f(x_i), z_{i,<s}, \theta)

    The latent sites are read off a trace of the model: shapes, supports, plates and order. Each per-observation site
    gets a conditional distribution of its own, conditioned on the encoder's features :math:`f(x)` and on the latent
    sites already drawn, and mapped to the site's support. Elements of a nested plate are independent given these, each
    with a context of its own. Global sites get a distribution without features, by default mean-field normal.

    Every :class:`~pyrogen.distributions.Vamp` in the model becomes the mixture of this guide's posteriors, no longer of
    an earlier guide's; a run that shall keep its own needs a model of its own.

    Args:
        model: The program to be guided. The guide keeps a reference, not its parameters.
        encoder: A module from the tensors of a batch, ``(B, ...)`` each, to features ``(B, C)``.
        family: A family such as :class:`~pyrogen.distributions.Normal`, called as ``family(features, context)``; a
            conditional distribution already built; or a mapping from site names to these, in which sites left out get
            ``Normal``. A family not given by name does not apply to global sites.
        example: A batch on which the model can run, or shape and type of its tensors. Needed only by a model that
            reads more of its batch than the length when nothing is observed, or that observes several sites.

    Raises:
        TypeError: If a family does not give a module whose call returns a distribution.
        ValueError: If the model has a discrete latent site, no latent site at all, or a name in ``family`` is not one
            of its sites; if a distribution has another event shape or context than its site; if the model cannot be
            traced without an ``example``.

    Example:
        >>> from pyrogen.distributions import Bernoulli, Flow, StandardNormal
        >>> from pyrogen.models import LatentVariableModel
        >>> from pyrogen.networks import MLP
        >>> model = LatentVariableModel(StandardNormal(2), Bernoulli(MLP(2, (1, 4, 4))))
        >>> guide = AmortizedGuide(model, encoder=MLP((1, 4, 4), 32), family=Flow)
        >>> guide(torch.zeros(5, 1, 4, 4))["z"].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        model: Callable,
        encoder: nn.Module,
        family: Family | Mapping[str, Family] = Normal,
        *,
        example: Tensor | Sequence[Tensor] | Sequence[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        # Kept outside the module tree: the model's parameters are not the guide's.
        self.__dict__["model"] = model
        self.encoder = encoder
        self.family = family
        batch = None if example is None else _as_example(example)
        self.example = None if batch is None else describe_example(batch)
        priors = [part for part in _modules(model) if isinstance(part, Vamp)]
        for prior in priors:
            prior.bind(partial(_stand_in, StandardNormal(prior.features)))
        batch, trace = stand_in_batch(model) if batch is None else (batch, prototype(model, *batch))
        self.sites = latent_sites(trace)
        _check_supports(model, batch, self.sites)
        if not self.sites:
            raise ValueError("the model has no latent site to guide; train it with guide=None")
        if isinstance(family, Mapping) and (unknown := family.keys() - self.sites.keys()):
            raise ValueError(f"family names the sites {sorted(unknown)}, but the model's are {[*self.sites]}")
        check_takes(encoder, *batch)
        try:
            with torch.no_grad(), evaluation_mode(encoder):
                features = encoder(*batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"the encoder can't read a batch of {', '.join(map(shown, batch))} ({error}); give it another inputs=, "
                "or an example= of the shape and type that it takes"
            ) from error
        width = features.flatten(1).shape[1]
        self.conditionals = nn.ModuleDict()
        self.contexts = nn.ModuleDict()
        for site in self.sites.values():
            self._add(site, width)
            width += math.prod(_flat_shape(site))
        self._bind(priors, trace)

    def _family_of(self, site: Site) -> Family:
        if isinstance(self.family, Mapping):
            return self.family.get(site.name, Normal)
        return Normal if site.is_global else self.family

    def _add(self, site: Site, width: int) -> None:
        others = [plate.size for plate in site.plates if plate.name != "data"]
        if site.is_global:
            context = math.prod(others) if others else 0
        else:
            context = width
            first = site.name == next(iter(self.sites))
            if others or not first:
                self.contexts[module_name(site.name)] = _Context(width, tuple(others), residual=not first)
        self.conditionals[module_name(site.name)] = _conditional(self._family_of(site), site, context)

    def _bind(self, priors: list[Vamp], trace: poutine.Trace) -> None:
        first = next(iter(self.sites.values()))
        for name, node in sample_sites(trace).items():
            if isinstance(node["fn"], EqualMixture) and (name != first.name or len(first.plates) != 1):
                raise ValueError(
                    f"site '{name}' has a Vamp prior, which needs a posterior that depends on the data alone; it must "
                    "be the first latent site of the model and in no nested plate"
                )
        if priors and isinstance(self.conditionals[module_name(first.name)], Delta):
            raise ValueError(
                "a Vamp prior is a mixture of the guide's posteriors, and a mixture of point masses has no density; "
                "use a family other than Delta"
            )
        for prior in priors:
            prior.bind(self._posterior_of_first_site)

    def _posterior_of_first_site(self, x: Tensor) -> dist.Distribution:
        site = next(iter(self.sites.values()))
        return self._distribution(site, self.encoder(x).flatten(1))

    def _distribution(self, site: Site, parts: Tensor) -> Any:
        """q of one site from the features and the sites drawn so far, ``(B, C)``."""
        conditional = self.conditionals[module_name(site.name)]
        if site.is_global:
            sizes = [plate.size for plate in site.plates]
            # One row of the identity for each element of the plates: free parameters for each.
            context = torch.eye(math.prod(sizes), dtype=parts.dtype, device=parts.device) if sizes else None
            if context is not None:
                context = context.reshape(*sizes, -1)
        else:
            key = module_name(site.name)
            context = self.contexts[key](parts) if key in self.contexts else parts
        q = conditional(_place(site, context)) if context is not None else conditional()
        return _supported(site, q)

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        """Draw every latent site; returns the draws by name."""
        rows = len(batch[0])
        plates = {plate.name: plate for site in self.sites.values() for plate in site.plates}
        opened = {name: _plate(frame, rows) for name, frame in plates.items()}
        parts = encode(self.encoder, *batch).flatten(1)
        draws = {}
        for site in self.sites.values():
            q = self._distribution(site, parts)
            with ExitStack() as stack:
                for plate in site.plates:
                    stack.enter_context(opened[plate.name])
                draws[site.name] = pyro.sample(site.name, q)
            if len(draws) < len(self.sites):
                parts = torch.cat([parts, flattened(site, draws[site.name], rows)], -1)
        return draws

    def extra_repr(self) -> str:
        return f"sites={[*self.sites]}"


def _conditional(family: Family, site: Site, context: int) -> nn.Module:
    """What a family gives for a site."""
    if not isinstance(family, nn.Module):
        try:
            family = family(_features(site), context)
        except TypeError as error:
            raise TypeError(
                f"the family of site '{site.name}' is called as family(features, context), as Normal is: {error}"
            ) from error
    if not isinstance(family, nn.Module):
        raise TypeError(_NO_CONDITIONAL.format(site.name, shown(family)))
    return family


_NO_CONDITIONAL = (
    "the family of site '{}' must be, or give when called as family(features, context), a module whose call with a "
    "context returns a distribution, such as Normal; got {}"
)


class _Context(nn.Module):
    """The context of one site: one vector for each element of its nested plates, with a residual layer where sites
    drawn earlier take part."""

    def __init__(self, width: int, plates: tuple[int, ...], *, residual: bool) -> None:
        super().__init__()
        self.width = width
        self.plates = plates
        self.spread = nn.Linear(width, math.prod(plates) * width) if plates else None
        self.residual = None
        if residual:
            self.residual = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, parts: Tensor) -> Tensor:
        """``(B, width)`` gives ``(B, *plates, width)``."""
        if self.residual is not None:
            parts = parts + self.residual(parts)
        if self.spread is not None:
            parts = self.spread(parts).unflatten(-1, (*self.plates, self.width))
        return parts


def _as_example(example: Any) -> tuple[Tensor, ...]:
    batch = (example,) if isinstance(example, Tensor) else tuple(example)
    if batch and isinstance(batch[0], Mapping):
        return make_example(batch)
    if not batch or not all(x.dim() and len(x) and x.isfinite().all() for x in batch):
        raise ValueError(f"example must be rows of finite data, such as data.train[:2], got {shown(example)}")
    return batch


def stand_in_batch(model: Callable) -> tuple[tuple[Tensor, ...], poutine.Trace]:
    """A batch for the encoder and a trace of the model with nothing observed."""
    device = next((parameter.device for part in _modules(model) for parameter in part.parameters()), None)
    try:
        trace = prototype(model, torch.zeros(2, device=device), observed=False)
    except Exception as error:
        raise ValueError(
            f"the model could not run on a stand-in batch of two rows ({type(error).__name__}: {error}); it reads more "
            "of its batch than the length. Pass example=, a batch on which it can run, such as data.train[:2] as floats"
        ) from error
    names = [*observed_sites(trace)]
    if len(names) != 1:
        raise ValueError(
            f"the model observes {len(names)} sites {names}, so what the encoder will get is not clear; pass example=, "
            "a batch on which the model can run"
        )
    x: Any = trace.nodes[names[0]]["value"]
    return (x,), trace


def _check_supports(model: Callable, batch: tuple[Tensor, ...], sites: dict[str, Site]) -> None:
    """Raise a ``ValueError`` where a support follows from what was drawn before, and so is no fixed set."""
    with seeded(1, batch[0].device):
        again = latent_sites(prototype(model, *batch, observed=False))
    for name, site in sites.items():
        if name in again and not same_support(site.support, again[name].support):
            raise ValueError(
                f"the support of latent site '{name}' depends on what was drawn before ({site.support} once, "
                f"{again[name].support} another time); draw a value on a fixed support and map it in the program"
            )


def _stand_in(normal: StandardNormal, inputs: Tensor) -> dist.Distribution:
    """A posterior of the right shape for a Vamp prior, while the model is read for the first time."""
    return normal(inputs.flatten(1))


def _modules(model: Callable) -> list[nn.Module]:
    return list(model.modules()) if isinstance(model, nn.Module) else []


def _unconstrained_shape(site: Site) -> tuple[int, ...]:
    return tuple(to_support(site.support).inverse_shape(torch.Size(site.shape)))


def _flat_shape(site: Site) -> tuple[int, ...]:
    """Shape of all the site's unconstrained values that belong to one observation."""
    return tuple(plate.size for plate in site.plates if plate.name != "data") + _unconstrained_shape(site)


def _features(site: Site) -> int | tuple[int, ...]:
    shape = _unconstrained_shape(site)
    return shape[0] if len(shape) == 1 else shape


def _plate(frame: CondIndepStackFrame, rows: int) -> IndepMessenger:
    if frame.name != "data":
        return pyro.plate(frame.name, frame.size, dim=frame.dim)
    if frame.full_size in (None, frame.size):
        return data_plate(rows, frame.dim)
    return pyro.plate("data", frame.full_size, subsample=torch.arange(rows), dim=frame.dim)


def _place(site: Site, context: Tensor) -> Tensor:
    """Bring a context ``(B, *nested plates, C)``, or ``(*plates, C)`` at a global site, to the plates' dimensions."""
    if len(site.plates) == 1 and _dim(site.plates[0]) == -1:
        return context
    plates = sorted(site.plates, key=lambda plate: plate.name != "data")
    dims = [_dim(plate) for plate in plates]
    order = sorted(range(len(dims)), key=lambda axis: dims[axis])
    sizes = {dims[axis]: context.shape[axis] for axis in order}
    shape = [sizes.get(dim, 1) for dim in range(min(dims), 0)]
    return context.permute(*order, len(dims)).reshape(*shape, context.shape[-1])


def flattened(site: Site, value: Tensor, rows: int) -> Tensor:
    """All unconstrained values of a site that belong to one observation, ``(B, n)``."""
    if not is_real(site.support):
        value = to_support(site.support).inv(value)
    if site.is_global:
        return value.reshape(1, -1).expand(rows, -1)
    data = next(_dim(plate) for plate in site.plates if plate.name == "data")
    return value.movedim(data - len(_unconstrained_shape(site)), 0).reshape(rows, -1)


def _dim(plate: CondIndepStackFrame) -> int:
    assert plate.dim is not None  # latent_sites keeps vectorised plates only
    return plate.dim


def _supported(site: Site, q: Any) -> Any:
    """A distribution over unconstrained values, mapped to the site's support."""
    expected = _unconstrained_shape(site)
    if not isinstance(q, Distribution):
        raise TypeError(_NO_CONDITIONAL.format(site.name, f"one that returns {shown(q)}"))
    if tuple(q.event_shape) != expected:
        raise ValueError(
            f"the conditional distribution of site '{site.name}' has event shape {tuple(q.event_shape)}, expected "
            f"{expected} (the site's shape {site.shape} before it is mapped to its support)"
        )
    if is_real(site.support):
        return q
    transform = to_support(site.support, cache_size=1)
    if isinstance(q, dist.Delta):
        return dist.Delta(transform(q.v), event_dim=len(site.shape))
    return dist.TransformedDistribution(q, [transform])
