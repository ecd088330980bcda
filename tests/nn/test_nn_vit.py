"""`VideoViT`: every kind of attention against plain softmax with masks, tokens, tasks, config."""

import json
import warnings

import pytest
import torch
from torch import Tensor

from tubelet.core.errors import ModelError, ShapeError
from tubelet.nn.vit import Layer, VideoViT, VideoViTConfig

# Neither square nor as long as wide, so that a mixed-up axis shows.
FRAMES, SIZE, GRID = 8, (16, 24), (4, 2, 3)
KINDS = {
    "joint": {},
    "joint, mean": {"pool": "mean"},
    "divided": {"attention": "divided", "pool": "mean"},
    "encoder": {"attention": "factorised-encoder"},
    "encoder, mean": {"attention": "factorised-encoder", "pool": "mean"},
    "dot-product": {"attention": "factorised-dot-product", "pool": "mean"},
}
BOUND = 1e-4
"""Outputs are of size about 1; another mask or another angle moves them by more than 0.01."""

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Threads cost more than they save on tensors this small.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(**changes) -> VideoViTConfig:
    fields = {"width": 64, "depth": 2, "heads": 4, "temporal_depth": 2, "mlp_ratio": 1.0}
    tasks = {"tasks": {"left": 3, "right": 5}, "dense_tasks": ("mask",)}
    return VideoViTConfig(**{**fields, "frames": FRAMES, "size": SIZE, **tasks, **changes})


def build(**changes) -> VideoViT:
    """A model whose every parameter matters: fresh ones have flat attention and zero biases."""
    torch.manual_seed(0)
    model = VideoViT(config(**changes)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape) * 0.2)
    return model


def clip(batch: int = 2, frames: int = FRAMES, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(batch, frames, 3, *size, generator=torch.Generator().manual_seed(1))


def gap(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


# A slow reference


def turned(x: Tensor, places: Tensor) -> Tensor:
    """[H, N, D] rotated: pair i is channels i and i + D/2; a third of the pairs to y, as many to
    x, the rest to t, with rates from 1 down to 1/100."""
    half = x.shape[-1] // 2
    side = half // 3
    turns = []
    for axis, pairs in zip(range(3), (half - 2 * side, side, side), strict=True):
        for i in range(pairs):
            rate = 100.0 ** -(i / (pairs - 1)) if pairs > 1 else 1.0
            turns.append(places[:, axis] * rate)
    angle = torch.stack(turns, dim=-1)
    spun = torch.polar(torch.ones_like(angle), angle) * torch.complex(x[..., :half], x[..., half:])
    return torch.cat([spun.real, spun.imag], dim=-1)


def masked_attention(module, x: Tensor, places: Tensor | None, masks: list[Tensor]) -> Tensor:
    """Softmax over all [N, N] pairs of one sample, with a mask per head."""
    qkv = module.qkv(x).chunk(3, dim=-1)
    q, k, v = (y.unflatten(-1, (module.heads, -1)).transpose(0, 1) for y in qkv)

    def unit(y: Tensor, norm) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    q, k = unit(q, module.norm_q), unit(k, module.norm_k)
    if places is not None:
        q, k = turned(q, places), turned(k, places)
    logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    weights = logits.masked_fill(~torch.stack(masks), -torch.inf).softmax(-1)
    return module.out((weights @ v).transpose(0, 1).flatten(1))


def coordinates(grid: tuple[int, int, int]) -> Tensor:
    t, h, w = grid
    return torch.tensor([[a, b, c] for a in range(t) for b in range(h) for c in range(w)]).float()


def embedded(model: VideoViT, sample: Tensor, grid: tuple[int, int, int]) -> Tensor:
    depth, tall, wide = model.config.tubelet
    tokens = []
    for t, y, x in coordinates(grid).int().tolist():
        box = sample[
            t * depth : (t + 1) * depth, :, y * tall : (y + 1) * tall, x * wide : (x + 1) * wide
        ]
        tokens.append(model.embeddings.patch(box.transpose(0, 1).flatten()))
    x = torch.stack(tokens)
    return x + model.embeddings.place[0] if model.config.positions == "learned" else x


def reference(model: VideoViT, sample: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """(tokens behind the norm, what the heads read) of one clip [T, 3, H, W]."""
    settings = model.config
    grid = settings.grid(sample.shape[0], *sample.shape[2:])
    x, prompt = embedded(model, sample, grid), model.embeddings.prompt.weight[number]
    at = coordinates(grid)
    if settings.pool == "mean":
        x = x + prompt
    elif settings.attention == "joint":
        x = torch.cat([model.embeddings.class_token[0] + prompt, x])
        at = torch.cat([torch.zeros(1, 3), at])
    everything = torch.ones(len(x), len(x), dtype=torch.bool)
    same_frame = at[:, None, 0] == at[None, :, 0]
    same_place = (at[:, None, 1:] == at[None, :, 1:]).all(-1)
    places = at if settings.positions == "rotary" else None
    for layer in model.layers:
        if settings.attention == "divided":
            x = x + masked_attention(layer.temporal, layer.norm0(x), places, [same_place] * 4)
            x = x + masked_attention(layer.attention, layer.norm1(x), places, [same_frame] * 4)
        else:
            masks = {
                "joint": [everything] * 4,
                "factorised-encoder": [same_frame] * 4,
                "factorised-dot-product": [same_place] * 2 + [same_frame] * 2,
            }[settings.attention]
            x = x + masked_attention(layer.attention, layer.norm1(x), places, masks)
        x = x + layer.mlp(layer.norm2(x))
    rows = x
    if settings.attention == "factorised-encoder":
        rows = temporal_part(model, x.unflatten(0, (grid[0], -1)).mean(1), prompt)
    pooled = rows[0] if settings.pool == "class" else rows.mean(0)
    return model.norm(x), model.norm(pooled)


def temporal_part(model: VideoViT, rows: Tensor, prompt: Tensor) -> Tensor:
    at = torch.stack([torch.arange(len(rows)).float(), *torch.zeros(2, len(rows))], dim=-1)
    if model.config.pool == "class":
        rows = torch.cat([model.embeddings.class_token[0] + prompt, rows])
        at = torch.cat([torch.zeros(1, 3), at])
    everything = torch.ones(len(rows), len(rows), dtype=torch.bool)
    places = at if model.config.positions == "rotary" else None
    for layer in model.temporal:
        rows = rows + masked_attention(layer.attention, layer.norm1(rows), places, [everything] * 4)
        rows = rows + layer.mlp(layer.norm2(rows))
    return rows


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@each_kind
@torch.no_grad()
def test_every_kind_equals_softmax_with_masks(kind, positions):
    model, pixels = build(**KINDS[kind], positions=positions), clip()
    for number, task in enumerate(model.config.task_names):
        got = model(pixels, task=task)
        for sample, hidden, logits in zip(pixels, got.last_hidden_state, got.logits, strict=True):
            tokens, pooled = reference(model, sample, number)
            assert gap(hidden, tokens) < BOUND
            if task == "mask":
                wanted = model.dense_heads["mask"](tokens[model.config.class_tokens :])[:, 0]
            else:
                wanted = model.heads[task](pooled)
            assert gap(logits, wanted) < BOUND


@torch.no_grad()
def test_frames_of_a_factorised_encoder_meet_in_the_temporal_layers_only():
    model, pixels = build(attention="factorised-encoder"), clip(1)
    other = pixels.clone()
    other[:, 2:4] += 1.0
    one, two = model(pixels), model(other)
    moved = (one.last_hidden_state != two.last_hidden_state).any(-1).reshape(GRID).flatten(1)
    assert moved.any(1).tolist() == [False, True, False, False]
    assert gap(one.logits, two.logits) > 0.01


# Positions


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
@torch.no_grad()
def test_content_that_moves_by_a_tubelet_keeps_its_logits(shift):
    model, content = build(pool="mean"), clip(1, 6, (16, 16))
    grid, inner = (4, 3, 3), (3, 2, 2)
    table = model._table(grid, torch.device("cpu"))

    def logits(by: tuple[int, int, int]) -> Tensor:
        canvas = torch.zeros(1, 8, 3, 24, 24)
        t, y, x = by
        canvas[:, 2 * t : 2 * t + 6, :, 8 * y : 8 * y + 16, 8 * x : 8 * x + 16] = content
        layer = model.layers[0]
        tokens = layer.norm1(model.embeddings(canvas, torch.zeros(1, dtype=torch.long)))
        q, k, _ = layer.attention.project(tokens, table)
        at = coordinates(inner) + torch.tensor(by)
        rows = (at @ torch.tensor([9.0, 3.0, 1.0])).long()
        return q[:, :, rows] @ k[:, :, rows].transpose(2, 3)

    assert gap(logits((0, 0, 0)), logits(shift)) < BOUND
    # Positions do matter: equal tokens at different places see one another differently.
    q, k, _ = model.layers[0].attention.project(torch.ones(1, 36, 64), table)
    assert float((q @ k.transpose(2, 3)).std()) > 0.1


@torch.no_grad()
def test_a_layer_turns_tokens_by_the_positions_it_is_given():
    model = build(pool="mean")
    layer, table = model.layers[0], model._table(GRID, torch.device("cpu"))
    x = torch.randn(2, 24, 64)
    kept = torch.stack([torch.randperm(24)[:9].sort().values for _ in range(2)])
    got = layer(x[:, :9], kept, table)
    assert isinstance(layer, Layer)
    for sample, rows, out in zip(x[:, :9], kept, got, strict=True):
        at = coordinates(GRID)[rows]
        seen = torch.ones(9, 9, dtype=torch.bool)
        y = sample + masked_attention(layer.attention, layer.norm1(sample), at, [seen] * 4)
        assert gap(out, y + layer.mlp(layer.norm2(y))) < BOUND
    renumbered = layer(x[:, :9], torch.arange(9).expand(2, -1), table)
    assert gap(got, renumbered) > 0.01


@each_kind
@torch.no_grad()
def test_rotary_positions_take_any_clip_and_learned_ones_their_own(kind):
    longer = clip(1, 12, (24, 16))
    model = build(**KINDS[kind])
    got = model(longer, task="right")
    assert gap(got.last_hidden_state[0], reference(model, longer[0], 1)[0]) < BOUND
    learned = build(**KINDS[kind], positions="learned")
    with pytest.raises(ShapeError, match=r"for 24 tokens, the clip has 36; rotary"):
        learned(longer)


# Tokens


@pytest.mark.parametrize(
    ("frame", "channel", "row", "column"), [(0, 0, 0, 0), (5, 2, 9, 17), (7, 1, 15, 23)]
)
@pytest.mark.parametrize("pool", ["class", "mean"])
@torch.no_grad()
def test_a_bright_pixel_lands_in_its_token(frame, channel, row, column, pool):
    model = build(pool=pool)
    dark, task = torch.zeros(1, FRAMES, 3, *SIZE), torch.zeros(1, dtype=torch.long)
    bright = dark.clone()
    bright[0, frame, channel, row, column] = 1.0
    change = (model.embeddings(bright, task) - model.embeddings(dark, task))[0]
    t, h, w = frame // 2, row // 8, column // 8
    token = model.config.class_tokens + (t * GRID[1] + h) * GRID[2] + w
    assert change.abs().sum(-1).nonzero().flatten().tolist() == [token]
    place = ((channel * 2 + frame % 2) * 8 + row % 8) * 8 + column % 8
    assert gap(change[token], model.embeddings.patch.weight[:, place]) < 1e-5


@pytest.mark.parametrize("shape", [(8, 3, 16, 24), (2, 8, 1, 16, 24), (2, 7, 3, 16, 24)])
def test_clips_that_do_not_fit_are_refused(shape):
    with pytest.raises(ShapeError):
        build()(torch.zeros(shape))


# Tasks


@each_kind
@torch.no_grad()
def test_the_task_prompt_changes_what_the_heads_read(kind):
    model, pixels = build(**KINDS[kind]), clip(1)
    _, first = model.features(pixels, torch.tensor([0]))
    _, second = model.features(pixels, torch.tensor([1]))
    assert gap(first, second) > 0.01


@each_kind
@torch.no_grad()
def test_numbered_tasks_equal_named_ones_sample_by_sample(kind):
    model, pixels = build(**KINDS[kind]), clip(3)
    numbered = model(pixels, task=torch.tensor([1, 0, 1])).logits
    assert numbered.shape == (3, 8)
    for i, name in enumerate(["right", "left", "right"]):
        named = model(pixels, task=name).logits[i]
        assert gap(numbered[i, model.class_range(name)], named) < BOUND
    assert (model.class_range("left"), model.class_range("right")) == (slice(0, 3), slice(3, 8))


@torch.no_grad()
def test_the_first_task_is_the_default():
    model = build()
    assert torch.equal(model(clip()).logits, model(clip(), task="left").logits)


@each_kind
@torch.no_grad()
def test_a_dense_task_has_a_logit_per_video_token(kind):
    model = build(**KINDS[kind])
    out = model(clip(), task="mask")
    assert out.logits.shape == (2, 24)
    head = model.dense_heads["mask"]
    video = out.last_hidden_state[:, -24:]
    assert gap(out.logits, video @ head.weight[0] + head.bias) < BOUND


def test_tasks_that_a_model_does_not_have_are_refused():
    model = build()
    with pytest.raises(ModelError, match="no task 'up'; it has left, right, mask"):
        model(clip(), task="up")
    with pytest.raises(ModelError, match="no classification task 'mask'; this VideoViT has left"):
        model.class_range("mask")
    with pytest.raises(ShapeError, match="2 clips need as many task numbers"):
        model(clip(), task=torch.tensor(1))
    with pytest.raises(ModelError, match="dense tasks only"):
        build(tasks={})(clip(), task=torch.zeros(2, dtype=torch.long))


@each_kind
def test_gradients_reach_every_parameter(kind):
    model, pixels = build(**KINDS[kind]), clip(3)
    numbered = model(pixels, task=torch.tensor([0, 1, 2])).logits
    dense = model(pixels, task="mask").logits
    (numbered.square().sum() + dense.square().sum()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@each_kind
@torch.no_grad()
def test_bfloat16_stays_close_and_raises_no_warning(kind):
    model, pixels = build(**KINDS[kind]), clip()
    wanted = model(pixels).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = model.bfloat16()(pixels.bfloat16()).logits
    assert got.dtype == torch.bfloat16
    assert gap(got.float(), wanted) < 0.1 * wanted.std() + 0.1


# Configuration


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention": "axial"}, "attention must be one of joint, divided"),
        ({"positions": "sinusoidal"}, "positions must be one of rotary, learned"),
        ({"pool": "max"}, "pool must be one of class, mean"),
        ({"attention": "divided"}, 'attention="divided" needs pool="mean"'),
        ({"attention": "factorised-dot-product"}, 'needs pool="mean"'),
        ({"width": 60}, "width 60 over 4 heads must give a multiple of 8"),
        ({"heads": 3}, "over 3 heads"),
        (
            {"attention": "factorised-dot-product", "pool": "mean", "heads": 1},
            "even number, got 1",
        ),
        ({"depth": 0}, "at least 1"),
        ({"frames": 0}, "at least 1"),
        ({"temporal_depth": 0}, "at least 1"),
        ({"width": 64.0}, "whole numbers"),
        ({"size": (16, -8)}, "at least 1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive"),
        ({"tubelet": (2, 8)}, "tubelet is"),
        ({"size": (16, 16, 16)}, "size"),
        ({"size": (16, 20)}, "no whole number of 2x8x8 tubelets"),
        ({"frames": 7}, "no whole number of 2x8x8 tubelets"),
        ({"tasks": {}, "dense_tasks": ()}, "at least one task"),
        ({"tasks": ["left"]}, "as a dict"),
        ({"tasks": {"left": 0}}, "at least one class"),
        ({"tasks": {"mask": 2}}, "must differ"),
        ({"tasks": {"a.b": 2}}, "cannot name a task 'a.b'"),
        ({"dense_tasks": ("keys",)}, "cannot name a task 'keys'"),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes, text):
    with pytest.raises(ModelError, match=text):
        config(**changes)


def test_a_configuration_survives_json():
    wanted = config(**KINDS["divided"], tubelet=(1, 8, 4), positions="learned")
    again = VideoViTConfig.from_dict(json.loads(json.dumps(wanted.to_dict())))
    assert again == wanted
    # The order of tasks is their numbers.
    assert again.task_names == ("left", "right", "mask")
    assert isinstance(again.tubelet, tuple)


@pytest.mark.parametrize("data", [{"width": 64, "colour": 3}, {"size": 5}, {"tasks": None}, None])
def test_what_is_not_a_configuration_is_refused(data):
    with pytest.raises(ModelError):
        VideoViTConfig.from_dict(data)
