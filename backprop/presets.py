"""Named models: short names for what users mean, with their rough needs of memory."""

from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A model under a short name.

    ``lora_gib`` and ``qlora_gib`` are rough needs of GPU memory at 2048 tokens: weights (2 bytes, or 4.127 bits a
    weight, arXiv:2305.14314 sec. 3, with embeddings in 16 bits) plus about 1.5 GiB and a quarter for the rest.
    """

    name: str
    hub_id: str
    parameters: int
    num_linear: int
    """Weights in linear layers, the part that 4-bit shrinks."""

    @property
    def lora_gib(self) -> float:
        """GPU memory for LoRA on 16-bit weights, GiB."""
        return 1.5 + 1.25 * self.parameters * 2 / GIB

    @property
    def qlora_gib(self) -> float:
        """GPU memory for LoRA on 4-bit weights, GiB."""
        rest = self.parameters - self.num_linear
        return 1.5 + 1.25 * (self.num_linear * 4.127 / 8 + rest * 2) / GIB


def _preset(name: str, hub_id: str, parameters: float, linear: float) -> Preset:
    return Preset(name=name, hub_id=hub_id, parameters=int(parameters * 1e9), num_linear=int(linear * 1e9))


DEMO = _preset("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 0.1345, 0.1062)

# Parameter counts from the model cards; linear weights from each model's config (hidden, intermediate, layers, heads).
# Ordered from small to large.
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        DEMO,
        _preset("qwen3-0.6b", "Qwen/Qwen3-0.6B", 0.596, 0.440),
        _preset("gemma-3-1b", "google/gemma-3-1b-it", 1.0, 0.698),
        _preset("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", 1.236, 0.973),
        _preset("qwen3-1.7b", "Qwen/Qwen3-1.7B", 1.721, 1.409),
        _preset("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", 3.086, 2.774),
        _preset("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", 3.075, 2.812),
        _preset("llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", 3.213, 2.819),
        _preset("qwen3-4b", "Qwen/Qwen3-4B-Instruct-2507", 4.022, 3.633),
        _preset("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", 7.248, 6.979),
        _preset("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", 7.616, 6.526),
        _preset("qwen3-8b", "Qwen/Qwen3-8B", 8.191, 6.946),
    )
}

# What `--model` means when it is left out: the largest of these that fits. Open licences only, since a gated
# model would fail for a newcomer.
DEFAULTS: tuple[str, ...] = ("smollm2-135m", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b")
