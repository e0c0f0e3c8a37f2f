"""Cutting a range into consecutive pieces."""

from collections.abc import Iterator


def slices(rows: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` out of `rows`."""
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
