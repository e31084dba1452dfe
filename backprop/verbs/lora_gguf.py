"""The adapter alone as GGUF, held to the model that was trained while it is applied to its base model in llama.cpp."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backprop.config import ExportConfig
from backprop.edges import llama_cpp, rundir
from backprop.errors import ExportError
from backprop.events import Phase, Sink, Warned
from backprop.verbs.card import write_card
from backprop.verbs.gguf import forget_rejected, lay_out
from backprop.verbs.records import answered, record
from backprop.verbs.source import Adapter
from backprop.verbs.verify import REJECTED, refuse_foreign, verifier_for

WEIGHTS = "adapter_model.safetensors"


def export_lora_gguf(adapter: Adapter, targets: Mapping[str, Path], config: ExportConfig, say: Sink) -> None:
    """Write the adapter in each type of ``targets``, whose keys are `lora-f16` and so on.

    Raises:
        ExportError: If it is no plain LoRA adapter, is not what was trained, or gives no answer.
    """
    from backprop.engine import loop

    loop.quieten(data=False)
    settings = _settings(adapter.folder)
    forget_rejected(adapter)
    if adapter.four_bit_dtype:
        told = "the adapter was trained on weights of 4 bits, and is proved on the 16-bit original: on the former it is nearer"
        say(Warned(message=told))
    with rundir.scratch(adapter.output) as scratch:
        say(Phase(name="converting the base model to GGUF, to apply the adapter to"))
        base, plain = scratch / "base.gguf", scratch / "adapter"
        inputs = lay_out(adapter, scratch, config, say, merged=False)
        with llama_cpp.converting(inputs.folder, base, kind="f16") as finish:
            if not config.verify:
                refuse_foreign(adapter, config)
            verifier = verifier_for(adapter, inputs.tokenizer, targets, config, say)
            finish()
        _write_plain(adapter, settings, plain)
        for kind, target in targets.items():
            say(Phase(name=f"writing {kind}"))
            rejected = target.with_name(target.name + REJECTED)
            with rundir.whole(target) as beside:
                llama_cpp.convert_adapter(plain, inputs.folder, beside, kind=kind.removeprefix("lora-"))
                if verifier:
                    verifier.check_adapter(kind, base, beside, rejected)
                with llama_cpp.loaded(base, adapter=beside) as model:
                    reply = model.reply([{"role": "user", "content": adapter.question}])
                held = kind.removeprefix("lora-")
                told = answered(adapter, reply.text, target, beside, rejected, format="lora-gguf", quantization=held)
                record(adapter, target, beside, told, config)
            say(told)


def _settings(folder: Path) -> dict[str, Any]:
    """Read what PEFT wrote of the adapter.

    Raises:
        ExportError: If llama.cpp's adapters have no place for a part of it.
    """
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("use_dora"):
        raise ExportError(
            "llama.cpp's adapters have no place for DoRA's magnitudes", hint="leave out `--format lora-gguf`"
        )
    if settings.get("modules_to_save"):
        raise ExportError(
            "llama.cpp's adapters have no place for layers that were trained whole",
            hint="leave out `--format lora-gguf`",
        )
    several = [name for name in ("rank_pattern", "alpha_pattern") if settings.get(name)]
    if several:
        raise ExportError(
            f"the layers of this adapter differ in strength (`{several[0]}`), and llama.cpp's adapters have one for all",
            hint="leave out `--format lora-gguf`",
        )
    return settings


def _write_plain(adapter: Adapter, settings: Mapping[str, Any], folder: Path) -> None:
    """Put the adapter into ``folder``, with its model card, and scaled as llama.cpp scales: by alpha over rank."""
    folder.mkdir()
    (folder / WEIGHTS).symlink_to((adapter.folder / WEIGHTS).resolve())
    write_card(adapter, folder, name=adapter.name)
    alpha = settings["lora_alpha"] * (math.sqrt(settings["r"]) if settings.get("use_rslora") else 1)
    plain = {**settings, "use_rslora": False, "lora_alpha": alpha}
    (folder / "adapter_config.json").write_text(json.dumps(plain), encoding="utf-8")
