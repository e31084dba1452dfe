"""What is too large for the memory: kept in a file without a name, and read back as it was."""

import errno
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backprop.core.data.formats import Conversation
from backprop.core.data.render import Example
from backprop.core.data.sequences import Picked, pick
from backprop.edges import device, spill
from backprop.errors import DiskError

words = st.text(max_size=20)
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]), "content": words}, optional={"reasoning_content": words}
    ),
    max_size=4,
).map(tuple)
conversations: Any = st.builds(
    Conversation,
    messages=turns,
    text=words,
    shape=words,
    place=words,
    tools=st.lists(st.dictionaries(words, st.integers() | words | st.none(), max_size=2), max_size=2).map(tuple),
    rejected=turns,
    desirable=st.sampled_from([None, True, False]),
)


@st.composite
def examples(draw: st.DrawFn, depth: int = 0) -> Example:
    pairs = draw(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=9))
    counts, question = draw(st.tuples(st.integers(0, 9), st.integers(0, 9))), draw(words)
    inner: Any = st.none() if depth else st.none() | examples(depth=1)
    return Example(
        tuple(token for token, _ in pairs),
        tuple(on for _, on in pairs),
        *counts,
        question,
        rejected=draw(inner),
        desirable=draw(st.booleans()),
        mismatched=draw(inner),
    )


@settings(max_examples=60)
@given(given_ones=st.lists(conversations, max_size=5), most=st.sampled_from([1, 50, 10_000]))
def test_conversations_come_back_as_they_were(given_ones: list[Conversation], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "IN_MEMORY_BYTES", most)
        kept = spill.conversations()
        for number, one in enumerate(given_ones):
            kept.append(one)
            assert kept[number // 2] == given_ones[number // 2]  # reading between writes moves no end
        assert list(kept) == given_ones


@settings(max_examples=60)
@given(given_ones=st.lists(examples(), max_size=5), most=st.sampled_from([1, 10_000]))
def test_examples_come_back_as_they_were(given_ones: list[Example], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "IN_MEMORY_BYTES", most)
        kept = spill.examples()
        for one in given_ones:
            kept.append(one)
        assert list(kept) == given_ones
        assert list(kept[1:]) == given_ones[1:]
        assert list(kept[-1:]) == given_ones[-1:]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(spill, "IN_MEMORY_BYTES", 100)
    return tmp_path


def test_no_file_has_a_name(home: Path) -> None:
    kept = spill.examples()
    for number in range(100):
        kept.append(Example((number,) * 50, (True,) * 50))
    assert not list((home / "backprop").iterdir())
    assert kept[99].ids == (99,) * 50


def test_a_full_disk_is_exit_9(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = spill.examples()

    class Full:
        def seek(self, position: int) -> None:
            pass

        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept, "_file", Full())
    with pytest.raises(DiskError, match="No space left"):
        kept.append(Example((1,), (True,)))


def test_picking_reads_nothing_before_it_is_asked() -> None:
    class Asked(list[int]):
        reads = 0

        def __getitem__(self, number: Any) -> Any:
            self.reads += 1
            return super().__getitem__(number)

    whole = Asked([10, 11, 12, 13])
    picked = Picked(whole, [3, 1, 2])
    later = picked[1:]
    assert (len(later), whole.reads) == (2, 0)
    assert list(later) == [11, 12]
    assert picked[-1] == 12
    assert pick((10, 11), [1]) == (11,)


def test_a_file_name_that_is_not_utf_8_is_kept() -> None:
    kept = spill.conversations()
    kept.append(Conversation(messages=(), text="a", shape="text", place="caf\udce9.jsonl, line 1"))
    assert kept[0].place == "caf\udce9.jsonl, line 1"


def test_small_data_needs_no_folder_and_large_data_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(spill, "IN_MEMORY_BYTES", 1000)
    kept = spill.examples()
    kept.append(Example((1,), (True,)))
    assert len(kept) == 1
    with pytest.raises(DiskError) as caught:
        kept.append(Example((1,) * 999, (True,) * 999))
    assert "XDG_CACHE_HOME" in str(caught.value.hint)


def test_a_disk_that_is_too_small_for_the_tokens_is_told_before_they_are_made(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "disk_free_bytes", lambda path: 5 * 2**20)
    spill.check_room(100)  # stays in memory
    spill.check_room(5 * 2**20)
    with pytest.raises(DiskError, match=r"about 6 MiB in .* there is room for 5"):
        spill.check_room(6 * 2**20)
