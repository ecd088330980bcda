"""Packed samples and how they return to full length."""

import torch

from tubelet.core.assignment import TokenAssignment
from tubelet.models.groups import TokenGroup, unpack


def test_unpacking_equals_restoring_each_sample() -> None:
    masks = torch.rand(3, 10) < 0.6
    masks[:, 0] = True
    origins = TokenAssignment.keep_where(masks)
    # A merge behind a drop: sizes differ and some tokens are gone.
    target = torch.arange(origins[1].num_out)[None].clone()
    target[0, 1] = 0
    kept = torch.tensor([[i for i in range(origins[1].num_out) if i != 1]])
    sizes = torch.ones(1, origins[1].num_out)
    origins[1] = origins[1].compose(TokenAssignment.merge(target, kept, sizes))
    parts = [torch.randn(1, origin.num_out, 5) for origin in origins]
    wanted = torch.cat([o.restore(x) for o, x in zip(origins, parts, strict=True)])
    torch.testing.assert_close(unpack(torch.cat(parts, dim=1), origins), wanted)


def test_a_group_splits_into_its_samples() -> None:
    plan = TokenAssignment.keep(torch.tensor([[0, 2], [1, 3]]), 4)
    group = TokenGroup.whole(2, 4, torch.device("cpu")).after(plan, 0)
    first, second = group.split()
    assert (first.start, second.start, second.first) == (0, 2, 1)
    assert second.anchor.tolist() == [[1, 3]]
    hidden = torch.arange(4.0).reshape(1, 4, 1)
    assert second.view(hidden, packed=True).flatten().tolist() == [2.0, 3.0]
