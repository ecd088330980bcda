"""Private torch interfaces that tubelet relies on: this file fails first when they move."""

import inspect

import pytest
import torch
from torch.nn.attention import flex_attention

# Operator -> (positional arguments in order, keyword-only arguments).
USED = {
    "_scaled_dot_product_flash_attention_for_cpu": (
        ["query", "key", "value", "dropout_p", "is_causal"],
        ["attn_mask", "scale"],
    ),
    "_scaled_dot_product_efficient_attention": (
        ["query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p", "is_causal"],
        ["scale"],
    ),
    "_scaled_dot_product_cudnn_attention": (
        [
            "query",
            "key",
            "value",
            "attn_bias",
            "compute_log_sumexp",
            "dropout_p",
            "is_causal",
            "return_debug_mask",
        ],
        ["scale"],
    ),
    "_scaled_dot_product_flash_attention": (
        ["query", "key", "value", "dropout_p", "is_causal", "return_debug_mask"],
        ["scale"],
    ),
}


@pytest.mark.parametrize("name", USED)
def test_fused_operators_have_the_arguments_and_results_used(name):
    positional, keywords = USED[name]
    schema = getattr(torch.ops.aten, name).default._schema
    arguments = schema.arguments
    assert [a.name for a in arguments if not a.kwarg_only][: len(positional)] == positional
    assert set(keywords) <= {a.name for a in arguments if a.kwarg_only}
    extra = [a for a in arguments if a.name not in (*positional, *keywords)]
    assert all(a.has_default_value() for a in extra)
    results = [result.name for result in schema.returns]
    assert results[0] == "output"
    assert results[1].replace("_", "") == "logsumexp"


def test_the_cpu_operator_returns_exactly_output_and_lse():
    schema = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default._schema
    assert len(schema.returns) == 2


def test_flex_attention_returns_the_lse_on_request():
    assert flex_attention.AuxRequest(lse=True).lse is True
    parameters = inspect.signature(flex_attention.flex_attention).parameters
    wanted = {"score_mod", "block_mask", "scale", "enable_gqa", "return_aux"}
    assert wanted <= set(parameters)


def test_flex_block_masks_take_lists_and_lengths():
    parameters = inspect.signature(flex_attention.BlockMask.from_kv_blocks).parameters
    assert {"BLOCK_SIZE", "mask_mod", "seq_lengths"} <= set(parameters)
    assert list(parameters)[:2] == ["kv_num_blocks", "kv_indices"]


def test_the_variable_length_operator_has_the_arguments_used():
    schema = torch.ops.aten._flash_attention_forward.default._schema
    wanted = ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p"]
    wanted += ["is_causal", "return_debug_mask"]
    assert [a.name for a in schema.arguments if not a.kwarg_only] == wanted
    assert [r.name for r in schema.returns][:2] == ["output", "softmax_logsumexp"]


def test_dynamo_has_the_limits_that_flex_raises():
    config = torch._dynamo.config
    assert isinstance(config.recompile_limit, int)
    assert isinstance(config.accumulated_recompile_limit, int)
