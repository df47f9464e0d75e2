"""Progress: a bar on a terminal, a line every half minute in a log, nothing when quiet."""

from __future__ import annotations

import contextlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hdcache import progress
from hdcache.progress import Progress, counted, duration, size


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_log_gets_a_line_each_half_minute_and_a_last_one(clock: Clock) -> None:
    """1,000 steps of 0.1 s: after 30, 60 and 90 s, with what is left of the time, and at the end."""
    stream = io.StringIO()
    with Progress("extract", 1000, "rows", stream=stream) as bar:
        for _ in range(1000):
            clock.now += 0.1
            bar.advance(1, "2 failed")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert "(30 %)  10.0 rows/s  ETA 1m10s  2 failed" in lines[0]
    assert lines[-1] == "extract  1,000/1,000 rows (100 %)  10.0 rows/s  1m40s  2 failed"
    assert "\r" not in stream.getvalue()


def test_time_of_other_work_takes_no_part_in_the_rate(clock: Clock) -> None:
    bar = Progress("x", 20, "rows", stream=io.StringIO())
    clock.now += 5
    bar.advance(10)
    clock.now += 100
    bar.rest(100)
    assert bar.rate == pytest.approx(2)
    assert "ETA 5.0s" in bar.line()


def test_bytes_are_shown_in_units_that_people_read(clock: Clock) -> None:
    bar = Progress("verify", 1_300_000_000, "bytes", stream=io.StringIO())
    clock.now += 10
    bar.advance(489_767_910)
    assert bar.line() == "verify  489.8 MB of 1.3 GB (38 %)  49.0 MB/s  ETA 16.5s"


def test_a_terminal_gets_one_line_that_is_overwritten(clock: Clock) -> None:
    stream = Terminal()
    with Progress("x", 3, "rows", stream=stream) as bar:
        for facts in ("a long fact", "", "short"):
            clock.now += 1
            bar.advance(1, facts)
            bar.advance(0, facts)
    written = stream.getvalue()
    assert written.count("\n") == 1
    assert written.endswith("\rx  3/3 rows (100 %)  1.0 rows/s  3.0s  short\n")
    first, second, third = written.split("\r")[1:4]
    assert first == "x  1/3 rows (33 %)  1.0 rows/s  ETA 2.0s  a long fact"
    assert second == "x  2/3 rows (67 %)  1.0 rows/s  ETA 1.0s  a long fact"
    assert third.rstrip() == "x  3/3 rows (100 %)  1.0 rows/s  3.0s  short"
    # What the longer line left on the screen is overwritten.
    assert len(third) == len(second)


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_quiet_prints_nothing(stream: io.StringIO, clock: Clock) -> None:
    with Progress("x", 3, "rows", quiet=True, stream=stream) as bar:
        for _ in range(3):
            clock.now += 100
            bar.advance(1)
    assert bar.done == 3
    assert stream.getvalue() == ""


def test_an_error_leaves_a_clean_line_and_no_summary(clock: Clock) -> None:
    for stream in (Terminal(), io.StringIO()):
        with contextlib.suppress(ZeroDivisionError), Progress("x", 2, "rows", stream=stream) as bar:
            clock.now += 50
            bar.advance(1)
            _ = 1 / 0
        last = stream.getvalue().split("\r")[-1]
        assert last == "" if stream.isatty() else last.count("\n") == 1


def test_work_of_an_earlier_run_is_done_but_not_fast(clock: Clock) -> None:
    with Progress("x", 100, "rows", stream=io.StringIO()) as bar:
        bar.skip(80)
        assert bar.line() == "x  80/100 rows (80 %)  0.0 rows/s  0.0s"
        clock.now += 5
        bar.advance(10)
        assert bar.rate == pytest.approx(2)
        assert "90/100 rows (90 %)  2.0 rows/s  ETA 5.0s" in bar.line()


def test_it_writes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("x", 0, "rows"):
        pass
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("x  0/0 rows (0 %)")


def test_one_has_no_plural() -> None:
    assert [counted(number, "stored views") for number in (0, 1, 2, 2000)] == [
        "0 stored views",
        "1 stored view",
        "2 stored views",
        "2,000 stored views",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0s"), (-1, "0.0s"), (0.04, "0.0s"), (59.4, "59.4s"), (59.6, "1m00s"), (75, "1m15s"), (3599.7, "1h00m"), (86_400, "24h00m")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (1536, "1.5 KB"), (999_999, "1.0 MB"), (2.5e9, "2.5 GB"), (5e15, "5000.0 TB")],
)  # fmt: skip
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@given(count=st.floats(0, 1e14))
def test_sizes_are_near(count: float) -> None:
    number, unit = size(count).split()
    factor = 1000.0 ** ("B", "KB", "MB", "GB", "TB").index(unit)
    assert float(number) * factor == pytest.approx(count, rel=0.05, abs=0.5)
    assert float(number) < 1000
