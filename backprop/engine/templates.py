"""Chat templates come from strangers. transformers runs them in Jinja's sandbox; here they get limits of time and size.

What one step of Python's interpreter computes cannot be interrupted, so that templates which could make such a step endless
are refused unseen. The rest is stopped after a time, in whatever loop it is, and where the memory that it asks for is absurd.
"""

import ctypes
import os
import re
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from backprop.errors import ModelError

SECONDS = 10.0
"""A real template needs less than a millisecond for a conversation."""
TEXT_MOST = 64 * 2**20
MEMORY_MOST = 2**30
"""What the process may grow by while a template works."""
SOURCE_MOST = 2**20
FACTOR_MOST = 1000
# Tags of transformers, which Jinja by itself does not know.
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
HINT = "choose another model, or mend its chat_template.jinja"


def check(template: object) -> None:
    """Refuse a template, or one of several, that could keep one step busy for ever.

    These are powers, products of two unknown numbers, and rounding to an unknown number of digits, which is a power too.

    Raises:
        ModelError: Saying where.
    """
    named = cast(Mapping[object, object], template) if isinstance(template, Mapping) else {"default": template}
    for source in named.values() if "default" in named else [None]:
        if not isinstance(source, str):
            raise ModelError("the chat template is no text, nor several of which one is `default`", hint=HINT)
        _check(source)


def _check(source: str) -> None:
    from jinja2 import Environment, TemplateSyntaxError, nodes

    if len(source) > SOURCE_MOST:
        raise ModelError(f"the chat template has {len(source):,} characters", hint=HINT)
    try:
        parser = Environment(extensions=["jinja2.ext.loopcontrols"])  # noqa: S701 - nothing is rendered # nosec B701
        tree = parser.parse(GENERATION.sub("", source))
    except (TemplateSyntaxError, RecursionError, ValueError) as error:  # the last of a number of thousands of digits
        raise ModelError(f"the chat template cannot be read: {error}", hint=HINT) from error
    for node in tree.find_all((nodes.Pow, nodes.Mul)):
        if isinstance(node, nodes.Pow) or not any(map(_is_small, (node.left, node.right))):
            raise ModelError(
                f"the chat template computes a power, or the product of two variables, in line {node.lineno}", hint=HINT
            )
    for node in tree.find_all(nodes.Filter):
        if not _rounds_shortly(node):
            raise ModelError(
                f"the chat template rounds to an unknown number of digits, in line {node.lineno}", hint=HINT
            )


def _rounds_shortly(node: Any) -> bool:
    """Say whether a filter is none that rounds, or does so to a few digits; `map` may apply any filter, by its name."""
    given = [*node.args, *(one.value for one in node.kwargs)]
    if node.name == "round":
        return not node.dyn_args and not node.dyn_kwargs and all(map(_is_small, given))
    if node.name != "map":
        return True
    names = [_constant(one) for one in node.args[:1]]
    return not node.dyn_args and all(isinstance(name, str) and name != "round" for name in names)


def _is_small(node: Any) -> bool:
    value = _constant(node)
    size = len(value) if isinstance(value, str) else value
    return isinstance(size, int) and abs(size) <= FACTOR_MOST


def _constant(node: Any) -> object:
    from jinja2 import nodes

    return node.value if isinstance(node, nodes.Const) else None


class TooMuchError(BaseException):
    """A template took too long. No `Exception`, all of which Jinja swallows while it computes constants beforehand."""


class _Watch:
    """One thread that looks after the rendering under way, of which there is one at a time in a process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ends_at, self.thread = float("inf"), 0
        self._started = self._told = False

    def begin(self) -> None:
        """Give the calling thread a time."""
        if not self._started:
            self._started = True
            threading.Thread(target=self._look, daemon=True).start()
        with self.lock:
            self.thread, self.ends_at = threading.get_ident(), time.monotonic() + SECONDS

    def end(self) -> None:
        """Let it be, also if it was just about to be told."""
        with self.lock:
            self.ends_at = float("inf")
            if not self._told:
                return
            try:  # Taken back by None, it would leave Python 3.11 hanging as soon as that is traced, as by a debugger.
                self._tell()
                while True:
                    pass
            except TooMuchError:
                self._told = False

    def _tell(self) -> None:
        self._told = True
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(TooMuchError))

    def _look(self) -> None:
        while True:
            time.sleep(SECONDS / 20)
            with self.lock:
                if time.monotonic() > self.ends_at:  # and again, should something have caught it
                    self._tell()


_watch = _Watch()
_one_at_a_time = threading.Lock()


@contextmanager
def limited() -> Generator[None]:
    """Stop what the block renders after a time, or when it asks for much memory. One thread at a time may render.

    Raises:
        ModelError: If it was stopped.
    """
    with _one_at_a_time:
        try:
            with _memory_limited():
                _watch.begin()
                try:
                    yield
                finally:
                    _watch.end()
        except TooMuchError as error:
            _watch.end()  # had it come within the first one
            raise ModelError(
                f"the chat template works for more than {SECONDS:g} s on one conversation", hint=HINT
            ) from error
        except (MemoryError, OverflowError) as error:
            raise ModelError(f"the chat template asks for too much: {str(error) or 'memory'}", hint=HINT) from error


def hold(text: str) -> str:
    """Give a rendered text, if it is one, and not absurdly long.

    Raises:
        ModelError: If it is.
    """
    if len(text) > TEXT_MOST:
        raise ModelError(f"the chat template makes {len(text):,} characters of one conversation", hint=HINT)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ModelError(f"the chat template makes what is no text: {error}", hint=HINT) from error
    return text


@cache
def _own_size() -> int:
    """Keep open what tells the size of this process, since it is asked for each conversation."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)


@contextmanager
def _memory_limited() -> Generator[None]:
    """Let the process grow by so much only; where the system can do that, which is on Linux."""
    try:
        import resource

        pages = int(os.pread(_own_size(), 64, 0).split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    except (ImportError, OSError):
        yield
        return
    room = pages * resource.getpagesize() + MEMORY_MOST
    resource.setrlimit(resource.RLIMIT_AS, (room if soft == resource.RLIM_INFINITY else min(soft, room), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# In words that every base model has read, and with the one token that it knows to end a text.
TURNS = """{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- 'Assistant:\n' + message.content + eos_token + '\n\n' -}}
{%- elif message.role == 'system' -%}
{{- 'System:\n' + message.content + '\n\n' -}}
{%- elif message.role == 'user' -%}
{{- 'User:\n' + message.content + '\n\n' -}}
{%- else -%}
{{- raise_exception('this template knows no role ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:\n' -}}
{%- endif -%}
"""


def plain(*, begins: bool) -> str:
    """Give the chat template for a base model that has none: `User:`, `Assistant:`, and the end-of-text token.

    Args:
        begins: Whether the model's texts begin with a token of their own.
    """
    return ("{{- bos_token -}}\n" if begins else "") + TURNS
