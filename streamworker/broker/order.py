"""In which order streams are walked, and how many entries each may give. Pure.

Strict: queues as listed, levels inside a queue. Weighted: levels 6:3:1 over all queues, then queues as listed; what a
level leaves over goes to the others in strict order, so that no slot stays empty.
"""

from __future__ import annotations

from typing import Final

from streamworker.job import LEVELS

WEIGHTS: Final = (6, 3, 1)
"""Shares of high, normal and low when all are saturated."""


class Order:
    """The walk over ``queues`` queues of three streams each, as the scripts that take take it.

    Args:
        queues: number of queues.
        weighted: weighted order instead of strict.
        heads: keys of each queue that the script takes before all streams or lists.
    """

    def __init__(self, queues: int, *, weighted: bool, heads: int = 1) -> None:
        self._weighted = weighted
        self._credit = [0] * len(LEVELS)
        levels = range(len(LEVELS))
        strict = [(queue, level) for queue in range(queues) for level in levels]
        # Steps of (stream, queue, budget), counted from 1 as Lua does.
        if weighted:
            shares = [(queue, level, level) for level in levels for queue in range(queues)]
            rest = [(queue, level, len(LEVELS)) for level in levels for queue in range(queues)]
            steps = shares + rest
        else:
            steps = [(queue, level, 0) for queue, level in strict]
        width = len(LEVELS)
        self.steps: Final[list[int]] = [
            number
            for queue, level, budget in steps
            for number in (heads * queues + queue * width + level + 1, queue + 1, budget + 1)
        ]

    def budgets(self, limit: int) -> list[int]:
        """Entries each budget of the walk allows, for a claim of ``limit`` entries."""
        if not self._weighted:
            return [limit]
        total = sum(WEIGHTS)
        rounds, rest = divmod(limit, total)
        shares = [weight * rounds for weight in WEIGHTS]
        for _ in range(rest):  # smooth weighted round robin keeps the shares true over many small claims
            self._credit = [credit + weight for credit, weight in zip(self._credit, WEIGHTS, strict=True)]
            best = self._credit.index(max(self._credit))
            self._credit[best] -= total
            shares[best] += 1
        return [*shares, limit]
