"""`--budget`: the types that fit are made and measured, and the nearest is kept; on a tiny model, with llama.cpp."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, backprop

from backprop.config import ExportConfig
from backprop.core import fidelity
from backprop.edges import llama_cpp, llama_tools
from backprop.errors import ExportError, UsageError
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
@pytest.mark.long
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


def ranked(done: Done) -> list[str]:
    tried = [event for event in told(done, "tried") if not event["refused"]]
    return [event["quantization"] for event in sorted(tried, key=lambda event: event["mean_kl"])]


def named(output: Path, pattern: str) -> list[str]:
    return sorted(path.name.removeprefix("run-") for path in output.glob(pattern))


@pytest.fixture(scope="module")
def most(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A budget that several types fit."""
    done = exported(run, tmp_path_factory.mktemp("plain") / "files", "-q", "q5_k_m", "--no-verify")
    return f"{(told(done, 'exported')[0]['size_bytes'] + 2**17) / 2**20:.3f}MiB"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be few types, which take less time."""
    monkeypatch.setattr(budget, "MAY_CHOOSE", ("f16", "q6_k", "q5_k_m", "q4_k_m", "q3_k_s"))


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_a_type_that_is_not_proved_gives_way_to_the_next_nearest(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: str
) -> None:
    first, second, *_ = ranked(exported(run, tmp_path / "good", "--budget", most))
    monkeypatch.setitem(fidelity.MOST_KL, first, -1.0)
    done = exported(run, tmp_path / "files", "--budget", most)
    assert done.returncode == 0, done.stderr
    (warned,) = [event["message"] for event in told(done, "warning")]
    assert warned.startswith(f"{first} is not taken: not proved: the {first} file predicts as the 16-bit file")
    assert warned.endswith(f"the next nearest is {second}")
    assert [event["quantization"] for event in told(done, "exported")] == [second]
    assert named(tmp_path / "files", "*.gguf*") == sorted([f"{first}.gguf.rejected", f"{second}.gguf"])
    again = exported(run, tmp_path / "files", "--budget", most)
    assert (again.returncode, told(again, "tried")) == (0, []), "the choice is not remembered"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("few")
def test_where_no_type_is_proved_the_export_fails(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: str
) -> None:
    for kind in budget.MAY_CHOOSE:
        monkeypatch.setitem(fidelity.MOST_KL, kind, fidelity.MOST_KL["f16"] if kind == "f16" else -1.0)
    done = exported(run, tmp_path / "files", "--budget", most)
    assert done.returncode == 7
    (error,) = told(done, "error")
    assert error["message"].startswith(f"of the types tried for `--budget` none is left ({', '.join(ranked(done))})")
    assert named(tmp_path / "files", "*.gguf*") == sorted(f"{kind}.gguf.rejected" for kind in ranked(done))
    assert not told(done, "exported")


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_a_type_that_llama_cpp_refuses_is_told_and_left_out(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: str
) -> None:
    quantize, size_as = llama_cpp.quantize, llama_tools.size_as

    def refusing(source: Path, target: Path, *, quantization: str) -> None:
        if quantization == "q5_k_m":
            target.write_text("half of it")
            raise ExportError("no q5_k_m of this one")
        quantize(source, target, quantization=quantization)

    def refusing_to_tell(kind: str, source: Path, *, imatrix: Path | None = None) -> int:
        if kind == "q4_k_m":
            raise ExportError("no q4_k_m of this one")
        return size_as(kind, source, imatrix=imatrix)

    monkeypatch.setattr(llama_cpp, "quantize", refusing)
    monkeypatch.setattr(llama_tools, "size_as", refusing_to_tell)
    done = exported(run, tmp_path / "files", "--budget", most)
    assert done.returncode == 0, done.stderr
    refused = {event["quantization"]: event["refused"] for event in told(done, "tried") if event["refused"]}
    assert refused == {"q5_k_m": "no q5_k_m of this one", "q4_k_m": "no q4_k_m of this one"}
    assert [event["quantization"] for event in told(done, "exported")] == ranked(done)[:1]


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_a_file_that_comes_out_beyond_the_budget_is_never_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: str
) -> None:
    monkeypatch.setattr(llama_tools, "size_as", lambda kind, source, *, imatrix=None: 2**20)
    done = exported(run, tmp_path / "files", "--budget", most)
    assert done.returncode == 0, done.stderr
    sizes = {event["quantization"]: event["size_bytes"] for event in told(done, "tried")}
    assert max(sizes.values()) > budget.bytes_of(most), "none is beyond it: nothing is tested"
    assert told(done, "exported")[0]["size_bytes"] <= budget.bytes_of(most)
    done = exported(run, tmp_path / "others", "--budget", "4MiB")
    assert done.returncode == 2
    smallest = min(event["size_bytes"] for event in told(done, "tried"))
    assert f"takes {smallest / 2**20:,.2f} MiB" in told(done, "error")[0]["message"]
    assert not list((tmp_path / "others").glob("*.gguf*"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("few")
def test_files_of_the_run_by_other_options_are_no_obstacle_unless_they_are_chosen(
    run: Path, tmp_path: Path, most: str
) -> None:
    old = exported(run, tmp_path, "-q", "q3_k_s", "--question", "What is 9?", "--no-verify")
    assert old.returncode == 0, old.stderr
    before = (tmp_path / "run-q3_k_s.gguf").read_bytes()
    done = exported(run, tmp_path, "--budget", most)
    assert done.returncode == 0, done.stderr
    chosen = told(done, "exported")[0]["quantization"]
    assert (tmp_path / "run-q3_k_s.gguf").read_bytes() == before
    other = exported(run, tmp_path, "--budget", most, "--question", "What is 9?")
    assert other.returncode == 2
    assert f"run-{chosen}.gguf` is there already" in told(other, "error")[0]["message"]
