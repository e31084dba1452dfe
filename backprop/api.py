"""The Python face: the four verbs as methods of a `Trainer`, raising the errors behind the exit codes."""

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from backprop.config import ExportConfig, MultiRunConfig, TrainConfig
from backprop.console import Console
from backprop.edges import stopping, threads
from backprop.errors import UsageError
from backprop.events import Sink


class Trainer:
    """Fine-tune one model in three lines.

    Args:
        model: Preset, hub id or folder. None for the best preset that fits this machine.
        options: Any option of `backprop train`, with underscores; a method's own arguments come before these.

    Every method raises `BackpropError` of the kind that says what can be mended.
    """

    def __init__(self, model: str | Path | None = None, *, say: Sink | None = None, **options: Any) -> None:
        threads.settle()
        self._model = model
        self._options = options
        self._say = say
        self._run: Path | None = None

    def train(self, data: str | Path | Iterable[str | Path] = (), **options: Any) -> Path:
        """Fine-tune on ``data`` and return the run directory. Without data, `from_run` names a run to do again."""
        from backprop.verbs.train import train

        config = self._config(data, options)
        with stopping.armed(end_process=False), Console() as console:
            return self._kept(train(config, say=self._say or console), config)

    def multi_run(
        self,
        dataset: str | Path | Iterable[str | Path],
        *,
        num_runs: int | None = None,
        steps_per_run: int | None = None,
        samples_per_run: int | None = None,
        merge_mode: Any = None,
        **options: Any,
    ) -> Path:
        """Train run after run, merge, and return the run directory; ``options`` are those of `backprop multi-run`."""
        from backprop.verbs.multi_run import multi_run

        if steps_per_run is not None:
            options["steps"] = steps_per_run
        own = {field.name: options.pop(field.name) for field in fields(MultiRunConfig) if field.name in options}
        config = self._config(dataset, options)
        named = {"runs": num_runs, "samples": samples_per_run, "merge_mode": merge_mode}
        runs = _build(MultiRunConfig, {**named, **own})
        with stopping.armed(end_process=False), Console() as console:
            return self._kept(multi_run(config, runs, say=self._say or console), config)

    def export(
        self,
        format: str = "gguf",
        *,
        quantization: str | Iterable[str] = (),
        register_ollama: bool = False,
        model_name: str | None = None,
        **options: Any,
    ) -> list[Path]:
        """Export what was trained and return the files; ``options`` are those of `backprop export`.

        Args:
            register_ollama: Hand the first file to a running Ollama, as `--ollama` does.
            model_name: Its name there.
        """
        from backprop.verbs.export import export

        named = {"ollama": register_ollama, "ollama_name": model_name}
        config = _build(ExportConfig, {"format": format, "quantization": quantization, **named, **options})
        with stopping.armed(end_process=False), Console() as console:
            return export(self._trained(), config, say=self._say or console)

    def save(self, folder: str | Path) -> Path:
        """Copy the adapter to ``folder``, where plain PEFT loads it."""
        import shutil

        from backprop.edges.rundir import whole

        target = Path(folder)
        if target.exists():
            raise UsageError(f"`{target}` is there already", hint="choose another folder")
        source = self._trained() / "lora"
        with whole(target) as beside:
            shutil.copytree(source, beside)
        return target

    def _kept(self, run: Path, config: TrainConfig) -> Path:
        if not config.dry_run:
            self._run = run
        return run

    def _trained(self) -> Path:
        if self._run is None:
            raise UsageError("nothing was trained yet", hint="call `trainer.train(data)` first")
        return self._run

    def _config(self, data: str | Path | Iterable[str | Path], options: dict[str, Any]) -> TrainConfig:
        merged: dict[str, Any] = {"model": self._model, **self._options, **options, "data": data}
        if "lr" in merged:
            merged["learning_rate"] = merged.pop("lr")
        return _build(TrainConfig, merged)


def _build(kind: Any, options: dict[str, Any]) -> Any:
    """Make a config, naming the nearest option for one that does not exist."""
    import difflib

    known = [field.name for field in fields(kind)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"there is no option `{name}`",
                hint=f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}",
            )
    return kind(**{name: _as_declared(kind, name, value) for name, value in options.items()})


def _as_declared(kind: Any, name: str, value: Any) -> Any:
    """Take what Python users write: one value where several may stand, any sequence, text for a path."""
    default = next(field.default for field in fields(kind) if field.name == name)
    if name == "data" or isinstance(default, tuple):
        values = (value,) if isinstance(value, str | Path) else tuple(value)
        return tuple(str(one) if isinstance(one, Path) else one for one in values)
    if name in ("output", "from_run") and isinstance(value, str):
        return Path(value)
    return str(value) if name in ("model", "resume", "imatrix") and isinstance(value, Path) else value
