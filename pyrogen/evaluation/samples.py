"""Samples: of the latents given observations, of reconstructions, and of new observations."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyrogen.arguments import checked
from pyrogen.evaluation.aggregate import with_globals_held
from pyrogen.evaluation.running import ROWS, Prepared, by_row, means, pair_passes, passes, prepared
from pyrogen.inference.programs import data_frame, make_example, observed_sites, sample_sites, trace_of
from pyrogen.inference.run import Run

__all__ = ["posterior_samples", "prior_samples", "reconstruct", "sample"]


@checked()
def posterior_samples(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    draws: int,
    *,
    seed: int = 0,
    rows: int = ROWS,
) -> dict[str, Tensor]:
    r"""Draw every latent site from the guide.

    .. math:: \theta_s \sim q(\theta), \quad z_{s,i} \sim q(z \mid x_i, \theta_s)

    Args:
        model, guide: Programs.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take.
        draws: Number S of draws, each with global sites of its own.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the guide at once.

    Returns:
        By site ``(S, B, *nested plates, *event)``, or ``(S, *plates, *event)`` at a global site.

    Raises:
        ValueError: If programs and observations do not fit.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> posterior_samples(toy.model, guide, toy.x[:5], 10)["z"].shape
        torch.Size([10, 5, 2])
    """
    with prepared(model, guide, x, seed=seed, particles=draws, rows=rows) as pair:
        found = passes(pair.guide, pair.batch, draws, rows, copies=1 if pair.has_global else None)
        return _gather(found, [*pair.latents])


@checked()
def prior_samples(
    model: Callable,
    x: Tensor | Sequence[Tensor],
    draws: int,
    *,
    seed: int = 0,
    rows: int = ROWS,
) -> dict[str, Tensor]:
    r"""Draw every site from the model, the observed ones too.

    .. math:: \theta_s \sim p(\theta), \quad z_{s,i} \sim p(z \mid \theta_s), \quad
        x_{s,i} \sim p(x \mid z_{s,i}, \theta_s)

    Args:
        model: A program.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the program takes. The first says how many
            rows there are; others, such as covariates, are used.
        draws: Number S of draws, each with global sites of its own.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the model at once.

    Returns:
        By site ``(S, B, *nested plates, *event)``, or ``(S, *plates, *event)`` at a global site.

    Raises:
        ValueError: If program and observations do not fit.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> toy = LinearGaussian()
        >>> {name: tuple(draws.shape) for name, draws in prior_samples(toy.model, toy.x[:5], 10).items()}
        {'z': (10, 5, 2), 'x': (10, 5, 4)}
    """
    with prepared(model, None, x, seed=seed, particles=draws, rows=rows, guided=False) as pair:
        program = poutine.uncondition(pair.model)
        found = passes(program, pair.batch, draws, rows, copies=1 if pair.has_global else None)
        return _gather(found, [*pair.latents, *pair.observed])


@checked()
def reconstruct(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    seed: int = 0,
    rows: int = ROWS,
) -> Tensor | dict[str, Tensor]:
    r"""Reconstruct each observation from one draw of its latents.

    .. math:: \hat x_i = \mathbb{E}_{p(x \mid z_i)} [x], \quad z_i \sim q(z \mid x_i)

    The latents are a draw, not their mean, so that what the guide is unsure of shows; the observation is the mean of
    its distribution, so that noise of the likelihood does not. Of an implicit distribution, which has no mean in closed
    form, it is a draw.

    Args:
        model, guide: Programs.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows go through the programs at once.

    Returns:
        Reconstructions ``(B, *event_shape)``, in the units of the data; by site where several are observed.

    Raises:
        ValueError: If programs and observations do not fit, there is no guide, or an observed distribution that is not
            implicit has no mean in closed form.

    Example:
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> reconstruct(toy.model, guide, toy.x[:5]).shape
        torch.Size([5, 4])
    """
    with prepared(model, guide, x, seed=seed, rows=rows) as pair:
        parts: dict[str, list[Tensor]] = {name: [] for name in pair.observed}
        for _, _, terms in pair_passes(pair, 1, rows):
            for name, node in observed_sites(terms.model_trace).items():
                shown = node["fn"].sample() if name in pair.implicit_likelihood else _mean(name, node)
                parts[name].append(by_row(node, shown, 1)[0])
        return _single({name: torch.cat(pieces) for name, pieces in parts.items()})


@checked()
def sample(
    run: Run,
    n: int = 64,
    *,
    seed: int = 0,
    mean: bool = False,
    given: Tensor | Sequence[Tensor] = (),
    rows: int = ROWS,
) -> Tensor | dict[str, Tensor]:
    r"""Sample new observations from a fitted model.

    .. math:: z_i \sim p(z \mid \theta), \quad x_i \sim p(x \mid z_i, \theta), \quad \theta \sim q(\theta)

    Global sites θ, where the model has any, come from the guide, drawn anew for every ⌈n/100⌉ observations.

    Args:
        run: What :func:`pyrogen.fit` returned.
        n: How many.
        seed: Of the draws; the caller's random state is left as it was.
        mean: Give the mean of the observed distribution at each z instead of a draw, as is customary for pictures; an
            implicit distribution, such as a GAN's, has none in closed form and gives draws.
        given: For a model that takes more tensors than x: these, without x, of any number of rows, which are repeated
            in order to make n.
        rows: How many rows go through the model at once.

    Returns:
        Observations ``(n, *event_shape)``, in the units of the data; by site where several are observed.

    Raises:
        ValueError: If n is below 1, tensors in ``given`` are missing or too many, or with ``mean=True`` an observed
            distribution has no mean in closed form.

    Example:
        >>> import pyrogen as pg
        >>> from pyrogen.distributions import Bernoulli, StandardNormal
        >>> data = pg.data.load("digits")
        >>> model = pg.models.LatentVariableModel(StandardNormal(2), Bernoulli(pg.networks.MLP(2, data.event_shape)))
        >>> guide = pg.inference.AmortizedGuide(model, pg.networks.MLP(data.event_shape, 32))
        >>> run = pg.fit(model, guide, pg.inference.ELBO(), data, epochs=1, progress=False)
        >>> sample(run, 4).shape
        torch.Size([4, 1, 8, 8])
    """
    if n < 1:
        raise ValueError(f"n, the number of new observations, must be a whole number of at least 1, got {n!r}")
    batch = _stand_in(run, n, given)
    with prepared(run.model, run.guide, batch, seed=seed, rows=rows, guided=False, values=False) as pair:
        parts: dict[str, list[Tensor]] = {name: [] for name in pair.observed}
        for trace in _new(pair, n, rows):
            for name, node in observed_sites(trace).items():
                value = _mean(name, node) if mean and name not in pair.implicit_likelihood else node["value"]
                parts[name].append(by_row(node, value, 1)[0])
        return _single({name: torch.cat(pieces) for name, pieces in parts.items()})


def _stand_in(run: Run, n: int, given: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A batch of n rows whose first tensor only says how many there are."""
    if not run.example:
        raise ValueError(
            "this run has no example, by which the shape of an observation is known; expected Run(..., "
            "example=describe_example(batch)), as fit and load make it"
        )
    x, *others = make_example(run.example)
    tensors = (given,) if isinstance(given, Tensor) else tuple(given)
    if len(tensors) != len(others):
        raise ValueError(
            f"the model takes {len(others)} tensors beside x, but {len(tensors)} came; pass them as "
            "given=(tensor, ...), such as the covariates of the test data"
        )
    for tensor in tensors:
        if tensor.dim() == 0 or len(tensor) == 0:
            raise ValueError(f"a tensor in given has no rows (shape {tuple(tensor.shape)}); expected at least one")
    repeated = (tensor[torch.arange(n, device=tensor.device) % len(tensor)] for tensor in tensors)
    return (x.new_zeros(n, *x.shape[1:]), *repeated)


def _new(pair: Prepared, n: int, rows: int) -> Iterator[poutine.Trace]:
    """Traces of the model with nothing observed, that have n rows in all."""
    size = min(rows, pair.copies_of(n) or rows)
    for start in range(0, n, size):
        batch = tuple(tensor[start : start + size] for tensor in pair.batch)
        program = poutine.uncondition(with_globals_held(pair, batch).model)
        yield trace_of(program, *batch)


def _gather(found: Iterator[tuple[slice, int, poutine.Trace]], names: list[str]) -> dict[str, Tensor]:
    """The values of sites from all passes, draw by draw and row by row."""
    gathered: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    for part, copies, trace in found:
        nodes = sample_sites(trace)
        for name in names:
            node = nodes[name]
            value = by_row(node, node["value"], copies)
            if data_frame(node) is None:
                value = value.unsqueeze(0)
                if part.start != 0:
                    continue
            if part.start == 0:
                gathered[name].append([])
            gathered[name][-1].append(value)
    return {
        name: torch.cat([pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1) for pieces in groups])
        for name, groups in gathered.items()
    }


def _mean(name: str, node: dict[str, Any]) -> Tensor:
    mean = means(node)
    if mean is None:
        raise ValueError(
            f"the distribution at the observed site '{name}' ({node['fn']}) has no mean in closed form; take draws, "
            "with sample(run, mean=False)"
        )
    return mean


def _single(values: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    return next(iter(values.values())) if len(values) == 1 else values
