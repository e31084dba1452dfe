"""The command: a plain question for help is answered from a prepared page; all else goes to the command line.

Drawing a page anew takes some 300 ms, nearly all of it in libraries; `scripts/readme` draws them once.
"""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PAGES = Path(__file__).with_name("help_pages")
WIDTH = 80


def main() -> None:
    """Run the command line and exit with the code of the contract."""
    page = prepared_page(sys.argv[1:])
    if page is None:
        _end_at_signals()
        from backprop.cli import main

        main()
    else:
        _show(page)


def _end_at_signals() -> None:
    """End with the codes of the contract while the command line is still loading; it listens itself afterwards."""
    import signal

    def end(number: int, _: object) -> None:
        # Written by hand: whatever would write it better may be half loaded.
        code, by = (75, "SIGTERM") if number == signal.SIGTERM else (130, "Ctrl-C")
        message, hint = f"stopped by {by}", "nothing was begun; run the same command again"
        if "--json" in sys.argv or os.environ.get("BACKPROP_JSON", "").lower() in ("1", "true", "yes"):
            moment = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
            head = f'{{"v": 1, "t": "{moment}", "event": "error", "code": {code}'
            tell(1, f'{head}, "message": "{message}", "hint": "{hint}"}}\n')
        tell(2, f"error: {message}\n\nhint: {hint}\n")
        os._exit(code)

    def tell(descriptor: int, text: str) -> None:
        with contextlib.suppress(OSError):  # who read it has gone
            os.write(descriptor, text.encode())

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


def prepared_page(tokens: Sequence[str]) -> Path | None:
    """Give the page that answers ``tokens``, if they ask for nothing but help."""
    if tokens and tokens[-1] not in ("--help", "-h"):
        return None
    command = tokens[:-1] or ["backprop"]
    page = PAGES / f"{command[0]}.txt"
    return page if len(command) == 1 and command[0] and page.is_file() else None


def _show(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if not sys.stdout or not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        text = uncoloured(text)
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read enough


def uncoloured(text: str) -> str:
    """Leave out the sequences that colour ``text`` in a terminal."""
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", text)


if __name__ == "__main__":
    main()
