"""Attention statistics: equal to those of the materialised map, without the map."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tubelet.core.context import AttentionStatistics
from tubelet.core.errors import ShapeError
from tubelet.kernels.attention import (
    CallStatistics,
    attention,
    attention_entropy,
    received_attention,
)

WIDTH = 64


def call(num, batch=1, heads=2, groups=1, bias=False, sharpness=1.0):
    q = sharpness * torch.randn(batch, heads, num, WIDTH)
    k, v = torch.randn(2, batch, groups, num, WIDTH)
    key_bias = torch.randint(1, 512, (batch, num)).float().log() if bias else None
    lse = attention(q, k, v, key_bias=key_bias)[1]
    return q, k, v, lse, key_bias


def softmax_map(q, k, key_bias):
    logits = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    logits = logits * WIDTH**-0.5
    if key_bias is not None:
        logits = logits + key_bias.double()[:, None, None]
    return logits.softmax(-1)


def entropy_of(weights):
    return -torch.special.xlogy(weights, weights).sum(-1)


@pytest.mark.parametrize("num", [1, 17, 256, 1024, 2048])
@pytest.mark.parametrize("bias", [False, True])
def test_statistics_equal_those_of_the_map(num, bias):
    q, k, _, lse, key_bias = call(num, bias=bias)
    weights = softmax_map(q, k, key_bias)
    received = received_attention(q, k, lse, key_bias=key_bias)
    entropy = attention_entropy(q, k, lse, key_bias=key_bias)
    assert received.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(received.double(), weights.sum(2), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), entropy_of(weights), atol=1e-5, rtol=0)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_grouped_heads_and_batches(batch, groups):
    q, k, _, lse, key_bias = call(33, batch=batch, heads=4, groups=groups, bias=True)
    weights = softmax_map(q, k, key_bias)
    received = received_attention(q, k, lse, key_bias=key_bias)
    entropy = attention_entropy(q, k, lse, key_bias=key_bias)
    assert received.shape == entropy.shape == (batch, 4, 33)
    torch.testing.assert_close(received.double(), weights.sum(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), entropy_of(weights), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num", [17, 256])
def test_received_attention_weighs_its_queries(num):
    q, k, _, lse, key_bias = call(num, batch=2, bias=True)
    weight = torch.rand(2, num)
    weight[:, ::3] = 0
    received = received_attention(q, k, lse, weight=weight, key_bias=key_bias)
    weights = softmax_map(q, k, key_bias)
    expected = (weights * weight.double()[:, None, :, None]).sum(2)
    torch.testing.assert_close(received.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("num", [1, 17, 1024])
def test_received_attention_sums_to_the_query_weight(num):
    q, k, _, lse, key_bias = call(num, bias=True)
    total = received_attention(q, k, lse, key_bias=key_bias).sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, num), rtol=1e-5, atol=0)
    weight = torch.rand(1, num)
    total = received_attention(q, k, lse, weight=weight, key_bias=key_bias).sum(-1)
    torch.testing.assert_close(total, weight.sum().expand_as(total), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sharpness", [0.0, 1e-3, 1.0, 30.0])
def test_entropy_lies_between_zero_and_the_log_of_the_keys(sharpness):
    num = 300
    q, k, _, lse, _ = call(num, sharpness=sharpness)
    entropy = attention_entropy(q, k, lse)
    assert float(entropy.min()) >= 0
    assert float(entropy.max()) <= math.log(num) + 1e-5
    if sharpness <= 1e-3:
        assert float(entropy.min()) == pytest.approx(math.log(num), abs=1e-4)


def test_one_key_has_no_entropy():
    q, k, _, lse, _ = call(1)
    assert float(attention_entropy(q, k, lse).max()) < 1e-6


def test_cross_attention_statistics():
    q, k = torch.randn(1, 2, 9, WIDTH), torch.randn(1, 2, 40, WIDTH)
    lse = attention(q, k, k)[1]
    weights = softmax_map(q, k, None)
    received = received_attention(q, k, lse)
    torch.testing.assert_close(received.double(), weights.sum(2), atol=1e-5, rtol=0)
    entropy = attention_entropy(q, k, lse)
    torch.testing.assert_close(entropy.double(), entropy_of(weights), atol=1e-5, rtol=0)


def test_excluded_keys_receive_nothing_and_carry_no_entropy():
    q, k, v = torch.randn(3, 1, 2, 50, WIDTH)
    key_bias = torch.zeros(1, 50)
    key_bias[:, 30:] = -torch.inf
    lse = attention(q, k, v, key_bias=key_bias)[1]
    weights = softmax_map(q, k[:, :, :30], None)
    received = received_attention(q, k, lse, key_bias=key_bias)
    assert bool((received[..., 30:] == 0).all())
    torch.testing.assert_close(received[..., :30].double(), weights.sum(2), atol=1e-5, rtol=0)
    entropy = attention_entropy(q, k, lse, key_bias=key_bias)
    torch.testing.assert_close(entropy.double(), entropy_of(weights), atol=1e-5, rtol=0)


def test_a_given_scale_is_used_by_all():
    q, k, v = torch.randn(3, 1, 2, 20, WIDTH)
    lse = attention(q, k, v, scale=0.3)[1]
    weights = softmax_map(q * 0.3 * WIDTH**0.5, k, None)
    received = received_attention(q, k, lse, scale=0.3)
    torch.testing.assert_close(received.double(), weights.sum(2), atol=2e-5, rtol=0)
    entropy = attention_entropy(q, k, lse, scale=0.3)
    torch.testing.assert_close(entropy.double(), entropy_of(weights), atol=2e-5, rtol=0)


MEMORY = """
import torch
from tubelet.kernels.attention import attention, attention_entropy, received_attention

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

torch.set_num_threads(2)
torch.set_grad_enabled(False)
for num in (256, 4096, 8192):
    q, k = torch.randn(2, 1, 1, num, 64)
    bias = torch.zeros(1, num)
    lse = attention(q, k, k, key_bias=bias)[1]
    received_attention(q, k, lse, key_bias=bias)
    attention_entropy(q, k, lse, key_bias=bias)
    print(peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux peak memory")
def test_memory_grows_linearly_with_the_tokens():
    # VmHWM belongs to the fresh process alone; getrusage would inherit pytest's own peak.
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=120
    )
    small, middle, large = (int(line) / 1024 for line in run.stdout.split())
    # One float32 map would be 64 MiB at 4,096 tokens and 256 MiB at 8,192; q is 2 MiB there.
    assert middle - small < 40
    assert large - middle < 40


@pytest.fixture
def stats():
    q, k, v, lse, key_bias = call(21, batch=2, heads=4, groups=2, bias=True)
    return CallStatistics(q=q, k=k, v=v, scale=WIDTH**-0.5, lse=lse, key_bias=key_bias)


def test_call_statistics_offer_what_recipes_ask_for(stats):
    assert isinstance(stats, AttentionStatistics)
    weights = softmax_map(stats.q, stats.k, stats.key_bias)
    for have, want in (
        (stats.keys(), stats.k.mean(1)),
        (stats.rows([0, 5, 20]), weights[:, :, [0, 5, 20]]),
        (stats.value_norm(), stats.v.square().sum(-1).sqrt().repeat_interleave(2, 1)),
        (stats.received(), weights.sum(2).mean(1)),
        (stats.entropy(), entropy_of(weights).mean(1)),
    ):
        assert have.dtype == torch.float32
        torch.testing.assert_close(have.double(), want.double(), atol=1e-5, rtol=0)


def test_call_statistics_weigh_queries(stats):
    weight = torch.rand(2, 21)
    weights = softmax_map(stats.q, stats.k, stats.key_bias)
    expected = (weights * weight.double()[:, None, :, None]).sum(2).mean(1)
    torch.testing.assert_close(stats.received(weight).double(), expected, atol=1e-5, rtol=0)


def test_rows_are_softmax_rows_in_float32_for_low_precision_inputs(stats):
    low = CallStatistics(
        q=stats.q.bfloat16(), k=stats.k.bfloat16(), v=stats.v.bfloat16(), scale=WIDTH**-0.5
    )
    rows = low.rows([3])
    assert rows.dtype == low.value_norm().dtype == low.keys().dtype == torch.float32
    expected = softmax_map(low.q, low.k, None)[:, :, [3]]
    torch.testing.assert_close(rows.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["received", "entropy"])
def test_statistics_that_need_the_lse_say_so(stats, name):
    bare = CallStatistics(q=stats.q, k=stats.k, v=stats.v, scale=stats.scale)
    with pytest.raises(ShapeError, match="kept no log-sum-exp"):
        getattr(bare, name)()
