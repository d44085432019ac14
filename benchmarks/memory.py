"""The most anonymous memory a process takes while something runs: what no file backs, so what swapping would cost."""

import re
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")


def anonymous() -> int:
    """RssAnon of this process, in bytes (Linux, proc(5))."""
    found = re.search(r"RssAnon:\s+(\d+) kB", _STATUS.read_text())
    assert found is not None
    return 1024 * int(found[1])


class PeakAnonymous:
    """Samples RssAnon every `interval` seconds inside the context; the kernel keeps no peak of it.

    Attributes:
        before: bytes on entry.
        growth: the most above that.
    """

    def __init__(self, interval: float = 0.001) -> None:
        self.growth = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self.before = anonymous()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.growth = max(self.growth, anonymous() - self.before)

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.growth = max(self.growth, anonymous() - self.before)
