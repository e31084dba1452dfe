"""The CI examples: they fit the published schemas, name only options that exist, and do what they say with exit codes."""

import os
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_jsonschema import main as check_jsonschema
from click.testing import CliRunner
from conftest import ROOT

from backprop.cli import ENVIRONMENT, app

pytestmark = pytest.mark.model

EXAMPLES = ROOT / "examples" / "ci"
GITHUB, GITLAB = EXAMPLES / "github.yml", EXAMPLES / "gitlab.yml"
SCHEMAS = [
    (GITHUB, ["--builtin-schema", "vendor.github-workflows"]),
    (GITHUB, ["--builtin-schema", "custom.github-workflows-require-timeout"]),
    (GITLAB, ["--builtin-schema", "vendor.gitlab-ci", "--data-transform", "gitlab-ci"]),
]


def fits(path: Path, schema: list[str]) -> bool:
    done = CliRunner().invoke(check_jsonschema, [*schema, str(path)])
    assert done.exit_code in (0, 1), done.output
    return done.exit_code == 0


def github_steps() -> list[dict[str, Any]]:
    return yaml.safe_load(GITHUB.read_text())["jobs"]["finetune"]["steps"]


def gitlab_job() -> dict[str, Any]:
    return yaml.safe_load(GITLAB.read_text())["finetune"]


def scripts(path: Path) -> list[str]:
    if path == GITHUB:
        return [step["run"] for step in github_steps() if "run" in step]
    return ["\n".join(gitlab_job()[part]) for part in ("script", "after_script")]


def commands(path: Path) -> list[list[str]]:
    """Find every `backprop …` in the scripts: its words up to the next operator of the shell."""
    found: list[list[str]] = []
    for script in scripts(path):
        for line in script.replace("\\\n", " ").splitlines():
            if not line.strip().startswith("backprop "):
                continue
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
            ends = [number for number, word in enumerate(words) if set(word) <= set("();<>|&")]
            found.append(words[1 : min([*ends, len(words)])])
    return found


@pytest.mark.parametrize(("path", "schema"), SCHEMAS, ids=["github", "github timeout", "gitlab"])
def test_an_example_fits_the_published_schema(path: Path, schema: list[str]) -> None:
    assert fits(path, schema)


@pytest.mark.parametrize(
    ("path", "schema", "right", "wrong"),
    [
        (*SCHEMAS[0], "runs-on:", "run-on:"),
        (*SCHEMAS[0], "- cron:", "- corn:"),
        (*SCHEMAS[1], "timeout-minutes: 150", "name: x"),
        (*SCHEMAS[2], "tags: [gpu]", "tags: {gpu: 1}"),
        (*SCHEMAS[2], "exit_codes: 75", "exit_codes: many"),
        (*SCHEMAS[2], "stuck_or_timeout_failure", "bad_weather"),
    ],
)
def test_the_schemas_are_not_blind(path: Path, schema: list[str], right: str, wrong: str, tmp_path: Path) -> None:
    text = path.read_text()
    assert right in text
    (tmp_path / path.name).write_text(text.replace(right, wrong))
    assert not fits(tmp_path / path.name, schema)


@pytest.mark.parametrize("path", [GITHUB, GITLAB], ids=lambda path: path.stem)
def test_an_example_checks_trains_and_exports(path: Path) -> None:
    assert [words[0] for words in commands(path)] == ["doctor", "train", "export"]


@pytest.mark.parametrize(
    ("path", "words"),
    [(path, words) for path in (GITHUB, GITLAB) for words in commands(path)],
    ids=lambda value: value.stem if isinstance(value, Path) else value[0],
)
def test_the_command_line_knows_every_option_of_an_example(path: Path, words: list[str]) -> None:
    app.config = (ENVIRONMENT,)  # without the file of an earlier `--config`
    app.parse_args(words, exit_on_error=False, print_error=False)


# Stands for the program: notes what it was asked, and ends as told.
STUB = """#!/bin/sh
echo "$1" >> "$HOME/asked"
echo '{"event":"run_started"}'
[ "$1" = train ] || exit 0
while [ $# -gt 0 ]; do [ "$1" = --output ] && mkdir -p "$2" && echo page > "$2/report.html"; shift; done
exit "$TRAIN_ENDS_WITH"
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay out a runner's home and a workspace, and go there."""
    home, workspace = tmp_path / "home", tmp_path / "workspace"
    for name, text in (("scripts/setup", "#!/bin/sh\n"), (".venv/bin/backprop", STUB)):
        program = home / "backprop" / name
        program.parent.mkdir(parents=True)
        program.write_text(text)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    for name, text in (("data/train.jsonl", "{}\n"), (".github/workflows/finetune.yml", ""), (".gitlab-ci.yml", "")):
        (workspace / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / name).write_text(text)
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HOME", str(home))
    return home


def bash(script: str, **variables: str) -> int:
    # As both systems call it: an error ends the script, also within a pipe.
    argv = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    return subprocess.run(argv, env={**os.environ, **variables}, capture_output=True).returncode


def github_job(runner: Path, code: int) -> tuple[int, str]:
    """Do the steps as GitHub would; give the exit code of the step that failed, and the outputs."""
    variables = {"DATA": "data/train.jsonl", "MODEL": "m", "TRAIN_ENDS_WITH": str(code)}
    files = {name: runner / name for name in ("GITHUB_PATH", "GITHUB_ENV", "GITHUB_OUTPUT")}
    for name, file in files.items():
        file.write_text("")
        variables[name] = str(file)
    for step in github_steps():
        wanted = step.get("if", "")
        if "run" not in step or (wanted and "finished=yes" not in files["GITHUB_OUTPUT"].read_text()):
            continue
        assert wanted in ("", "steps.train.outputs.finished == 'yes'")
        path = ":".join([*files["GITHUB_PATH"].read_text().split(), os.environ["PATH"]])
        added = dict(line.split("=", 1) for line in files["GITHUB_ENV"].read_text().splitlines())
        ended = bash(step["run"], **variables, **added, PATH=path)
        if ended:
            return ended, files["GITHUB_OUTPUT"].read_text()
    return 0, files["GITHUB_OUTPUT"].read_text()


@pytest.mark.parametrize(
    ("code", "ended", "asked"),
    [
        (0, 0, "doctor train export"),
        (75, 0, "doctor train"),
        (6, 6, "doctor train"),
    ],
    ids=["done", "time is up", "a gate is not met"],
)
def test_github_exports_what_is_finished_and_fails_on_what_failed(
    runner: Path, code: int, ended: int, asked: str
) -> None:
    assert github_job(runner, code) == (ended, "finished=yes\n" if code == 0 else "")
    assert (runner / "asked").read_text().split() == asked.split()


@pytest.mark.parametrize(("code", "asked"), [(0, "doctor train export"), (75, "doctor train"), (6, "doctor train")])
def test_gitlab_ends_with_the_code_of_the_training(runner: Path, code: int, asked: str) -> None:
    variables = {"DATA": "data/train.jsonl", "MODEL": "m", "TRAIN_ENDS_WITH": str(code)}
    script, after = scripts(GITLAB)
    assert bash(script, **variables) == code
    assert (runner / "asked").read_text().split() == asked.split()
    assert bash(after, **variables) == 0
    assert Path("report.html").read_text() == "page\n"
    assert gitlab_job()["allow_failure"] == {"exit_codes": 75}


@pytest.mark.parametrize("system", ["github", "gitlab"])
def test_the_same_data_get_the_same_run_directory_and_new_data_a_new_one(runner: Path, system: str) -> None:
    def job() -> set[str]:
        if system == "github":
            github_job(runner, 75)
        else:
            bash(scripts(GITLAB)[0], DATA="data/train.jsonl", MODEL="m", TRAIN_ENDS_WITH="75")
        return {path.name for path in (runner / "backprop-runs").iterdir() if path.is_dir()}

    first = job()
    assert len(first) == 1
    assert job() == first
    Path("data/train.jsonl").write_text('{"text": "new"}\n')
    assert len(job()) == 2
