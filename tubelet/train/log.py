"""The log of a run: one JSON object per line, and the text that tells how long it still takes."""

import json
import math
import os
from pathlib import Path
from typing import Any

from tubelet.core.errors import TubeletError
from tubelet.core.files import write_whole

FILE = "log.jsonl"


class Log:
    """Appends records to a file, each flushed as it is written.

    Training must not die of a full disk for the sake of its log: lines that cannot be written
    wait in memory and are tried again with the next one.

    Args:
        path: The file, or None to drop everything (processes other than the first).
        keep_to: Keep the records up to this step (inclusive) and append; None starts anew.

    Raises:
        TubeletError: The file cannot be opened, or does not hold a log.
    """

    def __init__(self, path: Path | None, keep_to: int | None = None) -> None:
        self._path = path
        self._waiting = b""
        self._file = None
        if path is None:
            return
        old = read_log(path) if keep_to is not None and path.exists() else []
        kept = [record for record in old if record.get("step", 0) <= (keep_to or 0)]
        write_whole(path, "".join(_line(record) for record in kept))
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        self._size = path.stat().st_size

    def write(self, **record: Any) -> None:
        """Append one record; numbers that are not finite become null."""
        if self._file is None:
            return
        self._waiting += _line(record).encode()
        try:
            while self._waiting:
                written = self._file.write(self._waiting)
                self._size += written
                self._waiting = self._waiting[written:]
        except OSError:
            # What was written of a line stays; the rest follows with the next record.
            return

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Records of a log, in order. A last line that was cut off is left out.

    Raises:
        TubeletError: There is no such file, or a line other than the last is no JSON object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TubeletError(f"cannot read log {path}: {error}") from None
    *lines, _cut_off = text.split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            raise TubeletError(f"line {number} of log {path} is no JSON object")
        records.append(record)
    return records


def duration(seconds: float) -> str:
    """Short text, such as `45 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record)) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
