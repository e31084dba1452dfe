"""What every command that writes a run directory shares: claim, log, manifest, report, and an end that is always told."""

import importlib.metadata
import platform
import time
import traceback
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import backprop
from backprop import report
from backprop.config import MultiRunConfig, TrainConfig
from backprop.core.plan import Plan
from backprop.edges import rundir
from backprop.edges.hub import ModelSource
from backprop.errors import EXIT_CODE_OF_A_BUG, BackpropError, Interrupted
from backprop.events import JSON, Event, Failed, RunFinished, RunStarted, Sink, tee

# Packages whose version changes what a run does.
VERSIONED = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "tokenizers", "bitsandbytes")
# Options that change where and how a run is told, not what it computes.
NOT_IDENTITY = ("output", "overwrite", "dry_run", "offline", "report_to")


# Marks the note on an exception whose traceback is in a file already.
CRASH_NOTE = "traceback in "


class Session:
    """A run under way: its sink, and its manifest as known so far."""

    def __init__(self, directory: Path, command: str, manifest: dict[str, Any], say: Sink) -> None:
        self.directory = directory
        self.events: list[Event] = []
        self.say = tee(say, self.events.append)
        self._command = command
        self._manifest = manifest
        self._started = time.monotonic()

    def record(self, *, model: ModelSource, plan: Plan, question: str) -> None:
        """Write the model, the plan, and a question that `export` may ask into the manifest."""
        choices = {name: asdict(choice) for name, choice in plan.choices().items()}
        self._manifest |= {"model": asdict(model), "plan": choices, "question": question}
        rundir.write_manifest(self.directory, self._manifest)

    def finish(self, result: Mapping[str, JSON]) -> None:
        """Write the report, then the manifest as finished, then say so."""
        seconds = round(time.monotonic() - self._started, 1)
        finished = RunFinished(command=self._command, output=str(self.directory), seconds=seconds, result=result)
        self._manifest |= {"status": "finished", "seconds": seconds, "result": dict(result)}
        # The manifest last: a run that says it is finished has its page.
        self._write_report()
        rundir.write_manifest(self.directory, self._manifest)
        self.say(finished)

    def fail(self, status: str, *, code: int, message: str, hint: str | None) -> Failed:
        """Write the manifest as ended early."""
        self._manifest |= {"status": status, "error": {"code": code, "message": message}}
        rundir.write_manifest(self.directory, self._manifest)
        self._write_report()
        return Failed(code=code, message=message, hint=hint or "")

    def _write_report(self) -> None:
        rundir.write_text(self.directory / "report.html", report.page(self._manifest, self.events))


@contextmanager
def running(
    config: TrainConfig, *, command: str, fingerprint: str, say: Sink, extra: MultiRunConfig | None = None
) -> Generator[Session]:
    """Hold the run directory of ``config`` while the block runs; the block must call `finish`.

    However the block ends, the manifest and the event log tell how. Errors go on to the caller.
    """
    settings = {**asdict(config), **(asdict(extra) if extra else {})}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    identity = {name: value for name, value in settings.items() if name not in NOT_IDENTITY}
    identity |= {"command": command, "data_sha256": fingerprint}
    rundir.claim(config.output, identity, overwrite=config.overwrite)
    manifest: dict[str, Any] = {
        "version": backprop.__version__,
        "command": command,
        "status": "running",
        "config": settings,
        "identity": identity,
        "versions": versions(),
    }
    rundir.write_manifest(config.output, manifest)
    with ExitStack() as stack:
        log = stack.enter_context(rundir.event_log(config.output))
        session = Session(config.output, command, manifest, tee(say, log))
        session.say(RunStarted(command=command, output=str(config.output), version=backprop.__version__))
        try:
            yield session
        except BackpropError as error:
            log(session.fail("failed", code=error.code, message=error.message, hint=error.hint))
            raise
        except KeyboardInterrupt:
            stopped = Interrupted("stopped by Ctrl-C", hint="run the same command again")
            log(session.fail("interrupted", code=stopped.code, message=stopped.message, hint=stopped.hint))
            raise stopped from None
        except BaseException as error:
            crash = config.output / "crash.txt"
            rundir.write_text(crash, "".join(traceback.format_exception(error)))
            error.add_note(CRASH_NOTE + str(crash))
            log(session.fail("crashed", code=EXIT_CODE_OF_A_BUG, message=repr(error), hint="see crash.txt"))
            raise


def versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
