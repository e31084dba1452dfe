"""Names of models and data sets, where nothing can be reached."""

from pathlib import Path

import pytest

from backprop.cli import run
from backprop.edges import hub
from backprop.errors import DataError, ModelError

pytestmark = pytest.mark.model


def test_the_demo_preset_comes_from_the_hub_where_the_package_is_absent(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("backprop.edges.demo_model.packaged_gguf", lambda: None)
    monkeypatch.setattr(hub, "fetch_model", lambda hub_id, *, offline: asked.append(hub_id) or str(tiny_model))
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
