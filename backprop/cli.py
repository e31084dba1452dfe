"""The command line: parse, call one verb, print, exit."""

import contextlib
import faulthandler
import io
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NoReturn, TextIO

from cyclopts import App, CycloptsError, Group, Parameter, UnknownOptionError
from cyclopts.config import Env

import backprop
from backprop.config import ONLY_OF_TRAIN, DoctorConfig, ExportConfig, MultiRunConfig, TrainConfig
from backprop.console import Console, without_escapes
from backprop.edges import stopping, threads
from backprop.errors import EXIT_CODE_OF_A_BUG, BackpropError, DiskError, UsageError
from backprop.events import Event, Failed, Sink, tee
from backprop.schema import schema

OUTPUT = Group.create_ordered("Output")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class Voice:
    """How a command talks."""

    config: Annotated[Path | None, Parameter(group=OUTPUT)] = None
    """A YAML file of options; `BACKPROP_…` variables and flags come before it."""
    json: Annotated[bool, Parameter(group=OUTPUT, negative="", show_default=False)] = False
    """One JSON object per event on stdout."""
    quiet: Annotated[bool, Parameter(group=OUTPUT, negative="", show_default=False)] = False
    """Errors only."""
    verbose: Annotated[bool, Parameter(group=OUTPUT, negative="", show_default=False)] = False
    """Every step."""
    junit: Annotated[Path | None, Parameter(group=OUTPUT)] = None
    """Write proofs, checks and gates as JUnit XML."""


PLAIN_VOICE, PLAIN_RUNS, PLAIN_EXPORT, PLAIN_DOCTOR = Voice(), MultiRunConfig(), ExportConfig(), DoctorConfig()
COMMANDS = ("train", "multi-run", "export", "doctor")
ENVIRONMENT = Env("BACKPROP_", command=False)

app = App(
    name="backprop",
    help="Fine-tune language models on the GPU you have, and hand over a model that runs.",
    version=backprop.__version__,
    help_format="plaintext",
    default_parameter=Parameter(show_env_var=False),
    config=[ENVIRONMENT],
)


@app.command
def train(config: TrainConfig | None = None, *, voice: Voice = PLAIN_VOICE) -> int:
    """Fine-tune one adapter on your data; the run directory goes to stdout."""
    asked = config or TrainConfig()

    def work(say: Sink) -> Sequence[Path]:
        from backprop.verbs.train import train

        run_directory = train(asked, say=say)
        return () if asked.dry_run else (run_directory,)

    return _call(work, replace(voice, verbose=voice.verbose or asked.dry_run))


@app.command(default_parameter=Parameter(parse=re.compile(rf"^(?!(?:{'|'.join(ONLY_OF_TRAIN)})$)")))
def multi_run(
    config: TrainConfig | None = None, options: MultiRunConfig = PLAIN_RUNS, *, voice: Voice = PLAIN_VOICE
) -> int:
    """Train on several data sets in turn (or on chunks of one) and merge after each, so that less is forgotten."""
    asked = config or TrainConfig()

    def work(say: Sink) -> Sequence[Path]:
        from backprop.verbs.multi_run import multi_run

        run_directory = multi_run(asked, options, say=say)
        return () if asked.dry_run else (run_directory,)

    return _call(work, replace(voice, verbose=voice.verbose or asked.dry_run))


@app.command
def export(source: Path, /, config: ExportConfig = PLAIN_EXPORT, *, voice: Voice = PLAIN_VOICE) -> int:
    """Merge an adapter into its model and write files that run; each is asked once before success is claimed.

    Parameters
    ----------
    source
        A run directory, or a folder with an adapter.
    """

    def work(say: Sink) -> Sequence[Path]:
        from backprop.verbs.export import export

        return export(source, config, say=say)

    return _call(work, voice)


@app.command
def doctor(config: DoctorConfig = PLAIN_DOCTOR, *, voice: Voice = PLAIN_VOICE) -> int:
    """Check that this machine can do what `backprop` promises; exit 5, or the code of what is wrong first."""

    def work(say: Sink) -> Sequence[Path]:
        from backprop.verbs.doctor import doctor

        doctor(config, say=say)
        return ()

    return _call(work, voice)


def _call(work: Callable[[Sink], Sequence[Path]], voice: Voice) -> int:
    """Run a verb, tell its end on the right stream and to the CI job around it, and give its exit code."""
    told: list[Event] = []
    if voice.junit is not None:
        check_writable(voice.junit)
    with Console(detail="quiet" if voice.quiet else "verbose" if voice.verbose else "normal") as console:
        sinks = [told.append, console, *([_annotate] if os.environ.get("GITHUB_ACTIONS") == "true" else [])]
        if voice.json:
            from backprop.edges.rundir import json_lines

            sinks.insert(1, until_closed(json_lines(_stdout())))
        say = tee(*sinks)
        started = time.monotonic()
        paths: Sequence[Path] = ()

        def end(error: BackpropError) -> int:
            say(Failed(code=error.code, message=error.message, hint=error.hint or ""))
            return error.code

        def end_at_once(error: BackpropError) -> None:
            end(error)
            _hand_over(told, voice, seconds=time.monotonic() - started)

        try:
            with stopping.ends_with(end_at_once):
                paths = work(say)
        except BackpropError as error:
            code = end(error)
        except KeyboardInterrupt as interrupt:
            code = end(stopping.accept(interrupt))
        except Exception as error:
            told.append(Failed(code=EXIT_CODE_OF_A_BUG, message=f"a bug: {error!r}", hint=""))
            _hand_over(told, voice, seconds=time.monotonic() - started)
            raise
        else:
            code = 0
        handed = _hand_over(told, voice, seconds=time.monotonic() - started)
        code = code or handed
    if code == 0 and not voice.json:
        for path in paths:
            print(path, file=_stdout())
    return code


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written at the end, before any work.

    Raises:
        UsageError: If it is a folder, or would be in none that can be written.
    """
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"`{path}` cannot be a file", hint="give `--junit` a file in a folder that can be written")


def _annotate(event: Event) -> None:
    """Mark an error or warning on the page of a GitHub job."""
    from backprop import ci

    text = ci.annotation(event)
    if text is not None and sys.stderr:
        print(text, file=sys.stderr, flush=True)


def _hand_over(told: Sequence[Event], voice: Voice, *, seconds: float) -> int:
    """Write what a CI job shows: its summary and the JUnit file. Give the exit code of a failure to do so."""
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if not (summary or voice.junit):
        return 0
    from backprop import ci
    from backprop.edges import rundir

    try:
        if summary:
            with open(summary, "a", encoding="utf-8") as file:
                file.write(ci.step_summary(told))
        if voice.junit:
            rundir.write_text(voice.junit, ci.junit(told, seconds=seconds))
    except OSError as error:
        return _usage(f"`{summary}` cannot be written: {error.strerror}", "", voice.json, code=DiskError.code)
    except DiskError as error:
        return _usage(error.message, error.hint or "", voice.json, code=error.code)
    return 0


def _stdout() -> TextIO:
    """Give stdout, or nowhere if this program was started without one."""
    return sys.stdout or open(os.devnull, "w", encoding="utf-8")


def until_closed(sink: Sink) -> Sink:
    """Go on in silence when who reads stdout has gone: a run is not to die of `| head`."""
    closed = False

    def say(event: Event) -> None:
        nonlocal closed
        if closed:
            return
        try:
            sink(event)
        except BrokenPipeError:
            closed = True
            # Python flushes stdout at exit, which would fail once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return say


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with the code of the contract."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    if tokens[:1] == ["--json-schema"]:
        import json

        print(json.dumps(schema(), indent=2))
        sys.exit(0)
    sys.excepthook = _tell_of_bug
    _name_calls_that_crash()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that this terminal cannot show ends no run
    with stopping.armed():
        code = run(tokens)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError):  # who read it has gone
                stream.flush()
        # At once: libraries take their time to unload, and a signal meanwhile would change the code. An interrupt that
        # struck inside `exec` is remembered by Python as unhandled, and would end the process by the signal.
        os._exit(code)


def _name_calls_that_crash() -> None:
    """Let a library that ends the process by a signal be named on stderr, also while `edges.llama_cpp` silences that."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none
        faulthandler.enable(os.dup(sys.stderr.fileno()))


def _tell_of_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tell of a fault of our own in the same words as any other; Python then exits with 1."""
    from backprop.verbs.session import CRASH_NOTE

    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(CRASH_NOTE)]
    if not notes:
        sys.__excepthook__(kind, error, trace)
    hint = f"please report it with the {notes[0]}" if notes else "please report it with the traceback above"
    _tell(Failed(code=EXIT_CODE_OF_A_BUG, message=f"a bug: {kind.__name__}: {error}", hint=hint), "--json" in sys.argv)


def run(tokens: Sequence[str]) -> int:
    """Parse ``tokens``, run their command, and give its exit code."""
    as_json = "--json" in tokens or os.environ.get("BACKPROP_JSON", "").lower() in ("1", "true", "yes")
    threads.settle()
    if not tokens or tokens[0].startswith("-"):
        _register_completion()
    try:
        _refuse_variables(tokens)
        app.config = (ENVIRONMENT, *_yaml_of(tokens))
        code = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        return _refuse(_refusal(error, tokens), tokens, as_json)
    except UsageError as error:
        return _refuse(error, tokens, as_json)
    except KeyboardInterrupt as interrupt:
        stopped = stopping.accept(interrupt)
        return _usage(stopped.message, stopped.hint or "", as_json, code=stopped.code)
    return code if isinstance(code, int) else 0


def _refusal(error: CycloptsError, tokens: Sequence[str]) -> UsageError:
    """Say what is wrong with a command line in words of our own, where another command would take it."""
    if isinstance(error, UnknownOptionError) and tokens[0] == "multi-run":
        given = (error.token.keyword or "").strip("[]")
        option = given.removeprefix("--").removeprefix("no-").replace("-", "_")
        if option in ONLY_OF_TRAIN:
            return UsageError(f"unknown option: `{given}`", hint=ONLY_OF_TRAIN[option])
    known = [name for name in tokens[:1] if name in COMMANDS]
    return UsageError(str(error).splitlines()[0], hint=" ".join(["backprop", *known, "--help"]))


def _refuse_variables(tokens: Sequence[str]) -> None:
    """Refuse variables of options that only `train` has: a gate that is set must never be passed by in silence.

    Raises:
        UsageError: Naming the variable.
    """
    for option, instead in ONLY_OF_TRAIN.items() if tokens[:1] == ["multi-run"] else ():
        variable = f"BACKPROP_{option.upper()}"
        if os.environ.get(variable):
            raise UsageError(f"unknown option: `{variable}`", hint=f"{instead}; unset {variable}")


@cache
def _register_completion() -> None:
    """Add `--install-completion`, whose import is a tenth of the time that the other commands start in."""
    app.register_install_completion_command()


def _refuse(error: UsageError, tokens: Sequence[str], as_json: bool) -> int:
    """Tell of a command that cannot be, also in the JUnit file that it asked for."""
    file = _option_of(tokens, "--junit")
    if file is not None:
        with contextlib.suppress(UsageError):
            check_writable(Path(file))
            failed = Failed(code=error.code, message=error.message, hint=error.hint or "")
            _hand_over([failed], Voice(junit=Path(file), json=as_json), seconds=0.0)
    return _usage(error.message, error.hint or "", as_json)


def _option_of(tokens: Sequence[str], name: str) -> str | None:
    """Find the value of an option without parsing the rest."""
    value = next((tokens[i + 1] for i, token in enumerate(tokens[:-1]) if token == name), None)
    return next((token.removeprefix(f"{name}=") for token in tokens if token.startswith(f"{name}=")), value)


def _usage(message: str, hint: str, as_json: bool, *, code: int = UsageError.code) -> int:
    _tell(Failed(code=code, message=without_escapes(message), hint=hint), as_json)
    return code


def _tell(failed: Failed, as_json: bool) -> None:
    if as_json:
        from backprop.edges.rundir import json_lines

        until_closed(json_lines(_stdout()))(failed)
    Console()(failed)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        _annotate(failed)


def _yaml_of(tokens: Sequence[str]) -> list[Any]:
    """Find `--config FILE` and read it.

    Raises:
        UsageError: If the file is missing or not YAML.
    """
    path = _option_of(tokens, "--config") or os.environ.get("BACKPROP_CONFIG")
    if path is None:
        return []
    import yaml
    from cyclopts.config import Dict

    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"`{path}` cannot be read: {error.strerror}", hint="check the path of `--config`") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(
            f"`{path}` is not YAML: {' '.join(str(error).split())}", hint="write `option: value`"
        ) from error
    if not isinstance(options, dict):
        raise UsageError(f"`{path}` holds no options", hint="write `option: value`, one on each line")
    return [Dict(options, source=path, use_commands_as_keys=False)]
