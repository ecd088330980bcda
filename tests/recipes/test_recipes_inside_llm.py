"""What the papers claim of reductions inside a language model."""

import pytest
import torch
from prompt_contexts import GivenStatistics, kept, layer_context

from tubelet.models.accelerate import accelerate
from tubelet.recipes import FastV
from tubelet.testing import catalogue_llm, tiny_llm


def test_FastV_keeps_what_the_last_token_attends_to():
    attention = torch.full((2, 30, 20), 0.9)
    attention[:, -1] = 0.001
    # Only the mean over heads puts the third above the fourth.
    attention[0, -1, 4], attention[1, -1, 11] = 0.5, 0.4
    attention[:, -1, 7] = 0.12
    attention[0, -1, 9] = 0.2
    context = layer_context(torch.zeros(20, 8), stats=GivenStatistics(attention))
    assert kept(FastV(keep_ratio=0.15).plan(context)) == [4, 7, 11]


@pytest.mark.parametrize("name", tiny_llm.HOSTS)
def test_FastV_reads_the_host_s_own_attention_of_the_layer_before(name):
    model, inputs = tiny_llm.build(name), tiny_llm.prompt(name, question=(7,))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    ids = inputs["input_ids"][0]
    video = (ids == tiny_llm.HOSTS[name].placeholder).nonzero()[:, 0]
    if name == "llava_onevision":
        video = video[:-1]
    if name == "video_llava":
        video = video[torch.arange(len(video)) % 17 != 0]
    wanted = maps[1][0].mean(0)[-1, video].topk(32).indices.sort().values
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        ((_, plan),) = catalogue_llm.decisions(model, FastV(keep_ratio=0.5), inputs)
        assert kept(plan) == wanted.tolist()


def test_FastV_leaves_the_layers_before_it_whole():
    model, inputs = tiny_llm.build("llava_onevision"), tiny_llm.prompt("llava_onevision")
    with accelerate(model, FastV(layer=3)) as handle, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    whole = inputs["input_ids"].shape[1]
    assert [layer.get_seq_length() for layer in cache.layers] == [whole] * 3 + [whole - 32]
    assert handle.report().tokens_per_layer == [whole] * 3 + [whole - 32]
