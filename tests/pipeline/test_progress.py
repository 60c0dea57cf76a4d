"""What long work shows where there is no terminal: now and then a line with rate and time left."""

import pytest

from dimefm.pipeline import progress


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_has_the_rate_of_this_run_and_the_time_that_is_left(clock, capsys):
    with progress.bar("stage one", 1000, "rows", done=400) as shown:  # an earlier run did 400
        clock.now += 5
        shown.update(450)
        assert capsys.readouterr().err == ""  # no line yet
        clock.now += 15
        shown.update(600)
    assert capsys.readouterr().err == "stage one: 600 of 1,000, 10 rows/s, 40 s left\n"  # 200 in 20 s, 400 are left


def test_a_run_that_was_resumed_is_not_credited_with_what_was_there(clock, capsys):
    with progress.bar("small", 1000, "images", done=progress.RESUMED) as shown:
        shown.update(500)
        clock.now += 20
        shown.update(510, text="loss 1.5")
    assert capsys.readouterr().err == "small: 510 of 1,000, 0.5 images/s, 980 s left, loss 1.5\n"
