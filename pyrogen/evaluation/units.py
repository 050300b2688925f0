"""Active units: which latents say anything about the observations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pyrogen.arguments import checked
from pyrogen.evaluation.running import ROWS, passes, prepared
from pyrogen.inference.units import INACTIVE, unit_variances

__all__ = ["ActiveUnits", "active_units"]


@dataclass(frozen=True, eq=False)
class ActiveUnits:
    """The variance over observations of the posterior mean of each latent unit.

    Attributes:
        variances: For each per-observation site, of the shape ``(*nested plates, *event)`` of its value.
        threshold: The variance above which a unit counts as active.
    """

    variances: dict[str, Tensor]
    threshold: float

    @property
    def active(self) -> dict[str, Tensor]:
        """Whether each unit is active, shaped as :attr:`variances`."""
        return {name: variance > self.threshold for name, variance in self.variances.items()}

    @property
    def per_site(self) -> dict[str, int]:
        """How many units of each site are active."""
        return {name: int(active.sum()) for name, active in self.active.items()}

    @property
    def count(self) -> int:
        """How many units are active."""
        return sum(self.per_site.values())

    @property
    def total(self) -> int:
        """How many units there are."""
        return sum(variance.numel() for variance in self.variances.values())

    def __str__(self) -> str:
        sites = ", ".join(f"{name} {n} of {self.variances[name].numel()}" for name, n in self.per_site.items())
        return f"{self.count} of {self.total} units are active ({sites or 'no per-observation latent site'})"


@checked()
def active_units(
    model: Callable,
    guide: Callable | None,
    x: Tensor | Sequence[Tensor],
    *,
    threshold: float = INACTIVE,
    particles: int = 100,
    seed: int = 0,
    rows: int = ROWS,
) -> ActiveUnits:
    r"""Find the latent units whose posterior mean differs from one observation to another.

    .. math:: A_u = \operatorname{Var}_x \left( \mathbb{E}_{q(u \mid x)} [u] \right), \quad
        \text{active if } A_u > 0.01

    Burda, Grosse & Salakhutdinov 2016, *Importance weighted autoencoders*, 1509.00519. The threshold is meant for
    units with a prior of about unit variance. Values are those of the model's sites, in their own supports.

    The posterior mean m is the mean over particles of the distribution's own mean, given the sites drawn before it, or
    of the draw where the distribution has no mean in closed form. What remains of Monte Carlo noise adds to the
    variance; with :math:`s^2` the variance over K particles, this is taken off:

    .. math:: \hat A_u = \operatorname{Var}_x(\hat m) - \tfrac{1}{K} \mathbb{E}_x [s^2]

    so that, without global sites, the estimate is unbiased (and may come out just below 0 for a unit that is not
    active). For a single latent site with a mean, such as a normal, there is no noise.

    Args:
        model, guide: Programs.
        x: Observations ``(B, *event_shape)``, or a tuple of tensors that the programs take; at least two.
        threshold: Variance above which a unit is active.
        particles: Number K of draws for each observation, at least two.
        seed: Of the draws; the caller's random state is left as it was.
        rows: How many rows, copies counted, go through the guide at once.

    Returns:
        The variances and counts. Global sites are left out.

    Raises:
        ValueError: For fewer than two observations or particles, or if programs and observations do not fit.

    Example:
        >>> import torch
        >>> from pyrogen.data import LinearGaussian
        >>> from pyrogen.inference import AmortizedGuide
        >>> toy = LinearGaussian()
        >>> guide = AmortizedGuide(toy.model, torch.nn.Linear(4, 8))
        >>> units = active_units(toy.model, guide, toy.x)
        >>> units.total, units.variances["z"].shape
        (2, torch.Size([2]))
    """
    with prepared(model, guide, x, seed=seed, particles=particles, rows=rows) as pair:
        if len(pair.batch[0]) < 2 or particles < 2:
            raise ValueError(
                f"a variance needs at least two observations and two particles, got {len(pair.batch[0])} and "
                f"{particles}"
            )
        found = passes(pair.guide, pair.batch, particles, rows, copies=pair.copies_of(particles))
        return ActiveUnits(unit_variances(found, pair.local, len(pair.batch[0]), particles), threshold)
