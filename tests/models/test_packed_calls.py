"""Sequences that lie one behind the other, as batches of equal length."""

import pytest
import torch

from tubelet.core.handle import Handle
from tubelet.kernels.attention import CallStatistics, attention
from tubelet.models.packed_calls import batches
from tubelet.models.vision_statistics import VisionTower, VisionWatch, same


@pytest.mark.parametrize("lengths", [[6, 6, 6], [4, 2, 4, 8, 2], [5]])
def test_every_sequence_is_in_one_batch(lengths):
    x = torch.randn(1, 2, sum(lengths), 3)
    wanted, found, seen = x.split(lengths, dim=2), [], 0
    for rows, (part,) in batches(lengths, x):
        seen += 1
        length = part.shape[2]
        starts = torch.arange(0, x.shape[2], length) if rows is None else rows[::length]
        found += list(zip(starts.tolist(), part, strict=True))
    assert seen == len(set(lengths))
    for (_, part), whole in zip(sorted(found, key=lambda item: item[0]), wanted, strict=True):
        assert torch.equal(part, whole[0])


@pytest.mark.parametrize("name", ["received", "class", "keys"])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [4, 2, 4, 8, 2]])
def test_statistics_of_a_packed_call_are_those_of_its_sequences(name, lengths):
    facts = VisionTower(path="", layers="", attention="", class_tokens=1, pool=same)
    watch = VisionWatch(facts, torch.nn.Module(), (), Handle(None, ()))
    q, k, v = (torch.randn(1, 2, sum(lengths), 8) for _ in range(3))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    found = watch._statistic(name, q, k, v, 0.4, ends)
    wanted = []
    for part in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True):
        lse = attention(*part, scale=0.4)[1]
        stats = CallStatistics(*part, 0.4, lse)
        value = {
            "received": lambda stats=stats, n=part[0].shape[2]: stats.received()[..., None] / n,
            "class": lambda stats=stats: stats.rows([0]).mean((1, 2))[..., None],
            "keys": stats.keys,
        }[name]()
        wanted.append(value[0, 1:])
    assert torch.allclose(found, torch.cat(wanted), atol=1e-6)
