"""One measurement spread over several processes: `--shard i/n`."""

from collections.abc import Sequence
from typing import TypeVar

from tubelet.core.errors import TubeletError

Item = TypeVar("Item")


def shard_of(items: Sequence[Item], shard: tuple[int, int], without: str) -> list[Item]:
    """Every n-th item from the i-th.

    Args:
        items: All that is to be measured.
        shard: (i, n).
        without: What is told of a shard without an item, behind its name.

    Raises:
        TubeletError: Not a shard, or one without an item.
    """
    part, parts = shard
    if not 1 <= part <= parts:
        raise TubeletError(f"shard must be i/n with 1 <= i <= n, got {part}/{parts}")
    mine = list(items[part - 1 :: parts])
    if not mine:
        raise TubeletError(f"shard {part}/{parts} {without}")
    return mine
