"""What the user asked: one dataclass per verb.

The dataclass is the flag, the YAML key, the environment variable, the Python argument and the help text. Bounds and
choices are checked here, once, whichever of these a value came through.
"""

import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter

from backprop.errors import UsageError

DATA = Group.create_ordered("Data")
MODEL = Group.create_ordered("Model")
TRAINING = Group.create_ordered("Training")
LORA = Group.create_ordered("LoRA")
RUNS = Group.create_ordered("Runs")
EXPORT = Group.create_ordered("Export")
RUN = Group.create_ordered("Run")

Method = Literal["lora", "qlora", "dora", "full"]
Objective = Literal["sft", "dpo", "orpo", "kto"]
Optimizer = Literal["adamw", "adamw-8bit"]
Engine = Literal["auto", "torch", "unsloth"]
Scheduler = Literal["cosine", "linear", "constant"]
RunSchedule = Literal["constant", "linear", "cosine"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
MergeMode = Literal["slao", "auto", "sequential", "average", "ema", "stack"]
Quantization = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q2_k_s", "iq4_nl", "iq4_xs", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs",
    "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s",
]  # fmt: skip
"""What llama.cpp's quantizer lists, without aliases and types for experts or for models trained in one or two bits."""
WITHOUT_IMATRIX = ("f32", "f16", "bf16", "q8_0")
"""Types that an importance matrix does not change; also those that an adapter alone can have."""
NEEDS_IMATRIX = ("q2_k_s", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")
"""Types of some tensor that llama.cpp does not quantize without one (llama-quant.cpp, `tensor_requires_imatrix`)."""
BUDGET = re.compile(r"[0-9]{1,6}(\.[0-9]{1,3})?[MG]i?B")
SPLIT_SIZE = re.compile(r"[1-9][0-9]{0,5}[MG]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """The open or closed interval a number must lie in."""

    above: float | None = None
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        parts = (("above", self.above), ("at least", self.least), ("at most", self.most))
        return " and ".join(f"{word} {value:,}" for word, value in parts if value is not None)

    def hold(self, value: float) -> bool:
        """Say whether ``value`` is finite and inside."""
        return (
            math.isfinite(value)
            and (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
        )


# The upper bounds are far above any use; they stop a slip of the keyboard from running for years.
Count = Bounds(least=1, most=10_000_000)
Positive = Bounds(above=0)

OUTPUT = Path("output")
"""Where a run goes if nothing else is said."""
ONE_OF_THEM = "leave out one of them"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Options of `train`; `multi-run` uses them for each of its runs."""

    data: Annotated[tuple[str, ...], Parameter(group=DATA, negative="", name=["--data", "-d"], show_default=False)] = ()
    """A .jsonl .json .csv .parquet .txt file (also .gz), a folder, or hub set `owner/name[:split]`. Repeatable."""
    eval_data: Annotated[tuple[str, ...], Parameter(group=DATA, negative="", show_default=False)] = ()
    """Held-out data. Default: a part of `--data`."""
    eval_fraction: Annotated[float | None, Bounds(least=0, most=0.5), Parameter(group=DATA)] = None
    """Share held out. Default: 0.05 from 200 rows on."""
    column: Annotated[tuple[str, ...], Parameter(group=DATA, negative="", show_default=False)] = ()
    """Say which column is what, e.g. `user=frage`."""
    loss_on: Annotated[Literal["assistant", "all"], Parameter(group=DATA)] = "assistant"
    """Which tokens are trained on."""
    max_length: Annotated[int | None, Bounds(least=8, most=10_000_000), Parameter(group=DATA)] = None
    """Tokens per example. Default: all, if the model can."""
    allow_truncation: Annotated[bool, Parameter(group=DATA, negative="", show_default=False)] = False
    """Train even if over 5 % of the tokens are cut."""
    packing: Annotated[bool | None, Parameter(group=DATA)] = None
    """Examples share rows. Default: if the model can."""

    model: Annotated[str | None, Parameter(group=MODEL, name=["--model", "-m"])] = None
    """Preset, hub id or folder. Default: the best that fits."""
    trust_remote_code: Annotated[bool, Parameter(group=MODEL, negative="", show_default=False)] = False
    """Run Python code that the model brings."""

    steps: Annotated[int | None, Count, Parameter(group=TRAINING)] = None
    """Optimizer steps. Default: from `--epochs`."""
    epochs: Annotated[float | None, Bounds(above=0, most=10_000), Parameter(group=TRAINING)] = None
    """Passes over the data. Default: from its size."""
    batch_size: Annotated[int | None, Bounds(least=1, most=65_536), Parameter(group=TRAINING)] = None
    """Examples per step. Default: from the data."""
    micro_batch: Annotated[int | None, Bounds(least=1, most=65_536), Parameter(group=TRAINING)] = None
    """Examples per pass; changes no result."""
    recompute: Annotated[int | None, Bounds(least=0, most=10_000), Parameter(group=TRAINING)] = None
    """Layers computed again. Default: as few as fit."""
    offload: Annotated[bool | None, Parameter(group=TRAINING)] = None
    """Their inputs in main memory. Default: if needed."""
    compile: Annotated[bool | None, Parameter(group=TRAINING)] = None
    """Compile the layers. Default: for long runs."""
    engine: Annotated[Engine, Parameter(group=TRAINING)] = "auto"
    """What computes a step."""
    fp8_backward: Annotated[bool, Parameter(group=TRAINING, negative="", show_default=False)] = False
    """Gradients in 8 bits, if proved."""
    learning_rate: Annotated[
        float | None, Bounds(above=0, most=1), Parameter(group=TRAINING, name=["--learning-rate", "--lr"])
    ] = None
    """Peak rate. Default: from method and width."""
    scheduler: Annotated[Scheduler, Parameter(group=TRAINING)] = "cosine"
    """How the rate falls after the warm-up."""
    warmup: Annotated[float, Bounds(least=0, most=0.5), Parameter(group=TRAINING)] = 0.05
    """Share of steps of rising rate."""
    objective: Annotated[Objective, Parameter(group=TRAINING)] = "sft"
    """Learn from answers, or from preferences."""
    beta: Annotated[float, Bounds(above=0, most=100), Parameter(group=TRAINING)] = 0.1
    """How strict preferences are; see the README."""
    weight_decay: Annotated[float, Bounds(least=0, most=1), Parameter(group=TRAINING)] = 0.0
    """AdamW's weight decay."""
    optimizer: Annotated[Optimizer | None, Parameter(group=TRAINING)] = None
    """Default: what fits."""
    eval_steps: Annotated[int | None, Count, Parameter(group=TRAINING)] = None
    """Steps between evaluations. Default: all, or a twentieth with `--early-stopping`."""
    early_stopping: Annotated[int | None, Count, Parameter(group=TRAINING)] = None
    """Stop after this many evaluations without a better loss; deliver the best adapter."""
    on_divergence: Annotated[Literal["stop", "rollback"], Parameter(group=TRAINING)] = "stop"
    """Or go back and on with half the rate, 3 times."""
    seed: Annotated[int, Bounds(least=0, most=2**32 - 1), Parameter(group=TRAINING)] = 42
    """Of the adapter and the order."""
    deterministic: Annotated[bool, Parameter(group=TRAINING, negative="", show_default=False)] = False
    """The same bits each time on a GPU too; slower."""

    method: Annotated[Method | None, Parameter(group=LORA)] = None
    """`qlora`: base in 4 bits; `dora`: magnitudes too; `full`: every weight. Default: `lora`, or `qlora` where only that fits."""
    dequantize: Annotated[bool | None, Parameter(group=LORA)] = None
    """`qlora` held in 16 bits. Default: if room."""
    lora_r: Annotated[int, Bounds(least=1, most=1024), Parameter(group=LORA)] = 16
    """Rank."""
    lora_alpha: Annotated[float | None, Positive, Parameter(group=LORA)] = None
    """Scale times the rank. Default: twice the rank."""
    rslora: Annotated[bool, Parameter(group=LORA, negative="", show_default=False)] = False
    """Divide alpha by the root of the rank."""
    pissa: Annotated[bool, Parameter(group=LORA, negative="", show_default=False)] = False
    """Start from each weight's largest singular vectors."""
    lora_plus: Annotated[float | None, Bounds(least=1, most=1000), Parameter(group=LORA)] = None
    """LoRA+: how much faster B learns, e.g. 16."""
    lora_dropout: Annotated[float, Bounds(least=0, most=0.9), Parameter(group=LORA)] = 0.0
    """Dropout before the adapter."""
    target_modules: Annotated[tuple[str, ...], Parameter(group=LORA, negative="", show_default=False)] = ()
    """Layers adapted. Default: all linear ones."""

    output: Annotated[Path, Parameter(group=RUN, name=["--output", "-o"])] = OUTPUT
    """The run directory."""
    overwrite: Annotated[bool, Parameter(group=RUN, negative="", show_default=False)] = False
    """Replace another or a finished run in `--output`."""
    dry_run: Annotated[bool, Parameter(group=RUN, negative="", show_default=False)] = False
    """Plan, data ledger, three examples; no training."""
    rehearse: Annotated[bool | None, Parameter(group=RUN)] = None
    """First with a small copy. Default: if long."""
    resume: Annotated[str, Parameter(group=RUN)] = "auto"
    """`never`, or a checkpoint's folder."""
    save_steps: Annotated[int | None, Count, Parameter(group=RUN)] = None
    """Between checkpoints. Default: 5 minutes."""
    keep_checkpoints: Annotated[int, Bounds(least=1, most=1000), Parameter(group=RUN)] = 2
    """Checkpoints that stay."""
    max_minutes: Annotated[float | None, Bounds(above=0, most=525_600), Parameter(group=RUN)] = None
    """Stop in time, saved; run the same again to go on."""
    gpu_max_temp: Annotated[int | None, Bounds(least=30, most=120), Parameter(group=RUN)] = None
    """Pause at so many °C. Default: 5 below its limit."""
    price_per_hour: Annotated[float | None, Bounds(least=0, most=1_000_000), Parameter(group=RUN)] = None
    """Of the machine; the run's cost is reported."""
    power_note: Annotated[str | None, Parameter(group=RUN)] = None
    """What stands beside the energy used."""
    skip_proofs: Annotated[bool, Parameter(group=RUN, negative="", show_default=False)] = False
    """Leave out what takes time; the manifest says so."""
    from_run: Annotated[Path | None, Parameter(group=RUN)] = None
    """Do a finished run again, in another `--output`, and compare."""
    gate: Annotated[tuple[str, ...], Parameter(group=RUN, negative="", show_default=False)] = ()
    """Exit 6 unless it holds, e.g. "eval_loss<1.2"."""
    gate_data: Annotated[tuple[str, ...], Parameter(group=RUN, negative="", show_default=False)] = ()
    """Old tasks: exit 6 if these rows got worse."""
    offline: Annotated[bool, Parameter(group=RUN, negative="", show_default=False)] = False
    """No network at all."""
    report_to: Annotated[tuple[Tracker, ...], Parameter(group=RUN, negative="", show_default=False)] = ()
    """Also write the curves for these trackers."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps is not None and self.epochs is not None:
            raise UsageError("both `--steps` and `--epochs` are given", hint="give one of them")
        if self.lora_plus is not None and self.method == "dora":
            raise UsageError("`--lora-plus` would also quicken DoRA's magnitudes", hint=ONE_OF_THEM)
        refined = (self.lora_plus, self.lora_alpha, self.lora_dropout, self.rslora, self.pissa, self.target_modules)
        if self.method == "full" and any(refined):
            raise UsageError("`--method full` has no adapter to refine", hint="leave out the options of LoRA")
        if self.pissa and self.method in ("qlora", "dora"):
            raise UsageError(f"`--pissa` cannot begin `--method {self.method}`", hint=ONE_OF_THEM)
        if self.fp8_backward and (self.method not in (None, "lora") or self.pissa or self.objective != "sft"):
            raise UsageError("`--fp8-backward` is for plain `--method lora` and `--objective sft`", hint=ONE_OF_THEM)
        if self.dequantize and self.method != "qlora" and self.from_run is None:
            raise UsageError("`--dequantize` is for `--method qlora`", hint="add that, or leave it out")
        if self.engine == "unsloth" and (beyond := beyond_unsloth(self)):
            raise UsageError(f"`--engine unsloth` does not do `{beyond}`", hint=ONE_OF_THEM)
        if self.offload and self.recompute == 0:
            raise UsageError("`--offload` is for layers that are recomputed", hint="leave out `--recompute 0`")
        if self.eval_data and self.eval_fraction is not None:
            raise UsageError("both `--eval-data` and `--eval-fraction` are given", hint="give one of them")
        if self.objective != "sft" and self.loss_on == "all":
            raise UsageError("`--loss-on all` is for `--objective sft`", hint=ONE_OF_THEM)
        if self.from_run is not None and self.data:
            raise UsageError("both `--data` and `--from-run` are given", hint="give one of them")
        if not self.data and self.from_run is None:
            raise UsageError("no data is given", hint="add `--data my.jsonl`")


def beyond_unsloth(config: TrainConfig) -> str:
    """Name the first option that unsloth does not do here, or that was never tried with it; empty if there is none."""
    given = {
        f"--method {config.method}": config.method in ("dora", "full"),
        f"--objective {config.objective}": config.objective != "sft",
        "--deterministic": config.deterministic,
        "--fp8-backward": config.fp8_backward,
        "--pissa": config.pissa,
        "--dequantize": bool(config.dequantize),
        "--lora-dropout": config.lora_dropout > 0,
        "--trust-remote-code": config.trust_remote_code,
    }
    return next((flag for flag, there in given.items() if there), "")


ONLY_OF_TRAIN: Mapping[str, str] = {
    "objective": "multi-run learns from answers only: give preferences to `backprop train`",
    "beta": "multi-run learns from answers only: give preferences to `backprop train`",
    "pissa": "multi-run begins each run from the last: leave it out",
    "from_run": "give the data",
    "gate": "use `--max-forgetting`",
    "gate_data": "use `--general-eval` and `--max-forgetting`",
}
"""Options that `multi-run` does not have, and what to do instead."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class MultiRunConfig:
    """Options of `multi-run` that `train` does not have."""

    runs: Annotated[int | None, Bounds(least=1, most=1000), Parameter(group=RUNS)] = None
    """Default: one per `--data`; with only one, 5 chunks."""
    samples: Annotated[int | None, Count, Parameter(group=RUNS)] = None
    """Rows per run. Default: all rows of the part."""
    merge_mode: Annotated[MergeMode | None, Parameter(group=RUNS)] = None
    """How runs become one adapter. Default: `slao`; on chunks of one data set `sequential`."""
    init: Annotated[Literal["function-preserving", "literal"], Parameter(group=RUNS)] = "function-preserving"
    """How a run starts; `literal` is as SLAO's paper has it."""
    replay: Annotated[float, Bounds(least=0, most=0.9), Parameter(group=RUNS)] = 0.0
    """Share of old rows, of all parts."""
    schedule: Annotated[RunSchedule, Parameter(group=RUNS)] = "constant"
    """How the rate falls from run to run."""
    general_eval: Annotated[tuple[str, ...], Parameter(group=RUNS, negative="", show_default=False)] = ()
    """Rows unlike all `--data`: is anything else lost?"""
    max_forgetting: Annotated[float | None, Bounds(least=0, most=1), Parameter(group=RUNS)] = None
    """Deliver the last merge whose scores fell no more."""

    def __post_init__(self) -> None:
        check_fields(self)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Options of `export`."""

    format: Annotated[Literal["gguf", "safetensors", "lora-gguf"], Parameter(group=EXPORT)] = "gguf"
    """`gguf` for llama.cpp and Ollama, `safetensors` for transformers and vLLM, `lora-gguf` for the adapter alone."""
    quantization: Annotated[
        tuple[Quantization, ...],
        Parameter(group=EXPORT, negative="", name=["--quantization", "-q"], show_default=False),
    ] = ()
    """How GGUF weights are held. Repeatable: several files from one conversion. Default: q4_k_m, of an adapter f16."""
    budget: Annotated[str | None, Parameter(group=EXPORT)] = None
    """Instead: try the types whose file is at most this, e.g. 5GiB, and keep the one nearest to the 16-bit file."""
    imatrix: Annotated[str | None, Parameter(group=EXPORT)] = None
    """Weigh what quantizing may lose: `auto` by the run's own rows, or a file of llama-imatrix."""
    split_size: Annotated[str | None, Parameter(group=EXPORT)] = None
    """Split each GGUF into files of about this size, e.g. 2G or 500M."""
    question: Annotated[str | None, Parameter(group=EXPORT)] = None
    """What the exported model is asked before success is claimed. Default: a short one of the data, held out if any is."""
    ollama: Annotated[bool, Parameter(group=EXPORT, negative="", show_default=False)] = False
    """Register the first file with a running Ollama, and ask it there."""
    ollama_name: Annotated[str | None, Parameter(group=EXPORT)] = None
    """Its name there. Default: the name of the run directory."""
    ollama_url: Annotated[str | None, Parameter(group=EXPORT)] = None
    """Where Ollama listens. Default: `OLLAMA_HOST`, or this machine."""
    system: Annotated[str | None, Parameter(group=EXPORT)] = None
    """System prompt for Ollama. Default: what the chat template adds by itself."""
    verify: Annotated[bool, Parameter(group=EXPORT, negative="--no-verify", show_default=False)] = True
    """Prove that each GGUF is the model that was trained: its tokens, prompts, predictions and answers."""
    output: Annotated[Path | None, Parameter(group=EXPORT, name=["--output", "-o"])] = None
    """Where the files go. Default: `export/` in the run directory."""
    overwrite: Annotated[bool, Parameter(group=EXPORT, negative="", show_default=False)] = False
    """Replace files of the same name."""
    max_minutes: Annotated[float | None, Bounds(above=0, most=525_600), Parameter(group=EXPORT)] = None
    """Stop in time; run the same again to go on: files that are whole stay."""
    offline: Annotated[bool, Parameter(group=EXPORT, negative="", show_default=False)] = False
    """No network at all."""
    trust_remote_code: Annotated[bool, Parameter(group=EXPORT, negative="", show_default=False)] = False
    """Run Python code that the model's repository brings. Never on by itself."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.format == "safetensors" and self.quantization:
            raise UsageError("`--quantization` is for GGUF", hint="leave it out, or leave out `--format safetensors`")
        if self.format != "gguf":
            self._refuse_with_other_formats()
        self._check_imatrix()
        self._check_budget()
        if self.split_size is not None:
            self._check_split_size()
        if (self.ollama_url or self.system is not None) and not (self.ollama or self.ollama_name):
            flag = "--ollama-url" if self.ollama_url else "--system"
            raise UsageError(f"`{flag}` is for `--ollama`", hint="add `--ollama`, or leave it out")

    def _refuse_with_other_formats(self) -> None:
        if self.ollama or self.ollama_name:
            raise UsageError("Ollama takes GGUF of a whole model", hint=f"leave out `--format {self.format}`")
        only = (("--budget", self.budget), ("--imatrix", self.imatrix), ("--split-size", self.split_size))
        for flag, value in only:
            if value is not None:
                raise UsageError(f"`{flag}` is for `--format gguf`", hint=ONE_OF_THEM)
        other = next((kind for kind in self.quantization if kind not in WITHOUT_IMATRIX), None)
        if other is not None:
            raise UsageError(f"an adapter alone cannot be {other}", hint=f"choose one of {', '.join(WITHOUT_IMATRIX)}")

    def _check_imatrix(self) -> None:
        needy = next((kind for kind in self.quantization if kind in NEEDS_IMATRIX), None)
        if needy is not None and self.imatrix is None:
            raise UsageError(f"{needy} needs an importance matrix", hint="add `--imatrix auto`")
        if self.imatrix is not None and self.quantization and set(self.quantization) <= set(WITHOUT_IMATRIX):
            raise UsageError(
                f"`--imatrix` changes nothing in {', '.join(self.quantization)}",
                hint="leave it out, or add a smaller type",
            )
        if self.imatrix not in (None, "auto") and not Path(self.imatrix).is_file():
            raise UsageError(
                f"`--imatrix`: no such file: `{self.imatrix}`", hint="give a file of llama-imatrix, or `auto`"
            )

    def _check_budget(self) -> None:
        if self.budget is None:
            return
        if not BUDGET.fullmatch(self.budget):
            raise UsageError(f"`--budget` is a number and MiB or GiB: {self.budget!r}", hint="e.g. `--budget 5GiB`")
        if self.quantization:
            raise UsageError("`--budget` chooses the quantization itself", hint="leave out `--quantization`")
        if not self.verify:
            raise UsageError("`--budget` measures, which `--no-verify` forbids", hint=ONE_OF_THEM)

    def _check_split_size(self) -> None:
        if not SPLIT_SIZE.fullmatch(self.split_size or ""):
            raise UsageError(
                f"`--split-size` is a number and M or G: {self.split_size!r}", hint="e.g. `--split-size 2G`"
            )
        if self.ollama or self.ollama_name:
            raise UsageError("Ollama takes a GGUF in one file", hint="leave out `--split-size`")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Options of `doctor`."""

    model: Annotated[str | None, Parameter(group=MODEL, name=["--model", "-m"])] = None
    """Say whether this preset, hub id or folder fits this machine."""
    data: Annotated[tuple[str, ...], Parameter(group=DATA, negative="", name=["--data", "-d"], show_default=False)] = ()
    """Judge this data as `train` would, without a model."""
    min_vram: Annotated[float | None, Positive, Parameter(group=RUN)] = None
    """Fail when the largest GPU has less memory than this, in GiB."""

    def __post_init__(self) -> None:
        check_fields(self)


class _Checkable:
    __dataclass_fields__: ClassVar[dict[str, Any]]


def check_fields(config: "_Checkable | Any") -> None:
    """Hold every field to its type, choices and `Bounds`.

    Raises:
        UsageError: Naming the first field that does not fit, as a flag.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        bounds = next((extra for extra in hint.__metadata__ if isinstance(extra, Bounds)), None)
        _check_value(f"--{name.replace('_', '-')}", value, hint.__origin__, bounds)


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls)}


def _check_value(flag: str, value: object, kind: Any, bounds: Bounds | None) -> None:
    if get_origin(kind) in (types.UnionType, Union):
        if value is None:
            return
        kind = next(option for option in get_args(kind) if option is not type(None))
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            raise UsageError(f"`{flag}` takes a tuple of values: {value!r}")
        for item in value:
            _check_value(flag, item, get_args(kind)[0], bounds)
        return
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise UsageError(f"`{flag}` cannot be {value!r}", hint=f"choose one of {', '.join(get_args(kind))}")
        return
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"`{flag}` takes {kind.__name__}: {value!r}")
    if bounds is not None and isinstance(value, int | float) and not bounds.hold(value):
        raise UsageError(f"`{flag}` must be {bounds}: {value}", hint="see the command with `--help`")


def differences(old: dict[str, object], new: dict[str, object]) -> list[str]:
    """Say, key by key, how two configurations differ. One of before an option existed had its default."""
    defaults = {one.name: one.default for kind in (TrainConfig, MultiRunConfig) for one in fields(kind)}
    keys = [*old, *(key for key in new if key not in old and new[key] != defaults.get(key))]
    return [f"{key}: {old.get(key)!r} before, {new.get(key)!r} now" for key in keys if old.get(key) != new.get(key)]
