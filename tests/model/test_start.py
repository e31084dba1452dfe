"""Starting the program: what is loaded and when, the prepared pages of help, and what takes a process or a large file to see."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pyarrow
import pytest
from conftest import ROOT
from pyarrow import parquet

from backprop.__main__ import prepared_page, uncoloured
from backprop.cli import run
from backprop.edges import rundir
from backprop.edges.files import read_rows
from backprop.errors import DataError, UsageError
from backprop.schema import schema

pytestmark = pytest.mark.model  # for its time: nothing here needs torch

ROW = {"question": "a", "answer": "b"}
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "numpy",
    "peft",
    "trl",
    "huggingface_hub",
    "gguf",
    "llm",
    "rich.progress",
    "pynvml",
)


def loaded_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import backprop, backprop.edges.demo_model; backprop.Trainer",
        "from backprop.cli import run; run(['--help']); run(['train', '--help']); "
        "assert run(['train', '--data', 'no-such-file.jsonl']) == 3",
    ],
    ids=["import", "help and a typo in the data"],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    loaded = loaded_by(code)
    assert not [name for name in HEAVY if name in loaded]
    assert "backprop.api" in loaded or "backprop.cli" in loaded


@pytest.mark.parametrize("command", [[], ["train"], ["multi-run"], ["export"], ["doctor"]], ids=str)
def test_help_is_shown_from_a_prepared_page_without_loading_the_command_line(command: list[str]) -> None:
    program = "import sys; from backprop.__main__ import main; main(); assert 'cyclopts' not in sys.modules"
    page = prepared_page([*command, "--help"])
    assert page
    shown = subprocess.run([sys.executable, "-c", program, *command, "-h"], capture_output=True, text=True, check=True)
    assert shown.stdout == uncoloured(page.read_text())
    assert "Usage: backprop" in shown.stdout


@pytest.mark.parametrize(("sent", "code", "by"), [("SIGTERM", 75, "SIGTERM"), ("SIGINT", 130, "Ctrl-C")])
def test_a_signal_before_the_command_line_is_loaded_is_told_too(sent: str, code: int, by: str) -> None:
    program = (
        "import os, signal, sys; from backprop import __main__ as start\n"
        "sys.modules['backprop.cli'] = None; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"start._end_at_signals(); os.kill(os.getpid(), signal.{sent})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "train", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr.startswith(f"error: stopped by {by}\n\nhint: ")
    (line,) = done.stdout.splitlines()
    told = json.loads(line)
    jsonschema.validate(told, schema())
    assert (told["event"], told["code"], told["message"]) == ("error", code, f"stopped by {by}")


def test_completion_is_installed_for_the_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["--install-completion", "--shell", "bash"]) == 0
    scripts = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".bashrc"]
    assert any("multi-run" in path.read_text() for path in scripts)


def test_a_hundred_megabytes_on_one_line_are_exit_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    assert run(["train", "--data", str(path), "--output", str(tmp_path / "output")]) == 3
    assert "line 1 is longer than 32 MiB" in capsys.readouterr().err


def test_a_second_process_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from backprop.edges import rundir\n"
        "with rundir.claim(Path(sys.argv[1]), {}, overwrite=False): print('held', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdin
    assert first.stdout
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match="another process is at work"):
        rundir.check(tmp_path / "run", {}, overwrite=False)
    first.kill()
    first.wait()
    rundir.check(tmp_path / "run", {}, overwrite=False)  # a dead process holds no lock


def test_parquet_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW]), path)
    assert [row.value for row in read_rows(str(path))] == [ROW, ROW]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is not a whole parquet file"):
        list(read_rows(str(path)))


def test_the_help_texts_are_those_of_the_program() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "readme", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
