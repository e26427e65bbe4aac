"""A process per run that ends with its parent, however that ended."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` returns or raises in a new process.

    Raises:
        RuntimeError: The process ended without an answer.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with exit code {process.exitcode}") from None
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to both; the parent answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send(error)


def _end_with_parent() -> None:
    wait([parent_process().sentinel])
    os._exit(1)


def stop_on_signals() -> None:
    """Lets SIGTERM and Ctrl-C end this process at once, and so the others; what is on the disk has to be whole."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, _: Any) -> None:
    print("stopped; the same command does the runs that are missing", flush=True)
    os._exit(128 + number)
