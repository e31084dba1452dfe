"""Names of models and data sets, where nothing can be reached."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, urlparse

import httpx
import pytest
from conftest import backprop_process, chat

from backprop.cli import run
from backprop.config import ExportConfig
from backprop.edges import hub
from backprop.errors import BackpropError, DataError, DiskError, ModelError
from backprop.verbs.source import find_adapter

pytestmark = pytest.mark.model

COMMIT, LATER = "0123abcd" * 5, "4567abcd" * 5


def test_the_demo_preset_comes_from_the_hub_where_the_package_is_absent(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("backprop.edges.demo_model.packaged_gguf", lambda: None)
    monkeypatch.setattr(hub, "fetch_model", lambda hub_id, **_: asked.append(hub_id) or str(tiny_model))
    source = hub.find_model("smollm2-135m", offline=False)
    assert (source.name, source.path) == ("smollm2-135m", str(tiny_model))
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


def test_a_model_that_is_neither_here_nor_reachable_says_what_to_do() -> None:
    with pytest.raises(ModelError) as raised:
        hub.find_model("owner/never-fetched", offline=True)
    assert "`owner/never-fetched` is not here" in raised.value.message
    assert "backprop[demo]" in (raised.value.hint or "")


@pytest.mark.parametrize("name", ["qwen3-0.6", "smolm2-135m"])
def test_a_mistyped_preset_is_answered_with_the_nearest(name: str) -> None:
    with pytest.raises(ModelError) as raised:
        hub.find_model(name, offline=True)
    assert "did you mean `--model " in (raised.value.hint or "")


def test_a_data_set_that_cannot_be_reached_is_exit_3(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="`owner/never-fetched`"):
        next(hub.stream_rows("owner/never-fetched", offline=True))
    assert run(["train", "--data", "owner/never-fetched", "--offline"]) == DataError.code
    assert "hint: " in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.slow
def test_an_adapter_names_its_base_as_others_know_it_and_finds_it_again(
    tiny_model: Path, tmp_path: Path, write: Callable[..., Path]
) -> None:
    """A hub's cache as `hf download` leaves it, from which no network is needed; the model has moved on since."""
    home = tmp_path / "home"
    cached = home / "hub" / "models--owner--tiny"
    shutil.copytree(tiny_model, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    data = write([chat(f"What is {n}?", "It is here.") for n in range(6)])
    options = ("--steps", "20", "--batch-size", "4", "--lr", "0.01", "--offline")
    done = backprop_process("train", "--data", data, "--model", "owner/tiny", *options, cwd=tmp_path, HF_HOME=str(home))
    assert done.returncode == 0, done.stderr
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "output" / "lora", copied)
    settings = json.loads((copied / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("owner/tiny", COMMIT)
    moved = cached / "snapshots" / LATER
    shutil.copytree(tiny_model, moved)
    (moved / "model.safetensors").write_bytes(b"not the weights that it was trained on")
    (cached / "refs" / "main").write_text(LATER)
    export = ("export", copied, "-q", "f16", "--no-verify", "--offline")
    done = backprop_process(*export, cwd=tmp_path, HF_HOME=str(home))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(cached / "snapshots" / COMMIT)
    done = backprop_process(*export, "--overwrite", cwd=tmp_path, HF_HOME=str(home))
    assert done.returncode == 4, done.stderr
    assert f"`owner/tiny@{COMMIT}` is not here" in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "owner/na[me",
        "owner/" + "x" * 200,
        "ow ner/name",
        "owner/name@\n",
        "owner/name@../../x",
        "é" * 3000,
        "~nobody/x",
    ],
)
def test_what_no_model_can_be_called_is_exit_4(name: str) -> None:
    with pytest.raises(ModelError):
        hub.find_model(name, offline=True)


@pytest.mark.parametrize("left_out", [["model.safetensors"], ["model-00002-of-00002.safetensors"]], ids=["all", "one"])
def test_a_model_that_was_looked_at_without_its_weights_is_not_whole(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path, left_out: list[str]
) -> None:
    """As `doctor --model` leaves it, which needs none."""
    cached = tmp_path / "models--owner--tiny"
    folder = cached / "snapshots" / "0123abcd"
    shutil.copytree(tiny_model, folder)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub.find_model("owner/tiny", offline=True).path == str(folder)
    if left_out == ["model.safetensors"]:
        (folder / "model.safetensors").unlink()
    else:
        shards = {"a": "model.safetensors", "b": left_out[0]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert hub.find_model("owner/tiny", offline=True, weights=False).path == str(folder)
    with pytest.raises(ModelError, match="is here without all of its weights"):
        hub.find_model("owner/tiny", offline=True)


@pytest.mark.parametrize("taken_away", [False, True], ids=["there", "taken away"])
@pytest.mark.parametrize(
    ("named", "revision", "base"),
    [
        ("owner/tiny", "4567abcd", "owner/tiny@4567abcd"),
        ("owner/tiny", None, "owner/tiny"),
        ("smollm2-135m", "4567abcd", "smollm2-135m"),
        ("{folder}", "4567abcd", "{folder}"),
    ],
)
def test_an_adapter_is_exported_onto_the_revision_that_it_was_trained_on(
    monkeypatch: pytest.MonkeyPatch,
    taught: Callable[[str], Path],
    tmp_path: Path,
    named: str,
    revision: str | None,
    base: str,
    taken_away: bool,
) -> None:
    """Both by itself, and in a run whose model is no longer where it was."""
    run_folder = Path(shutil.copytree(taught("llama-tied"), tmp_path / "run"))
    path = run_folder / "lora" / "adapter_config.json"
    settings = json.loads(path.read_text())
    folder = settings["base_model_name_or_path"]
    settings |= {"base_model_name_or_path": named.format(folder=folder), "revision": revision}
    path.write_text(json.dumps(settings))
    manifest = json.loads((run_folder / "run.json").read_text())
    model = manifest["model"]
    manifest["model"] |= {"name": "owner/tiny", "path": str(tmp_path / "gone") if taken_away else folder}
    (run_folder / "run.json").write_text(json.dumps(manifest))
    asked: list[str] = []

    def find_model(name: str, **_: object) -> hub.ModelSource:
        asked.append(name)
        return hub.ModelSource(name=name, path=folder, sha256=model["sha256"])

    monkeypatch.setattr(hub, "find_model", find_model)
    find_adapter(run_folder, ExportConfig(), say=print)
    shutil.copytree(run_folder / "lora", tmp_path / "alone")
    find_adapter(tmp_path / "alone", ExportConfig(), say=print)
    of_run = (base if "@" in base else "owner/tiny") if taken_away else folder
    assert asked == [of_run, base.format(folder=folder)]


def answered(kind: str) -> Exception:
    """Make what huggingface_hub raises for an answer of the hub."""
    from huggingface_hub import errors

    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/owner/name"))
    return getattr(errors, kind)("no", response=response)


@pytest.mark.parametrize(
    ("error", "kind", "said", "hint"),
    [
        (lambda: answered("GatedRepoError"), ModelError, "its licence must be accepted", "hf auth login"),
        (lambda: answered("RepositoryNotFoundError"), ModelError, "the hub has no model `owner/name`", "hf auth login"),
        (lambda: answered("RevisionNotFoundError"), ModelError, "`owner/name` has no revision `v2`", "commits"),
        (lambda: PermissionError(13, "denied", "/cache/x"), DiskError, "`/cache/x` may not be written", "user"),
        (lambda: httpx.ConnectError("down"), ModelError, "`owner/name@v2` is not here", "go online"),
    ],
    ids=["gated", "absent", "no such revision", "another user's cache", "offline"],
)
def test_what_the_hub_answers_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], kind: type[BackpropError], said: str, hint: str
) -> None:
    def refusing(hub_id: str, **_: object) -> str:
        assert hub_id == "owner/name"
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", refusing)
    with pytest.raises(kind, match=said) as raised:
        hub.find_model("owner/name@v2", offline=False)
    assert hint in (raised.value.hint or "")


def test_rows_of_the_hub_are_streamed_from_the_split_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, bool]] = []

    def load_dataset(name: str, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, split, streaming))
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = list(hub.stream_rows("owner/rows:test", offline=False))
    assert [(row.place, row.value) for row in rows] == [
        ("owner/rows:test, row 1", {"text": "a"}),
        ("owner/rows:test, row 2", {"text": "b"}),
    ]
    list(hub.stream_rows("owner/rows", offline=False))
    assert asked == [("owner/rows", "test", True), ("owner/rows", "train", True)]


def absent() -> Exception:
    from datasets.exceptions import DatasetNotFoundError

    return DatasetNotFoundError("no")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (absent, "the hub has no data set `owner/rows`"),
        (lambda: ConnectionError("down"), "the hub cannot be reached"),
        (lambda: ValueError("Bad split: x"), "`owner/rows:x` cannot be read: Bad split: x"),
    ],
    ids=["absent", "offline", "no such split"],
)
def test_a_data_set_of_the_hub_that_cannot_be_read_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], said: str
) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise error()

    monkeypatch.setattr("datasets.load_dataset", refusing)
    with pytest.raises(DataError, match=re.escape(said)) as raised:
        list(hub.stream_rows("owner/rows:x", offline=False))
    assert raised.value.hint


def test_a_hub_that_breaks_off_is_exit_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """What httpx raises then is no OSError, and ended in a traceback."""
    import datasets
    import httpx

    def broken(*arguments: object, **options: object) -> Iterator[dict[str, object]]:
        yield {"text": "first"}
        raise httpx.RemoteProtocolError("peer closed connection")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    rows = hub.stream_rows("owner/set", offline=False)
    assert next(rows).value == {"text": "first"}
    with pytest.raises(DataError, match="the hub cannot be reached"):
        next(rows)


@contextmanager
def hub_of(files: Mapping[str, bytes]) -> Iterator[tuple[str, list[tuple[str, int]]]]:
    """Serve a data set `owner/set` as the hub does; give the address, and what was sent: files, each with the last byte."""
    sent: list[tuple[str, int]] = []
    listed = [{"type": "file", "oid": "1" * 40, "size": len(content), "path": name} for name, content in files.items()]
    about = {"id": "owner/set", "sha": "0" * 40, "siblings": [{"rfilename": name} for name in files]}

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None: ...

        def answer(self, code: int, content: bytes, **headers: str) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": "0" * 40, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self) -> None:
            path = urlparse(self.path).path
            name = path.partition("/resolve/")[2].partition("/")[2]
            if "/tree/" in path:
                self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
            elif path.startswith("/api/datasets/owner/set"):
                self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
            elif name in files:
                whole = files[name]
                first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
                end = min(int(last or len(whole)) + 1, len(whole))
                if self.command == "GET":
                    sent.append((name, end))
                of = f"bytes {first}-{end - 1}/{len(whole)}"
                self.answer(206, whole[int(first) : end], Content_Range=of, ETag='"it"', Accept_Ranges="bytes")
            else:
                self.answer(404, b"{}", X_Error_Code="EntryNotFound")

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            paths = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
            found = [one for one in listed if one["path"] in paths]
            self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_multi_run_streams_samples_of_a_hub_data_set_without_the_rest(tiny_model: Path, tmp_path: Path) -> None:
    row = json.dumps(chat(f"What is it? {'x' * 900}", "It is here.")).encode() + b"\n"
    shards = dict.fromkeys((f"data/train-{number:05d}-of-00003.jsonl" for number in range(3)), row * 25_000)
    options = ("--model", tiny_model, "--samples", "3", "--dry-run", "--json")
    with hub_of(shards) as (address, sent):
        done = backprop_process(
            *("multi-run", "--data", "owner/set", "--data", "owner/set:train", *options),
            cwd=tmp_path,
            HF_ENDPOINT=address,
            HF_HOME=str(tmp_path / "home"),
            HF_HUB_OFFLINE="0",
            HF_DATASETS_OFFLINE="0",
        )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["rows"] for event in told if event["event"] == "data"] == [3, 3]
    assert {name for name, _ in sent} == {"data/train-00000-of-00003.jsonl"}
    assert max(end for _, end in sent) < len(row) * 20_000, "not all of that either"
    kept = sum(path.stat().st_size for path in (tmp_path / "home").rglob("*") if path.is_file())
    assert kept < len(row) * 100, "nothing of it is kept"
