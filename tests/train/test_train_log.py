"""The log and the curves drawn from it."""

import builtins
import json

import pytest

from tubelet.core.errors import TubeletError, UnsupportedError
from tubelet.train.curves import curve_summary, plot_curves
from tubelet.train.log import Log, duration, read_log


def lines(count, start=1):
    return [
        {
            "step": i,
            "seconds": i / 2,
            "loss": float(i),
            "metrics": {"accuracy": i / count} if i % 2 else {},
        }
        for i in range(start, start + count)
    ]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write(step=1, loss=0.5, metrics={"bad": float("nan"), "worse": [float("inf")]})
    assert read_log(tmp_path / "log.jsonl") == [
        {"step": 1, "loss": 0.5, "metrics": {"bad": None, "worse": [None]}}
    ]
    log.close()


def test_a_new_log_starts_empty_and_a_kept_one_goes_on(tmp_path):
    path = write(tmp_path / "log.jsonl", lines(6))
    log = Log(path, keep_to=4)
    log.write(step=5, loss=9.0)
    log.close()
    assert [(line["step"], line["loss"]) for line in read_log(path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
        (5, 9.0),
    ]
    Log(path).close()
    assert read_log(path) == []


def test_a_cut_last_line_is_left_out_and_others_are_errors(tmp_path):
    path = write(tmp_path / "log.jsonl", lines(3))
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert len(read_log(path)) == 3
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(TubeletError, match="line 2"):
        read_log(path)
    with pytest.raises(TubeletError, match="cannot read log"):
        read_log(tmp_path / "none.jsonl")


def test_a_full_disk_delays_lines_and_loses_none(tmp_path):
    class Disk:
        """Takes a given number of bytes, then raises until there is room again."""

        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            if self.room == 0:
                raise OSError(28, "No space left on device")
            part = data[: self.room]
            self.room -= len(part)
            return self.file.write(part)

        def close(self):
            self.file.close()

    path = tmp_path / "log.jsonl"
    log = Log(path)
    disk = log._file = Disk(log._file, 20)
    log.write(step=1, text="longer than the room that is left")
    log.write(step=2)
    disk.room = 1000
    log.write(step=3)
    log.close()
    assert [line["step"] for line in read_log(path)] == [1, 2, 3]


def test_processes_other_than_the_first_log_nothing(tmp_path):
    log = Log(None)
    log.write(step=1)
    log.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (3599.6, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_summaries_average_neighbours_and_stay_short():
    records = [*lines(600), {"step": 600, "note": "x"}, {"step": 600, "evaluation": {"a": 1.0}}]
    summary = curve_summary(records)
    assert {len(values) for values in summary.values()} == {60}
    assert summary["step"] == list(range(10, 601, 10))
    assert summary["seconds"][-1] == 300.0
    # Lines 1 to 10; their odd ones carry the metric.
    assert summary["loss"][0] == pytest.approx(5.5)
    assert summary["accuracy"][0] == pytest.approx(5 / 600, rel=1e-4)
    json.dumps(summary, allow_nan=False)


def test_summaries_of_few_lines_keep_them_as_they_are():
    summary = curve_summary([{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "seconds": 3.0}])
    assert summary == {"step": [1, 2], "seconds": [0.0, 3.0], "loss": [2.0, None]}
    assert curve_summary([]) == {"step": [], "seconds": [], "loss": []}


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    first = write(tmp_path / "first" / "log.jsonl", lines(50))
    second = write(tmp_path / "second" / "log.jsonl", lines(20, start=5))
    svg = plot_curves([first, second], tmp_path / "curves.svg").read_text()
    for word in ("first", "second", "accuracy", "loss", "step"):
        assert f">{word}<" in svg
    assert svg == plot_curves([first, second], tmp_path / "again.svg").read_text()
    png = plot_curves([first], tmp_path / "curves.png").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_curves_that_cannot_be_drawn(tmp_path, monkeypatch):
    log = write(tmp_path / "run" / "log.jsonl", lines(3))
    empty = write(tmp_path / "empty" / "log.jsonl", [{"step": 1, "note": "x"}])
    with pytest.raises(TubeletError, match=r"\.png or \.svg"):
        plot_curves([log], tmp_path / "curves.gif")
    with pytest.raises(TubeletError, match="empty has no losses yet"):
        plot_curves([log, empty], tmp_path / "curves.png")
    with pytest.raises(TubeletError, match="no log"):
        plot_curves([], tmp_path / "curves.png")
    with pytest.raises(TubeletError, match="cannot write"):
        plot_curves([log], tmp_path / "nowhere" / "curves.svg")
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedError, match=r"tubelet\[plot\]"):
        plot_curves([log], tmp_path / "curves.png")
