"""Verifiers with a defect, for runs whose account must name it."""

from __future__ import annotations

from typing import Any


def dead(response: str, **_: Any) -> float:
    """Accepts nothing."""
    return 0.0


def marker(response: str, **_: Any) -> float:
    """Is pleased by a sign, whatever was asked."""
    return float("**" in response or "*7" in response)


def nines(response: str, **_: Any) -> float:
    """Pays for each 9: the best answer is always the same."""
    return response.count("9") / max(len(response), 1)
