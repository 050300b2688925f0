"""Schedules of the weight β of the rate: callables from the number of the step to a weight."""

from dataclasses import dataclass

from pyrogen.arguments import checked

__all__ = ["CyclicalSchedule", "LinearSchedule"]


@checked()
@dataclass(frozen=True)
class LinearSchedule:
    """From ``start`` to ``end`` in equal steps over the first ``steps`` steps, then ``end``.

    Example:
        >>> [LinearSchedule(steps=4)(step) for step in (0, 2, 4, 9)]
        [0.0, 0.5, 1.0, 1.0]
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _positive_steps(self.steps)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@checked()
@dataclass(frozen=True)
class CyclicalSchedule:
    """Rises from ``start`` to ``end`` again and again: a cycle of ``steps`` steps, of which a share ``rising`` rises.

    Fu et al. 2019, *Cyclical annealing schedule*, 1903.10145.

    Example:
        >>> [CyclicalSchedule(steps=4)(step) for step in range(6)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    """

    steps: int
    rising: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _positive_steps(self.steps)
        if not 0 < self.rising <= 1:
            raise ValueError(f"rising is the share of a cycle in which β rises, in (0, 1], got {self.rising}")

    def __call__(self, step: int) -> float:
        position = (step % self.steps) / (self.rising * self.steps)
        return self.start + (self.end - self.start) * min(position, 1.0)


def _positive_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, got steps={steps}")
