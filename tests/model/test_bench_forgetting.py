"""scripts/bench-forgetting: each arm is what its name says, seen from what its runs began with, ended with, and delivered."""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.model, pytest.mark.slow]

OWN_ROWS, HELD_OUT_ROWS, STEPS = 9, 24, 2

# By module: A and B.
Factors = Mapping[str, tuple[Any, Any]]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    loader = SourceFileLoader("bench_forgetting", str(ROOT / "scripts" / "bench-forgetting"))
    spec = spec_from_loader("bench_forgetting", loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules["bench_forgetting"] = module  # its dataclasses look themselves up there
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    for one in bench.untrained():
        one.save_pretrained(folder)
    return folder


@dataclass
class Seen:
    """An arm's runs."""

    starts: list[Factors] = field(default_factory=list[Factors])
    ends: list[Factors] = field(default_factory=list[Factors])
    merged: list[Factors] = field(default_factory=list[Factors])
    """After each run, as it is on the disk."""
    delivered: Factors = field(default_factory=dict[str, tuple[Any, Any]])
    trained: list[list[tuple[int, ...]]] = field(default_factory=list[list[tuple[int, ...]]])
    """The tokens of each example of each run."""
    steps: list[int] = field(default_factory=list[int])
    exponents: list[float | None] = field(default_factory=list[float | None])
    figures: Mapping[str, float] = field(default_factory=dict[str, float])
    written: Mapping[str, Any] = field(default_factory=dict[str, Any])


def pairs(state: Mapping[str, Any]) -> Factors:
    return {
        name: (a.double().clone(), state[name.replace("lora_A", "lora_B")].double().clone())
        for name, a in state.items()
        if "lora_A" in name
    }


def read(folder: Path) -> Factors:
    from safetensors.torch import load_file

    return pairs(load_file(folder / "adapter_model.safetensors"))


@pytest.fixture
def seen(
    bench: ModuleType, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> Callable[[str], Seen]:
    """Run an arm on three tasks, through the code that users run, and watch where its runs begin."""
    from backprop.engine import load, loop

    found, fit = Seen(), loop.fit

    def watched(model: Any, tokenizer: Any, examples: Any, **options: Any) -> Any:
        found.starts.append(pairs(load.adapter_state(model)))
        found.trained.append([one.ids for one in examples])
        return fit(model, tokenizer, examples, **options)

    def seen(name: str) -> Seen:
        monkeypatch.setattr(bench, "TRAIN_ROWS", OWN_ROWS)
        monkeypatch.setattr(bench, "EVAL_ROWS", HELD_OUT_ROWS)
        monkeypatch.setattr(bench, "pretrained", lambda: model)
        monkeypatch.setattr(loop, "fit", watched)
        course = bench.symbol_tasks("unrelated", 0, False, tmp_path)
        settings = {"steps": STEPS, "batch_size": 4, "lora_r": 4, "learning_rate": 1e-2}
        course = dataclasses.replace(course, data=course.data[:3], held_out=course.held_out[:3], settings=settings)
        found.figures = bench.run(bench.arms()[name], course, tmp_path / "run")
        folders = sorted((tmp_path / "run" / "runs").iterdir())
        found.ends = [read(one / "lora") for one in folders]
        found.merged = [read(one / "merged") for one in folders]
        found.delivered = read(tmp_path / "run" / "lora")
        found.steps = [json.loads((one / "metrics.json").read_text())["steps"] for one in folders]
        events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
        found.exponents = [event["exponent"] for event in events if event["event"] == "merged"]
        found.written = json.loads((tmp_path / "run" / "forgetting.json").read_text())
        return found

    return seen


def alike(one: Factors, other: Factors) -> bool:
    return all(
        a.allclose(other[name][0], atol=1e-6, rtol=0) and b.allclose(other[name][1], atol=1e-6, rtol=0)
        for name, (a, b) in one.items()
    )


def changes(factors: Factors) -> dict[str, Any]:
    return {name: b @ a for name, (a, b) in factors.items()}


def basis(a: Any) -> tuple[Any, Any]:
    """Give Q^T and R of A^T = Q R with diag R >= 0."""
    import torch

    q, upper = torch.linalg.qr(a.T)
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return (q * sign).T, upper * sign[:, None]


def starts_of(end: Factors, merged: Factors) -> dict[str, Factors]:
    """Give what the next run could begin with."""
    return {
        "the last run": end,
        "the merge": merged,
        "orthogonal": {name: (basis(a)[0], b) for name, (a, b) in end.items()},
        "orthogonal, the same function": {name: (basis(a)[0], b @ basis(a)[1].T) for name, (a, b) in end.items()},
    }


def starts(found: Seen) -> set[str]:
    """Name what all runs but the first began with."""
    possible = [
        {name for name, start in starts_of(end, merged).items() if alike(start, begun)}
        | ({"nothing"} if not any(b.any() for _, b in begun.values()) else set())
        for begun, end, merged in zip(found.starts[1:], found.ends, found.merged, strict=False)
    ]
    return set.intersection(*possible)


def folded(
    ends: Sequence[Factors], share_a: Callable[[int], float], share_b: Callable[[int], float], carry: bool
) -> Factors:
    merged, before = ends[0], ends[0]
    for number, end in enumerate(ends[1:], start=2):
        following: dict[str, tuple[Any, Any]] = {}
        for name, (a, b) in end.items():
            upper = basis(before[name][0])[1]
            old_a, old_b = merged[name]
            if carry:
                old_a, old_b = upper.T.inverse() @ old_a, old_b @ upper.T
            w_a, w_b = share_a(number), share_b(number)
            following[name] = (old_a + w_a * (a - old_a), old_b + w_b * (b - old_b))
        merged, before = following, end
    return merged


def stacked(ends: Sequence[Factors]) -> dict[str, Any]:
    """Give the running mean of the weight changes, cut to the rank after each run."""
    import torch

    merged = changes(ends[0])
    for number, end in enumerate(ends[1:], start=2):
        for name, change in changes(end).items():
            u, sizes, v = torch.linalg.svd(merged[name] + (change - merged[name]) / number)
            r = len(end[name][0])
            merged[name] = u[:, :r] * sizes[:r] @ v[:r]
    return merged


def merges(found: Seen, shrinkage: float) -> set[str]:
    """Name what was delivered."""

    def whole(number: int) -> float:
        return 1.0

    def mean(number: int) -> float:
        return 1 / number

    ways: Iterator[tuple[str, Callable[[int], float], Callable[[int], float]]] = iter(
        [
            *((f"share {p:g}", whole, lambda number, p=p: number**-p) for p in (0.25, 0.5, 0.75, 1.0)),
            ("mean of both", mean, mean),
            ("half", whole, lambda number: 0.5),
        ]
    )
    possible = {
        f"{name}{', carried' if carry else ''}": folded(found.ends, *shares, carry)
        for (name, *shares), carry in itertools.product(ways, (False, True))
    }
    possible["last run"] = found.ends[-1]
    possible["last run, shrunk"] = {name: (a, shrinkage * b) for name, (a, b) in found.ends[-1].items()}
    names = {name for name, one in possible.items() if alike(one, found.delivered)}
    delivered = changes(found.delivered)
    mean_change = stacked(found.ends)
    close = all(one.allclose(delivered[name], atol=1e-6, rtol=0) for name, one in mean_change.items())
    return names | ({"mean change"} if close else set())


SAME, OWN, PAPERS = "the last run", "orthogonal, the same function", "orthogonal"


@pytest.mark.parametrize(
    ("name", "start", "merge"),
    [
        ("sequential", SAME, "last run"),
        pytest.param("orthogonal start only", PAPERS, "last run", marks=pytest.mark.long),
        ("SLAO, literal", PAPERS, "share 0.5"),
        ("SLAO", OWN, "share 0.5, carried"),
        pytest.param("SLAO, bases mixed", OWN, "share 0.5", marks=pytest.mark.long),
        pytest.param("merge without orthogonal start", SAME, "share 0.5", marks=pytest.mark.long),
        pytest.param("start from the merge", "the merge", "share 0.5", marks=pytest.mark.long),
        ("auto", OWN, "chosen"),
        pytest.param("average", OWN, "mean of both, carried", marks=pytest.mark.long),
        pytest.param("ema", OWN, "half, carried", marks=pytest.mark.long),
        ("stack", OWN, "mean change"),
        pytest.param("independent, stack", "nothing", "mean change", marks=pytest.mark.long),
        pytest.param("shrunk sequential", SAME, "last run, shrunk", marks=pytest.mark.long),
        pytest.param("10 % replay", SAME, "last run", marks=pytest.mark.long),
        pytest.param("SLAO, 10 % replay", OWN, "share 0.5, carried", marks=pytest.mark.long),
        pytest.param("auto, 10 % replay", OWN, "chosen", marks=pytest.mark.long),
    ],
)
def test_an_arm_is_what_its_name_says(
    bench: ModuleType, seen: Callable[[str], Seen], name: str, start: str, merge: str
) -> None:
    found = seen(name)
    # Where nothing is merged, the last run is the merge.
    assert starts(found) - ({"the merge"} if merge == "last run" else set()) == {start}
    if merge == "chosen":
        exponent = found.exponents[-1]
        assert exponent is not None
        merge = f"share {exponent:g}, carried" if exponent else "last run"
    else:
        assert found.exponents == [None] * 3
    assert merges(found, bench.SHRINKAGE) == {merge}
    if merge == "last run":
        assert all(
            a.equal(found.ends[-1][one][0]) and b.equal(found.ends[-1][one][1])
            for one, (a, b) in found.delivered.items()
        ), "bit for bit"
    old = [rows[OWN_ROWS:] for rows in found.trained]
    assert [len(rows) for rows in old] == ([0, 1, 1] if "replay" in name else [0, 0, 0])
    for number, rows in enumerate(old):
        assert {*rows} <= {one for earlier in found.trained[:number] for one in earlier[:OWN_ROWS]}
    assert found.steps == [STEPS] * 3
    assert found.figures["AP"] == pytest.approx(sum(found.written["score"][-1]) / 3)
    assert found.figures["BWT"] == found.written["measures"][-1]["backward_transfer"]
    assert found.figures["general"] == pytest.approx(
        found.written["general_loss"][-1] - found.written["general_loss_before"]
    )


def test_joint_trains_on_all_at_once_for_as_many_steps(seen: Callable[[str], Seen]) -> None:
    joint = seen("joint")
    (rows,) = joint.trained
    assert len(rows) == 3 * OWN_ROWS
    assert len({row[:2] for row in rows}) == 3, "of three tasks, by their tags"
    assert joint.steps == [3 * STEPS]
    assert merges(joint, 1.0) >= {"last run"}
    assert joint.figures["AP"] == pytest.approx(joint.written["score"][0][0])


def test_the_shrunk_arm_is_as_large_as_six_merges_of_slao(bench: ModuleType) -> None:
    shares = [number**-0.5 for number in range(1, 7)]
    kept = [1 - math.prod(1 - share for share in shares[number:]) for number in range(6)]  # of each run's change
    shrinkage: float = bench.SHRINKAGE
    assert shrinkage == pytest.approx(sum(kept) / 6, abs=5e-4)


def test_all_arms_are_tested(bench: ModuleType) -> None:
    (table,) = (mark for mark in test_an_arm_is_what_its_name_says.pytestmark if mark.name == "parametrize")
    rows = [getattr(row, "values", row) for row in table.args[1]]  # a row with a mark is an object
    assert [row[0] for row in rows] + ["joint"] == list(bench.arms())
