"""What is checked once before any training starts: that model, guide and data fit each other."""

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyrogen.inference.batches import Batches
from pyrogen.inference.programs import (
    Site,
    bare,
    data_frame,
    latent_sites,
    observed_sites,
    prototype,
    sample_sites,
)

__all__ = ["check_programs", "check_values"]

_CHUNK = 4096


def check_programs(model: Callable, guide: Callable | None, *batch: Tensor) -> None:
    """Run model and guide once and see that they fit each other and the data, before any training starts.

    Raises:
        ValueError: Without a ``"data"`` plate of the batch's length, without an observed site, with a discrete latent
            site, or with a guide whose sites are missing, extra, or of another shape or support than the model's.
    """
    model_trace = prototype(model, *batch)
    _check_data_plate(model_trace, len(batch[0]))
    latents = latent_sites(model_trace)
    if guide is None:
        return
    drawn = {
        name: node
        for name, node in sample_sites(prototype(guide, *batch)).items()
        if not node["is_observed"] and not node["infer"].get("is_auxiliary")
    }
    missing, extra = [*(latents.keys() - drawn.keys())], [*(drawn.keys() - latents.keys())]
    if missing or extra:
        raise ValueError(
            f"the guide must draw exactly the model's latent sites {[*latents]}; missing: {missing or 'none'}, extra: "
            f"{extra or 'none'}. Give the sites the same names, and mark helper sites of the guide with "
            'infer={"is_auxiliary": True}'
        )
    for name, site in latents.items():
        _check_site(site, model_trace.nodes[name], drawn[name])


def _check_data_plate(trace: poutine.Trace, rows: int) -> None:
    frames = {data_frame(node) for node in sample_sites(trace).values()} - {None}
    if not frames:
        raise ValueError(
            'the model has no plate named "data": per-observation sites must stand in '
            '`with pyro.plate("data", len(x)):`, so that objectives know what one observation is'
        )
    for frame in frames:
        if frame.size != rows or not frame.vectorized:
            raise ValueError(
                f'the plate "data" has size {frame.size} for a batch of {rows} rows; write '
                '`with pyro.plate("data", len(x)):`, a vectorised plate of the batch\'s length'
            )
    if not observed_sites(trace):
        raise ValueError(
            'the model observes nothing: at least one site needs obs=x, e.g. pyro.sample("x", likelihood(z), obs=x)'
        )


def _check_site(site: Site, model_node: dict[str, Any], guide_node: dict[str, Any]) -> None:
    expected, came = tuple(model_node["value"].shape), tuple(guide_node["value"].shape)
    if expected != came:
        raise ValueError(
            f"site '{site.name}' has shape {expected} in the model but {came} in the guide (plates, then event); give "
            "the guide's distribution the model's event shape and put it in the same plates"
        )
    if (data_frame(model_node) is None) != (data_frame(guide_node) is None):
        inside, outside = ("guide", "model") if site.is_global else ("model", "guide")
        raise ValueError(
            f"site '{site.name}' stands inside the plate \"data\" in the {inside} but outside it in the {outside}; "
            "put it in the same plates in both"
        )
    support = guide_node["fn"].support
    point_mass = isinstance(guide_node["fn"], pyro.distributions.Delta)
    fits = site.support.check(guide_node["value"]).all() if point_mass else _same_support(site.support, support)
    if not fits:
        raise ValueError(
            f"site '{site.name}' has support {site.support} in the model but {support} in the guide; transform the "
            "guide's distribution, e.g. with torch.distributions.biject_to(support), as AmortizedGuide does"
        )


def _same_support(first: constraints.Constraint, second: constraints.Constraint) -> bool:
    """Whether two constraints are the same set, up to the boundary of an interval."""
    first, second = bare(first), bare(second)
    names = [
        type(c).__name__.replace("GreaterThanEq", "GreaterThan").replace("HalfOpenInterval", "Interval")
        for c in (first, second)
    ]
    bounds = [
        [torch.as_tensor(getattr(c, bound)) for bound in ("lower_bound", "upper_bound") if hasattr(c, bound)]
        for c in (first, second)
    ]
    return names[0] == names[1] and all(bool((a == b).all()) for a, b in zip(*bounds, strict=True))


def check_values(model: Callable, batches: Batches) -> None:
    """See that the data have the event shape and the values that the model's observed sites expect.

    Raises:
        ValueError: Naming the site, what it expects and what the data hold.
    """
    batch = batches.first()
    try:
        trace = prototype(model, *batch, observed=False)
    except Exception:  # a model that needs its observations: its own errors speak when it runs with them
        return
    for name, node in observed_sites(trace).items():
        observed = node["infer"]["obs"]
        expected, came = tuple(node["value"].shape), tuple(observed.shape)
        if expected != came:
            raise ValueError(
                f"the data give the observed site '{name}' the shape {came} for {len(batch[0])} rows, but the model "
                f"draws {expected}; build the model for event shape {came[1:]}, or reshape the data"
            )
        position = next((i for i, x in enumerate(batch) if x is observed), None)
        if position is None or not isinstance(batches.rows, tuple):
            _check_support(name, node["fn"].support, observed)
            continue
        for start in range(0, len(batches), _CHUNK):
            with torch.random.fork_rng(devices=[]):
                rows = batches.prepare(tuple(x[start : start + _CHUNK].cpu() for x in batches.rows))
            _check_support(name, node["fn"].support, rows[position])


def _check_support(name: str, support: constraints.Constraint, x: Tensor) -> None:
    inside = support.check(x)
    if not inside.all():
        low, high = float(x.min()), float(x.max())
        raise ValueError(
            f"the data lie outside the support of the observed site '{name}': expected {support}, got values from "
            f"{low:.4g} to {high:.4g}; choose a likelihood for such values, or data for this one (binary data for "
            "Bernoulli: load(..., binarize='dynamic'); pixels in [0, 1] for ContinuousBernoulli)"
        )
