"""What every command that writes a run directory shares: claim, log, manifest, report, and an end that is always told."""

import importlib.metadata
import os
import platform
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import backprop
from backprop import report
from backprop.config import MultiRunConfig, TrainConfig
from backprop.core.choice import Choice
from backprop.core.data.formats import Message
from backprop.core.plan import taken_over
from backprop.edges import cards, checkpoints, rundir, stopping
from backprop.edges.hub import ModelSource
from backprop.errors import EXIT_CODE_OF_A_BUG, BackpropError, DiskError, UsageError
from backprop.events import (
    JSON,
    DataRead,
    Eval,
    Event,
    Failed,
    Gated,
    MemoryMended,
    Phase,
    Proved,
    Resumed,
    RolledBack,
    RunFinished,
    RunStarted,
    Sampled,
    Sink,
    Spent,
    Step,
    Warned,
)
from backprop.verbs.engines import can_be
from backprop.verbs.prepare import Prepared

# Packages whose version changes what a run does.
VERSIONED = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "tokenizers", "bitsandbytes", "unsloth")
# Options that change where and how a run is told, not what it computes.
NOT_IDENTITY = (
    *("output", "overwrite", "dry_run", "offline", "report_to", "skip_proofs", "rehearse", "micro_batch", "recompute"),
    *("resume", "save_steps", "keep_checkpoints", "max_minutes", "gate", "gate_data", "max_forgetting", "from_run"),
    *("gpu_max_temp", "price_per_hour", "power_note", "engine", "offload", "dequantize"),
)


# Variables that change what a run computes.
ENVIRONMENT = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
)
# Options that the plan chooses where they are not given, once for a run however often it goes on.
CHOSEN = ("method", "optimizer")
# What versions did that had no such option.
ONCE = {"optimizer": "adamw"}
BEGUN, SAVED = "as this run began", "as in this run's last checkpoint"
GATES = ("gate", "gate_data")
# Marks the note on an exception whose traceback is in a file already.
CRASH_NOTE = "traceback in "


class Session:
    """A run under way: its sink, and its manifest as known so far.

    Nothing is written, and nothing of an earlier run removed, before `claim`.
    """

    def __init__(self, config: TrainConfig, command: str, manifest: dict[str, Any], say: Sink) -> None:
        self.directory = config.output
        self._own: list[Event] = []
        self._kept: list[Event] = []
        """Of earlier processes, what was not done again."""
        self._overwrite = config.overwrite
        self._gpu_max_temp, self._price_per_hour = config.gpu_max_temp, config.price_per_hour
        self._power_note = config.power_note
        self._cards: cards.Cards | None = None
        self._command = command
        self._manifest = manifest
        self._say = say
        self._log: Sink | None = None
        self._keep = config.resume != "never"
        self._earlier: list[Event] = []
        self.done = False
        """Whether the directory holds this very run, finished."""
        self.goes_on = False
        """Whether this very run began before, here or where its checkpoint is from."""
        self.has_begun = False
        """Whether it began in this directory."""
        self._started = time.monotonic()
        self.stack = ExitStack()

    def say(self, event: Event) -> None:
        """Tell the caller's sink, the report, and, once there is one, the event log."""
        if isinstance(event, Resumed):
            self._kept = [old for old in self._earlier if _stands(old, event)]
        if isinstance(event, RolledBack):
            self._kept, self._own = (
                [old for old in told if not _is_undone(old, event)] for told in (self._kept, self._own)
            )
        self._own.append(event)
        if self._log is not None:
            self._log(event)
        self._say(event)
        stopping.check()

    @property
    def claimed(self) -> bool:
        """Whether the run directory is this run's own."""
        return self._log is not None

    def as_begun(self, asked: TrainConfig) -> tuple[TrainConfig, dict[str, Choice[Any]]]:
        """Give the configuration with what was chosen when the run in this directory began, if that goes on; and these choices.

        They are method, optimizer and engine; and of the newest checkpoint, how a step goes through the model.
        """
        if not self.has_begun:
            return asked, {}
        before = rundir.read_manifest(self.directory) or {}
        given: Mapping[str, Any] = {**ONCE, **before["config"]} if before.get("config") else {}
        config = replace(asked, **{name: given.get(name) for name in CHOSEN if getattr(asked, name) is None})
        begun = taken_over(asked, config, BEGUN)
        if config.engine == "auto" and before.get("plan"):  # there was one only, once
            had = (before["plan"].get("engine") or {}).get("value", "torch")
            there = can_be(had)
            config = replace(config, engine=had if there else "torch")
            begun["engine"] = Choice(config.engine, BEGUN if there else f"the run began with {had}, which is not here")
        return config, {**begun, **self.ways_begun(asked, self.directory)}

    def ways_begun(self, asked: TrainConfig, folder: Path) -> dict[str, Choice[Any]]:
        """Give what the next step of a run that goes on takes over from its newest checkpoint, and no option decides.

        Args:
            folder: Of this run, or of one of several.
        """
        if not self.has_begun:
            return {}
        size = checkpoints.newest_state(folder / "checkpoints").get("size") or {}
        kept = {"micro_batch": size.get("examples")} if asked.micro_batch is None else {}
        if asked.recompute is None and size.get("recomputed") is not None:  # else it is of before this was written down
            kept |= {} if asked.offload else {"recompute": size["recomputed"]}
            kept |= {"offload": size.get("offloaded", False)} if asked.offload is None else {}
        return {name: Choice(value, SAVED) for name, value in kept.items() if value is not None}

    def claim(self, prepared: Prepared, *, question: str, probes: Sequence[Sequence[Message]]) -> None:
        """Take the run directory, and write down what is known, with what export is going to ask.

        Raises:
            UsageError: If it holds an interrupted run of another model.
        """
        identity = self._manifest["identity"]
        before = rundir.read_manifest(self.directory) or {}
        goes_on = self.stack.enter_context(
            rundir.claim(self.directory, identity, overwrite=self._overwrite, keep=self._keep)
        )
        if goes_on:
            _refuse_other_model(self.directory, before, prepared.model)
            self._earlier = rundir.read_events(self.directory)
            self._manifest["started_again"] = int(before.get("started_again", 0)) + 1
            self._tell_other_versions(before.get("versions") or {})
        self._manifest |= {
            "model": {**asdict(prepared.model), "revision": prepared.model.revision or ""},
            "config": {**self._manifest["config"], **{name: getattr(prepared.config, name) for name in CHOSEN}},
            "plan": {name: asdict(choice) for name, choice in prepared.plan.choices().items()},
            "memory": asdict(prepared.plan.memory) if prepared.plan.memory else None,
            "question": question,
            "probes": [list(messages) for messages in probes],
            "examples_sha256": prepared.train_sha256,
            "hardware": asdict(prepared.hardware),
            "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        }
        rundir.write_manifest(self.directory, self._manifest)
        self._log = self.stack.enter_context(rundir.event_log(self.directory))
        for event in self._own:
            self._log(event)
        self._cards = self.stack.enter_context(
            cards.watching(self.say, asked_c=self._gpu_max_temp, started=self._started)
        )

    @property
    def events(self) -> list[Event]:
        """What the run said, also before it was interrupted."""
        return [*self._kept, *self._own]

    def _tell_other_versions(self, before: Mapping[str, str]) -> None:
        others = other_versions(before)
        if others:
            self._manifest["versions_before"] = dict(before)
            self.say(Warned(message=f"this run goes on with other versions: {'; '.join(others)}"))

    def meet(self, finished: Mapping[str, Any]) -> None:
        """Take notice that the directory holds this very run, finished: only other gates leave something to do."""
        settings = finished.get("config") or {}
        self.done = _gates_of(self._manifest["config"]) == _gates_of(settings)
        self._keep = True
        if not self.done and self._command != "multi-run" and not self._has_last_checkpoint():
            raise UsageError(
                f"`{self.directory}` holds this run, finished with other gates, and its last checkpoint is gone",
                hint="leave the gates as they were, choose another `--output`, or add `--overwrite`",
            )

    def _has_last_checkpoint(self) -> bool:
        last = checkpoints.newest_state(self.directory / "checkpoints")
        return bool(last.get("ended"))

    def end_again(self) -> None:
        """Tell once more how this very run ended, if what it delivered is still there.

        Raises:
            UsageError: If it is not.
        """
        manifest = rundir.read_manifest(self.directory) or {}
        result = manifest.get("result") or {}
        adapter = self.directory / "lora" / "adapter_model.safetensors"
        if not adapter.is_file() or rundir.sha256_of(adapter) != result.get("adapter_sha256"):
            raise UsageError(
                f"`{self.directory}` holds this very run, finished, but `{adapter}` is not what it wrote",
                hint="choose another `--output`, or add `--overwrite`",
            )
        self.say(Phase(name="this very run is finished already: nothing to do"))
        for kind, key in ((Proved, "proofs"), (Gated, "gates")):
            for one in manifest.get(key) or ():
                self.say(kind(**one))
        told = rundir.read_events(self.directory)
        if not (told and isinstance(told[-1], RunFinished)):  # killed before its last word, or exported since
            with suppress(DiskError), rundir.event_log(self.directory) as log:
                log(RunFinished(command=self._command, output=str(self.directory), seconds=0.0, result=result))
        self.finish(result)

    def finish(self, result: Mapping[str, JSON]) -> None:
        """Write the report, then the manifest as finished, then say so."""
        if self._cards is not None:
            self._cards.refuse_if_lost()
        seconds = round(time.monotonic() - self._started, 1)
        stopping.finished()
        if self.claimed:
            if self._cards is not None:
                self.say(self._cards.spent())
            self._manifest |= {"status": "finished", "seconds": seconds, "result": dict(result), **self._told()}
            # The manifest last: a run that says it is finished has its page.
            self._write_report()
            rundir.write_manifest(self.directory, self._manifest)
        self.say(RunFinished(command=self._command, output=str(self.directory), seconds=seconds, result=result))

    def _told(self) -> dict[str, Any]:
        """Collect what the data held, what proofs found, what the model answered and what the run cost."""
        ledgers = [event.ledger for event in self.events if isinstance(event, DataRead)]
        return {
            "data": dict(ledgers[0]) if ledgers else {},
            **({"data_of_runs": [dict(ledger) for ledger in ledgers]} if len(ledgers) > 1 else {}),
            "proofs": [asdict(proof) for proof in self._last_proofs()],
            "gates": [asdict(event) for event in self.events if isinstance(event, Gated)],
            "samples": [asdict(event) for event in self.events if isinstance(event, Sampled)],
            "memory_mended": [asdict(event) for event in self.events if isinstance(event, MemoryMended)],
            "spent": self._spent(),
        }

    def _spent(self) -> dict[str, JSON]:
        """Sum up what the run has spent in all its processes, what was done again included."""
        parts = [event for event in (*self._earlier, *self._own) if isinstance(event, Spent)]
        seconds = sum(one.seconds for one in parts)
        energies = [one.energy_wh for one in parts if one.energy_wh is not None]
        price = self._price_per_hour
        return {
            "seconds": round(seconds, 1),
            "paused_seconds": round(sum(one.paused_seconds for one in parts), 1),
            "energy_wh": round(sum(energies), 3) if energies else None,
            "power_note": self._power_note,
            "hottest_c": max((one.hottest_c for one in parts if one.hottest_c is not None), default=None),
            "cost": None if price is None else round(price * seconds / 3600, 4),
        }

    def _last_proofs(self) -> list[Proved]:
        """Give each proof once: those that a resumed run made again stand for the earlier ones."""
        proofs = {(event.name, event.run): event for event in self.events if isinstance(event, Proved)}
        return list(proofs.values())

    def fail(self, status: str, *, code: int, message: str, hint: str | None) -> None:
        """Write down how the run ended early. The caller's sink hears of it from the caller."""
        if self._log is None:
            return
        spent = self._cards.spent() if self._cards else None
        self._own += [spent] if spent else []
        self._manifest |= {"status": status, "error": {"code": code, "message": message}, **self._told()}
        # What cannot be written any more, on a full disk, must not hide what happened.
        for write in (
            lambda: rundir.write_manifest(self.directory, self._manifest),
            self._write_report,
            lambda: self._log and spent and self._log(spent),
            lambda: self._log and self._log(Failed(code=code, message=message, hint=hint or "")),
        ):
            with suppress(DiskError):
                write()

    def interrupted(self, error: BackpropError) -> None:
        """Write down that the run was stopped from outside."""
        self.fail("interrupted", code=error.code, message=error.message, hint=error.hint)

    def crash(self, error: BaseException) -> None:
        """Write down the traceback of a fault of our own."""
        if self._log is None:
            return
        path = self.directory / "crash.txt"
        with suppress(DiskError):
            rundir.write_text(path, "".join(traceback.format_exception(error)))
            error.add_note(CRASH_NOTE + str(path))
        self.fail("crashed", code=EXIT_CODE_OF_A_BUG, message=repr(error), hint="see crash.txt")

    def _write_report(self) -> None:
        rundir.write_text(self.directory / "report.html", report.page(self._manifest, self.events))


def _gates_of(settings: Mapping[str, Any]) -> list[object]:
    return [*(list(settings.get(name) or ()) for name in GATES), settings.get("max_forgetting")]


def _stands(event: Event, resumed: Resumed) -> bool:
    """Say whether an event of an earlier process is part of the run that goes on: what is done again is not."""
    if isinstance(event, Gated):  # told once, at the end
        return False
    run = getattr(event, "run", None)
    if run != resumed.run:
        return run is not None and run < resumed.run
    return isinstance(event, Proved) or (isinstance(event, Step | Eval) and event.step <= resumed.step)


def _is_undone(event: Event, back: RolledBack) -> bool:
    """Say whether an event tells of a step that is done again after going back."""
    return isinstance(event, Step | Eval) and event.run == back.run and event.step > back.step


def _refuse_other_model(directory: Path, before: Mapping[str, Any], model: ModelSource) -> None:
    known = before.get("model") or {}
    if known.get("sha256") not in (None, model.sha256):
        raise UsageError(
            f"`{directory}` holds another run, which differs in the files of the model: `{known.get('name')}` before, "
            f"`{model.name}` now",
            hint="bring back the model, or add `--overwrite`",
        )


@contextmanager
def running(
    config: TrainConfig, *, command: str, fingerprint: str, say: Sink, extra: MultiRunConfig | None = None
) -> Generator[Session]:
    """Run a block that ends with `finish`, in a directory that it takes with `claim` once all is judged.

    However the block ends, the manifest and the event log tell how. Errors go on to the caller.

    Raises:
        UsageError: At once, if the directory holds another or a finished run.
    """
    settings = {**asdict(config), **(asdict(extra) if extra else {})}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    identity = {name: value for name, value in settings.items() if name not in NOT_IDENTITY}
    identity |= {"command": command, "data_sha256": fingerprint}
    identity = _as_known_before(config.output, identity)
    found = "nothing" if config.dry_run else rundir.check(config.output, identity, overwrite=config.overwrite)
    manifest: dict[str, Any] = {
        "version": backprop.__version__,
        "command": command,
        "status": "running",
        "config": settings,
        "identity": identity,
        "versions": versions(),
    }
    session = Session(config, command, manifest, say)
    session.has_begun = found != "nothing" and config.resume != "never"
    session.goes_on = session.has_begun or config.resume not in ("auto", "never")
    if found == "finished":
        session.meet(rundir.read_manifest(config.output) or {})
    with session.stack, stopping.ends_with(session.interrupted):
        try:
            session.say(RunStarted(command=command, output=str(config.output), version=backprop.__version__))
            yield session
        except BackpropError as error:
            if error.details and session.claimed:
                rundir.write_text(session.directory / "crash.txt", error.details)
            session.fail("failed", code=error.code, message=error.message, hint=error.hint)
            raise
        except KeyboardInterrupt as interrupt:
            stopped = stopping.accept(interrupt)
            session.interrupted(stopped)
            raise stopped from None
        except BaseException as error:
            session.crash(error)
            raise


def _as_known_before(directory: Path, identity: Mapping[str, object]) -> dict[str, object]:
    """Leave out options that the version which began a run did not have, while they are at their defaults."""
    before = (rundir.read_manifest(directory) or {}).get("identity") or {}
    if not before:
        return dict(identity)
    if identity["method"] is None and before.get("method") == "lora":  # what was the default once
        identity = {**identity, "method": "lora"}
    identity = {name: value for name, value in identity.items() if name in before or value != ONCE.get(name, ...)}
    identity |= {name: value for name, value in before.items() if name in NOT_IDENTITY}  # it was, once
    defaults = {one.name: one.default for one in (*fields(TrainConfig), *fields(MultiRunConfig))}
    return {name: value for name, value in identity.items() if name in before or value != defaults.get(name, ...)}


def other_versions(before: Mapping[str, str]) -> list[str]:
    """Say which packages are of other versions than ``before``."""
    return [
        f"{name} {before.get(name)} before, {now} now" for name, now in versions().items() if before.get(name) != now
    ]


def versions() -> dict[str, str]:
    """Give the versions of Python and of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
