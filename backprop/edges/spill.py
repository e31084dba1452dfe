"""Conversations and examples beyond what the memory holds: in an unnamed file, which is gone when the process is."""

import json
import struct
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any, TypeVar, cast

from backprop.core.data.formats import Conversation
from backprop.core.data.render import Example
from backprop.core.data.sequences import Lazy
from backprop.edges import device
from backprop.edges.places import cache_dir
from backprop.errors import DiskError

T = TypeVar("T")
# Up to here nothing is written to a disk.
IN_MEMORY_BYTES = 64 * 2**20


class Spill(Lazy[T]):
    """A list whose items lie in memory as bytes, and all of them in a file once they are more than 64 MiB.

    Raises:
        DiskError: If the disk is full.
    """

    def __init__(self, pack: Callable[[T], bytes], unpack: Callable[[bytes], T]) -> None:
        self._pack, self._unpack = pack, unpack
        self._ends = array("Q", [0])
        self._folder = _folder()
        self._file = cast(IO[bytes], SpooledTemporaryFile(max_size=IN_MEMORY_BYTES, dir=str(self._folder)))  # noqa: SIM115

    def append(self, item: T) -> None:
        """Add an item at the end."""
        packed = self._pack(item)
        self._at(self._ends[-1], lambda file: file.write(packed))
        self._ends.append(self._ends[-1] + len(packed))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def num_bytes(self) -> int:
        """Give the bytes of all items."""
        return self._ends[-1]

    def _item(self, number: int) -> T:
        start, end = self._ends[number], self._ends[number + 1]
        return self._unpack(self._at(start, lambda file: file.read(end - start)))

    def _at(self, position: int, act: Callable[[IO[bytes]], Any]) -> Any:
        try:
            self._file.seek(position)
            return act(self._file)
        except OSError as error:
            raise DiskError(
                f"the data is larger than {IN_MEMORY_BYTES // 2**20} MiB, and `{self._folder}` cannot hold it: "
                f"{error.strerror}",
                hint="make room, or name another folder in XDG_CACHE_HOME",
            ) from error


def _folder() -> Path:
    """Give the folder for what can be made again: where the system keeps temporary files, that may be memory."""
    folder = cache_dir()
    with suppress(OSError):  # small data needs none
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_room(need_bytes: int) -> None:
    """Refuse a disk that is too small for what is going to be kept there, before the work of making it.

    Raises:
        DiskError: With both figures.
    """
    if need_bytes <= IN_MEMORY_BYTES:
        return
    folder = _folder()
    free = device.disk_free_bytes(folder)
    if free < need_bytes:
        raise DiskError(
            f"the tokens of this data take about {need_bytes / 2**20:,.0f} MiB in `{folder}` while the run is under way, "
            f"and there is room for {free / 2**20:,.0f}",
            hint="make room, or name another folder in XDG_CACHE_HOME",
        )


def conversations() -> Spill[Conversation]:
    """Give an empty list of conversations."""
    return Spill(_pack_conversation, _unpack_conversation)


def examples() -> Spill[Example]:
    """Give an empty list of examples, but for their references."""
    return Spill(_pack_example, lambda packed: _unpack_example(packed, 0)[0])


def _pack_conversation(one: Conversation) -> bytes:
    turns = [one.messages, one.rejected, one.tools]
    return json.dumps([*turns, one.text, one.shape, one.place, one.desirable], ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )


def _unpack_conversation(packed: bytes) -> Conversation:
    messages, rejected, tools, text, shape, place, desirable = json.loads(packed.decode("utf-8", "surrogatepass"))
    return Conversation(
        messages=tuple(messages),
        rejected=tuple(rejected),
        tools=tuple(tools),
        text=text,
        shape=shape,
        place=place,
        desirable=desirable,
    )


# Tokens, answers, answers that end, bytes of the question, and which of the rest there is.
HEAD = struct.Struct("<IIIIB")
DESIRABLE, REJECTED, MISMATCHED = 1, 2, 4


def _pack_example(one: Example) -> bytes:
    question = one.question.encode("utf-8", "surrogatepass")
    beside = [side for side in (one.rejected, one.mismatched) if side]
    flags = DESIRABLE * one.desirable + REJECTED * bool(one.rejected) + MISMATCHED * bool(one.mismatched)
    head = HEAD.pack(len(one.ids), one.answers, one.ended, len(question), flags)
    return b"".join([head, array("i", one.ids).tobytes(), bytes(one.mask), question, *map(_pack_example, beside)])


def _unpack_example(packed: bytes, at: int) -> tuple[Example, int]:
    length, answers, ended, asked, flags = HEAD.unpack_from(packed, at)
    at += HEAD.size
    ids = array("i", packed[at : at + 4 * length])
    at += 4 * length
    mask = tuple(map(bool, packed[at : at + length]))
    question = packed[at + length : at + length + asked].decode("utf-8", "surrogatepass")
    made = Example(tuple(ids), mask, answers, ended, question, desirable=bool(flags & DESIRABLE))
    at += length + asked
    if flags & REJECTED:
        side, at = _unpack_example(packed, at)
        made = replace(made, rejected=side)
    if flags & MISMATCHED:
        side, at = _unpack_example(packed, at)
        made = replace(made, mismatched=side)
    return made, at
