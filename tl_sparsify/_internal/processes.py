"""Processes that end with the one that started them, and signals that end a process in order."""

from __future__ import annotations

import _thread
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ENDING = ("SIGTERM", "SIGHUP")


class Ended(BaseException):
    """A signal asked this process to end; ``args`` has its number."""


def end_with_parent() -> None:
    """End this worker when the process that started it has ended, however that was. Ctrl-C is the parent's to hear."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def again(number: int) -> None:
    """Send this process a signal in a moment, never the same one: a loop of callbacks must not meet it each time."""
    moment = 0.1 * random.random()
    _thread.start_new_thread(lambda: (time.sleep(moment), os.kill(os.getpid(), number)), ())


@contextmanager
def ending() -> Iterator[None]:
    """Here SIGTERM and SIGHUP raise :class:`Ended`, as Ctrl-C raises ``KeyboardInterrupt``: what is half written
    is removed. Signals that are ignored (``nohup``) stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    hearing = False

    def stop(number: int, _: Any) -> None:
        if hearing:
            return again(number)
        signal.signal(number, signal.SIG_IGN)  # a second one must not stop the cleaning up
        raise Ended(number)

    def lost(unraisable: sys.UnraisableHookArgs) -> None:
        """The signal came in a finaliser or a callback, where nothing can be raised: it comes again in a moment."""
        nonlocal hearing
        if not isinstance(unraisable.exc_value, Ended):
            return hook(unraisable)
        hearing = True
        number = unraisable.exc_value.args[0]
        signal.signal(number, stop)
        again(number)
        hearing = False

    before: dict[int, Any] = {}
    for name in _ENDING:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            before[number] = signal.signal(number, stop)
    hook, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
