"""SIGTERM and SIGINT end a run after the step that it is at."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal ended the run; the checkpoint of the step that it was at is written."""

    def __init__(self, number: int, step: int):
        name = signal.Signals(number).name
        super().__init__(f"{name} stopped the run at step {step}, whose checkpoint is written")
        self.exit_code = 128 + number


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """The signals received so far, which end nothing meanwhile; but a second SIGINT does."""
    received, before = [], {}

    def note(number, frame):
        received.append(number)
        # A group's signal also ends what loads data, on which torch raises wherever the run is.
        before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):  # as nohup and a shell's & leave it
                before[number] = handler
                signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def leave_to_parent(worker: int = 0) -> None:
    """In a process that loads data: Ctrl-C is the run's to answer, which may then terminate it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
