"""What a sparse call leaves out, made up for: means of blocks, dense rows, gain and residual."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.core.block_mask import BlockMask
from tubelet.core.errors import UnsupportedError
from tubelet.core.plan import AttentionPlan
from tubelet.kernels.attention import attention, left_out, merge

IMPLS = ["reference", "cpu", "flex"]
SETTINGS = settings(deadline=None, max_examples=25, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def _untyped():
    """FlexAttention cannot trace checked functions."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def inputs(num=45, keys=45, groups=2):
    return torch.randn(2, 4, num, 8), *torch.randn(2, 2, groups, keys, 8)


def mask_of(num=45, keys=45, block=(8, 6), density=0.4) -> BlockMask:
    kept = torch.rand(2, 4, -(-num // block[0]), -(-keys // block[1])) < density
    kept[0, 0, 0] = False
    kept[0, 0, 1] = True
    return BlockMask.from_dense(kept, block=block, num_queries=num, num_keys=keys)


def close(have, want, atol=1e-5) -> None:
    torch.testing.assert_close(have.double(), want.double(), atol=atol, rtol=0)


@SETTINGS
@given(st.integers(0, 2**16), st.integers(0, 20), st.floats(1, 1e4))
def test_merging_two_halves_is_the_whole(seed, cut, size):
    torch.manual_seed(seed)
    q, k, v = size * torch.randn(1, 2, 9, 8), *torch.randn(2, 1, 2, 20, 8)
    whole = attention(q.double(), k.double(), v.double())
    parts = []
    for keys in (slice(0, cut), slice(cut, 20)):
        if k[:, :, keys].shape[2]:
            parts += attention(q, k[:, :, keys], v[:, :, keys], impl="reference")
        else:
            parts += [torch.full((1, 2, 9, 8), torch.nan), torch.full((1, 2, 9), -torch.inf)]
    out, lse = merge(*parts)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(lse.double(), whole[1], atol=1e-5, rtol=1e-6)
    # A rounded logit of 1e4 moves its softmax weight by about 1e-3.
    close(out, whole[0], atol=1e-5 if size < 10 else 1e-2)


def test_merging_nothing_with_nothing_is_nothing():
    nothing = torch.full((1, 1, 2, 4), torch.nan), torch.full((1, 1, 2), -torch.inf)
    out, lse = merge(*nothing, *nothing)
    assert bool((out == 0).all())
    assert bool(lse.isneginf().all())


def approximated_densely(q, k, v, mask: BlockMask, temperature=1.0):
    """Keys and values of blocks left out replaced by their block means, then plain softmax."""
    k, v = (x[:, :, : mask.num_keys].double() for x in (k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    means = []
    for x in (k, v):
        parts = x.split(mask.block[1], dim=2)
        means.append(torch.cat([p.mean(2, keepdim=True).expand_as(p) for p in parts], dim=2))
    scale = q.shape[-1] ** -0.5 / temperature
    tokens = mask.token_mask()
    logits = torch.where(tokens, q.double() @ k.mT, q.double() @ means[0].mT) * scale
    weights = logits.softmax(-1)
    out = torch.where(tokens, weights, 0.0) @ v + torch.where(tokens, 0.0, weights) @ means[1]
    return out, logits.logsumexp(-1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_left_out_blocks_count_by_their_means_as_often_as_they_have_tokens(temperature, impl):
    q, k, v = inputs()
    # Two tokens of padding behind a last key block of one token.
    mask = mask_of(keys=43)
    plan = AttentionPlan(mask=mask, approximate=True, temperature=temperature)
    out, lse = attention(q, k, v, plan, impl=impl)
    want, want_lse = approximated_densely(q, k, v, mask, temperature)
    close(out, want)
    close(lse, want_lse)


def test_approximation_is_exact_where_the_tokens_of_a_block_agree():
    q, k, v = inputs(num=48, keys=48)
    k, v = (x[:, :, ::6].repeat_interleave(6, dim=2) for x in (k, v))
    plan = AttentionPlan(mask=mask_of(48, 48), approximate=True)
    out, lse = attention(q, k, v, plan)
    want, want_lse = attention(q, k, v)
    close(out, want)
    close(lse, want_lse)


def test_how_many_blocks_are_approximated_at_once_changes_nothing(monkeypatch):
    q, k, v = inputs()
    plan = AttentionPlan(mask=mask_of(), approximate=True)
    whole = attention(q, k, v, plan)
    monkeypatch.setattr(left_out, "LOGITS", 1)
    for have, want in zip(attention(q, k, v, plan), whole, strict=True):
        close(have, want, atol=1e-6)


def test_left_out_blocks_may_be_poisonous_only_when_they_count():
    q, k, v = inputs()
    v[:, :, :6] = torch.nan
    mask = mask_of()
    seen = mask.to_dense()[..., 0].repeat_interleave(8, dim=2)[:, :, :45]
    plain, _ = attention(q, k, v, AttentionPlan(mask=mask))
    assert torch.equal(plain.isnan().any(-1), seen)
    counted, _ = attention(q, k, v, AttentionPlan(mask=mask, approximate=True))
    assert bool(counted.isnan().all())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ordered", [False, True])
def test_every_few_rows_lend_what_they_gain_from_all_keys(ordered, impl):
    q, k, v = inputs(groups=4)
    order = torch.randperm(45)[None] if ordered else None
    mask = mask_of(keys=43)
    sparse, sparse_lse = attention(q, k, v, AttentionPlan(mask=mask, order=order), impl="reference")
    out, lse = attention(q, k, v, AttentionPlan(mask=mask, order=order, delta_rows=7), impl=impl)
    places = torch.arange(45) if order is None else order[0]
    real = places[:43]
    dense, _ = attention(q, k[:, :, real], v[:, :, real], impl="reference")
    want = sparse.clone()
    for rank, place in enumerate(places):
        leader = places[rank - rank % 7]
        want[:, :, place] += dense[:, :, leader] - sparse[:, :, leader]
    close(out, want)
    close(lse.nan_to_num(neginf=-1e3), sparse_lse.nan_to_num(neginf=-1e3))
    # The leaders themselves are exact.
    close(out[:, :, places[::7]], dense[:, :, places[::7]])


def test_delta_rows_correct_what_approximation_leaves():
    q, k, v = inputs()
    plan = AttentionPlan(mask=mask_of(), approximate=True, delta_rows=5)
    out, _ = attention(q, k, v, plan)
    close(out[:, :, ::5], attention(q, k, v)[0][:, :, ::5])


def test_gain_and_residual_come_last_in_the_original_order():
    q, k, v = inputs()
    order, gain, residual = torch.randperm(45)[None], torch.rand(2, 4, 45), torch.randn(2, 4, 45, 8)
    plan = {"mask": mask_of(), "order": order, "delta_rows": 6}
    plain, plain_lse = attention(q, k, v, AttentionPlan(**plan))
    out, lse = attention(q, k, v, AttentionPlan(**plan, gain=gain, residual=residual))
    close(out, gain[..., None] * plain + residual, atol=1e-6)
    assert torch.equal(lse, plain_lse)
    half = [x.bfloat16() for x in (q, k, v)]
    assert attention(*half, AttentionPlan(gain=gain))[0].dtype == torch.bfloat16


def test_combinations_without_a_meaning_are_refused():
    q, k, v = inputs()
    plan = AttentionPlan(mask=mask_of(), approximate=True)
    with pytest.raises(UnsupportedError, match="under a key bias"):
        attention(q, k, v, plan, key_bias=torch.zeros(2, 45))
    for extra in ({"approximate": True}, {"delta_rows": 4}):
        with pytest.raises(UnsupportedError, match="causal calls take neither"):
            attention(q, k, v, AttentionPlan(mask=mask_of(), **extra), causal=True)
