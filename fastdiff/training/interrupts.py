"""Ctrl-C and SIGTERM as a flag that the loop looks at after each step. May import: nothing of the package."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType

PATIENCE = 2.0  # seconds


class Interrupts:
    """Within the block the first signal sets `name`; a second Ctrl-C, seconds later, interrupts at once.

    Ctrl-C reaches a process of torchrun twice: from the terminal, and passed on by torchrun.
    """

    def __init__(self) -> None:
        self.name, self._since = "", 0.0

    def __enter__(self) -> Interrupts:
        # Only the main thread may set handlers; elsewhere signals do what they do.
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.name and number == signal.SIGINT and now - self._since > PATIENCE:
            raise KeyboardInterrupt
        if not self.name:
            self.name, self._since = signal.Signals(number).name, now
            # a handler may run within a write to sys.stderr, which must not be entered again
            os.write(2, f"\n{self.name}: the step is finished and saved first; Ctrl-C again stops at once\n".encode())
