"""Watching critics: one that has won or died teaches the program nothing."""

import warnings
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CriticWatch"]

SATURATED, CHANCE, LONG = 0.99, 0.51, 1000
"""Shares of draws that a critic tells apart, and the number of steps after which it is said."""

PREFIX = "accuracy_"


@dataclass
class CriticWatch:
    """Warns once of each critic that is saturated or at chance for 1000 steps on end.

    Attributes:
        steps: For how many steps, by critic and state.
        told: What was said already.
    """

    steps: dict[str, int] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def look(self, row: dict[str, Any], steps: int, settling: Collection[str] = ()) -> None:
        """Take note of an epoch's figures, means over its steps; some critics settle at chance where all is well."""
        for name, accuracy in row.items():
            if not name.startswith(PREFIX):
                continue
            critic = name.removeprefix(PREFIX)
            at_chance = accuracy < CHANCE and critic not in settling
            for state, is_so in (("saturated", accuracy > SATURATED), ("at chance", at_chance)):
                key = f"{critic} {state}"
                self.steps[key] = self.steps.get(key, 0) + steps if is_so else 0
                if self.steps[key] >= LONG and key not in self.told:
                    self.told.append(key)
                    warnings.warn(_message(critic, state, accuracy, self.steps[key]), stacklevel=2)

    def state(self) -> dict[str, Any]:
        """Plain values to go on from."""
        return asdict(self)


def _message(critic: str, state: str, accuracy: float, steps: int) -> str:
    what = f"the critic of '{critic}' has been {state} for {steps} steps (it tells {accuracy:.0%} of the draws apart)"
    if state == "saturated":
        return (
            f"{what}: what it should compare hardly overlaps, so its ratio is too small and its gradient poor. Try "
            "contrast='adaptive', a slower critic (critic=CriticOptions(learning_rate=...)), a penalty on its slope "
            "(ratio=partial(Logistic, r1=1.0)), spectral normalisation, or Telescoping"
        )
    return (
        f"{what}: either both sides have come to match, or it has stopped learning. A held-out ratio tells which; if "
        "it is not small, try more steps of the critic, a higher learning rate for it, or a wider one"
    )
