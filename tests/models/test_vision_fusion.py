"""Fused vision towers give the host's results; canaries and GPU tests of them."""

import importlib
import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fused_towers import LLAVA, PIXELS, QWEN, SIZES, build, close, patches, tower_outputs
from torch import nn

from tubelet.models import vision_operations as ops
from tubelet.models.accelerate import accelerate
from tubelet.models.llm_presets import llm_preset
from tubelet.models.vision_fusion import POOLS, TOWERS, fuse_vision
from tubelet.recipes import FastVID, FoPru, VidCom2, VisionZip
from tubelet.testing import tiny_llm


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in (*QWEN, LLAVA)}


# Packed attention


@pytest.mark.parametrize("lengths", [[6, 6, 6], [4, 2, 4, 8, 2], [5]])
def test_packed_attention_stays_within_each_sequence(lengths):
    total = sum(lengths)
    q, k, v = (torch.randn(1, 2, total, 8) for _ in range(3))
    parts = [x.split(lengths, dim=2) for x in (q, k, v)]
    wanted = [F.scaled_dot_product_attention(*part, scale=0.3) for part in zip(*parts, strict=True)]
    found = ops.attend(q, k, v, lengths, 0.3)
    assert torch.allclose(found, torch.cat(wanted, dim=2).transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("name", QWEN)
def test_frames_of_one_length_are_one_call(name, models, monkeypatch):
    calls = []
    host = F.scaled_dot_product_attention

    def counting(q, *args, **kwargs):
        calls.append(q.shape[0])
        return host(q, *args, **kwargs)

    with torch.inference_mode(), fuse_vision(models[name]) as fusion:
        monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
        tower_outputs(models[name], patches(name))
        assert "frames packed" in str(fusion)
    # Frames of 24, 60 and 64 patches; in Qwen2.5-VL windows of 4, 8 and 16 in two of three layers.
    frames, windows = [3, 2, 1], [2, 9, 11]
    assert calls == (windows + frames + windows if "2.5" in name else frames * 3)


def test_lengths_are_read_once_per_object():
    packed, cu = ops.PackedAttention(), torch.tensor([0, 3, 5])
    x = torch.randn(1, 2, 5, 8)
    out, _ = packed(nn.Module(), x, x, x, None, cu_seq_lens_q=cu)
    assert packed.last[0] is cu
    other, _ = packed(nn.Module(), x, x, x, None, cu_seq_lens_q=torch.tensor([0, 5]))
    assert packed.last[1] == [5]
    assert not torch.allclose(out, other)


# The host's results


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("name", QWEN)
def test_attention_on_a_cpu_is_the_hosts_bit_for_bit(name, kind, models):
    model = models[name]
    block = model.model.visual.blocks[0].attn
    hidden, angles = torch.randn(20, 32), torch.randn(2, 20, 16).unbind(0)
    cu = torch.tensor([0, 8, 16, 20], dtype=torch.int32)
    model.model.visual.set_attn_implementation(kind)
    with torch.inference_mode():
        host = block(hidden, cu_seqlens=cu, position_embeddings=angles)
        with fuse_vision(model) as fusion:
            assert "attention" not in vars(block)
            assert vars(block)["forward"].__func__ is ops.attention
            assert (ops.PACKED in block.config._attn_implementation) == (kind == "sdpa")
            assert ("frames packed" in str(fusion)) == (kind == "sdpa")
            found = block(hidden, cu_seqlens=cu, position_embeddings=angles)
    model.model.visual.set_attn_implementation("sdpa")
    assert torch.equal(found, host)


@pytest.mark.parametrize("name", QWEN)
def test_towers_give_what_the_host_gives(name, models, forced):
    model, pixels = models[name], patches(name)
    with torch.inference_mode():
        host = tower_outputs(model, pixels)
        with fuse_vision(model):
            close(tower_outputs(model, pixels), host)
            # A second shape behind the first, and back.
            close(tower_outputs(model, pixels[:64], SIZES[1:2])[1:2], [host_of(model, pixels[:64])])
            close(tower_outputs(model, pixels), host)
        assert all(map(torch.equal, tower_outputs(model, pixels), host))


def host_of(model, pixels):
    """The pooled output of one frame of 8 x 8 patches by the class's own methods."""
    tower = model.model.visual
    own = {m: vars(m).pop("forward") for m in tower.modules() if "forward" in vars(m)}
    out = tower_outputs(model, pixels, SIZES[1:2])[1]
    for module, forward in own.items():
        module.forward = forward
    return out


@pytest.mark.parametrize("name", QWEN)
def test_hidden_states_of_every_layer_are_given(name, models, forced):
    model, pixels = models[name], patches(name)

    def hidden():
        out = model.model.visual(pixels, SIZES, return_dict=True, output_hidden_states=True)
        return list(out.hidden_states)

    with torch.inference_mode():
        host = hidden()
        with fuse_vision(model):
            close(hidden(), host)
        assert "forward" not in vars(model.model.visual.blocks[0].attn)


@pytest.mark.parametrize("name", QWEN)
def test_images_beside_videos(name, models, forced):
    model = models[name]
    images, videos = (torch.randn(n, PIXELS[name]) for n in (64 + 24, 128))
    grids = torch.tensor([[1, 8, 8], [1, 4, 6]]), torch.tensor([[2, 8, 8]])
    ids = torch.tensor([[5, 102, *[100] * 16, 103, 6, *[100] * 6, 103, *[101] * 32, 103, 9, 8]])
    inputs = {
        "input_ids": ids,
        "pixel_values": images,
        "pixel_values_videos": videos,
        "image_grid_thw": grids[0],
        "video_grid_thw": grids[1],
        "position_ids": torch.arange(ids.shape[1])[None],
    }
    with torch.inference_mode():
        host = model(**inputs).logits
        with fuse_vision(model):
            close([model(**inputs).logits], [host], 1e-4)


@pytest.mark.parametrize(
    ("width", "dtype", "rows", "padded"),
    [
        (3420, torch.bfloat16, 4096, True),
        (3420, torch.bfloat16, 100, False),
        (3420, torch.float32, 4096, False),
        (4304, torch.bfloat16, 4096, False),
    ],
)
def test_what_is_padded_on_a_gpu(width, dtype, rows, padded):
    x = SimpleNamespace(is_cuda=True, numel=lambda: rows * 1280, shape=(rows, 1280))
    layer = nn.Linear(width, 8, dtype=dtype)
    assert ops.pads(x, layer) == padded
    assert not ops.pads(torch.randn(rows, 1280), layer)


# In half precision the weights of the mean are rounded too.
POOLED = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 2**-10, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", POOLED, ids=str)
@pytest.mark.parametrize(("side", "pooled"), [(8, 4), (9, 5)])
def test_pooling_is_the_hosts(side, pooled, dtype):
    model = build(LLAVA, image_size=4 * side)
    features = torch.randn(3, side * side, 24).to(dtype)
    host = model.model.apply_pooling(features)
    assert host.shape == (3, pooled * pooled, 24)
    with fuse_vision(model) as fusion:
        assert str(fusion) == "pooling as a matrix product"
        found = model.model.apply_pooling(features)
    close([found], [host], POOLED[dtype])
    assert found.is_contiguous()


def test_pooling_leaves_equal_patches_as_they_are():
    # The published sides: rounded to half precision the weights of a place do not add up to 1.
    model = build(LLAVA, image_size=4 * 27)
    features = torch.full((1, 27 * 27, 8), 15.9375, dtype=torch.bfloat16)
    with fuse_vision(model):
        assert bool((model.model.apply_pooling(features) == 15.9375).all())


def test_pooling_of_another_precision_behind_the_first(models):
    base = models[LLAVA].model
    with fuse_vision(models[LLAVA]):
        for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.float32):
            features = torch.randn(1, 64, 8, dtype=dtype)
            host = type(base).apply_pooling(base, features)
            close([base.apply_pooling(features)], [host], POOLED[dtype])


@pytest.mark.parametrize("recipe", [FoPru, VisionZip, FastVID, VidCom2], ids=lambda r: r.__name__)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_recipes_that_look_at_the_tower_say_the_same(name, recipe, forced):
    model = tiny_llm.build(name)
    inputs = tiny_llm.prompt(name, [[3], [3]])
    with torch.inference_mode():
        found = []
        for fused in (False, True):
            fusion = fuse_vision(model) if fused else None
            with accelerate(model, recipe(keep_ratio=0.4)):
                logits = model(**inputs).logits
                ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
                found.append((ids, logits))
            if fusion is not None:
                fusion.remove()
    (ids, logits), (same_ids, same_logits) = found
    assert torch.equal(ids, same_ids)
    close([same_logits], [logits], 1e-4)


@pytest.mark.parametrize("name", QWEN)
def test_training_through_a_fused_tower(name, forced):
    model = build(name).train().requires_grad_(True)
    pixels = patches(name)

    def gradients():
        model.zero_grad()
        tower_outputs(model, pixels)[1].square().sum().backward()
        return [weight.grad.clone() for weight in model.model.visual.parameters()
                if weight.grad is not None]  # fmt: skip

    host = gradients()
    with fuse_vision(model):
        close(gradients(), host, 1e-4)


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", LLAVA])
def test_training_after_inference(name, forced):
    """Nothing that is kept was made for inference only."""
    model = build(name).requires_grad_(True)
    with fuse_vision(model):
        if name in QWEN:
            run = lambda: tower_outputs(model, patches(name))[1]  # noqa: E731
        else:
            features = torch.randn(1, 64, 8, requires_grad=True)
            run = lambda: model.model.apply_pooling(features)  # noqa: E731
        with torch.inference_mode():
            run()
        run().sum().backward()


# Canaries: private parts of the hosts, and what a GPU makes of them


STEPS = {
    "tiny-qwen2.5-vl": [
        "rotary embedding",
        "frames packed",
        "patch embedding",
        "MLP padded 52 -> 64 (0.0 MB of copies at a time)",
        "RMSNorm",
    ],
    "tiny-qwen3-vl": [
        "rotary embedding",
        "frames packed",
        "patch embedding",
        "MLP padded 52 -> 64 (0.0 MB of copies at a time)",
    ],
    LLAVA: ["pooling as a matrix product"],
}


@pytest.mark.parametrize("name", STEPS)
def test_every_part_of_the_hosts_is_found(name, models):
    """A host that renames what is replaced here fails this first."""
    with fuse_vision(models[name]) as fusion:
        assert [step.words for step in fusion.steps] == STEPS[name]
        assert type(models[name]).__name__ in (*TOWERS, *POOLS)


@pytest.mark.parametrize("name", QWEN)
def test_the_towers_attention_has_the_interface_used(name, models):
    tower = models[name].model.visual
    attn = tower.blocks[0].attn
    module = importlib.import_module(type(attn).__module__)
    assert callable(module.eager_attention_forward)
    assert callable(module.ALL_ATTENTION_FUNCTIONS.get_interface)
    assert attn.config is tower.config
    assert attn.attention_dropout == 0
    assert attn.scaling == attn.head_dim**-0.5
    taken = inspect.signature(type(attn).forward).parameters
    assert list(taken)[:3] == ["self", "hidden_states", "cu_seqlens"]
    # Anything new might mean something that is not done here.
    known = {"position_embeddings", "rotary_pos_emb", "max_seqlen", "kwargs"}
    assert set(list(taken)[3:]) <= known


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_a_real_tower_on_a_gpu_is_as_near_to_float32_as_the_hosts(name):
    preset = llm_preset(name)
    vision = {**preset.vision, "depth": 4}
    if "fullatt_block_indexes" in vision:
        vision["fullatt_block_indexes"] = [1, 3]
    if "deepstack_visual_indexes" in vision:
        vision["deepstack_visual_indexes"] = [0, 1, 2]
    model = replace(preset, vision=vision).build(layers=3, device="cuda")
    sizes = torch.tensor([[4, 32, 32], [3, 18, 22]], device="cuda")
    side = vision["patch_size"]
    pixels = torch.randn(4 * 1024 + 3 * 396, 6 * side * side, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        host = tower_outputs(model, pixels, sizes)
        with fuse_vision(model) as fusion:
            assert "rotary embedding" in fusion.done
            assert ("MLP padded 3420 -> 3456 (26.5 MB of copies at a time)" in fusion.done) == (
                "2.5" in name
            )
            fused = tower_outputs(model, pixels, sizes)
        model.model.visual.float()
        exact = tower_outputs(model, pixels.float(), sizes)
    for have, want, true in zip(fused, host, exact, strict=True):
        theirs, mine = ((x.float() - true).norm() / true.norm() for x in (want, have))
        assert mine < 1.1 * theirs + 1e-3


@pytest.mark.gpu
def test_padding_and_pooling_on_a_gpu_stay_within_bfloat16():
    model = replace(
        llm_preset("qwen2.5-vl-7b"),
        vision={**llm_preset("qwen2.5-vl-7b").vision, "depth": 1, "fullatt_block_indexes": [0]},
    ).build(layers=1, device="cuda")
    mlp, rows = model.model.visual.blocks[0].mlp, torch.randn(4096, 1280, device="cuda").bfloat16()
    with torch.inference_mode():
        assert ops.pads(rows, mlp.down_proj)
        close([ops.padded_mlp(mlp, rows)], [type(mlp).forward(mlp, rows)], 2**-7)
    llava = build(LLAVA, image_size=108).cuda().bfloat16()
    features = torch.randn(5, 729, 256, device="cuda").bfloat16()
    host = llava.model.apply_pooling(features)
    with fuse_vision(llava):
        close([llava.model.apply_pooling(features)], [host], 2**-7)
