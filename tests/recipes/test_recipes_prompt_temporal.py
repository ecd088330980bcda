"""What the papers claim of prompt reductions over time."""

import pytest
import torch
from prompt_contexts import kept, noise, prompt_context

from tubelet.core.errors import ShapeError
from tubelet.recipes import EVS


def test_EVS_keeps_the_first_frame_and_what_moved():
    tokens = noise(1).repeat(4, 1, 1, 1)
    # One place changes in the third frame and stays as it is then.
    tokens[2:, 1, 2] = -tokens[0, 1, 2]
    plan = EVS(keep_ratio=17 / 64).plan(prompt_context(tokens))
    assert kept(plan) == [*range(16), 2 * 16 + 1 * 4 + 2]


def test_EVS_compares_with_the_frame_before_not_with_the_first():
    tokens = noise(1).repeat(4, 1, 1, 1)
    # One place turns round in the second frame for good, another a little in the last.
    tokens[1:, 0, 0] = -tokens[0, 0, 0]
    tokens[3, 3, 3] += 0.1 * noise(1, seed=1)[0, 3, 3]
    plan = EVS(keep_ratio=18 / 64).plan(prompt_context(tokens))
    assert kept(plan) == [*range(16), 16, 63]


def test_EVS_spends_its_budget_over_the_whole_clip():
    tokens = noise(4)
    tokens[1], tokens[2] = tokens[0], tokens[0]
    plan = EVS(keep_ratio=0.5).plan(prompt_context(tokens))
    assert kept(plan) == [*range(16), *range(48, 64)]


def test_EVS_looks_at_direction_alone():
    tokens = noise(4)
    tokens[1], tokens[2] = 9 * tokens[0], 0.1 * tokens[0]
    plan = EVS(keep_ratio=0.5).plan(prompt_context(tokens))
    assert kept(plan) == [*range(16), *range(48, 64)]


@pytest.mark.parametrize("keep_ratio", [0.25, 0.3, 0.5, 0.77])
def test_EVS_keeps_exactly_its_budget_also_when_nothing_moves(keep_ratio):
    still = torch.ones(4, 4, 4, 8)
    for tokens in (still, noise(4)):
        plan = EVS(keep_ratio=keep_ratio).plan(prompt_context(tokens))
        assert plan is not None
        assert plan.num_out == -(-64 * keep_ratio // 1)


def test_EVS_refuses_less_than_its_first_frame():
    with pytest.raises(ShapeError, match="always keeps 16 of 32"):
        EVS(keep_ratio=0.3).plan(prompt_context(noise(2)))
