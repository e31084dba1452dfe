"""The text of a JSON file, of which only what is being read is in memory."""

import codecs
import json
import re
from pathlib import Path
from typing import IO

from backprop.errors import DataError

CHUNK_BYTES = 2**20
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()
OF_NUMBERS = "0123456789.eE+-"
# What is left of a word, number or escape that goes on in the next chunk.
CUT_CHARACTERS = 16


class TooLongError(Exception):
    """A value does not end within what may be held of it."""


class JsonText:
    """Positions are those of the text that is held; `forget` moves them.

    Args:
        file: At its start, and UTF-8.
    """

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        self._text, self._num_bytes, self._ended = "", 0, False
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._lines, self._columns = 0, 0
        """Of what was forgotten: whole lines, and characters of the line after these."""

    def _more(self) -> bool:
        """Hold one more chunk, or as much again; false if there is none."""
        if self._ended:
            return False
        chunk = self._file.read(max(CHUNK_BYTES, len(self._text)))
        self._ended = not chunk
        try:
            self._text += self._utf8.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            error.start += self._num_bytes + len(chunk) - len(error.object)  # which is without what stands before
            raise
        self._num_bytes += len(chunk)
        return True

    def at(self, position: int) -> str:
        """Give the character at a position; empty at the end."""
        while position >= len(self._text) and self._more():
            pass
        return self._text[position : position + 1]

    def after_space(self, position: int) -> int:
        """Give the next position that holds no white space."""
        while True:
            found = SPACE.match(self._text, position)
            end = found.end() if found else position
            if end < len(self._text) or not self._more():
                return end

    def expect(self, character: str, position: int) -> int:
        """Give the next position that holds no white space, of which it must hold this character.

        Raises:
            DataError: Naming the line, if it does not.
        """
        at = self.after_space(position)
        if self.at(at) != character:
            raise self.fault(f"Expecting '{character}' delimiter", at)
        return at

    def decode(self, position: int, most: int | None = None) -> tuple[object, int]:
        """Give the value at a position, and where it ends.

        Raises:
            DataError: Naming the line, if there is none.
            TooLongError: If it does not end within ``most`` characters.
        """
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - CUT_CHARACTERS
                if cut and most is not None and len(self._text) - position >= most:
                    raise TooLongError from error
                if not (cut and self._more()):
                    raise self.fault(error.msg, error.pos) from error
            except RecursionError as error:
                raise DataError(
                    f"{self.path} is nested too deeply", hint="a .json file is one list of flat objects"
                ) from error
            except ValueError as error:  # a number of over 4,300 digits
                if not (self._text[-1] in OF_NUMBERS and self._more()):  # of which there may be more, or a point
                    raise DataError(
                        f"{self.path} cannot be read: {error}", hint="quote numbers that are text"
                    ) from error
            else:
                if end + CUT_CHARACTERS <= len(self._text) or not self._more():
                    return value, end

    def forget(self, position: int) -> int:
        """Let go of what stands before a position, if that is worth it; give the same position anew."""
        if position < CHUNK_BYTES:
            return position
        gone = self._text[:position]
        lines = gone.count("\n")
        self._columns = len(gone) - gone.rfind("\n") - 1 if lines else self._columns + len(gone)
        self._lines += lines
        self._text = self._text[position:]
        return 0

    def fault(self, what: str, position: int) -> DataError:
        """Say what is wrong at a position, by its line and column in the file."""
        found = json.JSONDecodeError(what, self._text, position)
        column = found.colno + (self._columns if found.lineno == 1 else 0)
        return DataError(
            f"{self.path}, line {found.lineno + self._lines} is not JSON: {what} at column {column}",
            hint="a .json file is one list of objects",
        )
