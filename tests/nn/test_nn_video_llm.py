"""The small video language model: a real host whose video features are the encoder's."""

import pytest
import torch
import torch.nn.functional as F

from tubelet.core.errors import ModelError, ShapeError, UnsupportedError
from tubelet.models.accelerate import accelerate
from tubelet.nn.video_llm import SPECIAL, VideoLLM, VideoLLMConfig, build_tokenizer
from tubelet.nn.video_tower import as_pictures, tower_config, waves_of
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.nn.weights import load_weights, read_card, save_weights
from tubelet.recipes import EVS, DivPrune, FastV, FastVID, FoPru, UniformFrames, VisionZip

WORDS = (",", "?", "blue", "down-left", "go", "red", "the", "way", "which")
SHAPE = {"width": 32, "depth": 3, "heads": 2, "frames": 8, "size": (32, 32)}
FRAMES, PLACES = 4, 16
"""Tokens of these encoders: 4 frames of 4 x 4."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    torch.manual_seed(5)
    model = VideoViT(VideoViTConfig(**SHAPE, tasks={"direction": 8}))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape) * 0.1)
    path = tmp_path_factory.mktemp("vit") / "enc"
    save_weights(path, model, record={})
    return str(path)


def build(encoder: str, **changes) -> VideoLLM:
    torch.manual_seed(2)
    fields = {"taps": (0, 2), "width": 32, "depth": 3, "heads": 2, "mlp_width": 64}
    config = VideoLLMConfig(words=WORDS, encoder=encoder, **{**fields, **changes})
    return VideoLLM(config).eval()


def inputs(llm: VideoLLM, questions=("which way",), seed=0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    clips = torch.randn(len(questions), 8, 3, 32, 32)
    return {**llm.prompts(questions), "pixel_values_videos": as_pictures(clips, 2)}


# The tower


@pytest.mark.parametrize("pooled", [False, True])
@torch.inference_mode()
def test_the_hosts_features_are_the_encoders_tokens(encoder, pooled):
    llm = build(encoder, pooled=pooled)
    clips = torch.randn(2, 8, 3, 32, 32)
    found = llm.host.model.get_video_features(as_pictures(clips, 2)).pooler_output
    vit = load_weights(encoder)
    kept = []
    for layer in vit.layers:
        layer.register_forward_hook(lambda module, args, out: kept.append((args[0], out)))
    vit(clips, task="mask")
    # In front of the first layer and behind the second, without the class token.
    taps = [x[:, 1:] for x in (kept[0][0], kept[1][1])]
    tapped = [(x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True) for x in taps]
    where = waves_of((4, 4, 4), clips.device).expand(2, -1, -1)
    wanted = llm.host.model.multi_modal_projector(torch.cat([*tapped, where], -1))
    if pooled:
        maps = wanted.reshape(8, 4, 4, -1).permute(0, 3, 1, 2)
        wanted = F.avg_pool2d(maps, 2).flatten(2).mT.reshape(2, 16, -1)
    assert found.shape == (2, llm.num_video + 1, 32)
    assert torch.allclose(found[:, :-1], wanted, atol=1e-4)
    assert torch.equal(found[0, -1], llm.host.model.image_newline)
    assert torch.allclose(llm.video_tokens(clips), found[:, :-1], atol=1e-5)


def test_pictures_hold_the_frames_of_a_token_in_order():
    clips = torch.arange(6 * 3).view(1, 6, 3, 1, 1).expand(2, -1, -1, 4, 4)
    pictures = as_pictures(clips, 2)
    assert pictures.shape == (2, 3, 6, 4, 4)
    assert pictures[0, 1, :, 0, 0].tolist() == [6, 7, 8, 9, 10, 11]
    with pytest.raises(ShapeError, match="multiple of 2"):
        as_pictures(clips[:, :5], 2)


def test_waves_tell_every_place_apart():
    found = waves_of((4, 4, 4), torch.device("cpu"))
    assert found.shape == (64, 24)
    gaps = torch.cdist(found, found) + 9 * torch.eye(64)
    assert gaps.min() > 0.3
    # The first token lies half a step from the border on every axis.
    assert torch.allclose(found[0, 0], torch.tensor(torch.pi / 8).sin())


def test_layers_behind_the_last_tap_are_not_computed(encoder):
    whole, short = build(encoder, taps=(3,)), build(encoder, taps=(1,))
    assert (len(whole.tower.video.layers), len(short.tower.video.layers)) == (3, 1)
    clips = torch.randn(1, 8, 3, 32, 32)
    assert torch.equal(whole.tower.layers_of(clips)[1], short.tower.layers_of(clips)[1])


def test_the_task_prompt_reaches_the_encoder(encoder):
    one, other = build(encoder, task="mask"), build(encoder, task="direction")
    clips = torch.randn(1, 8, 3, 32, 32)
    assert not torch.equal(one.tower.tokens(clips), other.tower.tokens(clips))


def test_a_video_of_another_length_is_refused(encoder):
    llm = build(encoder)
    with pytest.raises(ShapeError, match="videos of 4 x 2 frames"):
        llm.host.model.get_video_features(torch.randn(1, 3, 6, 32, 32))
    with pytest.raises(ShapeError, match="as_pictures"):
        llm.host.model.get_video_features(torch.randn(1, 8, 3, 32, 32))


@pytest.mark.parametrize(
    ("changes", "taps", "task", "text"),
    [
        ({"attention": "divided", "pool": "mean"}, (1,), "mask", "joint attention"),
        ({"size": (32, 40)}, (1,), "mask", "square"),
        ({}, (4,), "mask", "3 layers"),
        ({}, (1,), "shells", "tasks direction, mask"),
    ],
    ids=str,
)
def test_an_encoder_that_does_not_fit_is_refused(changes, taps, task, text):
    config = VideoViTConfig(**{**SHAPE, **changes}, tasks={"direction": 8})
    with pytest.raises(ModelError, match=text):
        tower_config(config, taps, task, False)


# Recipes


@pytest.mark.parametrize(
    "recipe",
    [
        EVS(keep_ratio=0.5),
        UniformFrames(keep_ratio=0.5),
        DivPrune(keep_ratio=0.5),
        FastV(layer=1),
        # These ask for statistics of the vision tower.
        FoPru(keep_ratio=0.5),
        VisionZip(keep_ratio=0.5),
        FastVID(keep_ratio=0.5),
    ],
    ids=lambda recipe: recipe.name,
)
def test_recipes_shorten_its_prompts_and_leave_no_trace(encoder, recipe):
    llm = build(encoder)
    given = inputs(llm, ("which way ?", "red"))
    before = llm.host.generate(**given, max_new_tokens=3, eos_token_id=None)
    with accelerate(llm.host, recipe) as handle:
        reply = llm.host.generate(**given, max_new_tokens=3, eos_token_id=None)
        lengths = handle.report().tokens_per_layer
        assert handle.assignment[0].num_out == 32
    assert reply.shape == before.shape
    assert lengths[-1] < given["input_ids"].shape[1]
    assert torch.equal(llm.host.generate(**given, max_new_tokens=3, eos_token_id=None), before)


@torch.inference_mode()
def test_attention_functions_are_shown_the_video_tokens_of_every_call(encoder):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    llm = build(encoder)
    tower, seen = llm.tower, []

    def spy(module, query, key, value, mask, **options):
        seen.append((module, query, key, value, options["scaling"]))
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    clips = torch.randn(2, 8, 3, 32, 32)
    pictures = as_pictures(clips, 2)
    plain = llm.host.model.get_video_features(pictures).pooler_output
    hidden = []
    hook = tower.encoder.layers[1].register_forward_hook(lambda m, a, out: hidden.append(out))
    AttentionInterface.register("test_spy", spy)
    before = tower.config._attn_implementation
    tower.set_attn_implementation("test_spy")
    assert torch.equal(llm.host.model.get_video_features(pictures).pooler_output, plain)
    assert [entry[0] for entry in seen] == [view.self_attn for view in tower.encoder.layers]
    attention, x = tower.video.layers[0].attention, None
    layer = tower.video.layers[0]
    x = layer.norm1(tower.video.embeddings(clips, torch.ones(2, dtype=torch.long)))
    wanted = attention.project(x, tower.video._table((4, 4, 4), x.device, 1))
    for found, whole in zip(seen[0][1:4], wanted, strict=True):
        assert found.shape == (2, 2, FRAMES * PLACES, 16)
        assert torch.allclose(found, whole[:, :, 1:], atol=1e-5)
    assert seen[0][4] == pytest.approx(0.25)
    assert hidden[0].shape == (2, FRAMES * PLACES, 32)
    tower.set_attn_implementation(before)
    hook.remove()
    assert torch.equal(llm.host.model.get_video_features(pictures).pooler_output, plain)
    assert len(seen) == len(tower.encoder.layers)
    assert all(layer.attention.runtime is None for layer in tower.video.layers)


@torch.inference_mode()
def test_recipes_get_the_attention_that_video_tokens_give_each_other(encoder, monkeypatch):
    llm, seen = build(encoder), []
    given = inputs(llm)
    recipe = FoPru(keep_ratio=0.5)
    monkeypatch.setattr(FoPru, "plan", lambda self, ctx: seen.append(ctx.statistic("received", -2)))
    with accelerate(llm.host, recipe):
        llm.host(**given)
    attention, vit = llm.tower.video.layers[0].attention, llm.tower.video
    clips = given["pixel_values_videos"].unflatten(2, (2, 3)).flatten(1, 2)
    x = vit.layers[0].norm1(vit.embeddings(clips, torch.ones(1, dtype=torch.long)))
    q, k, _ = (y[:, :, 1:] for y in attention.project(x, vit._table((4, 4, 4), x.device, 1)))
    wanted = (q @ k.mT / 4).softmax(-1).mean((1, 2))
    assert seen[0].shape == (1, 64)
    assert torch.allclose(seen[0], wanted, atol=1e-5)


# Answers


@torch.inference_mode()
def test_generation_with_a_cache_equals_none_and_a_batch_its_singles(encoder):
    llm = build(encoder)
    given = inputs(llm, ("which way the red go", "blue ?"))
    batch = llm.host.generate(**given, max_new_tokens=5, eos_token_id=None)
    slow = llm.host.generate(**given, max_new_tokens=5, eos_token_id=None, use_cache=False)
    assert torch.equal(batch, slow)
    for row, question in enumerate(("which way the red go", "blue ?")):
        one = {
            **llm.prompts([question]),
            "pixel_values_videos": given["pixel_values_videos"][[row]],
        }
        alone = llm.host.generate(**one, max_new_tokens=5, eos_token_id=None)
        assert torch.equal(alone[0, -5:], batch[row, -5:])


def test_an_end_stops_the_answer(encoder):
    llm = build(encoder)
    with torch.no_grad():
        llm.host.lm_head.weight.zero_()
    # Equal logits: the first, padding, wins; END must win here.
    llm.host.lm_head.register_forward_hook(
        lambda m, a, out: out.index_fill(-1, torch.tensor([SPECIAL.index("<end>")]), 9.0)
    )
    given = inputs(llm)
    assert llm.host.generate(**given, max_new_tokens=5).shape[1] == given["input_ids"].shape[1] + 1


# Words


def test_the_tokenizer_reads_words_and_writes_them_back(tmp_path):
    tokenizer = build_tokenizer(WORDS)
    ids = tokenizer("Which WAY, down-left?")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["which", "way", ",", "down-left", "?"]
    assert tokenizer.decode(ids) == "which way , down-left ?"
    assert tokenizer("cat")["input_ids"] == [SPECIAL.index("<unknown>")]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(SPECIAL)))
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("which way?")["input_ids"] == tokenizer("which way?")["input_ids"]


def test_prompts_are_a_start_the_video_and_the_question(encoder):
    llm = build(encoder)
    given = llm.prompts(["which way", "Blue?"])
    video, start, pad = (SPECIAL.index(f"<{name}>") for name in ("video", "start", "pad"))
    assert given["input_ids"][1].tolist()[: 1 + 1 + 65] == [pad, start, *[video] * 65]
    words = llm.tokenizer.convert_ids_to_tokens(given["input_ids"][0, -3:].tolist())
    assert words == ["which", "way", "?"]
    assert given["attention_mask"].sum(1).tolist() == [66 + 3, 66 + 2]


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (
            "which way does the cat go",
            r"does not know 'does', 'cat'. It knows: , \? blue down-left",
        ),
        ("<video> red", "does not know '<video>'"),
        ("  ", "empty"),
    ],
)
def test_strange_words_are_refused_with_those_it_knows(encoder, question, text):
    with pytest.raises(UnsupportedError, match=text) as caught:
        build(encoder).prompts([question])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"words": ()}, "must differ"),
        ({"words": ("a", "a")}, "must differ"),
        ({"words": ("<pad>",)}, "must differ"),
        ({"taps": ()}, "at least one layer"),
        ({"taps": (-1,)}, "at least one layer"),
        ({"width": 33}, "even channels"),
        ({"depth": 0}, "at least 1"),
    ],
    ids=str,
)
def test_a_configuration_out_of_range_is_refused(changes, text):
    with pytest.raises(ModelError, match=text):
        VideoLLMConfig(**{"words": WORDS, **changes})


# Weights


def test_weights_come_back_without_a_copy_of_the_encoder(encoder, tmp_path):
    llm = build(encoder)
    with torch.no_grad():
        for value in llm.parameters():
            value.copy_(value.half())
    save_weights(tmp_path / "llm", llm, record={"seed": 1}, summary="a test")
    card = read_card(tmp_path / "llm")
    assert (card.architecture, card.record) == ("VideoLLM", {"seed": 1})
    assert card.config["encoder_sha256"] == read_card(encoder).sha256
    from safetensors import safe_open

    with safe_open(tmp_path / "llm.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "vision_tower" in name]  # noqa: SIM118
    again = load_weights(tmp_path / "llm", expect="VideoLLM")
    assert again.config == llm.config
    given = inputs(llm)
    with torch.inference_mode():
        assert torch.equal(again.host(**given).logits, llm.host(**given).logits)


def test_another_encoder_of_the_same_name_is_refused(encoder, tmp_path):
    other = load_weights(encoder)
    with torch.no_grad():
        other.norm.bias.add_(1)
    save_weights(tmp_path / "enc", other, record={})
    config = build(encoder).config.to_dict()
    with pytest.raises(ModelError, match="trained with another"):
        VideoLLM(VideoLLMConfig.from_dict({**config, "encoder": str(tmp_path / "enc")}))
    with pytest.raises(ModelError, match="no weights"):
        VideoLLM(VideoLLMConfig.from_dict({**config, "encoder": "nowhere"}))
    with pytest.raises(ModelError, match="configuration"):
        VideoLLMConfig.from_dict({**config, "colour": 3})


def test_the_encoder_is_frozen_and_in_no_checkpoint(encoder):
    llm = build(encoder)
    assert not any(p.requires_grad for p in llm.tower.parameters())
    assert all(p.requires_grad for p in llm.host.model.language_model.parameters())
    state = llm.state_dict()
    assert not [name for name in state if "vision_tower" in name]
    other = build(encoder, depth=3)
    with torch.no_grad():
        other.host.lm_head.weight.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.host.lm_head.weight, llm.host.lm_head.weight)
    with pytest.raises(RuntimeError, match="Missing"):
        other.load_state_dict({n: w for n, w in state.items() if "lm_head" not in n})
