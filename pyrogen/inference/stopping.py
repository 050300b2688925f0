"""Being asked to stop: the first Ctrl-C or SIGTERM ends a fit after its step, with a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Stopping"]


class Stopping:
    """Whether somebody has asked this process to stop.

    Attributes:
        by: The signal that did, or None.
    """

    def __init__(self) -> None:
        self.by: signal.Signals | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within, the first signal is noted, and a second one does at once what it always did.

        Only the main thread gets signals, and a handler of the user's own stays in its place.
        """
        ours: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            found: Any = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
            ours = {each: it for each, it in found.items() if it in (signal.SIG_DFL, signal.default_int_handler)}

        def give_back() -> None:
            while ours:
                signal.signal(*ours.popitem())

        def note(number: int, _: Any) -> None:
            self.by = signal.Signals(number)
            give_back()

        for each in ours:
            signal.signal(each, note)
        try:
            yield
        finally:
            give_back()

    def error(self, said: str = "") -> BaseException:
        """What ends the process as the signal would have, once everything is written."""
        return SystemExit(128 + self.by) if self.by == signal.SIGTERM else KeyboardInterrupt(said)
