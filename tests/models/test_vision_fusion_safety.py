"""Fused vision towers among other things: weights that change, hooks, conflicts, copies."""

import copy
import pickle

import pytest
import torch
from fused_towers import LLAVA, QWEN, SIZES, build, close, patches, tower_outputs
from torch import nn
from transformers import AttentionInterface, Qwen3VLForConditionalGeneration

import tubelet
from tubelet.core.errors import ConflictError, ShapeError, UnsupportedError
from tubelet.models import vision_operations as ops
from tubelet.models.accelerate import accelerate
from tubelet.models.llm_presets import llm_preset
from tubelet.models.vision_fusion import fuse_vision
from tubelet.recipes import VidCom2, VisionZip
from tubelet.testing import tiny, tiny_llm


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in (*QWEN, LLAVA)}


# Weights that change


def changed(how, model):
    other = build("tiny-qwen2.5-vl", initializer_range=0.3)
    if how == "loaded":
        model.load_state_dict(other.state_dict())
    elif how == "assigned":
        model.load_state_dict(other.state_dict(), assign=True)
    elif how == "in place, unseen":
        for weight in model.model.visual.parameters():
            weight.data.mul_(0.8)
    elif how == "cast":
        model.to(torch.float64)


@pytest.mark.parametrize("how", ["loaded", "assigned", "in place, unseen", "cast"])
def test_weights_may_change_while_fused(how, forced):
    model, pixels = build("tiny-qwen2.5-vl"), patches("tiny-qwen2.5-vl")
    with torch.inference_mode(False), torch.no_grad():
        fusion = fuse_vision(model)
        tower_outputs(model, pixels)
        changed(how, model)
        found = tower_outputs(model, pixels)
        fusion.remove()
        close(found, tower_outputs(model, pixels))


# Who else is there


class Spy:
    def __init__(self):
        self.seen = []

    def __call__(self, module, query, key, value, attention_mask, **options):
        self.seen.append(((query, key, value, attention_mask), options))
        return query.transpose(1, 2), None


@pytest.mark.parametrize("name", QWEN)
def test_flash_attention_is_called_as_the_host_calls_it(name):
    spy, model = Spy(), build(name)
    AttentionInterface.register("spying_flash", spy)
    model.model.visual.config._attn_implementation = "spying_flash"
    pixels = patches(name)
    with torch.inference_mode():
        tower_outputs(model, pixels)
        host, spy.seen = spy.seen, []
        with fuse_vision(model) as fusion:
            assert "frames packed" not in str(fusion)
            assert model.model.visual.config._attn_implementation == "spying_flash"
            tower_outputs(model, pixels)
    assert len(spy.seen) == len(host) > 0
    for (states, options), (their_states, their_options) in zip(spy.seen, host, strict=True):
        assert [x.shape for x in states[:3]] == [x.shape for x in their_states[:3]]
        assert states[3] is their_states[3] is None
        assert options.keys() == their_options.keys()
        for key, value in options.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(value, their_options[key]), key


@pytest.mark.parametrize(
    "inner",
    [
        *(f"blocks.1.{x}" for x in ("mlp.down_proj", "mlp.gate_proj", "attn.qkv")),
        "patch_embed.proj",
    ],
)
def test_hooks_on_inner_layers_still_run(inner, models, forced):
    model, seen = models["tiny-qwen2.5-vl"], []
    layer = model.model.visual.get_submodule(inner)
    hook = layer.register_forward_hook(lambda *call: seen.append(1))
    with torch.inference_mode(), fuse_vision(model):
        tower_outputs(model, patches("tiny-qwen2.5-vl"))
    hook.remove()
    assert seen == [1]


def test_a_method_that_somebody_replaced_is_left_alone():
    model = build("tiny-qwen3-vl")
    block = model.model.visual.blocks[1].attn
    own = block.forward
    block.forward = own
    with fuse_vision(model) as fusion:
        assert str(fusion) == "patch embedding"
        assert model.model.visual.config._attn_implementation == "sdpa"
    assert vars(block)["forward"] is own


def test_what_was_put_around_a_fused_method_stays_and_is_said():
    model, seen = build("tiny-qwen2.5-vl"), []
    fusion, block = fuse_vision(model), model.model.visual.blocks[1].attn
    fused = block.forward

    def hooked(*args, **options):
        seen.append(1)
        return fused(*args, **options)

    block.forward = hooked
    with pytest.raises(ConflictError, match=r"forward of a .*VisionAttention .* was replaced"):
        fusion.remove()
    assert fusion.done
    with torch.inference_mode():
        tower_outputs(model, patches("tiny-qwen2.5-vl"))
    assert seen == [1]
    block.forward = fused
    fusion.remove()
    assert "forward" not in vars(block)


def test_attention_chosen_while_fused_stays_chosen():
    model, pixels = build("tiny-qwen3-vl"), patches("tiny-qwen3-vl")
    with torch.inference_mode():
        host = tower_outputs(model, pixels)
        with fuse_vision(model) as fusion:
            model.model.visual.set_attn_implementation("eager")
            assert "frames packed" not in str(fusion)
            close(tower_outputs(model, pixels), host)
    assert model.model.visual.config._attn_implementation == "eager"


def test_an_error_inside_is_not_hidden_by_a_fusion_that_cannot_go(models):
    model = models["tiny-qwen3-vl"]
    fusion = fuse_vision(model)
    handles = []

    def fails():
        with fusion:
            handles.append(accelerate(model, VidCom2()))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside") as caught:
        fails()
    assert "stays fused" in caught.value.__notes__[0]
    handles[0].remove()
    fusion.remove()


class Quantised(nn.Parameter):
    """A weight as packages for quantisation make them: a product is all it knows."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in (nn.functional.linear, nn.functional.conv3d) and "get" not in func.__name__:
            raise NotImplementedError(func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_weights_of_another_kind_stay_the_hosts(forced):
    model, pixels = build("tiny-qwen2.5-vl"), patches("tiny-qwen2.5-vl")
    tower = model.model.visual
    with torch.inference_mode():
        host = tower_outputs(model, pixels)
        for layer in (tower.patch_embed.proj, *(block.mlp.down_proj for block in tower.blocks)):
            layer.weight.__class__ = Quantised
        with fuse_vision(model) as fusion:
            assert "rotary" in str(fusion) or "frames packed" in str(fusion)
            assert not {"patch embedding", "MLP"} & {
                words.split(" padded")[0] for words in fusion.done
            }
            close(tower_outputs(model, pixels), host)


@pytest.mark.parametrize("name", QWEN)
def test_lengths_written_over_in_place_are_read_again(name, models):
    model, pixels = models[name], patches(name, torch.tensor([[2, 8, 8]]))
    sizes, ends = torch.tensor([[2, 8, 8]]), torch.tensor([0, 64, 128], dtype=torch.int32)
    tower = model.model.visual

    def run():
        return list(tower(pixels, sizes, cu_seqlens=ends, return_dict=True).pooler_output)

    with torch.inference_mode(), fuse_vision(model):
        first = run()
        ends.copy_(torch.tensor([0, 32, 128]))
        second = run()
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_lengths_that_leave_patches_over_are_refused():
    x = torch.randn(1, 2, 10, 8)
    with pytest.raises(ShapeError, match="ends behind 7 patches, but there are 10"):
        ops.PackedAttention()(nn.Identity(), x, x, x, None, cu_seq_lens_q=torch.tensor([0, 3, 7]))


def test_another_model_with_the_same_config_is_not_touched():
    config = llm_preset("tiny-qwen3-vl").make_config()
    one, two = (Qwen3VLForConditionalGeneration(config).eval() for _ in range(2))
    assert one.model.visual.config is two.model.visual.config
    with fuse_vision(one), torch.inference_mode():
        assert two.model.visual.config._attn_implementation == "sdpa"
        # Both may even look at their towers at once.
        with accelerate(one, VisionZip(keep_ratio=0.4)), accelerate(two, VisionZip(keep_ratio=0.4)):
            assert ops.PACKED in one.model.visual.config._attn_implementation
            with pytest.raises(ConflictError, match="accelerated already"):
                fuse_vision(two)
    with accelerate(one, VisionZip(keep_ratio=0.4)):
        with pytest.raises(ConflictError, match="shares its config"):
            fuse_vision(two)
        assert not hasattr(two.model.visual, "_tubelet_fusion")


@pytest.mark.parametrize("name", [*QWEN, LLAVA])
def test_remove_gives_the_model_back_exactly(name, models):
    model = models[name]

    def state():
        own = {path: set(vars(m)) for path, m in model.named_modules()}
        configs = {path: id(m.config) for path, m in model.named_modules() if hasattr(m, "config")}
        return own, configs, model.config.to_dict(), list(model.state_dict())

    before = state()
    names = list(model.state_dict())
    fusion = fuse_vision(model)
    assert list(model.state_dict()) == names
    assert state() != before
    assert str(fusion) not in ("", "nothing fused")
    with torch.no_grad():
        if name not in QWEN:
            model.model.apply_pooling(torch.randn(1, 64, 8))
    fusion.remove()
    fusion.remove()
    assert state() == before
    assert fusion.done == ()
    with fuse_vision(model):
        pass
    assert state() == before


def test_conflicts_change_nothing(models):
    model = models["tiny-qwen3-vl"]
    with fuse_vision(model) as fusion:
        with pytest.raises(ConflictError, match="fused already"):
            fuse_vision(model)
        with accelerate(model, VidCom2()):
            done = fusion.done
            with pytest.raises(ConflictError, match="recipes are on"):
                fusion.remove()
            assert fusion.done == done != ()
            assert model.model.visual.config._attn_implementation == ops.PACKED
    with accelerate(model, VidCom2()), pytest.raises(ConflictError, match="comes first"):
        fuse_vision(model)
    assert "forward" not in vars(model.model.visual.blocks[0].attn)


@pytest.mark.parametrize("name", ["video_llava", "smolvlm", "internvl"])
def test_other_video_llms_are_refused(name):
    with pytest.raises(UnsupportedError, match=r"ForConditionalGeneration has no.*Qwen3VL"):
        tubelet.fuse_vision(tiny_llm.build(name))


def test_encoders_and_models_without_weights_are_refused():
    with pytest.raises(UnsupportedError, match=r"VideoMAE.*Qwen2_5_VL"):
        fuse_vision(tiny.build("videomae"))
    with pytest.raises(UnsupportedError, match="no weights"):
        fuse_vision(llm_preset("tiny-qwen3-vl").build(device="meta"))


@pytest.mark.parametrize("name", [*QWEN, LLAVA])
def test_a_tower_of_unknown_parts_is_refused(name):
    model = build(name)
    if name in QWEN:
        visual = model.model.visual
        for module in (visual.patch_embed, *(b.attn for b in visual.blocks)):
            module.forward = module.forward
        for block in visual.blocks:
            block.mlp = nn.Identity()
        for module in visual.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = module.forward
    else:
        model.model.apply_pooling = model.model.apply_pooling
    with pytest.raises(UnsupportedError, match="nothing in the vision tower"):
        fuse_vision(model)
    assert not any(hasattr(part, "_tubelet_fusion") for part in model.modules())


def test_copies_of_a_fused_model_are_refused_and_of_its_parts_their_own():
    model = build("tiny-qwen3-vl")
    hidden, angles = torch.randn(8, 32), torch.randn(2, 8, 16).unbind(0)
    cu = torch.tensor([0, 8], dtype=torch.int32)
    with torch.no_grad(), fuse_vision(model):
        for way in (copy.deepcopy, pickle.dumps):
            with pytest.raises(UnsupportedError, match=r"cannot be (copied|saved)"):
                way(model)
        part = copy.deepcopy(model.model.visual.blocks[0].attn)
        part.proj.weight.zero_()
        part.proj.bias.fill_(3)
        assert torch.equal(part(hidden, cu, position_embeddings=angles), torch.full((8, 32), 3.0))


@pytest.mark.parametrize("name", [*QWEN, LLAVA])
def test_a_fused_model_compiles(name, models, forced):
    model = models[name]
    torch._dynamo.reset()
    with torch.no_grad(), fuse_vision(model):
        if name in QWEN:
            pixels = patches(name)
            host = model.model.visual(pixels, SIZES, return_dict=True).pooler_output
            tower = torch.compile(model.model.visual, backend="eager")
            found = tower(pixels, SIZES, return_dict=True).pooler_output
        else:
            features = torch.randn(2, 64, 8)
            host = model.model.apply_pooling(features)
            found = torch.compile(model.model.apply_pooling, backend="eager")(features)
    torch._dynamo.reset()
    close([found], [host])
