"""Prompts made shorter, and attention of one prompt, on plain tensors."""

import pytest
import torch

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ShapeError
from tubelet.core.grid import TokenGrid
from tubelet.models.layer_statistics import PromptStatistics
from tubelet.models.prompt import (
    Prompt,
    VideoPlace,
    VideoRows,
    packed_order,
    shortened,
    side_by_side,
    unreduced,
)
from tubelet.models.video_llm import frames_of_prompts, in_turn

IDS = torch.tensor([[0, 0, 1, 2, 9, 9, 9, 9, 3], [4, 9, 9, 8, 9, 9, 5, 6, 7]])
MASK = IDS != 0


def places() -> list[VideoPlace]:
    """One video of four tokens, and one whose third token is the host's own."""
    first = VideoPlace(
        sample=0,
        columns=torch.arange(4, 8),
        grid=TokenGrid(frames=2, height=1, width=2),
        grid_rows=torch.arange(4),
    )
    second = VideoPlace(
        sample=1,
        columns=torch.tensor([1, 2, 4, 5]),
        grid=TokenGrid(frames=3, height=1, width=1),
        grid_rows=torch.tensor([0, 1, 3]),
    )
    return [first, second]


def short(policy: str = "keep", axes: bool = False) -> Prompt:
    positions = torch.arange(9).expand(2, -1) * 10
    whole = unreduced(IDS, MASK, places(), positions.expand(3, -1, -1) if axes else positions)
    rows = [VideoRows(rows=torch.arange(4.0)[:, None] + start) for start in (100, 200)]
    plans = [
        TokenAssignment.keep(torch.tensor([[2]]), 4),
        TokenAssignment.merge(torch.tensor([[1, 1, 2]]), torch.tensor([[1, 2]]), torch.ones(1, 3)),
    ]
    return shortened(whole, places(), rows, plans, policy=policy, pad=11)


def test_shorter_prompts_hold_text_survivors_and_the_host_s_own_tokens():
    prompt = short()
    assert prompt.ids.tolist() == [[11, 11, 11, 11, 1, 2, 9, 3], [4, 9, 8, 9, 9, 5, 6, 7]]
    assert prompt.mask.long().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [1] * 8]
    assert prompt.written.long().tolist() == [[0] * 6 + [1, 0], [0, 1, 0, 1, 1, 0, 0, 0]]
    assert prompt.video.long().tolist() == [[0] * 6 + [1, 0], [0, 1, 0, 0, 1, 0, 0, 0]]
    assert prompt.features is not None
    # The merged token is the mean of two, the third is the host's own.
    assert prompt.features[:, 0].tolist() == [102, 200.5, 202, 203]
    assert prompt.original[0, 6] == 2
    assert prompt.original[1, [1, 4]].tolist() == [1, 2]
    assert prompt.size[1, 1] == 2


def test_positions_are_kept_renumbered_or_those_of_the_earliest_member():
    assert short().positions is not None
    assert short().positions[0].tolist() == [0, 0, 0, 0, 20, 30, 60, 80]
    assert short().positions[1].tolist() == [0, 20, 30, 40, 50, 60, 70, 80]
    assert short("anchor").positions[1].tolist() == [0, 10, 30, 40, 50, 60, 70, 80]
    assert short("compact").positions[0].tolist() == [0, 0, 0, 0, 0, 1, 2, 3]


def test_the_text_row_of_three_axes_has_no_gaps():
    positions = short(axes=True).positions
    assert positions is not None
    assert positions.shape == (4, 2, 8)
    assert positions[0].tolist() == [[0, 0, 0, 0, 0, 1, 2, 3], list(range(8))]
    for axis in positions[1:]:
        assert axis[0].tolist() == [0, 0, 0, 0, 20, 30, 60, 80]


def test_rows_to_write_follow_from_the_columns_of_a_call():
    prompt = short()
    mask, rows = prompt.rows_of(0, 8, 1) or ()
    assert rows.tolist() == [0, 1, 2, 3]
    assert torch.equal(mask, prompt.written)
    mask, rows = prompt.rows_of(3, 2, 2) or ()
    assert rows.tolist() == [2, 3, 2, 3]
    assert mask.long().tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    mask, rows = prompt.rows_of(4, 7, 1) or ()
    assert mask.shape == (2, 7)
    assert rows.tolist() == [0, 3]
    assert prompt.rows_of(5, 1, 1) is None
    assert prompt.rows_of(8, 1, 1) is None


def test_padding_stays_on_the_side_where_it_was():
    keep = torch.tensor([[True, True, False], [True, False, False]])
    left = packed_order(keep, torch.tensor([[True, True, True], [False, True, True]]))
    right = packed_order(keep, torch.tensor([[True, True, True], [True, True, False]]))
    assert keep.gather(1, left).tolist() == [[True, True], [False, True]]
    assert keep.gather(1, right).tolist() == [[True, True], [True, False]]


def test_plans_of_several_videos_stand_side_by_side():
    one = TokenAssignment.keep(torch.tensor([[0, 2]]), 3)
    other = TokenAssignment.merge(torch.tensor([[1, 1]]), torch.tensor([[1]]), torch.ones(1, 2))
    both = side_by_side([one, other])
    both.check()
    block = torch.zeros(1, 3, 5)
    block[:, :2, :3], block[:, 2:, 3:] = one.matrix(), other.matrix()
    assert torch.equal(both.matrix(), block)
    assert both.anchor.tolist() == [[0, 2, 4]]


def test_placeholders_go_to_videos_in_turn():
    found = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 0]]).bool()
    grid = TokenGrid(frames=1, height=1, width=2)
    rows = torch.arange(2)
    first, second = in_turn(found[:, :4], [2, 2], [grid] * 2, [rows] * 2)
    assert (first.sample, first.columns.tolist()) == (0, [1, 2])
    assert (second.sample, second.columns.tolist()) == (1, [0, 3])
    with pytest.raises(ShapeError, match="2 videos need 4 placeholders, but the prompts hold 5"):
        in_turn(found, [2, 2], [grid] * 2, [rows] * 2)


def test_a_part_of_a_frame_is_refused():
    found = torch.tensor([[1, 1, 1, 0]]).bool()
    with pytest.raises(ShapeError, match="prompt 0 has 3 placeholders, not a multiple of 2"):
        frames_of_prompts(found, 1, 2)


def statistics(pad: int) -> PromptStatistics:
    """The same call with `pad` tokens of padding in front, which hold large values."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 6, 8, generator=generator)
    k = torch.randn(2, 6, 8, generator=generator)
    q, k = (torch.cat([torch.full((len(x), pad, 8), 3.0), x], 1) for x in (q, k))
    real = torch.arange(6 + pad) >= pad
    video, behind = torch.tensor([1, 3]) + pad, torch.tensor([4, 5]) + pad
    return PromptStatistics(q, k, 0.4, real, video, behind)


def test_attention_rows_are_a_causal_softmax_over_all_keys():
    stats = statistics(0)
    keys = stats.k.repeat_interleave(2, 0)
    logits = stats.q @ keys.mT * 0.4
    dense = logits.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    assert torch.allclose(stats.rows([-1, 2]), dense[:, [5, 2]][..., [1, 3]], atol=1e-6)
    assert torch.allclose(stats.rows([-1], softmax=False), logits[:, 5:][..., [1, 3]], atol=1e-6)
    assert torch.equal(stats.video_keys(), keys[:, [1, 3]])
    assert torch.equal(stats.video_queries(), stats.q[:, [1, 3]])


def test_padding_changes_no_attention():
    alone, padded = statistics(0), statistics(3)
    assert torch.allclose(alone.rows([-1, 2]), padded.rows([-1, 2]), atol=1e-6)
    assert alone.question() == padded.question() == [4, 5]
    assert alone.num_tokens == padded.num_tokens == 6
