"""All latents as one vector of real numbers: what chains move, samples are compared by and pictures walk along."""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.transforms import biject_to
from torch import Tensor

from pyrogen.inference.programs import Site, data_frame, row_axis
from pyrogen.inference.units import names_of_units

__all__ = ["LatentVector"]


class LatentVector:
    r"""Latent sites as one vector of D real numbers, their values on unconstrained scales site by site, and back.

    Values by site have rows and whatever else there is of them in front: ``(*S, *unit)``, with ``*unit`` the
    ``(*nested plates, *event)`` of one observation, or all axes of a global site.

    Args:
        sites: In the order of the vector.
        nodes: These sites in a trace of their program.
        rows: Of how many observations together the vector is, ``(*S, rows, *unit)``; by default of one.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> from pyrogen.inference.programs import latent_sites, prototype, sample_sites
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Poisson(z.sum(-1)), obs=x)
        >>> trace = prototype(model, torch.ones(5))
        >>> latents = LatentVector(latent_sites(trace), sample_sites(trace))
        >>> latents.names, latents.vectors({"z": torch.ones(5, 2)}).shape, latents.values(torch.zeros(2))
        (['z[0]', 'z[1]'], torch.Size([5, 2]), {'z': tensor([1., 1.])})
    """

    def __init__(self, sites: Mapping[str, Site], nodes: Mapping[str, dict[str, Any]], rows: int | None = None) -> None:
        self.nodes = nodes
        self.transforms = {name: biject_to(site.support) for name, site in sites.items()}
        self.shapes: dict[str, torch.Size] = {}
        """Of the unconstrained values, by site."""
        drawn = self.drawn(nodes)
        for name, transform in self.transforms.items():
            shape = transform.inv(drawn[name]).shape
            if data_frame(nodes[name]) is not None:
                shape = shape[1:] if rows is None else torch.Size([rows, *shape[1:]])
            self.shapes[name] = shape

    @property
    def names(self) -> list[str]:
        """Of the D numbers, such as ``z[3]``."""
        return [unit for name, shape in self.shapes.items() for unit in names_of_units(name, shape)]

    def drawn(self, nodes: Mapping[str, dict[str, Any]]) -> dict[str, Tensor]:
        """The values in a trace by site, rows first: ``(B, *unit)``, or ``(*unit)`` if global."""
        return {
            name: node["value"] if data_frame(node) is None else node["value"].movedim(row_axis(node), 0)
            for name, node in nodes.items()
            if name in self.transforms
        }

    def placed(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Such values with their rows where the program has them, on the axis of the plate ``"data"``."""
        nodes = {name: self.nodes[name] for name in values}
        return {
            name: values[name] if data_frame(node) is None else values[name].movedim(0, row_axis(node))
            for name, node in nodes.items()
        }

    def vectors(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values by site ``(*S, *unit)``, of any leading axes that all share, give ``(*S, D)``."""
        flat = []
        for name, shape in self.shapes.items():
            free = self.transforms[name].inv(values[name])
            flat.append(free.reshape(*free.shape[: free.dim() - len(shape)], shape.numel()))
        return torch.cat(flat, -1)

    def values(self, vectors: Tensor) -> dict[str, Tensor]:
        """Vectors ``(*S, D)`` give values by site, ``(*S, *unit)``."""
        return {name: self.transforms[name](free) for name, free in self._unconstrained(vectors).items()}

    def log_volume(self, vectors: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        r"""What a log-density of the values gains as one of the vectors that they come from, ``(*S)``.

        .. math:: \log p(u) = \log p(z) + \log \left| \det \frac{\partial z}{\partial u} \right|
        """
        total = vectors.new_zeros(vectors.shape[:-1])
        for name, free in self._unconstrained(vectors).items():
            gain = self.transforms[name].log_abs_det_jacobian(free, values[name])
            total = total + gain.reshape(*total.shape, -1).sum(-1)
        return total

    def _unconstrained(self, vectors: Tensor) -> dict[str, Tensor]:
        pieces = vectors.split([shape.numel() for shape in self.shapes.values()], -1)
        return {
            name: piece.reshape(vectors.shape[:-1] + shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
