"""Options that are lists in one text."""

from tubelet.core.errors import TubeletError


def read_words(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """Words between commas."""
    return default if text is None else tuple(w.strip() for w in text.split(",") if w.strip())


def read_numbers(text: str | None, default: tuple[float, ...], option: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return default if text is None else tuple(float(w) for w in text.split(","))
    except ValueError:
        raise TubeletError(f"{option} takes numbers such as 0.5,0.25, got {text!r}") from None


def read_shard(text: str) -> tuple[int, int]:
    """Part and parts of `i/n`."""
    try:
        part, parts = (int(word) for word in text.split("/"))
    except ValueError:
        raise TubeletError(f"--shard takes i/n such as 1/4, got {text!r}") from None
    return part, parts
