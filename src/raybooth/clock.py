"""How long a stage took, over all its starts; work on one stage within another counts only once."""

import time
from dataclasses import dataclass
from pathlib import Path

from raybooth.files import write_atomically

CLOCK = ".seconds.tmp"
"""The file in the work in progress that holds the seconds it has taken."""


@dataclass
class Worked:
    """Seconds on stages that were finished since a storage was opened."""

    seconds: float = 0.0


class Clock:
    """Counts the seconds of work on one stage: those of earlier starts, kept in `path`, and those since this one, without work on other stages in between."""

    def __init__(self, worked: Worked, path: Path):
        self.worked, self.path = worked, path
        self.before = _number_in(path)
        self._began = self._kept = time.monotonic()
        self._others = worked.seconds

    @property
    def due(self) -> bool:
        return time.monotonic() - self._kept > 5

    def keep(self) -> None:
        write_atomically(self.path, str(self.before + self._since()).encode())
        self._kept = time.monotonic()

    def stop(self) -> float:
        """Return the seconds over all starts; those since this one no longer count for a stage around it."""
        since = self._since()
        self.worked.seconds += since
        return self.before + since

    def _since(self) -> float:
        return time.monotonic() - self._began - (self.worked.seconds - self._others)


def _number_in(path: Path) -> float:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return 0.0
