"""Shards share out what is to be measured."""

import pytest

from tubelet.bench.shards import shard_of
from tubelet.core.errors import TubeletError


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_every_item_is_in_one_shard(parts):
    found = [shard_of(range(7), (part, parts), "") for part in range(1, parts + 1)]
    assert sorted(item for mine in found for item in mine) == list(range(7))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize(
    ("shard", "words"), [((0, 2), "got 0/2"), ((3, 2), "got 3/2"), ((9, 9), "9/9 has no cell")]
)
def test_a_shard_without_anything_is_refused(shard, words):
    with pytest.raises(TubeletError, match=words):
        shard_of(range(7), shard, "has no cell")
