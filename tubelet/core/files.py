"""Writing files whole or not at all."""

import os
import tempfile
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
