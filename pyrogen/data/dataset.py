"""A data set as tensors, and the one rule for what a stored tensor means."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyrogen.arguments import checked

__all__ = ["Binarization", "Data", "Values", "as_float"]

Values = Literal["binary", "unit interval", "levels", "real"]
Binarization = Literal["dynamic", "static", "threshold"]
_SPLITS = ("train", "validation", "test")


def as_float(x: Tensor) -> Tensor:
    r"""Give a stored tensor as the floats that a program sees.

    ``bool`` becomes 0 and 1, ``uint8`` becomes :math:`k / 255`, both in torch's default float type;
    floating tensors are returned unchanged, with their own type. The device stays.

    Args:
        x: A tensor of any shape.

    Returns:
        A floating tensor of the same shape.

    Raises:
        TypeError: If ``x`` is not a tensor, or holds any other type: integers other than ``uint8`` do not
            say how many levels they have.

    Example:
        >>> as_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
        >>> as_float(torch.tensor([True, False]))
        tensor([1., 0.])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor, got {type(x).__name__}; make it one with torch.as_tensor")
    if x.is_floating_point():
        return x
    if x.dtype == torch.bool:
        return x.to(torch.get_default_dtype())
    if x.dtype == torch.uint8:
        return x.to(torch.get_default_dtype()) / 255
    raise TypeError(
        f"expected a bool, uint8 or floating tensor, got {x.dtype}; use x.to(torch.uint8) for 8-bit levels, "
        f"x.bool() for binary data, or x.float() for real values"
    )


@checked(but=("values", "binarize"))
@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """Three splits of a data set, kept as compactly as the source is, and what their values are.

    Stored tensors mean what :func:`as_float` says: ``uint8`` is 8-bit levels, ``bool`` is binary, floats are
    themselves. A training loop hands each batch of training rows to :meth:`prepare`.

    Args:
        name: What the data set is called.
        train: Training rows, shape ``(N, *event_shape)``.
        validation: Validation rows, shape ``(V, *event_shape)``.
        test: Test rows, shape ``(T, *event_shape)``.
        values: What a program sees: ``"binary"`` (0 or 1), ``"levels"`` (multiples of 1/(levels - 1) in
            [0, 1]), ``"unit interval"`` (floats in [0, 1]) or ``"real"``. A likelihood checks it.
        levels: The number of levels when ``values`` is ``"levels"`` (256, or 17 for digits), otherwise None.
        binarize: ``"dynamic"`` when :meth:`prepare` draws binary images from gray training rows anew each
            time; ``"static"`` or ``"threshold"`` when that was done once; otherwise None.
        train_labels: Integer labels, shape ``(N,)``, or None.
        validation_labels: Integer labels, shape ``(V,)``, or None.
        test_labels: Integer labels, shape ``(T,)``, or None.
        classes: The name of each label, where the source has names.
        source: The arguments with which ``load(**source)`` gives the same data again, as plain values;
            empty for data made by hand.

    Raises:
        ValueError: If the splits differ in event shape, one is empty, labels do not match the rows, or
            ``values``, ``levels`` and ``binarize`` contradict each other or the tensors' types.

    Example:
        >>> x = torch.randn(100, 3)
        >>> data = Data("mine", train=x[:80], validation=x[80:90], test=x[90:], values="real")
        >>> data.event_shape
        (3,)
        >>> data
        Data('mine', values='real', event_shape=(3,), train=80 float32, validation=10 float32,
             test=10 float32)
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    values: Values
    levels: int | None = None
    binarize: Binarization | None = None
    train_labels: Tensor | None = None
    validation_labels: Tensor | None = None
    test_labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split in _SPLITS:
            self._check_split(split)
        self._check_values()

    def _check_split(self, split: str) -> None:
        rows, labels = getattr(self, split), getattr(self, f"{split}_labels")
        if rows.ndim == 0 or len(rows) == 0:
            raise ValueError(f"{self.name}: expected at least one row in {split}, got shape {tuple(rows.shape)}")
        as_float(rows[:0])  # refuses types whose meaning is not defined
        if rows.shape[1:] != self.train.shape[1:]:
            raise ValueError(
                f"{self.name}: expected all splits to have the event shape of train, {self.event_shape}, "
                f"got {tuple(rows.shape[1:])} in {split}; reshape or resize it"
            )
        if labels is not None and labels.shape != rows.shape[:1]:
            raise ValueError(
                f"{self.name}: expected one label a row, shape ({len(rows)},), in {split}_labels, "
                f"got {tuple(labels.shape)}"
            )

    def _check_values(self) -> None:
        if self.values not in get_args(Values):
            raise ValueError(f"expected values to be one of {get_args(Values)}, got {self.values!r}")
        if (self.levels is not None) != (self.values == "levels"):
            raise ValueError(
                f"expected levels (the number of levels, e.g. 256) with values='levels' and only there, "
                f"got values={self.values!r}, levels={self.levels!r}"
            )
        if self.binarize not in (None, *get_args(Binarization)):
            raise ValueError(f"expected binarize to be None or one of {get_args(Binarization)}, got {self.binarize!r}")
        if self.binarize is not None and self.values != "binary":
            raise ValueError(f"expected values='binary' with binarize={self.binarize!r}, got {self.values!r}")
        for split in _SPLITS:
            dtype = getattr(self, split).dtype
            gray = split == "train" and self.binarize == "dynamic"
            if dtype == torch.bool and self.values != "binary":
                raise ValueError(f"{self.name}: {split} is bool, so values must be 'binary', not {self.values!r}")
            if dtype == torch.uint8 and not gray and (self.values, self.levels) != ("levels", 256):
                raise ValueError(
                    f"{self.name}: {split} is uint8, which means 8-bit levels: give values='levels', "
                    f"levels=256, or make it bool (binary) or float"
                )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one observation; images are (channels, height, width)."""
        return tuple(self.train.shape[1:])

    def prepare(self, batch: Tensor, generator: torch.Generator | None = None) -> Tensor:
        r"""Turn training rows into the floats that a program sees.

        With dynamic binarisation each pixel is drawn anew from Bernoulli(pixel) at each call, on the batch's
        device; rows that are already ``bool`` (validation, test) are only converted.

        Args:
            batch: Training rows, shape ``(B, *event_shape)``, on any device.
            generator: Where to draw from, on the batch's device; None is torch's global random state.

        Returns:
            A floating tensor, shape ``(B, *event_shape)``.

        Raises:
            TypeError: As :func:`as_float`.

        Example:
            >>> from pyrogen.data import load
            >>> data = load("digits")
            >>> data.prepare(data.train[:64]).unique()
            tensor([0., 1.])
        """
        x = as_float(batch)
        if self.binarize != "dynamic" or batch.dtype == torch.bool:
            return x
        return torch.bernoulli(x, generator=generator)

    def __repr__(self) -> str:
        parts = [repr(self.name), f"values={self.values!r}"]
        if self.levels is not None:
            parts.append(f"levels={self.levels}")
        if self.binarize is not None:
            parts.append(f"binarize={self.binarize!r}")
        parts.append(f"event_shape={self.event_shape}")
        for split in _SPLITS:
            rows = getattr(self, split)
            parts.append(f"{split}={len(rows)} {str(rows.dtype).removeprefix('torch.')}")
        return f"Data({', '.join(parts)})"
