"""Named dimensions for the draws of a program's sites, and what differs from one version of ArviZ to the next."""

import importlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import numpy as np
import xarray
from torch import Tensor

from pyrogen.evaluation.running import Prepared
from pyrogen.inference.programs import data_frame, row_axis

__all__ = ["Frame", "Store", "Variables", "arviz_major", "assemble", "datasets_of", "import_arviz"]

Variables: TypeAlias = dict[str, tuple[tuple[str, ...], Tensor]]

_RESERVED = ("chain", "draw", "observation")
_RGB = ("red", "green", "blue")


def arviz_major() -> int:
    """The installed ArviZ's major version; its parts without the whole count as 1."""
    for package in ("arviz", "arviz-base"):
        try:
            number = int(version(package).split(".")[0])
        except PackageNotFoundError:
            continue
        return number if package == "arviz" else 1
    raise ModuleNotFoundError("this needs ArviZ; install it with: pip install arviz")


def import_arviz(name: str) -> Any:
    """One of ArviZ's modules, without its announcements."""
    with warnings.catch_warnings():
        # ArviZ 0.x announces 1.x once a day; both are served here, so there is nothing for the user to do.
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        try:
            return importlib.import_module(name)  # noqa: TID251 (a name of ours)
        except FileNotFoundError:  # of the day's stamp, which another process has put in place meanwhile
            return importlib.import_module(name)  # noqa: TID251 (as above)


def assemble(groups: Mapping[str, xarray.Dataset], *, major: int) -> Any:
    """Put groups together into what a major version of ArviZ works with.

    Args:
        groups: Data sets by the names that ArviZ gives to groups.
        major: 0 for an ``arviz.InferenceData``, 1 or more for an ``xarray.DataTree``.

    Example:
        >>> tree = assemble({"posterior": xarray.Dataset({"z": ("draw", [1.0, 2.0])})}, major=1)
        >>> tree["posterior/z"].sizes["draw"]
        2
    """
    if major >= 1:
        return xarray.DataTree.from_dict(dict(groups))
    return import_arviz("arviz").InferenceData(**groups)


def datasets_of(tree: Any) -> dict[str, xarray.Dataset]:
    """The groups of what :func:`assemble` gave, by name."""
    if isinstance(tree, xarray.DataTree):
        return {name: node.to_dataset() for name, node in tree.children.items()}
    return {name: tree[name] for name in tree.groups()}


@dataclass(frozen=True)
class Frame:
    """The dimensions in which the draws of the sites stand, and their coordinates.

    Attributes:
        pair: The programs.
        chains, draws: How many.
        names: The dimensions of each site, without chain, draw and observation.
        labels: Coordinates that don't just count, by dimension.
    """

    pair: Prepared
    chains: int
    draws: int
    names: Mapping[str, tuple[str, ...]]
    labels: Mapping[str, np.ndarray]

    @classmethod
    def of(
        cls,
        pair: Prepared,
        chains: int,
        draws: int,
        *,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
    ) -> "Frame":
        """Name the dimensions, where the user does not.

        Raises:
            ValueError: If names or labels do not fit the sites.
        """
        names = {name: _default_dims(name, node) for name, node in pair.nodes.items()}
        for name, given in (dims or {}).items():
            names[name] = _checked_dims(name, given, names)
        sizes = {"observation": len(pair.batch[0])}
        for name, site in names.items():
            for dim, size in zip(site, _shape(pair.nodes[name]), strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise ValueError(
                        f"the dimension '{dim}' of the site '{name}' has {size} elements, but {sizes[dim]} at another "
                        "site; give them different names in dims"
                    )
        channels = {dim for site in names.values() for dim in site if dim.endswith("_channel")}
        labels = {dim: np.array(_RGB) for dim in channels if sizes[dim] == len(_RGB)}
        labels |= {dim: _checked_labels(dim, given, sizes) for dim, given in (coords or {}).items()}
        return cls(pair, chains, draws, names, labels)

    @property
    def observed(self) -> list[str]:
        """The names of the observed sites, without deterministic ones."""
        return [name for name in self.pair.observed if not self.pair.nodes[name]["infer"].get("_deterministic")]

    @property
    def of_posterior(self) -> list[str]:
        """The names of the latent sites, and of the deterministic ones."""
        return [name for name in self.pair.nodes if name not in self.observed]

    def is_global(self, name: str) -> bool:
        """Whether a site stands outside the plate ``"data"``."""
        return data_frame(self.pair.nodes[name]) is None

    def of_site(self, name: str) -> tuple[str, ...]:
        """The dimensions of a site in one draw."""
        return (*(() if self.is_global(name) else ("observation",)), *self.names[name])

    def of_draws(self, name: str) -> tuple[str, ...]:
        """The dimensions of a site's draws."""
        return ("chain", "draw", *self.of_site(name))

    def by_chain(self, values: Tensor) -> Tensor:
        """``(chains * draws, ...)`` gives ``(chains, draws, ...)``."""
        return values.unflatten(0, (self.chains, -1))

    def dataset(self, variables: Variables, draw: np.ndarray | None = None) -> xarray.Dataset:
        """Tensors in named dimensions, with labels or numbers as coordinates, and the draws' own where given."""
        arrays = {name: (dims, value.detach().cpu().numpy()) for name, (dims, value) in variables.items()}
        sizes = {dim: size for dims, array in arrays.values() for dim, size in zip(dims, array.shape, strict=True)}
        coordinates = {dim: self.labels.get(dim, np.arange(size)) for dim, size in sizes.items()}
        if draw is not None and "draw" in coordinates:
            coordinates["draw"] = draw
        return xarray.Dataset(arrays, coords=coordinates)


class Store:
    """Draws of one variable, collected pass by pass into one tensor on the CPU."""

    def __init__(self, draws: int, observations: int | None) -> None:
        self.leading = (draws,) if observations is None else (draws, observations)
        self.values: Tensor | None = None

    def put(self, value: Tensor, start: int, part: slice) -> None:
        """Put in ``(K, B, ...)``, or ``(...)`` of a global site."""
        value = value.detach().cpu()
        local = len(self.leading) == 2
        if self.values is None:
            self.values = value.new_empty(*self.leading, *value.shape[2 if local else 0 :])
        if local:
            self.values[start : start + len(value), part] = value
        else:
            self.values[start] = value

    @property
    def all(self) -> Tensor:
        if self.values is None:
            raise RuntimeError("no pass has put anything in")
        return self.values


def _default_dims(name: str, node: dict[str, Any]) -> tuple[str, ...]:
    """Names for the nested plates around a site, and for its event."""
    plates = {frame.dim: frame.name for frame in node["cond_indep_stack"] if frame.vectorized and frame.name != "data"}
    event_dim = node["fn"].event_dim
    batch = len(node["value"].shape) - event_dim
    data = data_frame(node)
    outer = [
        plates.get(dim, f"{name}_batch_{dim + batch}") for dim in range(-batch, 0) if data is None or dim != data.dim
    ]
    outer = [f"{plate}_plate" if plate in _RESERVED else plate for plate in outer]
    if event_dim == 3 and node["is_observed"]:
        return (*outer, f"{name}_channel", f"{name}_row", f"{name}_column")
    if event_dim == 1:
        return (*outer, f"{name}_dim")
    return (*outer, *(f"{name}_dim_{axis}" for axis in range(event_dim)))


def _shape(node: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a site's value without its row axis."""
    shape = list(node["value"].shape)
    if data_frame(node) is not None:
        del shape[row_axis(node)]
    return tuple(shape)


def _checked_dims(name: str, given: Sequence[str], names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    if name not in names:
        raise ValueError(f"dims names the dimensions of '{name}', but the model has the sites {[*names]}")
    dims = (given,) if isinstance(given, str) else tuple(given)
    if len(dims) != len(names[name]) or len({*dims}) != len(dims) or {*dims} & {*_RESERVED}:
        raise ValueError(
            f"dims must give {len(names[name])} different names to the site '{name}', in place of {[*names[name]]} and "
            f"none of them {[*_RESERVED]}, got {[*dims]}"
        )
    return dims


def _checked_labels(dim: str, given: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    if dim not in sizes:
        raise ValueError(f"coords labels the dimension '{dim}', but those there are to label are {[*sizes]}")
    labels = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if labels.shape != (sizes[dim],) or len({*labels.tolist()}) != len(labels):
        raise ValueError(
            f"coords must have {sizes[dim]} different labels for the dimension '{dim}', since ArviZ selects by them, "
            f"got shape {labels.shape} with {len({*labels.ravel().tolist()})} different ones; to labels that repeat, "
            "such as classes, add a number"
        )
    return labels
