"""Packed samples and how they return to full length."""

import torch

from tubelet.core.assignment import TokenAssignment
from tubelet.core.learned import LearnedPlan
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


def test_learned_weights_follow_their_tokens_and_add_up() -> None:
    weights = (torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0]]))
    kept = (torch.tensor([[0, 2, 3]]), torch.tensor([[0, 2]]))
    group = TokenGroup.whole(1, 4, torch.device("cpu"))
    for weight, places in zip(weights, kept, strict=True):
        plan = TokenAssignment.keep(places, group.num)
        hidden = torch.zeros(1, plan.num_out, 2)
        group = group.after(LearnedPlan(assignment=plan, hidden=hidden, log_weight=weight), 0)
    assert group.log_weight is not None
    assert group.log_weight.tolist() == [[11.0, 23.0]]
    last = group.after(TokenAssignment.keep(torch.tensor([[1]]), 2), 0)
    assert last.log_weight is not None
    assert last.log_weight.tolist() == [[23.0]]
