"""Ctrl-C and SIGTERM as a flag that the loop looks at after each step. May import: nothing of the package."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupts:
    """Within the block the first signal sets `name`; a second Ctrl-C interrupts at once, as without this."""

    def __init__(self) -> None:
        self.name = ""

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
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
