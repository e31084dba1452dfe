"""The command line: three faces of an option, exit codes, and every kind of bad input."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import chat

from backprop import Trainer
from backprop.__main__ import PAGES, prepared_page, uncoloured
from backprop.cli import COMMANDS, run
from backprop.config import ONLY_OF_TRAIN, DoctorConfig, ExportConfig, MultiRunConfig, TrainConfig
from backprop.errors import UsageError

pytestmark = pytest.mark.model  # for its time: nothing here needs torch

GOOD = [chat("hi", "ho")]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fails(capsys: pytest.CaptureFixture[str], *tokens: str | Path) -> tuple[int, str]:
    """Run, and give the exit code and what stderr says; stdout stays empty."""
    code = run([str(token) for token in tokens])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "\n\nhint: " in captured.err
    return code, captured.err


def left_behind(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# The list of options is part of the product: to change it, change docs and CHANGELOG too.
OPTIONS = {
    TrainConfig: "data eval_data eval_fraction column loss_on max_length allow_truncation packing model trust_remote_code steps epochs batch_size micro_batch recompute offload compile engine fp8_backward "
    "learning_rate scheduler warmup objective beta weight_decay optimizer eval_steps early_stopping on_divergence seed deterministic method dequantize lora_r lora_alpha rslora pissa lora_plus lora_dropout target_modules output "
    "overwrite dry_run rehearse resume save_steps keep_checkpoints max_minutes gpu_max_temp price_per_hour power_note skip_proofs from_run gate gate_data offline report_to",
    MultiRunConfig: "runs samples merge_mode init replay schedule general_eval max_forgetting",
    ExportConfig: "format quantization budget imatrix split_size question ollama ollama_name ollama_url system verify output overwrite max_minutes offline trust_remote_code",
    DoctorConfig: "model data min_vram",
}


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_the_list_of_options_is_frozen(kind: type) -> None:
    assert [field.name for field in fields(kind)] == OPTIONS[kind].split()


# What multi-run cannot do, which its help must not offer.
TRAIN_ALONE = {
    "objective": "dpo",
    "beta": "0.2",
    "pissa": None,
    "from_run": "run",
    "gate": "eval_loss<1",
    "gate_data": "old.jsonl",
}


def test_the_help_of_multi_run_lists_what_it_can_do() -> None:
    page = uncoloured((PAGES / "multi-run.txt").read_text())
    flags = {
        field.name: f"--{field.name.replace('_', '-')} "
        for kind in (TrainConfig, MultiRunConfig)
        for field in fields(kind)
    }
    listed = {name for name, flag in flags.items() if re.search(rf"{flag}", page)}
    assert listed == flags.keys() - TRAIN_ALONE.keys()


@pytest.mark.parametrize("option", TRAIN_ALONE)
@pytest.mark.parametrize("face", ["flag", "YAML", "variable", "Python"])
def test_multi_run_refuses_what_it_cannot_do_with_what_to_do_instead(
    option: str,
    face: str,
    capsys: pytest.CaptureFixture[str],
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value, tokens = TRAIN_ALONE[option], ["multi-run", "--data", "no-such-file"]
    instead = ONLY_OF_TRAIN[option]
    if face == "Python":
        given = {"beta": 0.2, "pissa": True}.get(option, value)
        data = () if option == "from_run" else "no-such-file"
        with pytest.raises(UsageError) as caught:
            Trainer("tiny").multi_run(data, **{option: given})
        assert caught.value.hint == instead
        return
    if face == "variable":
        monkeypatch.setenv(f"BACKPROP_{option.upper()}", value or "true")
    elif face == "YAML":
        tokens += ["--config", str(write(f"{option}: {json.dumps(value or True)}", "o.yaml"))]
    else:
        tokens += [f"--{option.replace('_', '-')}", *([value] if value else [])]
    code, error = fails(capsys, *tokens)
    assert code == 2
    assert error.startswith("error: unknown option: `")
    assert instead in error


def test_a_slip_of_the_keyboard_is_still_answered_with_the_nearest_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--eval-fraction" in fails(capsys, "multi-run", "--data", "x", "--eval-fractoin", "0.1")[1]


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["train"], "no data is given"),
        (["train", "--data"], "--data"),
        (["trian"], "trian"),
        (["train", "--data", "x", "--stesp", "3"], "--steps"),
        (["train", "--data", "x", "--steps", "many"], "--steps"),
        (["train", "--data", "x", "--steps", "0"], "`--steps` must be at least 1"),
        (["train", "--data", "x", "--steps", "-3"], "`--steps` must be at least 1"),
        (["train", "--data", "x", "--steps", "99999999999"], "`--steps` must be at least 1 and at most"),
        (["train", "--data", "x", "--lr", "0"], "`--learning-rate` must be above 0"),
        (["train", "--data", "x", "--lr", "nan"], "`--learning-rate` must be above 0"),
        (["train", "--data", "x", "--lr", "inf"], "`--learning-rate` must be above 0"),
        (["train", "--data", "x", "--lora-alpha", "inf"], "`--lora-alpha` must be above 0"),
        (["train", "--data", "x", "--eval-fraction", "1.5"], "`--eval-fraction` must be"),
        (["train", "--data", "x", "--method", "magic"], "magic"),
        (["train", "--data", "x", "--steps", "1", "--epochs", "1"], "both `--steps` and `--epochs`"),
        (["train", "--data", "x", "--offload", "--recompute", "0"], "`--offload` is for layers that are recomputed"),
        (["train", "--data", "x", "--dequantize"], "`--dequantize` is for `--method qlora`"),
        (["export", "no-such-run"], "holds no adapter"),
        (["export", "x" * 300], "holds no adapter"),
        (["export", ".", "--quantization", "q99"], "q99"),
        (["doctor", "--min-vram", "-1"], "`--min-vram` must be above 0"),
    ],
)
def test_a_bad_option_is_exit_2_and_named(capsys: pytest.CaptureFixture[str], tokens: list[str], said: str) -> None:
    code, error = fails(capsys, *tokens)
    assert code == 2
    assert said in error


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", "", "empty.jsonl` is empty"),
        ("broken.jsonl", '{"text": "a"}\n{"text"\n', "broken.jsonl, line 2 is not JSON"),
        ("columns.jsonl", [{"foo": 1}], "columns.jsonl, line 1 has unknown columns: `foo`"),
        ("silent.jsonl", [chat("hi")], "none of the 1 rows has an assistant turn"),
        ("types.jsonl", [{"prompt": 1, "completion": "x"}], "line 1 holds a number in `prompt`"),
        ("mixed.jsonl", [*GOOD, {"foo": 1}], "mixed.jsonl, line 2 has unknown columns"),
        ("both.jsonl", [{**GOOD[0], "question": "x", "answer": "y"}], "line 1 has two shapes at once"),
        ("binary.jsonl", b"\x7fELF\x00\x00", "binary.jsonl, line 1 is binary"),
        ("blank.jsonl", "\n\n", "the data holds no rows"),
    ],
)
def test_bad_data_is_exit_3_named_by_row_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    write: Callable[..., Path],
    tmp_path: Path,
    name: str,
    content: object,
    said: str,
) -> None:
    code, error = fails(capsys, "train", "--data", write(content, name))
    assert code == 3
    assert said in error
    assert left_behind(tmp_path) == {name}


def test_a_missing_file_is_exit_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fails(capsys, "train", "--data", "nope.jsonl")[0] == 3
    assert left_behind(tmp_path) == set()


def test_an_output_that_is_a_file_is_exit_9(
    capsys: pytest.CaptureFixture[str], write: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("mine")
    code, error = fails(capsys, "train", "--data", write(GOOD), "--output", "taken")
    assert code == 9
    assert "`taken` is a file" in error
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_output_under_a_file_is_exit_9(
    capsys: pytest.CaptureFixture[str], write: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("mine")
    assert fails(capsys, "train", "--data", write(GOOD), "--output", "taken/run")[0] == 9


def test_a_folder_of_someone_else_is_exit_2_and_untouched(
    capsys: pytest.CaptureFixture[str], write: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    code, error = fails(capsys, "train", "--data", write(GOOD), "--output", "mine")
    assert code == 2
    assert "thesis.tex" in error
    assert left_behind(tmp_path / "mine") == {"thesis.tex"}


def test_with_json_an_error_is_one_line_on_stdout_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--data", "nope.jsonl", "--json"]) == 3
    event = json.loads(capsys.readouterr().out)
    assert (event["event"], event["code"], event["v"]) == ("error", 3, 1)
    assert event["message"] == "no such file: `nope.jsonl`"


def test_a_usage_error_with_json_is_one_line_on_stdout_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["code"] == 2


def given(monkeypatch: pytest.MonkeyPatch, tokens: list[str]) -> TrainConfig:
    """Give the config that `train` would be called with."""
    seen: list[TrainConfig] = []

    def note(config: TrainConfig, **_: object) -> Path:
        seen.append(config)
        return Path()

    monkeypatch.setattr("backprop.verbs.train.train", note)
    assert run(["train", *tokens]) == 0
    return seen[0]


def test_flags_come_before_variables_and_variables_before_the_file(
    monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]
) -> None:
    config = write("data: a.jsonl\nsteps: 1\nmax_length: 100\nbatch_size: 3\n", "run.yaml")
    monkeypatch.setenv("BACKPROP_STEPS", "2")
    monkeypatch.setenv("BACKPROP_MAX_LENGTH", "200")
    made = given(monkeypatch, ["--config", str(config), "--max-length", "300"])
    assert (made.data, made.batch_size, made.steps, made.max_length) == (("a.jsonl",), 3, 2, 300)


def test_every_option_can_be_given_in_the_file(monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]) -> None:
    text = "data: [a.jsonl, b.jsonl]\nlearning_rate: 1e-3\ntarget_modules: [q_proj]\ndry_run: true\noutput: there\n"
    made = given(monkeypatch, ["--config", str(write(text, "run.yaml"))])
    assert made == TrainConfig(
        data=("a.jsonl", "b.jsonl"), learning_rate=1e-3, target_modules=("q_proj",), dry_run=True, output=Path("there")
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: a.jsonl\nstepps: 3\n", "stepps"),
        ("data: [a.jsonl\n", "is not YAML"),
        ("- a\n- b\n", "holds no options"),
        ("data: a.jsonl\nsteps: -1\n", "`--steps` must be at least 1"),
    ],
)
def test_a_bad_config_file_is_exit_2(
    capsys: pytest.CaptureFixture[str], write: Callable[..., Path], text: str, said: str
) -> None:
    code, error = fails(capsys, "train", "--config", write(text, "run.yaml"))
    assert code == 2
    assert said in error


def test_a_missing_config_file_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "train", "--config", "nope.yaml")[0] == 2


def test_an_unknown_command_is_answered_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = fails(capsys, "trian")
    assert code == 2
    assert error.endswith("hint: backprop --help\n")


def test_help_fits_two_screens() -> None:
    lines = {page.stem: page.read_text().count("\n") for page in PAGES.iterdir()}
    assert set(lines) == {"backprop", *COMMANDS}
    assert max(lines.values()) <= 100  # two screens of 50 lines


def test_help_is_drawn_anew_where_no_page_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json", "--help"]) == 0
    assert "--min-vram" in capsys.readouterr().out


@pytest.mark.parametrize(
    "tokens", [["train"], ["trian", "--help"], ["", "-h"], ["train", "--data", "x", "--help"], ["--version"]], ids=str
)
def test_all_else_goes_to_the_command_line(tokens: list[str]) -> None:
    assert prepared_page(tokens) is None


def test_the_terminal_never_gets_the_escape_sequences_of_a_file(
    capsys: pytest.CaptureFixture[str], write: Callable[..., Path]
) -> None:
    _, error = fails(capsys, "train", "--data", write([{"\x1b]0;owned\x07": 1}]))
    assert "\x1b" not in error
    assert "\x07" not in error


@pytest.mark.parametrize("option", [["--ollama-url", "http://x"], ["--system", "Be brief."]], ids=str)
def test_what_is_for_ollama_is_refused_without_it(capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    code, error = fails(capsys, "export", "run", *option)
    assert code == 2
    assert f"`{option[0]}` is for `--ollama`" in error


def test_a_library_that_ends_the_process_by_a_signal_is_named(tmp_path: Path) -> None:
    program = """
import ctypes
from backprop import cli
from backprop.edges import llama_cpp
from backprop.verbs import doctor

def a_call_into_a_library(*_, **__):
    with llama_cpp._quiet():
        ctypes.string_at(0)

doctor.doctor = a_call_into_a_library
cli.main(["doctor"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
    assert "in a_call_into_a_library" in done.stderr
