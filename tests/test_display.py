"""Progress: what fits 80 columns of a terminal, and what the lines of a log say."""

from __future__ import annotations

import asyncio
import re

import pytest

from rlvr_landscape_plugin import display as module
from rlvr_landscape_plugin.display import Display, Rate, TrainingDisplay, duration, per_second, size

LONGEST = "step 000150, census, slice 12 of 16"


def shown(display: Display, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines below the messages as a terminal of 80 columns has them."""
    capsys.readouterr()
    display._console.print(display._shown())
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).splitlines()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def log(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test moves on by hand."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_the_bar_fits_80_columns_and_keeps_the_time_left(terminal, capsys, clock):
    with Display() as display:
        display.begin(0, 11025, 16384)
        display.open(LONGEST, 439, 441, 16384, 16384)
        clock[0] += 10.0
        for _ in range(20):
            display.episode()
        display.point(-0.1, 0.1, -12.345, 1234.567, 9.0)
        bar, note = shown(display, capsys)
    assert len(bar) <= 80
    assert len(note) <= 80
    assert "1/11025 points" in bar
    assert re.search(r"ETA \d+ d \d\d h", bar)
    assert note.startswith(f"{LONGEST}  440/441")


def test_the_time_left_is_that_of_all_slices(terminal, capsys, clock):
    with Display() as display:
        display.begin(0, 30, 10)
        display.open("first", 0, 10, 10, 20)
        clock[0] += 20.0
        for _ in range(40):
            display.episode()
        state = display.state()
    assert state.rate == pytest.approx(2.0)
    assert state.seconds_left == pytest.approx((10 * 10 + 20 - 40 + 20 * 10) / 2.0)


def test_the_rate_forgets_what_is_long_ago():
    now = [0.0]
    rate = Rate(lambda: now[0])
    for _ in range(1000):
        now[0] += 1.0
        rate.event()
    for _ in range(100):
        now[0] += 10.0
        rate.event()
    assert rate.per_second == pytest.approx(0.1, rel=0.1)
    now[0] += 100.0
    assert rate.per_second == pytest.approx(0.075, rel=0.1)


def test_a_log_has_time_slice_and_time_left(log, capsys, clock):
    with Display() as display:
        display.begin(1, 4, 10)
        display.open("step 10, slice 2 of 3", 1, 2, 10, 0)
        clock[0] += 5.0
        for _ in range(10):
            display.episode()
        display.point(0.1, -0.2, 0.5, 1.25, 3.0)
    said = capsys.readouterr().err.strip()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step 10, slice 2 of 3  2/2 points  \(\+0\.1, -0\.2\)  "
        r"reward 0\.500  KL 1\.250 nat  3\.0 s  ETA 10 s",
        said,
    )


def test_a_progressive_sweep_says_that_more_may_follow(log, capsys, clock):
    with Display() as display:
        display.begin(0, 1, 4, at_least=True)
        display.open("slice", 0, 1, 4, 0)
        clock[0] += 1.0
        display.episode()
        display.point(0, 0, 0.5, 0.0, 1.0)
    assert capsys.readouterr().err.strip().endswith("or more")


async def test_a_wait_shows_its_seconds_on_a_terminal(terminal, capsys, clock):
    with Display() as display:
        async with display.waiting("starting the vLLM server"):
            clock[0] += 75
            assert shown(display, capsys) == ["starting the vLLM server: 1 min 15 s"]
            assert display.state().waiting == ("starting the vLLM server",)
        assert display.state().waiting == ()


async def test_a_wait_is_a_line_now_and_then_in_a_log(log, capsys, monkeypatch):
    monkeypatch.setattr(module, "WAITING_LINES", 0.05)
    with Display() as display:
        async with display.waiting("starting the vLLM server"):
            await asyncio.sleep(0.13)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 2
    assert all(text.endswith("starting the vLLM server: 0 s so far") for text in lines)


def test_training_fits_80_columns(terminal, capsys):
    with TrainingDisplay(1_000_000, 512) as display:
        display.start(999_990)
        display.step(999_991, {"reward": -0.123, "entropy": 12.345, "kl_base": 123.456, "seconds": 12.0})
        display.episode()
        bar, note = shown(display, capsys)
    assert len(bar) <= 80
    assert "ETA" in bar
    assert len(note) <= 80
    assert note.rstrip().endswith("1/512 episodes")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (273600, "3 d 04 h"), (-5, "0 s")],
)
def test_durations(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(("rate", "said"), [(0.0421, "0.042"), (4.2, "4.2"), (1490.4, "1,490")])
def test_rates(rate, said):
    assert per_second(rate) == said


@pytest.mark.parametrize(("count", "said"), [(12, "12 B"), (2048, "2.0 KiB"), (3 * 2**30, "3.0 GiB")])
def test_sizes(count, said):
    assert size(count) == said
