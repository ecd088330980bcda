"""Writing files whole or not at all, and asking beforehand."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tubelet.core.errors import TubeletError


def write_whole(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file by way of a temporary one beside it.

    Raises:
        TubeletError: The folder cannot be written; nothing is left behind.
    """
    target = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, prefix=f".{target.name}.", delete=False, encoding="utf-8"
        ) as file:
            temporary = file.name
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise TubeletError(f"cannot write {target}: {error.strerror or error}") from None
    return target


def check_folder(out: Path, names: Sequence[str]) -> None:
    """Raise TubeletError unless files of these names can be written there; makes nothing."""
    try:
        existing = next(folder for folder in [out, *out.absolute().parents] if folder.exists())
        if not existing.is_dir():
            raise NotADirectoryError(0, "it is not a folder")
        for name in names:
            if (out / name).is_dir():
                raise IsADirectoryError(0, f"{name} is a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise TubeletError(f"cannot write to {out}: {error.strerror or error}") from None
