"""Several examples in one row, so that no step computes padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each length, longest first, into the fullest row that has room for it.

    Best-fit decreasing needs at most 11/9 of the rows of the best packing, plus one (Johnson, 1974).

    Args:
        capacity: Most that a row may hold; a single length above it gets a row of its own.

    Returns:
        Rows of positions in ``lengths``; every position is in exactly one.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), ascending
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        length = lengths[position]
        found = bisect_left(rooms, (length, 0))
        if found == len(rooms):
            rows.append([position])
            room, row = capacity - length, len(rows) - 1
        else:
            room, row = rooms.pop(found)
            rows[row].append(position)
            room -= length
        if room > 0:
            insort(rooms, (room, row))
    return rows
