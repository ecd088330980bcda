"""Statistics of some rows of causal attention against the map written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.ops import causal_rows
from tubelet.ops.causal_rows import received, row_totals


def drawn(num: int, wanted: float, groups: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    places = (torch.rand(num, generator=generator) < wanted).nonzero()[:, 0]
    places = places if len(places) else torch.tensor([num - 1])
    q = torch.randn(2 * groups, len(places), 6, generator=generator)
    k = torch.randn(2, num, 6, generator=generator)
    weight = torch.rand(2 * groups, len(places), generator=generator)
    return q, k, places, weight


def written_out(q, k, places, scale):
    """[H, rows, M] logits, -inf behind the place of each row."""
    logits = q @ k.repeat_interleave(len(q) // len(k), 0).mT * scale
    hidden = torch.arange(k.shape[1])[None] > places[:, None]
    return logits.masked_fill(hidden, -torch.inf)


@settings(max_examples=40, deadline=None)
@given(
    num=st.integers(1, 40),
    wanted=st.floats(0, 1),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
    part=st.sampled_from([1, 60, 2**24]),
)
def test_rows_and_columns_are_those_of_the_map_in_parts_of_any_size(
    num, wanted, groups, seed, part
):
    q, k, places, weight = drawn(num, wanted, groups, seed)
    logits = written_out(q, k, places, 0.4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_rows, "PART", part)
        totals = row_totals(q, k, places, 0.4)
        torch.testing.assert_close(totals, logits.logsumexp(-1))
        shares = logits.softmax(-1)
        torch.testing.assert_close(received(q, k, places, 0.4, totals), shares.sum(1))
        weighted = received(q, k, places, 0.4, totals, weight)
        torch.testing.assert_close(weighted, (shares * weight[..., None]).sum(1))


def test_all_that_rows_give_arrives():
    q, k, places, weight = drawn(30, 0.4, 2, 7)
    found = received(q, k, places, 0.4, row_totals(q, k, places, 0.4), weight)
    torch.testing.assert_close(found.sum(1), weight.sum(1))
    assert bool((found[:, places[-1] + 1 :] == 0).all())


def test_no_table_of_all_rows_exists():
    q, k, places, _ = drawn(600, 1.0, 1, 0)
    largest = [logits.numel() for _, logits in causal_rows._parts(q, k, places, 1.0)]
    assert len(largest) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_rows, "PART", 2**14)
        parts = [logits.numel() for _, logits in causal_rows._parts(q, k, places, 1.0)]
    assert max(parts) <= 2**14
    assert len(parts) > 40


def test_half_precision_is_added_up_in_float32():
    q, k = torch.ones(1, 1, 4).bfloat16(), torch.zeros(1, 1000, 4).bfloat16()
    totals = row_totals(q, k, torch.tensor([999]), 1.0)
    assert totals.dtype == torch.float32
    assert float(totals.exp()) == pytest.approx(1000, rel=1e-5)
