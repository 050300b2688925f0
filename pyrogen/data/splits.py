"""Seeded splits for sources that publish none."""

import torch
from torch import Tensor

__all__ = ["hold_out"]


def hold_out(rows: int, parts: int, seed: int) -> tuple[Tensor, ...]:
    """Hold out some tenths of the rows at random: the rest first, then each held-out tenth.

    Rows are shuffled with the seed and cut; within each part they keep their order. A tenth is rounded to the
    nearest number of rows and is at least one row.

    Args:
        rows: The number of rows, N.
        parts: How many tenths to hold out (0, 1 or 2).
        seed: The seed of the shuffle.

    Returns:
        ``parts + 1`` index tensors that together hold each of 0..N-1 once.

    Raises:
        ValueError: If too few rows would be left.

    Example:
        >>> [len(part) for part in hold_out(1797, parts=2, seed=0)]
        [1437, 180, 180]
    """
    tenth = max(1, round(rows / 10))
    rest = rows - parts * tenth
    if rest < 1:
        raise ValueError(f"expected at least {parts + 1} rows to split, got {rows}")
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    pieces = shuffled.split([rest] + [tenth] * parts)
    return tuple(piece.sort().values for piece in pieces)
