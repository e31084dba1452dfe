"""Signals and time limits: heard in every phase, never in the middle of what must be whole. In processes of their own."""

import signal
import subprocess
import sys
import time

import pytest

PREAMBLE = """
import os, signal, sys, time, hashlib, threading
from backprop.edges import stopping
stopping.GRACE_S = 0.5
def send(number): os.kill(os.getpid(), number)
def stuck(): hashlib.pbkdf2_hmac("sha256", b"x", b"y", 10**9)  # C code that hears nothing
def say(*words): print(*words, flush=True)
"""


def ran(program: str, *, timeout_s: float = 20) -> tuple[int, str]:
    """Run a program; give its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + program],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize(("sent", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_is_raised_where_the_program_stands(sent: str, code: int) -> None:
    program = f"""
with stopping.armed():
    try:
        send(signal.{sent}); time.sleep(5); say("not heard")
    except KeyboardInterrupt as interrupt:
        error = stopping.accept(interrupt)
        say(error.code, error.message)
"""
    exit_code, printed = ran(program)
    assert exit_code == 0
    assert printed.split()[0] == str(code)
    assert "SIGTERM" in printed or "Ctrl-C" in printed


def test_a_held_block_is_ended_first() -> None:
    program = """
with stopping.armed():
    try:
        with stopping.held():
            send(signal.SIGTERM); time.sleep(0.2); say("whole")
        say("not heard")
    except KeyboardInterrupt:
        say("then")
"""
    assert ran(program) == (0, "whole\nthen\n")


def test_a_step_is_ended_first() -> None:
    program = """
with stopping.armed():
    try:
        stopping.hold(); send(signal.SIGTERM); say("updated"); stopping.release(); say("not heard")
    except KeyboardInterrupt:
        say("then")
"""
    assert ran(program) == (0, "updated\nthen\n")


def test_a_signal_that_a_library_swallowed_is_raised_again() -> None:
    program = """
with stopping.armed():
    try:
        try:
            send(signal.SIGINT); time.sleep(1)
        except BaseException:
            pass
        stopping.check(); say("not heard")
    except KeyboardInterrupt:
        say("again")
"""
    assert ran(program) == (0, "again\n")


def test_once_the_program_is_ending_no_signal_tears_it() -> None:
    program = """
with stopping.armed():
    try:
        send(signal.SIGTERM); time.sleep(1)
    except KeyboardInterrupt as interrupt:
        stopping.accept(interrupt)
        send(signal.SIGTERM); time.sleep(0.1)
        with stopping.held(): say("saved")
        stopping.check(); say("ended")
"""
    assert ran(program) == (0, "saved\nended\n")


def test_where_the_program_cannot_hear_it_is_saved_and_ended() -> None:
    program = """
with stopping.armed(), stopping.ends_with(lambda error: say("last words", error.code)):
    with stopping.rescued_by(lambda: say("saved")):
        threading.Timer(0.2, send, [signal.SIGTERM]).start()
        stuck()
"""
    assert ran(program) == (75, "saved\nlast words 75\n")


@pytest.mark.parametrize(("armed", "expected"), [("", (5, "last words 5\n")), ("end_process=False", (0, "goes on\n"))])
def test_a_thread_that_has_given_up_ends_the_program_but_no_notebook(armed: str, expected: tuple[int, str]) -> None:
    program = f"""
from backprop.errors import HardwareError
with stopping.armed({armed}), stopping.ends_with(lambda error: say("last words", error.code)):
    threading.Thread(target=stopping.end_process, args=[HardwareError("lost", hint="")]).start()
    time.sleep(0.5); say("goes on")
"""
    assert ran(program) == expected


def test_last_words_are_heard_while_a_library_is_silenced() -> None:
    program = """
from backprop.edges import llama_cpp
with stopping.armed(), stopping.ends_with(lambda error: say("last words", error.code)), llama_cpp._quiet():
    say("of the library")
    threading.Timer(0.2, send, [signal.SIGTERM]).start()
    stuck()
"""
    assert ran(program) == (75, "last words 75\n")


@pytest.mark.slow
def test_a_failing_rescue_does_not_keep_the_program_alive() -> None:
    program = """
with stopping.armed(), stopping.ends_with(lambda error: 1 / 0), stopping.rescued_by(lambda: 1 / 0):
    threading.Timer(0.2, send, [signal.SIGTERM]).start()
    stuck()
"""
    assert ran(program) == (75, "")


def test_what_is_being_saved_is_not_cut_off() -> None:
    program = """
with stopping.armed():
    try:
        with stopping.held():
            send(signal.SIGTERM); time.sleep(1.5); say("whole")  # three times the grace
    except KeyboardInterrupt:
        say("then")
"""
    assert ran(program) == (0, "whole\nthen\n")


def test_in_a_notebook_the_process_is_never_ended() -> None:
    program = """
with stopping.armed(end_process=False):
    threading.Timer(0.1, send, [signal.SIGTERM]).start()
    try:
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 4_000_000)
        time.sleep(5)
    except KeyboardInterrupt:
        say("heard late")
"""
    assert ran(program) == (0, "heard late\n")


def test_the_limit_of_one_thread_is_not_that_of_another() -> None:
    program = """
found = {}
def work(name, minutes):
    try:
        with stopping.time_limit(minutes):
            for _ in range(20):
                time.sleep(0.05); stopping.check()
            stopping.finished()
            found[name] = "done"
    except stopping.Stopped as error:
        found[name] = error.code
threads = [threading.Thread(target=work, args=one) for one in (("short", 0.3 / 60), ("none", None), ("long", 1.0))]
for one in threads: one.start()
for one in threads: one.join()
say(found["short"], found["none"], found["long"])
"""
    assert ran(program) == (0, "75 done done\n")


def test_a_second_ctrl_c_ends_at_once() -> None:
    program = """
with stopping.armed(), stopping.rescued_by(lambda: say("saved")):
    with stopping.held():
        send(signal.SIGINT); time.sleep(0.1); send(signal.SIGINT); time.sleep(30)
"""
    started = time.monotonic()
    assert ran(program) == (130, "")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("armed", [True, False])
def test_a_time_limit_ends_the_program_in_any_thread(armed: bool) -> None:
    program = """
def work():
    try:
        with stopping.armed(), stopping.time_limit(0.2 / 60):
            for _ in range(100):
                time.sleep(0.05); stopping.check()
            say("not heard")
    except stopping.Stopped as error:
        say(error.code, error.message)
"""
    program += "work()\n" if armed else "t = threading.Thread(target=work); t.start(); t.join()\n"
    assert ran(program) == (0, "75 the time of `--max-minutes` is over\n")


def test_a_signal_that_the_caller_ignores_is_ignored() -> None:
    """As `nohup` and shells do for what runs in the background."""
    program = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
with stopping.armed():
    send(signal.SIGINT); time.sleep(0.1); say("on")
"""
    assert ran(program) == (0, "on\n")
