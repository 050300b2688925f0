"""The figures of an epoch under way, which go with a checkpoint that is written within it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["GRADIENT_NORM", "Tally"]

GRADIENT_NORM = "gradient_norm"


@dataclass
class Tally:
    """Sums over the steps of an epoch so far, in one process.

    Attributes:
        sums: Of each figure, where several processes train weighted by rows.
        rows: How many were seen, by all processes.
        steps: How many were taken.
        looks: At how many the norm of the gradient was looked at.
        skipped: How many were not taken, see ``non_finite`` of :func:`pyrogen.fit`.
        seconds: What the part of the epoch before a checkpoint within it took.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    steps: int = 0
    looks: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def add(self, figures: Mapping[str, Tensor]) -> None:
        """Count a step in."""
        self.steps, self.looks = self.steps + 1, self.looks + (GRADIENT_NORM in figures)
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def means(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Means over the steps, of sums over all processes."""
        return {name: total / (self.looks if name == GRADIENT_NORM else self.steps) for name, total in totals.items()}

    def counts(self) -> dict[str, Any]:
        """All but the sums, as plain values."""
        return {name: value for name, value in vars(self).items() if name != "sums"}
