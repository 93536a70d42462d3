"""Ctrl-C and termination: clean up, say one line, and die by the signal, so that a shell loop stops too.

Work that must end in good order (a training step) asks `orderly` between its pieces; everything else is
interrupted where it stands. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interrupted", "die_by", "install", "orderly"]

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_requests: list[int] | None = (
    None  # the signals that came while work is to end in good order; None: it is not
)


class Interrupted(BaseException):
    """A signal asked the process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def install() -> None:
    """Take over SIGINT, SIGTERM and SIGHUP. For the command line alone: a library leaves handlers be."""
    for signum in _SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup stays in force
            signal.signal(signum, _handle)


@contextmanager
def orderly() -> Iterator[Callable[[], int | None]]:
    """Within, a first signal only sets what the yielded function returns."""
    global _requests
    came = _requests = []
    try:
        yield lambda: came[0] if came else None
    finally:
        _requests = None


def die_by(signum: int) -> None:
    """End as the signal would have ended us: a shell sees 130, 143 or 129, and its `for` loop stops."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def _handle(signum: int, frame: FrameType | None) -> None:
    for s in _SIGNALS:
        signal.signal(s, signal.SIG_DFL)  # the next one ends the process at once
    if _requests is None:
        raise Interrupted(signum)
    _requests.append(signum)
