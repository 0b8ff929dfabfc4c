"""What is remembered of data and holes: only what was learnt, and never a hole where something was written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from volfs import known_extents
from volfs.backends.base import Extent
from volfs.known_extents import KnownExtents, Writing

SIZE = 60
UNKNOWN = None

RANGES = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
    lambda it: (it[0], min(it[1], SIZE - it[0]))
)


@st.composite
def answers(draw: st.DrawFn) -> list[Extent]:
    """What a backend may say of a range: in order, without gaps, two of a kind side by side as well."""
    offset, length = draw(RANGES)
    end = offset + length
    extents = []
    while offset < end and len(extents) < 6:
        length = draw(st.integers(1, end - offset))
        extents.append(Extent(offset, length, draw(st.booleans())))
        offset += length
    return extents


def ends(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(offset, offset + length) for offset, length in ranges]


STEPS = st.one_of(
    st.tuples(st.just("learn"), answers(), st.lists(RANGES, max_size=2)),
    st.tuples(st.just("forget"), RANGES, st.none()),
    st.tuples(st.just("written"), RANGES, st.none()),
    st.tuples(st.just("clear"), st.none(), st.none()),
)


class Bytes:
    """The model: of each byte, whether it is data, or UNKNOWN."""

    def __init__(self) -> None:
        self.known: list[bool | None] = [UNKNOWN] * SIZE

    def set(self, offset: int, length: int, value: bool | None) -> None:
        self.known[offset : offset + length] = [value] * length

    def check(self, found: KnownExtents, *, complete: bool = True) -> None:
        """All that is said is so. With `complete`, all that was learnt is said, and a run goes on as far as it may."""
        for offset in range(SIZE):
            extent = found.at(offset)
            if extent is None:
                assert not complete or self.known[offset] is UNKNOWN, f"byte {offset} is not remembered"
                continue
            assert extent.offset == offset
            assert offset < extent.end <= SIZE
            assert set(self.known[offset : extent.end]) == {extent.data}, f"{extent}: {self.known}"
        assert found.at(SIZE) is None


@given(steps=st.lists(STEPS, max_size=30))
def test_what_is_remembered_is_what_was_learnt_and_not_changed_since(
    steps: list[tuple[str, object, object]],
) -> None:
    found, model = KnownExtents(), Bytes()
    for step in steps:
        match step:
            case "learn", list(extents), list(spoilt):
                found.learn(extents, ends(spoilt))
                for extent in extents:
                    model.set(extent.offset, extent.length, extent.data)
                for offset, length in spoilt:
                    model.set(offset, length, UNKNOWN)
            case "forget", (int(offset), int(length)), None:
                found.forget(offset, length)
                model.set(offset, length, UNKNOWN)
            case "written", (int(offset), int(length)), None:
                found.written(offset, length)
                if found.at(offset) is None or not all(model.known[offset : offset + length]):
                    # All or nothing: what was data in part may be forgotten, but a hole must be.
                    model.set(offset, length, UNKNOWN)
            case _:
                found.clear()
                model.known = [UNKNOWN] * SIZE
        model.check(found, complete=step[0] != "written")
        model.known = [known(found, offset) for offset in range(SIZE)]


def known(found: KnownExtents, offset: int) -> bool | None:
    extent = found.at(offset)
    return UNKNOWN if extent is None else extent.data


def test_runs_of_a_kind_that_are_learnt_one_after_the_other_are_one() -> None:
    found = KnownExtents()
    found.learn([Extent(at, 10, data=at >= 30) for at in range(0, 60, 10)])
    assert len(found) == 2
    assert found.at(5) == Extent(5, 25, data=False)
    assert found.at(35) == Extent(35, 25, data=True)


def test_a_write_to_known_data_is_no_news_and_any_other_is_forgotten() -> None:
    found = KnownExtents()
    found.learn([Extent(0, 20, data=True), Extent(20, 20, data=False), Extent(40, 20, data=True)])
    found.written(3, 17)
    assert found.at(0) == Extent(0, 20, data=True)
    found.written(19, 2)
    assert found.at(0) == Extent(0, 19, data=True)
    assert found.at(19) is None
    assert found.at(20) is None
    assert found.at(21) == Extent(21, 19, data=False)


def test_what_is_remembered_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_extents, "MAX_RUNS", 8)
    found = KnownExtents()
    for offset in range(0, 1000, 2):
        found.learn([Extent(offset, 1, data=bool(offset % 4))])
        assert len(found) <= 8
        assert found.at(offset) == Extent(offset, 1, data=bool(offset % 4))


# ---- questions and writes ----------------------------------------------------------------------------------------

FAR = st.tuples(st.integers(0, SIZE // 2), st.just(SIZE // 2))  # any two of them overlap
EVENTS = st.lists(
    st.tuples(st.sampled_from(["ask", "answer", "begin", "end", "at once"]), RANGES | FAR, st.integers(0, 3)),
    min_size=10,
    max_size=40,
)


@given(events=EVENTS)
@settings(max_examples=100)
def test_no_data_is_hidden_however_questions_and_writes_overlap(
    events: list[tuple[str, tuple[int, int], int]],
) -> None:
    """The backend sees a write somewhere between its begin and its end: at its end here, and a question is answered
    as things were when it was asked. Once a write has begun, no byte of it may be told to be a hole.
    """
    data = [False] * SIZE  # in the backend
    written = [False] * SIZE  # begun at the least
    found, writing = KnownExtents(), Writing()
    questions: list[tuple[object, list[tuple[int, int]], list[Extent]]] = []
    writes: list[tuple[int, int, int]] = []
    for event, (offset, length), which in events:
        match event:
            case "ask":
                question = writing.question()
                spoilt = question.__enter__()
                answer = [Extent(at, 1, data[at]) for at in range(offset, offset + length)]
                questions.append((question, spoilt, answer))
            case "answer" if questions:
                question, spoilt, answer = questions.pop(which % len(questions))
                question.__exit__(None, None, None)  # type: ignore[attr-defined]
                found.learn(answer, spoilt)
            case "begin":
                found.written(offset, length)
                writes.append((writing.begin(offset, length), offset, length))
                written[offset : offset + length] = [True] * length
            case "end" if writes:
                number, offset, length = writes.pop(which % len(writes))
                data[offset : offset + length] = [True] * length
                writing.end(number)
            case "at once":
                data[offset : offset + length] = written[offset : offset + length] = [True] * length
                writing.note(offset, length)
                found.written(offset, length)
        for at in range(SIZE):
            hole = known(found, at) is False
            assert not (hole and written[at]), f"after {event}: byte {at} is written, and told to be a hole"


def test_what_no_write_has_touched_is_believed() -> None:
    writing = Writing()
    done = writing.begin(0, 10)
    writing.end(done)
    running = writing.begin(20, 10)
    with writing.question() as first:
        begun = writing.begin(40, 5)
        with writing.question() as second:
            writing.end(begun)
            writing.end(running)
            writing.note(50, 1)
    writing.note(55, 1)
    assert sorted(first) == [(20, 30), (40, 45), (50, 51)]
    assert sorted(second) == [(20, 30), (40, 45), (50, 51)]
    with writing.question() as later:
        pass
    assert later == []


def test_questions_at_once_that_are_spoilt_alike_are_told_apart() -> None:
    writing = Writing()
    with writing.question() as outer:
        with writing.question():
            pass
        writing.note(1, 1)
    assert outer == [(1, 2)]
