"""Pictures that are handed out as URLs: for some minutes, in bounded memory, under names that nobody guesses."""

import secrets
import time
from collections import OrderedDict

from raybooth.serving.schemas import Limits


class Kept:
    """PNG files by name; the oldest go when they are too many or too old."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._held: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._bytes = 0

    def put(self, data: bytes) -> str:
        name = secrets.token_urlsafe(24)
        self._held[name] = (time.monotonic(), data)
        self._bytes += len(data)
        self._tidy()
        return name

    def get(self, name: str) -> bytes | None:
        self._tidy()
        return self._held.get(name, (0.0, None))[1]

    def _tidy(self) -> None:
        oldest = time.monotonic() - self.limits.kept_seconds
        while self._held and (self._bytes > self.limits.kept_bytes or next(iter(self._held.values()))[0] < oldest):
            self._bytes -= len(self._held.popitem(last=False)[1][1])
