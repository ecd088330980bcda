"""Statistics of vision towers against the hosts' own attention maps and features."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import UnsupportedError
from tubelet.core.prompt import PromptContext
from tubelet.core.recipe import PromptReduction
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.testing import tiny_llm
from tubelet.testing.catalogue import spying

HOSTS = {name: tiny_llm.build(name) for name in tiny_llm.HOSTS}
hosts = pytest.mark.parametrize("name", HOSTS)
pytestmark = pytest.mark.filterwarnings("ignore::tubelet.core.errors.NoEffectWarning")


@dataclass(frozen=True, kw_only=True)
class Asking(PromptReduction):
    """Keeps everything and asks for what it is told to."""

    identity: ClassVar = {}
    asked: ClassVar[frozenset[tuple[str, int]]] = frozenset()

    @property
    def vision(self) -> frozenset[tuple[str, int]]:
        return self.asked

    def plan(self, ctx: PromptContext) -> None:
        return None


def asked_for(name: str, *wanted: tuple[str, int]) -> list[PromptContext]:
    """What a recipe that asks for these is shown of two videos."""
    seen: list[Any] = []
    recipe = type("AskingHere", (Asking,), {"asked": frozenset(wanted)})()
    with accelerate(HOSTS[name], spying(recipe, lambda ctx, plan: seen.append(ctx))):
        HOSTS[name](**tiny_llm.prompt(name, [[3], [3]]))
    return seen


def tower_of(name: str) -> Any:
    adapter = adapter_for(HOSTS[name])
    return HOSTS[name].model.get_submodule(adapter.tower.path), adapter.tower


def maps_of_the_last_layer(name: str) -> Tensor:
    """[frames, S] received attention of every place, from the tower's own eager maps."""
    tower, facts = tower_of(name)
    last = list(tower.get_submodule(facts.layers))[-1].get_submodule(facts.attention)
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append(output[1])

    hook = last.register_forward_hook(keep)
    tower.set_attn_implementation("eager")
    HOSTS[name](**tiny_llm.prompt(name, [[3], [3]]))
    tower.set_attn_implementation("sdpa")
    hook.remove()
    return seen[0].mean(1)


@pytest.mark.parametrize("name", ["llava_onevision", "video_llava", "internvl", "smolvlm"])
def test_received_attention_is_that_of_the_host_s_map(name):
    maps = maps_of_the_last_layer(name)
    received = maps.mean(1)[:, adapter_for(HOSTS[name]).tower.class_tokens :]
    side = round(received.shape[1] ** 0.5)
    square = received.reshape(6, 1, side, side)
    if name == "llava_onevision":
        square = F.interpolate(square, size=(4, 4), mode="bilinear")
    elif side > 4:
        square = F.avg_pool2d(square, 2)
    found = torch.cat([ctx.statistic("received", -1) for ctx in asked_for(name, ("received", -1))])
    assert torch.allclose(found, square.reshape(2, 48), atol=1e-5)


@pytest.mark.parametrize("name", ["video_llava", "internvl"])
def test_class_attention_is_the_first_row_of_the_host_s_map(name):
    row = maps_of_the_last_layer(name)[:, 0, 1:]
    side = round(row.shape[1] ** 0.5)
    square = row.reshape(6, 1, side, side)
    square = F.avg_pool2d(square, 2) if side > 4 else square
    found = torch.cat([ctx.statistic("class", -1) for ctx in asked_for(name, ("class", -1))])
    assert torch.allclose(found, square.reshape(2, 48), atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_statistics_of_qwen_follow_patches_in_raster_order(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name, [[3], [3]])
    before = [ctx.statistic("hidden", -1) for ctx in asked_for(name, ("hidden", -1))]
    patches = inputs["pixel_values_videos"].clone()
    # The four patches of token (frame 1, row 0, column 2) of the second video, which windows move.
    token = 1 * 16 + 2
    patches[3 * 64 + 4 * token : 3 * 64 + 4 * token + 4] += 5
    seen: list[Any] = []
    recipe = type("AskingHere", (Asking,), {"asked": frozenset({("hidden", 0)})})()
    with accelerate(model, spying(recipe, lambda ctx, plan: seen.append(ctx))):
        model(**inputs)
        model(**{**inputs, "pixel_values_videos": patches})
    first, second, other_first, other_second = (ctx.statistic("hidden", 0) for ctx in seen)
    assert torch.equal(first, other_first)
    moved = (second - other_second).abs().sum(-1)[0]
    assert int(moved.argmax()) == token
    assert before[0].shape == (1, 48, 32)


@hosts
def test_tokens_stand_in_raster_order(name):
    """The token whose pixels change most moves most, and its frame alone with it."""
    model, inputs = HOSTS[name], tiny_llm.prompt(name, [[3]])
    key = adapter_for(model).pixels
    pixels = inputs[key].clone()
    if name.startswith("qwen"):
        pixels[64 + 4 * 6 : 64 + 4 * 7] += 9
    else:
        frames = pixels.view(3, 3, *pixels.shape[-2:])
        cell = frames.shape[-1] // 4
        frames[1, :, cell : 2 * cell, 2 * cell : 3 * cell] += 9
    seen: list[Any] = []
    with accelerate(model, spying(Asking(), lambda ctx, plan: seen.append(ctx))):
        model(**inputs)
        model(**{**inputs, key: pixels})
    moved = (seen[0].hidden - seen[1].hidden).abs().sum(-1)[0].reshape(3, 16)
    assert int(moved[1].argmax()) == 6
    assert moved[0].max() < 1e-4
    assert moved[2].max() < 1e-4


@hosts
def test_context_holds_the_text_and_where_the_question_begins(name):
    model, inputs = HOSTS[name], tiny_llm.prompt(name, [[3]], question=(7,))
    seen: list[Any] = []
    with accelerate(model, spying(Asking(), lambda ctx, plan: seen.append(ctx))):
        model(**inputs)
    (ctx,) = seen
    embed = model.get_input_embeddings()
    ids = inputs["input_ids"][0]
    text = ids[ids != tiny_llm.HOSTS[name].placeholder]
    assert torch.equal(ctx.text, embed(text))
    assert torch.equal(ctx.question[-7:], embed(ids[-7:]))
    behind = len(ids) - 1 - int((ids == tiny_llm.HOSTS[name].placeholder).nonzero()[-1])
    assert ctx.num_question == behind
    assert torch.equal(ctx.frames[1], ctx.hidden[0, 16:32])


@hosts
def test_statistics_that_were_not_asked_for_or_do_not_exist_are_refused(name):
    (ctx, _) = asked_for(name, ("keys", 0))
    assert ctx.statistic("keys", 0).shape == (1, 48, 16)
    with pytest.raises(UnsupportedError, match="asks for keys of layer 0"):
        ctx.statistic("received", 0)
    with pytest.raises(UnsupportedError, match="vision layer 9 is not among"):
        asked_for(name, ("keys", 9))
    with pytest.raises(UnsupportedError, match="unknown vision statistic 'entropy'"):
        asked_for(name, ("entropy", 0))


@hosts
def test_class_or_received_is_the_class_token_s_where_the_tower_has_one(name):
    wanted = "class" if adapter_for(HOSTS[name]).tower.class_tokens else "received"
    for ctx in asked_for(name, ("class or received", -1), (wanted, -1)):
        assert torch.equal(ctx.statistic("class or received", -1), ctx.statistic(wanted, -1))
