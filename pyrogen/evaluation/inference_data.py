"""Posteriors for ArviZ: draws, densities and importance weights in named dimensions, beside a reference."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, TypeAlias

import pyro
import torch
import xarray
from pyro import poutine
from torch import Tensor

from pyrogen.arguments import check_counts, checked
from pyrogen.evaluation.frames import Frame, Variables, arviz_major, assemble, datasets_of
from pyrogen.evaluation.posterior_groups import BY_ROW, Posterior, stores
from pyrogen.evaluation.reference import ReferencePosterior
from pyrogen.evaluation.running import ROWS, by_row, passes, prepared
from pyrogen.inference.programs import sample_sites
from pyrogen.inference.run import Run

__all__ = ["assemble", "reference_posterior", "to_arviz"]

Groups: TypeAlias = dict[str, xarray.Dataset]


@checked()
def to_arviz(
    run: Run,
    x: Tensor | Sequence[Tensor],
    *,
    draws: int = 1000,
    chains: int = 4,
    prior_draws: int = 500,
    predictive_draws: int = 25,
    particles: int = 32,
    reference: ReferencePosterior | None = None,
    dims: Mapping[str, Sequence[str] | str] | None = None,
    coords: Mapping[str, Any] | None = None,
    seed: int = 0,
    rows: int = ROWS,
) -> Any:
    r"""Draw from a run's posterior and prior, for every analysis and plot that ArviZ has.

    ====================== =================================================================================
    group                  variables and their dimensions
    ====================== =================================================================================
    posterior              each latent or deterministic site ``(chain, draw, observation, ...)``; a global one
                           without observation
    posterior_predictive   each observed site, for ``predictive_draws`` evenly spaced draws of each chain
    log_likelihood         log p(x | z) at each observed site in nats, ``(chain, draw, observation)``; and
                           ``marginal``, see below
    sample_stats           densities and importance weights, see below
    prior                  as the posterior, for ``prior_draws`` draws in one chain
    prior_predictive       each observed site for the first ``predictive_draws`` of these
    observed_data          x, ``(observation, ...)``
    reference              as the posterior, from :func:`~pyrogen.evaluation.nuts`
    sample_stats_reference ``diverging`` ``(chain, draw, observation)``, or ``(chain, draw)`` with global sites
    ====================== =================================================================================

    Dimensions are named after the site: ``z_dim``; ``x_channel, x_row, x_column`` for an observation of three
    dimensions; ``z_dim_0, z_dim_1, ...`` for other shapes. Nested plates give theirs their own names. Three channels
    are labelled red, green and blue, all else is counted; ``dims`` and ``coords`` give other names and labels.
    Predictive draws keep the numbers of the draws that they belong to.

    **sample_stats**, in nats, for each draw and observation, at global sites for each draw, as far as densities are
    known: ``log_prior_z`` = log p(z) and ``log_guide_z`` = log q(z | x) at each latent site, here called z, each given
    the sites before it and on the site's own scale; ``lp`` = log p(x, z), or log p(x, z, θ) of all observations
    together where there are global sites; ``log_weight`` and, from all draws of an observation, ``pareto_k``.

    A guide's draws are independent, so chains are only parts of one sample; with several of them R̂ and effective
    sample sizes are defined, and tell nothing about whether the guide fits. That is told by the importance weights

    .. math:: \log w = \log p(x, z \mid \theta) - \log q(z \mid x, \theta)

    and by the shape k̂ of their tail: below 0.5 the guide is good, above 0.7 it is not to be trusted
    (:func:`~pyrogen.evaluation.pareto_k`). It needs 25 draws in all. Weights are not defined where the guide has a
    point mass, nor known where guide or model have an implicit site: they and k̂ are left out then. What a critic makes
    of the ratio is no weight. An implicit observed site has no ``log_likelihood``. With global sites a weight is that
    of the observation's own latents given θ, and ``log_weight_global`` ``(chain, draw)``, log p(θ) − log q(θ), stands
    beside it.

    **Leave-one-out** (``arviz.loo``, ``arviz.compare``) weights draws of the posterior by 1 / p(x_i | draw), so as to
    forget x_i (Vehtari, Gelman & Gabry 2017, *Practical Bayesian model evaluation using leave-one-out cross-validation
    and WAIC*, 1507.04544). For global sites alone that is sound, if x are all the observations that θ was fitted to,
    and ``arviz.loo(tree)`` does it. But an observation's own latents know only this observation: without it they fall
    back to the prior, and the weights that lead there have no finite variance; a guide that is too narrow hides even
    that. What can be left out is p(x_i | θ), latents integrated out (Merkle, Furr & Rabe-Hesketh 2019, *Bayesian
    comparison of latent variable models: conditional versus marginal likelihoods*, 1802.04452). So with
    per-observation latents, or several observed sites, ``log_likelihood`` has a second variable, on account of which
    ``arviz.loo(tree)`` asks for one by name; take ``var_name="marginal"``:

    .. math:: \log \hat p(x_i \mid \theta_s) = \log \frac{1}{K} \sum_{k=1}^{K} w_{s,i,k}, \quad
        z_k \sim q(z \mid x_i, \theta_s)

    With global sites, K is ``particles``; noise of relative variance v between weights lowers the result by about
    v / K. Without them nothing is left out when an observation is: the parameters are what they were fitted to be,
    the result is log p(x_i), with ``p_loo`` about 0, and says something of new data only if x is not what was trained
    on. K is then half of all draws, those from each on and around the end, so that estimates differ as draws do. Where
    weights are not known ``marginal`` is NaN. ``log_likelihood`` says in its attribute ``leave_one_out`` what holds.
    That q(θ) is not the posterior is not made up for by ``arviz.loo``; ``loo_approximate_posterior`` of ArviZ 1.x does
    it, with ``lp`` and the sum of ``log_guide_`` where all sites are global.

    **A reference** is laid over the guide by :func:`reference_posterior`, which makes a tree of its own of it.

    Memory: besides posterior and densities, ``(chains * predictive_draws + predictive_draws) * B`` observations are
    kept.

    Args:
        run: What :func:`pyrogen.fit` returned.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take.
        draws: Draws of each chain.
        chains: Number of chains.
        prior_draws: Draws from the prior; 0 leaves the prior's groups out.
        predictive_draws: Predictive draws of each chain; 0 leaves the predictive groups out.
        particles: Where there are global sites and per-observation ones, the number K of draws of the latter for each
            draw of the former; at most ``rows``.
        reference: What :func:`~pyrogen.evaluation.nuts` returned for the same model and x.
        dims: Names of a site's dimensions but for chain, draw and observation: ``{"z": ["unit"]}``.
        coords: Labels, all different, by dimension: ``{"observation": [...], "unit": [...]}``.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the programs at once.

    Returns:
        An ``arviz.InferenceData`` with ArviZ 0.x, an ``xarray.DataTree`` with ArviZ 1.x.

    Raises:
        ValueError: If a number of draws is out of range, names or labels do not fit, the reference is of other sites or
            observations, an observed site is called "marginal", there is no guide, as after training a GAN, or
            programs and observations do not fit.
        ArithmeticError: If an importance weight is NaN; it names the site where that began.

    Example:
        >>> import pyrogen as pg
        >>> from pyrogen.distributions import Bernoulli, StandardNormal
        >>> data = pg.data.load("digits")
        >>> model = pg.models.LatentVariableModel(StandardNormal(2), Bernoulli(pg.networks.MLP(2, data.event_shape)))
        >>> guide = pg.inference.AmortizedGuide(model, pg.networks.MLP(data.event_shape, 32))
        >>> run = pg.fit(model, guide, pg.inference.ELBO(), data, epochs=1, progress=False)
        >>> tree = to_arviz(run, data.test[:3], draws=10)
        >>> dict(tree["posterior"].sizes)
        {'chain': 4, 'draw': 10, 'observation': 3, 'z_dim': 2}
    """
    check_counts(draws=draws, chains=chains, particles=particles)
    for name, value in (("prior_draws", prior_draws), ("predictive_draws", predictive_draws)):
        if value < 0:
            raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")
    with prepared(run.model, run.guide, x, seed=seed, rows=rows) as pair:
        frame = Frame.of(pair, chains, draws, dims=dims, coords=coords)
        posterior = Posterior(frame, min(predictive_draws, draws), min(particles, rows))
        posterior.collect(rows)
        groups = posterior.groups()
        if prior_draws:
            groups |= _prior_groups(frame, prior_draws, min(predictive_draws, prior_draws), rows)
        if reference is not None:
            groups |= _reference_groups(frame, reference)
    attributes = _attributes(run)
    filled = {name: group.assign_attrs(attributes | group.attrs) for name, group in groups.items() if group.data_vars}
    return assemble(filled, major=arviz_major())


@checked()
def reference_posterior(tree: Any) -> Any:
    """A tree whose posterior is the reference, to be shown beside the guide's.

    With ArviZ 0.x ``arviz.plot_forest([tree, reference_posterior(tree)], model_names=["guide", "NUTS"])``, and in the
    same way ``plot_density``; ``plot_pair`` draws into the axes of another, ``ax=``, and marks divergences of one
    observation, ``tree.sel(observation=0)``. ArviZ 1.x takes ``{"guide": tree, "NUTS": reference_posterior(tree)}``.

    Args:
        tree: What :func:`to_arviz` returned with ``reference=``.

    Returns:
        A tree of the same kind. ``posterior`` and ``sample_stats`` are the reference's; what the guide has no part in,
        the observations and the prior, is as before, and the rest left out.

    Raises:
        ValueError: If there is no reference.

    Example:
        >>> tree = assemble({"reference": xarray.Dataset({"z": ("draw", [1.0, 2.0])})}, major=1)
        >>> reference_posterior(tree)["posterior/z"].sizes["draw"]
        2
    """
    groups = datasets_of(tree)
    if "reference" not in groups:
        raise ValueError(
            "the tree has no group 'reference'; make it by to_arviz(run, x, reference=nuts(run.model, run.guide, x))"
        )
    names = {"reference": "posterior", "sample_stats_reference": "sample_stats"}
    names |= {name: name for name in ("prior", "prior_predictive", "observed_data")}
    found = {names[name]: group for name, group in groups.items() if name in names}
    return assemble(found, major=1 if isinstance(tree, xarray.DataTree) else 0)


def _prior_groups(frame: Frame, draws: int, predictive: int, rows: int) -> Groups:
    """Draws of every site from the model alone."""
    pair = frame.pair
    latents, predicted = stores(frame, frame.of_posterior, draws), stores(frame, frame.observed, predictive)
    program, start = poutine.uncondition(pair.model), 0
    for part, copies, trace in passes(program, pair.batch, draws, rows, copies=1 if pair.has_global else None):
        nodes = sample_sites(trace)
        for name, into in latents.items():
            into.put(by_row(nodes[name], nodes[name]["value"], copies), start, part)
        if start < predictive:
            for name, into in predicted.items():
                into.put(by_row(nodes[name], nodes[name]["value"], copies)[: predictive - start], start, part)
        start += copies if part.stop == len(pair.batch[0]) else 0
    groups = {"prior": frame.dataset({name: (frame.of_draws(name), v.all[None]) for name, v in latents.items()})}
    if predictive:
        variables = {name: (frame.of_draws(name), v.all[None]) for name, v in predicted.items()}
        groups["prior_predictive"] = frame.dataset(variables)
    return groups


def _reference_groups(frame: Frame, reference: ReferencePosterior) -> Groups:
    pair = frame.pair
    same = len(reference.x) == len(pair.batch) and all(
        torch.equal(ours.cpu(), theirs.cpu().to(ours.dtype))
        for ours, theirs in zip(pair.batch, reference.x, strict=True)
    )
    if not same or [*reference.samples] != [*pair.latents]:
        raise ValueError(
            f"the reference is of the sites {[*reference.samples]} and {len(reference.x[0])} observations; expected "
            f"{[*pair.latents]} and the very {len(pair.batch[0])} observations of x: nuts(run.model, run.guide, x)"
        )
    samples = {name: (frame.of_draws(name), draws) for name, draws in reference.samples.items()}
    diverging: Variables = {"diverging": (BY_ROW[: reference.divergent.dim()], reference.divergent)}
    said = {"sampler": "NUTS", "converged": str(reference.converged), "diagnostics": str(reference)}
    return {
        "reference": frame.dataset(samples).assign_attrs(said),
        "sample_stats_reference": frame.dataset(diverging).assign_attrs(said),
    }


def _attributes(run: Run) -> dict[str, str]:
    return {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "pyrogen",
        "creation_library_version": version("pyrogen"),
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "objective": repr(run.objective),
    }
