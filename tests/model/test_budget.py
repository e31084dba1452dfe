"""`--budget`: the types that fit are made and measured, and the nearest is kept; on a tiny model, with llama.cpp."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, backprop

from backprop.config import ExportConfig
from backprop.edges import llama_cpp, llama_tools
from backprop.errors import UsageError
from backprop.verbs import budget

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def run(taught: Callable[[str], Path]) -> Path:
    return taught("llama-tied")


def exported(run: Path, output: Path, *options: str) -> Done:
    return backprop("export", run, "--output", output, "--json", *options, cwd=output.parent)


def told(done: Done, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in done.stdout.splitlines()]
    return [event for event in events if event["event"] == kind]


@pytest.mark.slow
def test_what_fits_is_tried_and_the_nearest_kept_and_not_tried_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = exported(run, tmp_path / "plain", "-q", "f16", "-q", "q5_k_m")
    f16, q5_k_m = (event["size_bytes"] for event in told(plain, "exported"))
    most = (q5_k_m + 2**17) / 2**20
    done = exported(run, tmp_path / "chosen", "--budget", f"{most:.3f}MiB")
    assert done.returncode == 0, done.stderr
    tried = told(done, "tried")
    sizes = [event["size_bytes"] for event in tried]
    assert "q5_k_m" in [event["quantization"] for event in tried]
    assert len(tried) > 3
    assert 0.6 * max(sizes) < min(sizes) <= max(sizes) <= most * 2**20 < f16
    nearest = min(tried, key=lambda event: event["mean_kl"])
    assert len({event["mean_kl"] for event in tried}) > 2, "all are alike: nothing is chosen"
    (file,) = told(done, "exported")
    assert file["quantization"] == nearest["quantization"]
    assert sorted(path.name for path in (tmp_path / "chosen").iterdir()) == [
        "exports.json",
        f"run-{nearest['quantization']}.gguf",
        "verification.json",
    ]
    proved = json.loads((tmp_path / "chosen" / "verification.json").read_text())["proofs"]
    (likeness,) = [proof for proof in proved[nearest["quantization"]] if "predicts as" in proof["name"]]
    assert f"KL {nearest['mean_kl']:.3g} in the mean" in likeness["found"]
    monkeypatch.setattr(llama_cpp, "converting", lambda *_, **__: pytest.fail("it is converted again"))
    again = exported(run, tmp_path / "chosen", "--budget", f"{most:.3f}MiB")
    assert again.returncode == 0, again.stderr
    assert told(again, "exported")[0]["path"] == file["path"]


@pytest.mark.slow
def test_a_budget_that_takes_the_16_bit_file_takes_it(run: Path, tmp_path: Path) -> None:
    done = exported(run, tmp_path / "files", "--budget", "1GiB")
    assert done.returncode == 0, done.stderr
    assert not told(done, "tried")
    assert [event["quantization"] for event in told(done, "exported")] == ["f16"]


def test_a_file_of_another_is_refused_before_any_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run-q5_0.gguf").write_text("mine")
    monkeypatch.setattr(llama_cpp, "converting", lambda *_, **__: pytest.fail("it is converted"))
    done = exported(run, tmp_path, "--budget", "1GiB")
    assert done.returncode == 2
    assert "run-q5_0.gguf` is there already" in told(done, "error")[0]["message"]


def test_a_budget_that_nothing_fits_is_refused_before_any_work(run: Path, tmp_path: Path) -> None:
    done = exported(run, tmp_path / "files", "--budget", "0.001MiB")
    assert done.returncode == 2
    assert "nothing fits a `--budget` of 0.001MiB" in told(done, "error")[0]["message"]
    assert not (tmp_path / "files").exists()


@pytest.mark.slow
def test_a_budget_below_the_smallest_file_names_its_size(run: Path, tmp_path: Path) -> None:
    done = exported(run, tmp_path / "files", "--budget", "2MiB")
    assert done.returncode == 2
    (error,) = told(done, "error")
    assert "MiB" in error["message"]
    assert "takes" in error["message"]
    assert not list((tmp_path / "files").glob("*.gguf*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": "5"}, "a number and MiB or GiB: '5'"),
        ({"budget": "-5GiB"}, "a number and MiB or GiB"),
        ({"budget": "5GiB; rm -rf ."}, "a number and MiB or GiB"),
        ({"budget": "5GiB", "quantization": ("q8_0",)}, "chooses the quantization itself"),
        ({"budget": "5GiB", "verify": False}, "`--no-verify` forbids"),
        ({"budget": "5GiB", "format": "safetensors"}, "`--budget` is for `--format gguf`"),
    ],
)
def test_what_cannot_be_is_refused_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ExportConfig(**options)


@pytest.mark.parametrize(("text", "count"), [("5GiB", 5 * 2**30), ("0.5GB", 5 * 10**8), ("1.5MiB", 3 * 2**19)])
def test_sizes_are_read_as_written(text: str, count: int) -> None:
    assert budget.bytes_of(text) == count


@pytest.mark.slow
def test_an_importance_matrix_changes_sizes_and_none_is_beyond_the_budget(run: Path, tmp_path: Path) -> None:
    plain = exported(run, tmp_path / "plain", "-q", "iq3_m", "--imatrix", "auto")
    most = told(plain, "exported")[0]["size_bytes"] / 2**20 + 0.1
    done = exported(run, tmp_path / "chosen", "--budget", f"{most:.3f}MiB", "--imatrix", "auto")
    assert done.returncode == 0, done.stderr
    tried = told(done, "tried")
    assert {"iq3_m", "iq3_s"} <= {event["quantization"] for event in tried}
    assert max(event["size_bytes"] for event in tried) <= most * 2**20


@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_the_size_of_a_file_is_known_before_it_is_made(tmp_path: Path, kind: str) -> None:
    llama_cpp.quantize_tiny(tmp_path)
    llama_cpp.quantize(tmp_path / "tiny.gguf", tmp_path / "made.gguf", quantization=kind)
    size = (tmp_path / "made.gguf").stat().st_size
    assert size <= llama_tools.size_as(kind, tmp_path / "tiny.gguf") <= size + 2**17
