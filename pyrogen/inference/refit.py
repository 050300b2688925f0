"""Priors fitted afterwards: to the aggregate posterior of a run whose other parts stay as they are."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from pyrogen.arguments import checked
from pyrogen.data import Data, load
from pyrogen.distributions.flow import Flow
from pyrogen.distributions.implicit import NoDensityError, is_implicit
from pyrogen.distributions.mixtures import Vamp
from pyrogen.distributions.semi_implicit import has_stochastic_density
from pyrogen.inference.batches import CHUNK, Batches, training_and_validation
from pyrogen.inference.checks import check_programs, check_values, first_parameter
from pyrogen.inference.divergences import is_point_mass
from pyrogen.inference.draws import draw_only, is_masked
from pyrogen.inference.expectation_maximisation import FAMILIES, expectation_maximisation, start_at_moments
from pyrogen.inference.fabric import Fabric
from pyrogen.inference.guides import AmortizedGuide
from pyrogen.inference.loop import Training
from pyrogen.inference.objectives import ELBO
from pyrogen.inference.programs import (
    Program,
    Site,
    as_module,
    before,
    evaluation_mode,
    is_real,
    latent_sites,
    prototype,
    rehearsal,
    sample_sites,
    trace_of,
)
from pyrogen.inference.run import FitOptions, Run
from pyrogen.inference.terms import frozen
from pyrogen.inference.trouble import NonFiniteLoss
from pyrogen.inference.turns import Turn, seeded
from pyrogen.inference.with_prior import SECOND, TwoStageGuide, WithPrior
from pyrogen.models.latent import LatentVariableModel

__all__ = ["refit_prior"]

DRAWS = 20_000
"""How many draws, at least, fits without gradients and first values rest on, however few the rows."""

EXAMPLE = 16
"""Rows on which a model is tried."""


@checked(but=("run", "prior", "data"))
def refit_prior(
    run: Run,
    prior: nn.Module,
    data: Data | Tensor | Sequence[Tensor] | Dataset | None = None,
    *,
    guide: nn.Module | None = None,
    site: str | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> Run:
    r"""Fit a prior to the aggregate posterior of a run, whose decoder and guide stay as they are.

    .. math:: \max_{p'} \; \mathbb{E}_{q(z)} \log p'(z)
        \iff \min_{p'} \; \operatorname{KL}(q(z) \| p'(z)),
        \quad q(z) = \frac{1}{N} \sum_n q(z \mid x_n)

    What the bound gains is what the marginal divergence loses, for
    :math:`\mathbb{E}_x \operatorname{KL}(q(z \mid x) \| p') = I_q(x; z) + \operatorname{KL}(q(z) \| p')` (Hoffman &
    Johnson 2016). With a point mass for a guide, q(z) is the set of codes, and what comes is a plain autoencoder that
    can be sampled: the control for every method that matches the two while it trains (Ghosh et al. 2020, *From
    variational to deterministic autoencoders*, 1903.12436, with ``Mixture(D, components=10)``). The guide may be
    implicit, too.

    ``Normal``, ``MultivariateNormal`` and ``Mixture`` are fitted by expectation maximisation to as many draws of each
    row as make 20 000, or to one: for the first two that is the exact maximum, for a mixture a local one from k-means.
    Every other prior is fitted by Adam to draws made anew in every step, with a learning rate that falls to 0 as a half
    cosine; a ``Flow`` starts at the location and the scale of the draws. Where the data have validation rows, the
    weights of the best epoch on these are kept.

    A prior that is a ``LatentVariableModel`` of z is a second stage (Dai & Wipf 2019, *Diagnosing and enhancing VAE
    models*, 1903.05789), trained by the ELBO on z with the ``guide`` given for it. The model is then a program of two
    levels, u ~ p(u), z ~ p'(z|u), x ~ p(x|z), guided by q(z|x) q(u|z), so that its log-likelihood is still to be had by
    importance sampling.

    Args:
        run: What :func:`pyrogen.fit` returned. Nothing of it changes; what is returned shares its decoder and guide.
        prior: A conditional distribution called without a context, or a ``LatentVariableModel`` over the values of the
            latent site. It is trained in place.
        data: What the run was fitted to, as for :func:`pyrogen.fit`; may be left out where that has a name, for then
            :func:`pyrogen.data.load` gets it again.
        guide: The second stage's guide, such as ``AmortizedGuide(prior, encoder)``; with a ``LatentVariableModel``
            only. It is trained in place.
        site: The latent site. By default the one whose distribution depends on no other site and no observation.
        epochs: How long; of expectation maximisation so many iterations at most.
        batch_size, learning_rate: Of Adam.
        seed: Of the draws and of the data's order. The caller's random state is left as it was.
        progress: Show a progress bar with the time left.

    Returns:
        A run of the model with the new prior and the same guide, for whatever takes a run. The model is a
        ``LatentVariableModel`` where the run's is one and there is one stage, else a
        :class:`~pyrogen.inference.WithPrior`. The history is that of this fit, in nats: ``loss`` is −E log p'(z), or of
        a second stage the negative ELBO of z, and ``validation`` the same on validation rows with the sign of a bound.
        The objective is ``ELBO()``, of which this is all that depends on the prior.

    Raises:
        TypeError: If a part is of no known kind.
        NoDensityError: A ``ValueError``, if the prior has no density to fit.
        ValueError: If the run has no guide, its data are not known, the prior does not fit the site, or the site's own
            distribution depends on other sites or on the observations.
        NonFiniteLoss: If a loss is NaN or infinite.

    Example:
        >>> import pyrogen as pg
        >>> from pyrogen.distributions import Bernoulli, Delta, Mixture, StandardNormal
        >>> data = pg.data.load("digits")
        >>> model = pg.models.LatentVariableModel(StandardNormal(2), Bernoulli(pg.networks.MLP(2, data.event_shape)))
        >>> point = AmortizedGuide(model, pg.networks.MLP(data.event_shape, 32), Delta)
        >>> run = pg.fit(model, point, ELBO(beta=0.0), data, epochs=1, progress=False)
        >>> refitted = refit_prior(run, Mixture(2, components=10))
        >>> type(refitted.model.prior).__name__, refitted.model.likelihood is model.likelihood
        ('Mixture', True)
    """
    _check_parts(run, prior, guide)
    source = _data_of(run, data)
    batches, validation = training_and_validation(source, batch_size, seed)
    parameter = first_parameter(run.model, run.guide)
    home = torch.zeros(()) if parameter is None else parameter
    options = FitOptions(
        epochs=epochs,
        # Patience that lasts to the end stops nothing, and keeps the best weights.
        patience=None if validation is None else epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule="cosine",
        seed=seed,
        device=str(home.device),
    )
    splits = [part.to(home.device, home.dtype) for part in (batches, validation) if part is not None]
    example = tuple(x.to(home.device) for x in splits[0].first(EXAMPLE))
    for split in splits:
        check_values(run.model, split)
    check_programs(run.model, run.guide, *example)
    for part in (prior, guide):
        if part is not None:
            part.to(home.device, home.dtype)
    with evaluation_mode(run.model, run.guide), seeded(seed, home.device):
        root = _root(run.model, example, site)
        model, its_guide = _assembled(run, prior, guide, root, example)
        draws = [_Draws.of(part, run.guide, root, home.device) for part in splits]
        # Frozen for the sake of a Vamp, whose density has gradients for the guide.
        with frozen([*run.programs.parameters()]), pyro.validation_enabled(False):
            stage = _fitted(prior, guide, draws, options, progress)
    for part in (model, its_guide):
        if part is not run.guide:
            part.training = False
    source_of_data = source.source or None if isinstance(source, Data) else None
    return dataclasses.replace(
        stage, model=model, guide=its_guide, objective=ELBO(), data=source_of_data, example=run.example
    )


def _check_parts(run: Run, prior: nn.Module, guide: nn.Module | None) -> None:
    """What can be seen without running anything."""
    if not isinstance(run, Run):
        raise TypeError(f"expected a run, what fit or load returns, got a {type(run).__name__}")
    parts = [prior] if guide is None else [prior, guide]
    for part in parts:
        if not isinstance(part, nn.Module):
            came = f"the class {part.__name__}" if isinstance(part, type) else f"a {type(part).__name__}"
            raise TypeError(f"expected prior and guide as modules, such as Mixture(8, components=10), got {came}")
    if run.guide is None:
        raise ValueError(
            "the run has no guide, as after training a GAN, so there is no aggregate posterior to which a prior could "
            "be fitted; fit a guide to the frozen model first"
        )
    if isinstance(prior, LatentVariableModel) and guide is None:
        raise ValueError(
            "a prior that is a LatentVariableModel is trained with a guide of its own; pass guide=, such as "
            "AmortizedGuide(prior, encoder) with an encoder of the latent values"
        )
    if guide is not None and not isinstance(prior, LatentVariableModel):
        raise ValueError(
            f"guide= is that of a second stage, a LatentVariableModel, but the prior is a {type(prior).__name__}; "
            "leave it out"
        )
    own = {id(p) for p in run.programs.parameters()}
    if any(id(p) in own for part in parts for p in part.parameters()):
        raise ValueError(
            "prior or guide share parameters with the run, which would change with them; pass others, such as a "
            "copy.deepcopy"
        )
    if not any(p.requires_grad for part in parts for p in part.parameters()):
        raise ValueError(f"a {type(prior).__name__} has no parameter to fit; pass a prior such as Mixture or Flow")


def _data_of(run: Run, data: Any) -> Any:
    if data is not None:
        return data
    if not run.data:
        raise ValueError("the run was not fitted to a data set with a name; pass data=, what it was fitted to")
    return load(**run.data)


def _root(model: Callable, batch: tuple[Tensor, ...], wanted: str | None) -> Site:
    """The latent site whose prior can be another: the only one, or that wanted."""
    trace = prototype(model, *batch)
    sites = latent_sites(trace)
    if not sites:
        raise ValueError("the model has no latent site, so it has no prior to fit")
    if wanted is not None and wanted not in sites:
        raise ValueError(f"the model has no latent site '{wanted}'; its sites are {[*sites]}")
    names = [*sites] if wanted is None else [wanted]
    reasons = {name: _why_no_root(model, batch, trace.nodes[name], sites[name]) for name in names}
    roots = [name for name, reason in reasons.items() if reason is None]
    if not roots:
        why = "; ".join(f"'{name}' {reason}" for name, reason in reasons.items())
        raise ValueError(f"no other prior can take the place of the latent site's own: {why}")
    if len(roots) > 1:
        raise ValueError(f"the latent sites {roots} have a prior each; say by site= which one's shall be fitted")
    return sites[roots[0]]


def _why_no_root(model: Callable, batch: tuple[Tensor, ...], node: Any, site: Site) -> str | None:
    if site.is_global:
        return 'stands outside the plate "data", so it has one value for all observations'
    if len(site.plates) > 1:
        return f'stands in the plates {[plate.name for plate in site.plates]}, of which only "data" may be around it'
    if is_masked(node):
        return "is masked, so some of its draws are idle"
    other = tuple(torch.zeros_like(x) for x in batch)
    if torch.allclose(_from_one_noise(model, batch, site.name, 0), _from_one_noise(model, other, site.name, 1)):
        return None
    return "has a distribution that depends on the observations or on sites drawn before it"


def _from_one_noise(model: Callable, batch: tuple[Tensor, ...], name: str, seed: int) -> Tensor:
    """A site's draw, always from the same noise, where all sites before it were drawn from a seed."""
    program = poutine.uncondition(model)
    with rehearsal(model):
        with seeded(seed, batch[0].device):
            nodes = sample_sites(trace_of(program, *batch))
        earlier = {other: nodes[other]["value"] for other in before(nodes, name)}
        with seeded(0, batch[0].device):
            return draw_only(poutine.condition(program, data=earlier), [name], batch)[name]["value"]


def _assembled(
    run: Run, prior: nn.Module, guide: nn.Module | None, site: Site, example: tuple[Tensor, ...]
) -> tuple[nn.Module, nn.Module]:
    """The run's model with the prior in place of a site's own, and the guide for it."""
    own: Any = run.guide
    vamps = [part for part in prior.modules() if isinstance(part, Vamp)] if isinstance(own, AmortizedGuide) else []
    if guide is None:
        for vamp in vamps:
            vamp.bind(own._posterior_of_first_site)
    _check_density(prior, site)
    if guide is not None and SECOND in sample_sites(prototype(run.model, *example)):
        raise ValueError(f"the model has a site '{SECOND}' already, the name of the second stage's latent; rename it")
    model: nn.Module = _around(run.model, partial(WithPrior, site=site.name, prior=prior), example)
    # A module of Pyro's can't be part of another once it has run.
    if type(run.model) is LatentVariableModel and guide is None and not _has_pyro_module(run.model.likelihood):
        model = LatentVariableModel(prior, run.model.likelihood)
    if guide is not None:
        own = _around(own, partial(TwoStageGuide, second=guide, site=site.name), example)
    elif isinstance(own, AmortizedGuide):
        # The same parts, but a guide of the new model: so it is described, and so a Vamp in there finds its posterior.
        own = copy.copy(own)
        own.__dict__["model"] = model
        own._bind(vamps, prototype(model, *example))
    check_programs(model, own, *example)
    return model, own


def _has_pyro_module(module: nn.Module) -> bool:
    return any(isinstance(part, PyroModule) for part in module.modules())


def _around(program: nn.Module, wrap: Callable[[Callable], nn.Module], example: tuple[Tensor, ...]) -> nn.Module:
    """A program inside another; one made of a function is made anew around that, as it will be when it is loaded."""
    if not isinstance(program, Program):
        return wrap(program)
    made = as_module(wrap(program.function), *example)
    if isinstance(made, Program):
        with torch.no_grad():
            for name in program._store["params"].keys() & made._store["params"].keys():
                made._store["params"][name].copy_(program._store["params"][name])
    return made


def _check_density(prior: nn.Module, site: Site) -> None:
    """See that a prior has a density over the values of a site."""
    with torch.no_grad():
        p = prior.prior() if isinstance(prior, LatentVariableModel) else prior()
        parts = [p]
        if p.batch_shape:
            raise ValueError(
                f"the prior is {tuple(p.batch_shape)} distributions, and one for all observations is expected; make "
                "these dimensions part of the event (to_event)"
            )
        if isinstance(prior, LatentVariableModel):
            parts.append(prior.likelihood(p.sample((2,))))
    if parts[-1].event_shape != site.shape:
        raise ValueError(
            f"the prior is one of values of shape {tuple(parts[-1].event_shape)}, but the latent site '{site.name}' "
            f"has shape {site.shape}; build it for that"
        )
    if not is_real(site.support) and is_real(parts[-1].support):
        raise ValueError(
            f"the prior has draws on the whole space, but the latent site '{site.name}' has support {site.support}; "
            "give a prior of that support, such as a TransformedDistribution of one of these"
        )
    if any(is_implicit(part) or is_point_mass(part) or has_stochastic_density(part) for part in parts):
        raise NoDensityError(
            f"the prior, a {type(prior).__name__}, has no density that could be fitted to draws: it is implicit or a "
            "point mass; use Mixture, Flow or another family with a density"
        )


@dataclass(frozen=True)
class _Draws(Batches):
    """Rows of data as draws of a guide's site, made anew each time that they are read."""

    guide: Any = None
    site: str = ""
    device: Any = None

    @classmethod
    def of(cls, rows: Batches, guide: Any, site: Site, device: torch.device) -> "_Draws":
        given = {field.name: getattr(rows, field.name) for field in dataclasses.fields(rows)}
        return cls(**given, guide=guide, site=site.name, device=device)

    def prepare(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = tuple(x.to(self.device) for x in super().prepare(batch))
        with rehearsal(self.guide):
            return (draw_only(self.guide, [self.site], rows)[self.site]["value"],)

    def many(self) -> Tensor:
        """As many draws of each row as make enough, ``(n, *event_shape)``."""
        order = torch.arange(len(self)).repeat(math.ceil(DRAWS / len(self)))
        z = torch.cat([draws for (draws,) in self._batches(order, CHUNK, self.device)])
        if not torch.isfinite(z).all():
            raise NonFiniteLoss(f"the guide's draws of site '{self.site}' are not all finite, so no prior has them")
        return z


def _fitted(
    prior: nn.Module, guide: nn.Module | None, splits: list[_Draws], options: FitOptions, progress: bool
) -> Run:
    """Fit a prior to the draws of the training rows; returns a run of that alone."""
    draws, validation = splits[0], splits[1] if len(splits) > 1 else None
    model = prior if isinstance(prior, LatentVariableModel) else _Observed(prior)
    stage = Run(model, guide, ELBO(observations=len(draws)), pd.DataFrame(), options)
    if type(prior) in FAMILIES:
        _fit_exactly(prior, stage, draws, validation)
        return stage
    if isinstance(prior, Flow):
        start_at_moments(prior, draws.many())
    example = draws.first()
    check_programs(model, guide, *example)
    stage.objective.prepare(model, guide, *example)
    index = draws.device.index
    fabric = Fabric(accelerator=draws.device.type, devices=1 if index is None else [index])
    with Turn(draws.device) as turn:
        Training(stage, draws, validation, fabric, None, (), turn).go(progress)
    return stage


def _fit_exactly(prior: Any, stage: Run, draws: _Draws, validation: _Draws | None) -> None:
    started = time.perf_counter()
    z = draws.many()
    count = expectation_maximisation(prior, z, iterations=stage.options.epochs or 1, seed=stage.options.seed)
    prior.eval()
    with torch.no_grad():
        found = {"loss": -_mean_density(prior, z), "validation": math.nan}
        if validation is not None:
            found["validation"] = _mean_density(prior, validation.many())
    stage.seconds = time.perf_counter() - started
    stage.history = pd.DataFrame([{"epoch": count, "step": count} | found | {"seconds": stage.seconds}])


def _mean_density(prior: Any, z: Tensor) -> float:
    p = prior()
    return sum(float(p.log_prob(part).double().sum()) for part in z.split(CHUNK)) / len(z)


class _Observed(nn.Module):
    """A prior as a model of latents that are observed."""

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, z: Tensor) -> None:
        with pyro.plate("data", len(z)):
            pyro.sample("z", self.prior(), obs=z)
