"""AttentionPlan: the empty plan is dense, the others survive JSON."""

import json
import pickle

import pytest
import torch

from tubelet.core.block_mask import BlockMask
from tubelet.core.errors import ShapeError
from tubelet.core.plan import AttentionPlan

MASK = BlockMask.from_dense(
    torch.tensor([[[[True, False], [False, True]]]]), block=(2, 3), num_queries=4, num_keys=4
)
PARTS = {
    "mask": MASK,
    "order": torch.tensor([[3, 1, 0, 2]]),
    "bias": torch.tensor([[0.5, -torch.inf, 0.0, 1e-7]]),
    "temperature": 0.7,
}


def test_the_empty_plan_is_dense():
    assert AttentionPlan().is_dense


@pytest.mark.parametrize("name", PARTS)
def test_every_part_makes_a_plan_not_dense(name):
    assert not AttentionPlan(**{name: PARTS[name]}).is_dense


def same(a: AttentionPlan, b: AttentionPlan) -> None:
    assert a.temperature == b.temperature
    for name in ("order", "bias"):
        have, want = getattr(a, name), getattr(b, name)
        assert (have is None) == (want is None)
        assert have is None or (have.dtype == want.dtype and torch.equal(have, want))
    assert (a.mask is None) == (b.mask is None)
    if a.mask is not None:
        assert torch.equal(a.mask.to_dense(), b.mask.to_dense())
        assert (a.mask.block, a.mask.num_keys) == (b.mask.block, b.mask.num_keys)


@pytest.mark.parametrize("names", [(), ("mask",), ("order", "bias"), tuple(PARTS)])
def test_json_and_pickle_keep_every_part(names):
    plan = AttentionPlan(**{name: PARTS[name] for name in names})
    same(AttentionPlan.from_dict(json.loads(json.dumps(plan.to_dict()))), plan)
    same(pickle.loads(pickle.dumps(plan)), plan)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ShapeError, match="temperature must be a positive number"):
        AttentionPlan(temperature=temperature)


@pytest.mark.parametrize("name", ["order", "bias"])
def test_tensors_of_another_rank_are_refused(name):
    with pytest.raises(ShapeError, match=f"{name} must have 2 axes, got \\(4,\\)"):
        AttentionPlan(**{name: PARTS[name][0]})
