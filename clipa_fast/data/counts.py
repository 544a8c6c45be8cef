"""Counts of bad data by reason, and the share above which a run stops."""

from __future__ import annotations

from collections.abc import Mapping

from clipa_fast.errors import UserError

Counts = dict[str, int]
"""Reason -> how often."""
# A share of fewer samples than this says nothing yet.
_ENOUGH = 1000


class TooMuchBadData(UserError):
    """More of the data is bad than the run allows; the text is the report."""


def count(counts: Counts, reason: str, number: int = 1) -> None:
    """Adds to the count of a reason."""
    counts[reason] = counts.get(reason, 0) + number


def merge(counts: Counts, more: Mapping[str, int]) -> None:
    """Adds each count of `more`."""
    for reason, number in more.items():
        count(counts, reason, number)


def describe(counts: Mapping[str, int]) -> str:
    """One line, the most frequent reason first; "none" where nothing was counted."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number:,} x {reason}" for reason, number in ordered) or "none"


def check_share(what: str, bad: int, seen: int, limit: float, counts: Mapping[str, int]) -> None:
    """Stops where the bad are more than `limit` of what was seen; of fewer than 1,000 seen, as if of 1,000.

    Raises:
      TooMuchBadData: they are.
    """
    if bad > limit * max(seen, _ENOUGH):
        raise TooMuchBadData(
            f"data: {bad:,} of {seen:,} {what} are bad, data.max_bad_share allows {limit:.1%}: {describe(counts)}"
        )
