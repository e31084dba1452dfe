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


def balanced(weights: Sequence[int], num: int) -> list[list[int]]:
    """Share weights out, heaviest first, each to where least lies.

    At most 4/3 of the best makespan (Graham, 1969).

    Returns:
        ``num`` ascending lists of positions in ``weights``; every position is in exactly one.
    """
    shares: list[list[int]] = [[] for _ in range(num)]
    loads = [0] * num
    for position in sorted(range(len(weights)), key=lambda position: -weights[position]):
        least = loads.index(min(loads))
        shares[least].append(position)
        loads[least] += weights[position]
    return [sorted(share) for share in shares]


def even_rows(lengths: Sequence[int], capacity: int, num: int) -> list[list[int]]:
    """Put each length into one of ``num`` rows of about the same length, or of a multiple of ``num`` if they need more.

    Returns:
        As `best_fit`; fewer than ``num`` rows only where there are fewer lengths.
    """
    count = num
    while True:
        rows = [row for row in balanced(lengths, count) if row]
        if count >= len(lengths) or all(sum(lengths[one] for one in row) <= capacity for row in rows):
            return rows
        count += num
