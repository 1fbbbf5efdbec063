"""What is printed: few plain lines when piped, a bar on a terminal, answers that are JSON."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from flows.console import Terminal, duration, jsonable, size, table
from flows.engine.events import Event


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def block(done: int, total: int = 100, **facts) -> Event:
    return Event("block", done, total, "restoring", facts)


def test_piped_progress_is_a_line_every_few_seconds_and_one_at_the_end():
    stream, clock = io.StringIO(), Clock()
    with Terminal(stream, interactive=False, clock=clock) as terminal:
        for done in range(1, 101):
            clock.now += 0.1
            terminal(block(done, eta_s=100 - done))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[1/100] restoring (1 min 39 s left)"
    assert lines[-1] == "[100/100] restoring"
    assert len(lines) == 3


def test_what_a_person_must_know_is_never_throttled():
    stream, clock = io.StringIO(), Clock()
    with Terminal(stream, interactive=False, clock=clock) as terminal:
        terminal(block(1))
        for kind in ("quarantined", "retry", "corrupt", "lost"):
            terminal(Event(kind, 1, 100, f"{kind}!"))
        terminal(block(2))
    assert stream.getvalue().count("\n") == 5


def test_on_a_terminal_it_is_a_bar_with_the_time_left():
    stream = io.StringIO()
    with Terminal(stream, interactive=True) as terminal:
        terminal(block(30, eta_s=125.0))
        bar = terminal._bar
        assert bar is not None
        (task,) = bar.tasks
        assert (task.completed, task.total) == (30, 100)
        assert task.fields["left"] == "2 min 05 s left"
        terminal(Event("quarantined", 30, 100, "item-1 is [quarantined]: empty"))
    assert terminal._bar is None
    assert "item-1 is [quarantined]: empty" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.9, "1 h 00 min"),
        (7260, "2 h 01 min"),
    ],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(12, "12 B"), (8.1e7, "81.0 MB"), (3e12, "3.0 TB")]
)
def test_sizes(num_bytes: float, text: str):
    assert size(num_bytes) == text


def test_a_table_sets_numbers_to_the_right_and_leaves_no_trailing_spaces():
    lines = table(["method", "psnr"], [["covprox", 31.234], ["fbp", None]]).splitlines()
    assert lines == ["method    psnr", "-------  -----", "covprox  31.23", "fbp"]


def test_answers_of_any_kind_become_json():
    @dataclass
    class Answer:
        path: Path
        figures: dict
        keys: frozenset

    value = Answer(Path("a/b"), {"psnr": np.float32(1.5)}, frozenset({"k"}))
    assert jsonable(value) == {"path": "a/b", "figures": {"psnr": 1.5}, "keys": ["k"]}
