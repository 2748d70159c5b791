"""How long a stage took, over all its starts, and of work on one stage within another only once."""

import time
from dataclasses import dataclass
from pathlib import Path

from raybooth.files import write_atomically

CLOCK = ".seconds.tmp"
"""In the work in progress: the seconds that it has taken."""


@dataclass
class Worked:
    """Seconds on stages that were finished since a storage was opened."""

    seconds: float = 0.0


class Clock:
    """Seconds of work on one stage: those that `path` holds of earlier starts, and those since this one, without the work on others in between."""

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
        """The seconds of all, of which those since the start are from now on no other stage's."""
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
