"""The end that others ask for: SIGTERM, Ctrl-C, a time limit. Heard at once, acted on where nothing is torn.

A signal raises a KeyboardInterrupt where the main thread stands; inside `held` it waits for the end of the block. While
the main thread is in a library's C code it hears nothing: then a thread saves what there is, says the last words and
ends the process.
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from backprop.errors import BackpropError, Interrupted, Stopped

# `docker stop` waits 10 s; the contract is 8. This leaves the rest for saving.
GRACE_S = 5.5
# A save that is under way is not cut off sooner.
SAVING_MOST_S = 60.0

LastWords = Callable[[BackpropError], object]


class Terminated(KeyboardInterrupt):
    """SIGTERM: what `docker stop` and cancelled CI jobs send."""


class OutOfTime(KeyboardInterrupt):
    """The time that `--max-minutes` gave is over."""


KINDS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
if hasattr(signal, "SIGALRM"):  # not on Windows
    KINDS[signal.SIGALRM] = OutOfTime


@dataclass
class _State:
    armed: bool = False
    ends_process: bool = False
    asked: type[KeyboardInterrupt] | None = None
    rescue: Callable[[], None] | None = None
    last_words: list[LastWords] = field(default_factory=list[LastWords])
    saving: threading.RLock = field(default_factory=threading.RLock)
    over: threading.Event = field(default_factory=threading.Event)


class _OfThread(threading.local):
    """What belongs to the one run of a thread."""

    holds = 0
    deadline = float("inf")
    ending = False
    """Whether its work is over, or ending because of an interrupt: none is raised any more."""


_state = _State()
_here = _OfThread()


@contextmanager
def armed(*, end_process: bool = True) -> Generator[None]:
    """Listen while the block runs. Only the main thread can; elsewhere, and inside another such block, do nothing.

    Args:
        end_process: Whether to end the process where the program does not hear; not in a notebook, which has more to do.
    """
    global _state
    if _state.armed or not _is_main():
        yield
        return
    _state, _here.ending = _State(armed=True, ends_process=end_process), False
    heard = [number for number in KINDS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _hear) for number in heard}
    reader, writer = socket.socketpair()  # for which Windows can wait, too
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    if end_process:
        threading.Thread(target=_watch, args=(reader, _state), daemon=True).start()
    try:
        yield
    finally:
        _state.over.set()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
        if not end_process:
            reader.close()
        _state = _State()


def _hear(number: int, frame: FrameType | None) -> None:
    _state.asked = _state.asked or KINDS[number]
    if _here.holds == 0 and not _here.ending:
        raise _state.asked


@contextmanager
def held() -> Generator[None]:
    """Let an interrupt wait until the block has ended."""
    hold()
    try:
        yield
    finally:
        _let_go(1)
    check()


def hold() -> None:
    """Let interrupts wait until `release`; nor is the process ended from another thread meanwhile."""
    _state.saving.acquire()
    _here.holds += 1


def release() -> None:
    """End all holds, and raise what came meanwhile."""
    let_go()
    check()


def let_go() -> None:
    """End all holds, as after a failure inside them."""
    _let_go(_here.holds)


def _let_go(count: int) -> None:
    for _ in range(count):
        _here.holds -= 1
        _state.saving.release()


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def check() -> None:
    """Raise an interrupt that waits, or that a library swallowed."""
    if _here.holds or _here.ending:
        return
    if time.monotonic() > _here.deadline:
        raise OutOfTime
    if _is_main() and _state.asked is not None:
        raise _state.asked


def accept(interrupt: KeyboardInterrupt) -> Interrupted | Stopped:
    """Give the error that ``interrupt`` means; from here on the program is ending, and none is raised any more."""
    _here.ending = True
    let_go()
    return _error_of(type(interrupt))


def finished() -> None:
    """Raise no interrupt any more: the work is done, and told."""
    _here.ending = True


def _error_of(kind: type[KeyboardInterrupt]) -> Interrupted | Stopped:
    hint = "run the same command again: what is saved is not done again"
    if issubclass(kind, Terminated):
        return Stopped("stopped by SIGTERM", hint=hint)
    if issubclass(kind, OutOfTime):
        return Stopped("the time of `--max-minutes` is over", hint=hint)
    return Interrupted("stopped by Ctrl-C", hint=hint)


@contextmanager
def time_limit(minutes: float | None) -> Generator[None]:
    """Give the work of the block ``minutes``, in whatever thread it runs.

    Raises:
        Stopped: When they are over.
    """
    _here.ending = False
    if minutes is None:
        yield
        return
    _here.deadline = time.monotonic() + 60 * minutes
    at_once = _state.armed and _is_main() and hasattr(signal, "setitimer")
    if at_once:
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        yield
    except OutOfTime as interrupt:
        raise accept(interrupt) from None
    finally:
        _here.deadline = float("inf")
        if at_once:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def rescued_by(save: Callable[[], None]) -> Generator[None]:
    """Call ``save`` before the process is ended from another thread while the block runs.

    It must be callable from that thread at any moment, and do nothing where nothing can be saved.
    """
    _state.rescue = save
    try:
        yield
    finally:
        _state.rescue = None


@contextmanager
def ends_with(last_words: LastWords) -> Generator[None]:
    """Say ``last_words`` when the process is ended from another thread while the block runs."""
    _state.last_words.append(last_words)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            _state.last_words.remove(last_words)


def _watch(reader: socket.socket, state: _State) -> None:
    """Wait for a signal, then for the program's own end; give it a time, and at a second Ctrl-C none."""
    try:
        number = _read(reader)
        if number is None:
            return
        until = time.monotonic() + GRACE_S
        while (left := until - time.monotonic()) > 0:
            if select.select([reader], [], [], left)[0]:
                again = _read(reader)
                if again is None:
                    return
                if again == signal.SIGINT == number:
                    _end(state, number, save=False)
        _end(state, number, save=True)
    finally:
        reader.close()


def _read(reader: socket.socket) -> int | None:
    """Give the next signal that is meant for us; None when the program has ended by itself."""
    while data := reader.recv(1):
        if data[0] in KINDS:
            return data[0]
    return None


def _end(state: _State, number: int, *, save: bool) -> None:
    if save and state.saving.acquire(timeout=SAVING_MOST_S):
        if state.over.wait(2):  # it was only saving
            return
        with contextlib.suppress(Exception):
            if state.rescue is not None:
                state.rescue()
    _end_with(state, _error_of(KINDS[number]))


def end_process(error: BackpropError) -> None:
    """End the process with ``error``, from another thread, since the program will not come to an end by itself.

    Not in a notebook, which has more to do.
    """
    if _state.ends_process:
        _end_with(_state, error)


def _end_with(state: _State, error: BackpropError) -> None:
    for say in reversed(state.last_words):
        with contextlib.suppress(Exception):
            say(error)
    os._exit(error.code)
