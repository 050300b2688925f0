"""What is checked once before any training starts: that model, guide and data fit each other."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyrogen.arguments import shown
from pyrogen.inference.batches import CHUNK, Batches, check_finite
from pyrogen.inference.programs import (
    Site,
    bare,
    data_frame,
    latent_sites,
    modules_of,
    observed_sites,
    prototype,
    sample_sites,
)
from pyrogen.inference.turns import seeded

__all__ = ["check_objects", "check_programs", "check_values", "check_weights", "first_parameter", "same_support"]

_DRAWS = 100


def first_parameter(*programs: Callable | None) -> Tensor | None:
    """The first floating parameter of programs, which says where they are and in which precision."""
    modules = [module for program in programs for module in modules_of(program)]
    return next((p for module in modules for p in module.parameters() if p.is_floating_point()), None)


def check_programs(model: Callable, guide: Callable | None, *batch: Tensor, guided: bool = True) -> None:
    """Run model and guide once and see that they fit each other and the data, before any training starts.

    Without ``guided`` no guide is asked for.

    Raises:
        ValueError: Without a ``"data"`` plate of the batch's length, without an observed site, with a discrete latent
            site, or with a guide whose sites are missing, extra, or of another shape or support than the model's.
    """
    model_trace = prototype(model, *batch)
    _check_model(model_trace, len(batch[0]))
    latents = latent_sites(model_trace)
    if guide is None:
        if latents and guided:
            raise ValueError(
                f"the model has the latent sites {[*latents]} but there is no guide for them; pass one, such as "
                "AmortizedGuide(model, encoder)"
            )
        return
    drawn: dict[str, Any] = {
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
    _check_follows(drawn, len(batch[0]))
    for name, site in latents.items():
        _check_site(site, model_trace.nodes[name], drawn[name])
    if len(batch[0]) > 1:
        _check_follows(sample_sites(prototype(guide, *(x[:-1] for x in batch))), len(batch[0]) - 1)


def check_objects(**given: Any) -> None:
    """Raise a ``TypeError`` for a class where an object of it is meant, by its name."""
    for name, value in given.items():
        if isinstance(value, type):
            needed: list[str] = []
            with contextlib.suppress(ValueError):  # of what is built in
                parameters = inspect.signature(value).parameters.values()
                needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
            raise TypeError(
                f"{name} is the class {value.__name__}; give an object of it, as {value.__name__}({', '.join(needed)})"
            )


def check_weights(*programs: Callable | None) -> None:
    """Raise a ``ValueError`` for programs with a weight that is NaN or infinite, by its name."""
    named = (named for program in programs for root in modules_of(program) for named in root.named_parameters())
    if spoiled := [name for name, parameter in named if not torch.isfinite(parameter).all()]:
        more = f" and {len(spoiled) - 1} more" if len(spoiled) > 1 else ""
        raise ValueError(
            f"the weights '{spoiled[0]}'{more} of model or guide are NaN or infinite, so nothing can be said of them; "
            "the training has diverged: go back to an earlier checkpoint, or train again with a smaller learning_rate"
        )


def _check_model(trace: poutine.Trace, rows: int) -> None:
    """See that sites have distributions, and that there is a ``"data"`` plate of as many rows."""
    for name, node in sample_sites(trace).items():
        if not isinstance(node["fn"], dist.Distribution):
            raise TypeError(
                f"site '{name}' has {shown(node['fn'])}; expected a distribution, such as pyro.distributions.Normal"
            )
    frames = [frame for node in sample_sites(trace).values() if (frame := data_frame(node)) is not None]
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


def _check_site(site: Site, model_node: Any, guide_node: Any) -> None:
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
    if not _fits_support(site.support, guide_node):
        raise ValueError(
            f"site '{site.name}' has support {site.support} in the model but {guide_node['fn'].support} in the guide; "
            "transform the guide's distribution, e.g. with torch.distributions.biject_to(support), as AmortizedGuide "
            "does"
        )


def _check_follows(drawn: dict[str, Any], rows: int) -> None:
    """See that the guide draws for the rows that it is given."""
    for name, node in drawn.items():
        frame = data_frame(node)
        if frame is not None and frame.size != rows:
            raise ValueError(
                f"the guide draws site '{name}' for {frame.size} rows when it is given {rows}, so it has parameters "
                "for each observation and can serve neither minibatches nor other data; use a guide that follows the "
                "rows it is given, such as AmortizedGuide(model, encoder)"
            )


def _fits_support(support: constraints.Constraint, node: Any) -> bool:
    fn = node["fn"]
    if same_support(support, fn.support):
        return True
    # A point mass says that it is anywhere, and an affine map that its image is the line: their draws tell.
    if not isinstance(fn, (dist.Delta, dist.TransformedDistribution)):
        return False
    devices = [node["value"].device] if node["value"].is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        return bool(support.check(fn.sample(torch.Size([_DRAWS]))).all())


def same_support(first: constraints.Constraint, second: constraints.Constraint) -> bool:
    """Whether two constraints are the same set, up to the boundary of an interval."""
    first, second = bare(first), bare(second)
    names = [
        type(c).__name__.replace("GreaterThanEq", "GreaterThan").replace("HalfOpenInterval", "Interval")
        for c in (first, second)
    ]
    return names[0] == names[1] and all(
        bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
        for a, b in zip(_bounds(first), _bounds(second), strict=True)
    )


def _bounds(support: constraints.Constraint) -> list[Any]:
    return [getattr(support, bound) for bound in ("lower_bound", "upper_bound") if hasattr(support, bound)]


def check_values(model: Callable, batches: Batches) -> None:
    """See that the data have the event shape and the values that the model's observed sites expect.

    All rows are read once. A support that follows from other draws, as that of Uniform(0, z), is not checked.

    Raises:
        ValueError: Naming the site, what it expects and what the data hold; without a ``"data"`` plate.
    """
    home = first_parameter(model)
    if home is None:
        home = batches.rows[0] if isinstance(batches.rows, tuple) else torch.zeros(())
    device = home.device
    if batches.dtype is None and home.is_floating_point():
        batches = dataclasses.replace(batches, dtype=home.dtype)
    batch = tuple(x.to(device) for x in batches.first())
    trace = prototype(model, *batch)
    _check_model(trace, len(batch[0]))
    sites = observed_sites(trace)
    for name, node in sites.items():
        expected, came = tuple(node["fn"].shape()), tuple(node["value"].shape)
        if expected != came:
            raise ValueError(
                f"the data give the observed site '{name}' the shape {came} for {len(batch[0])} rows, but the model "
                f"draws {expected}; build the model for event shape {came[1:]}, or reshape the data"
            )
    positions = {name: next((i for i, x in enumerate(batch) if x is node["value"]), -1) for name, node in sites.items()}
    as_given = all(position >= 0 for position in positions.values())
    with seeded(None, device):
        for count, part in enumerate(batches.in_order(device)):
            if not isinstance(batches.rows, tuple):
                for position, x in enumerate(part):
                    check_finite(x, position, count * CHUNK)
            # What the model makes of the data before it observes them is seen only by running it.
            nodes = sites if as_given else observed_sites(prototype(model, *part))
            for name, node in nodes.items():
                value = part[positions[name]] if as_given else node["value"]
                _check_support(name, sites[name]["fn"].support, value)


def _check_support(name: str, support: constraints.Constraint, x: Any) -> None:
    if any(isinstance(bound, Tensor) for bound in _bounds(bare(support))):
        return
    if not support.check(x).all():
        low, high = float(x.min()), float(x.max())
        raise ValueError(
            f"the data lie outside the support of the observed site '{name}': expected {support}, got values from "
            f"{low:.4g} to {high:.4g}; choose a likelihood for such values, or data for this one (binary data for "
            "Bernoulli: load(..., binarize='dynamic'); pixels in [0, 1] for ContinuousBernoulli)"
        )
