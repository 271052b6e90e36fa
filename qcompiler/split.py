"""Which samples calibrate, and which are held back to judge the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qcompiler.data import Source
from qcompiler.state import Feeds

MAX_HELD_BACK = 16


@dataclass
class Split:
    """The samples that calibrate: all but a tenth (1 to 16, evenly spread), which is held back for the comparison.

    A single sample serves both. Held-back samples are kept when they come by, so that no file is read twice.
    """

    source: Source
    _held: dict[int, Feeds] = field(default_factory=dict)

    @property
    def shared(self) -> bool:
        """Whether one sample serves both ends."""
        return len(self.source) == 1

    @property
    def held_back(self) -> list[Feeds]:
        """The samples for the comparison."""
        if not self._held:
            for _ in self:
                pass
        return list(self._held.values())

    def spread(self, count: int) -> list[Feeds]:
        """At most so many of the samples that calibrate, evenly spread."""
        count = min(count, len(self))
        chosen = {i * len(self) // count for i in range(count)}
        return [feeds for i, feeds in enumerate(self) if i in chosen]

    def __len__(self) -> int:
        return 1 if self.shared else len(self.source) - self._count()

    def __iter__(self) -> Iterator[Feeds]:
        total, held = len(self.source), self._count()
        for i, feeds in enumerate(self.source):
            if i * held // total != (i + 1) * held // total:
                self._held[i] = feeds
                if not self.shared:
                    continue
            yield feeds

    def _count(self) -> int:
        return min(MAX_HELD_BACK, max(1, len(self.source) // 10))
