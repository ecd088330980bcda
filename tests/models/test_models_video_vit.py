"""Recipes on tubelet's own encoder: every recipe, the positions it sees, and what is refused."""

import math

import pytest
import torch
from torch import Tensor

from tubelet.core.errors import ModelError, UnsupportedError
from tubelet.core.recipe import LearnedReduction, TokenRecipe
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.models.load import load_model
from tubelet.nn import weights
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.recipes import (
    ATS,
    EVAD,
    RLT,
    TESTA,
    RandomDrop,
    TempScale,
    ToMe,
    UniformPool,
    VidTLDR,
)
from tubelet.testing import catalogue, oracles, tiny, tolerances
from tubelet.testing.oracle_hosts import Token, attend, mean_of

pytestmark = pytest.mark.filterwarnings("ignore::tubelet.core.errors.NoEffectWarning")

KINDS = {
    "class": {},
    "mean": {"pool": "mean"},
    "learned": {"positions": "learned"},
    "divided": {"attention": "divided", "pool": "mean"},
    "divided learned": {"attention": "divided", "pool": "mean", "positions": "learned"},
    "encoder": {"attention": "factorised-encoder"},
    "dot-product": {"attention": "factorised-dot-product", "pool": "mean", "heads": 2},
}
SHAPE = (4, 4, 4)
"""Frames, height and width of the token grid."""


def build(kind: str = "class", **changes) -> VideoViT:
    """A tiny model without flat attention, zero biases or exact ties."""
    torch.manual_seed(0)
    fields = {"width": 48, "depth": 4, "heads": 3, "temporal_depth": 1, "mlp_ratio": 2.0}
    clip = {"frames": tiny.FRAMES, "size": (tiny.SIDE, tiny.SIDE), "tasks": {"left": 7, "up": 2}}
    model = VideoViT(VideoViTConfig(**{**fields, **clip, **KINDS[kind], **changes})).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape) * 0.2)
    return model


MODELS = {kind: build(kind) for kind in KINDS}
RECIPES = [r for r in catalogue.settings() if not isinstance(r, LearnedReduction)]
PAIRS = [(kind, recipe) for kind in KINDS for recipe in RECIPES]
RUNNING = [(k, r) for k, r in PAIRS if catalogue.why_refused(MODELS[k], r) is None]
TOKENS = [(k, r) for k, r in RUNNING if isinstance(r, TokenRecipe)]

pairs = pytest.mark.parametrize(("kind", "recipe"), RUNNING, ids=str)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # Threads cost more than they save on tensors this small.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Every recipe


def test_every_recipe_runs_on_one_of_the_kinds():
    assert {type(recipe) for _, recipe in RUNNING} == {type(recipe) for recipe in RECIPES}
    running = {kind: {r.name for k, r in RUNNING if k == kind} for kind in KINDS}
    assert {"RandomDrop", "ToMe", "RLT", "ATS", "EVAD", "UniformPool"} <= running["class"]
    assert running["mean"] == running["class"] - {"ATS"}
    assert running["divided"] == {"TESTA", "UniformPool", "TempScale"}
    assert running["encoder"] == running["dot-product"] == set()


@pytest.mark.parametrize(("kind", "recipe"), PAIRS, ids=str)
def test_a_recipe_runs_or_is_refused_with_the_reason(kind, recipe):
    catalogue.runs_or_is_refused(MODELS[kind], recipe, tiny.clip(2))


@pytest.mark.parametrize(("kind", "recipe"), TOKENS, ids=str)
def test_a_token_recipe_changes_the_number_of_tokens(kind, recipe):
    model = MODELS[kind]
    with accelerate(model, recipe) as handle:
        catalogue.logits(model, tiny.clip(2))
    whole = math.prod(SHAPE) + model.config.class_tokens
    assert handle.report().tokens_in == whole
    assert handle.report().tokens_per_layer[-1] < whole
    assert sum(a.num_out * a.batch for a in handle.assignment) < 2 * whole
    for assignment in handle.assignment:
        assignment.check()
        assert assignment.num_in == whole


@pairs
def test_at_its_identity_point_nothing_changes(kind, recipe):
    exact = isinstance(recipe, TokenRecipe)
    bound = tolerances.EXACT if exact else tolerances.REPLACED_ATTENTION
    catalogue.identity_equals_dense(MODELS[kind], recipe, tiny.clip(2), bound)


@pairs
def test_remove_restores_the_last_bit_and_leaves_nothing_behind(kind, recipe):
    model = MODELS[kind]
    catalogue.remove_restores(model, recipe, tiny.clip(2))
    for module in model.modules():
        assert not {"runtime", "forward", "_tubelet_handle"} & vars(module).keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pairs
def test_plans_fit_and_the_length_comes_back(kind, recipe):
    catalogue.plans_are_valid(MODELS[kind], recipe, tiny.clip(2))
    catalogue.length_is_kept(MODELS[kind], recipe, tiny.clip(2))


@pairs
def test_runs_leave_no_trace_in_one_another(kind, recipe):
    model, pixels = MODELS[kind], tiny.clip(2)
    catalogue.state_never_survives(model, recipe, pixels, tiny.clip(3, seed=1))
    catalogue.dropped_is_never_read(model, recipe, pixels)


@pairs
def test_a_batch_equals_its_samples(kind, recipe):
    catalogue.batch_equals_singles(MODELS[kind], recipe, tiny.clip(3))


@pytest.mark.parametrize("kind", ["class", "mean", "learned"])
@pytest.mark.parametrize("recipes", [(RLT(),), (RLT(), ToMe(r=4)), (RLT(), EVAD(keep_ratio=0.8))])
def test_samples_that_keep_other_numbers_of_tokens_are_packed(kind, recipes):
    model, pixels = MODELS[kind], tiny.clip(3)
    with accelerate(model, *recipes) as handle:
        together = catalogue.logits(model, pixels)
        counts = [a.num_out for a in handle.assignment]
        assert any(what.startswith("packed") for what in handle.report().attention)
        singles = torch.cat([catalogue.logits(model, clip[None]) for clip in pixels])
    assert len(set(counts)) > 1, "the clips must differ for this test to mean something"
    assert catalogue.difference(together, singles) <= tolerances.SPLIT_BATCH


@pairs
def test_recipes_run_in_bfloat16(kind, recipe):
    catalogue.runs_in(MODELS[kind], recipe, tiny.clip(2), torch.bfloat16)


@pytest.mark.parametrize("task", ["up", "mask", torch.tensor([1, 0])], ids=str)
def test_every_task_is_answered_with_recipes_on(task):
    model, pixels = MODELS["class"], tiny.clip(2)
    with torch.no_grad():
        dense = model(pixels, task=task).logits
        with accelerate(model, ToMe(r=6)):
            got = model(pixels, task=task).logits
    assert got.shape == dense.shape
    assert 0 < catalogue.difference(got, dense) < float("inf")


@pytest.mark.parametrize("frames", [4, 12])
def test_another_clip_length_takes_recipes_as_well(frames):
    model = MODELS["class"]
    pixels = tiny.clip(2).repeat(1, 2, 1, 1, 1)[:, :frames]
    with accelerate(model, RandomDrop()) as handle:
        catalogue.logits(model, pixels)
    assert handle.assignment[0].num_in == 1 + 16 * frames // 2


# Against slow references


class Host:
    """The pieces of a joint VideoViT around attention, on the tokens of one sample."""

    def __init__(self, model: VideoViT) -> None:
        self.model, self.layers = model, model.layers

    def embed(self, clip: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        return self.model.embeddings(clip, torch.zeros(1, dtype=torch.long))[0], SHAPE

    def project(self, layer, x: Tensor, places: Tensor) -> list[Tensor]:
        normed = layer.norm1(x)[None]
        return [y[0] for y in layer.attention.project(normed, self.turned(places))]

    def turned(self, places: Tensor):
        before = self.model.config.class_tokens
        table = self.model._table(SHAPE, torch.device("cpu"), before)
        return None if table is None else (table[0][places], table[1][places])

    def output(self, layer, out: Tensor) -> Tensor:
        return layer.attention.out(out)

    def mlp(self, layer, x: Tensor) -> Tensor:
        return x + layer.mlp(layer.norm2(x))

    def head(self, tokens: list[Token]) -> Tensor:
        whole = tokens[0].value if self.model.config.pool == "class" else mean_of(tokens)
        return self.model.heads["left"](self.model.norm(whole))[None]


@pytest.fixture(autouse=True)
def _known_to_the_oracles(monkeypatch):
    monkeypatch.setitem(oracles.HOSTS, "VideoViT", Host)


REFERENCES = [
    (ToMe(r=6), oracles.tome(6), True),
    (ToMe(r=6, proportional=False), oracles.tome(6), False),
    (VidTLDR(share=(0.2, 0.1)), oracles.vid_tldr((0.2, 0.1)), False),
    (RLT(), oracles.rlt(0.1), False),
    (ATS(first_layer=1, samples=0.5), oracles.ats(1, 32, 8), False),
    (EVAD(keep_ratio=0.6, keyframe_weight=4.0), oracles.evad(0.6, 4.0, (1, 2, 3)), False),
    (UniformPool(factor=(2, 1, 2)), oracles.uniform_pool((2, 1, 2)), False),
    (UniformPool(proportional=True), oracles.uniform_pool((1, 2, 2)), True),
]


@pytest.mark.parametrize("kind", ["class", "mean", "learned"])
@pytest.mark.parametrize(("recipe", "reducer", "size_bias"), REFERENCES, ids=str)
def test_recipes_equal_loops_over_single_tokens(kind, recipe, reducer, size_bias):
    model, pixels = MODELS[kind], tiny.clip(2)
    if catalogue.why_refused(model, recipe) is not None:
        assert (kind, recipe.name) == ("mean", "ATS")
        return
    with accelerate(model, recipe):
        got = catalogue.logits(model, pixels)
    wanted = oracles.encode(model, pixels, reducer, size_bias)
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE


@pytest.mark.parametrize("kind", ["class", "mean", "learned"])
@pytest.mark.parametrize("per_frame", [False, True])
@torch.no_grad()
def test_dropped_tokens_are_as_good_as_never_there(kind, per_frame):
    model, pixels = MODELS[kind], tiny.clip(2)
    with accelerate(model, RandomDrop(keep_ratio=0.4, per_frame=per_frame)) as handle:
        got = model(pixels)
        kept = handle.assignment[0].anchor
    table = model._table(SHAPE, pixels.device, model.config.class_tokens)

    def by_hand(positions: Tensor) -> tuple[Tensor, Tensor]:
        x = model.embeddings(pixels, torch.zeros(2, dtype=torch.long))
        x = x.gather(1, kept[..., None].expand(-1, -1, 48))
        gathered = None if table is None else (table[0][positions], table[1][positions])
        for layer in model.layers:
            x = layer(x, None, gathered)
        pooled = x[:, 0] if model.config.pool == "class" else x.mean(1)
        return model.norm(x), model.heads["left"](model.norm(pooled))

    hidden, logits = by_hand(kept)
    assert catalogue.difference(got.logits, logits) <= tolerances.ORACLE
    survivors = got.last_hidden_state.gather(1, kept[..., None].expand(-1, -1, 48))
    assert catalogue.difference(survivors, hidden) <= tolerances.ORACLE
    if table is not None:
        renumbered = torch.arange(kept.shape[1]).expand(2, -1)
        wrong = by_hand(renumbered)[1]
        assert catalogue.difference(got.logits, wrong) > 100 * tolerances.ORACLE


@pytest.mark.parametrize(
    "recipes", [(RandomDrop(),), (RLT(),), (RandomDrop(), ToMe(r=4)), (UniformPool(),)], ids=str
)
def test_layers_get_the_original_positions_of_their_tokens(recipes):
    model, seen = MODELS["class"], []
    with accelerate(model, *recipes) as handle:
        # Hooks run in the order they came, so these see what the recipes changed.
        hooks = [x.register_forward_pre_hook(lambda _, a: seen.append(a)) for x in model.layers]
        catalogue.logits(model, tiny.clip(2))
        for hook in hooks:
            hook.remove()
    last = torch.cat([a.anchor for a in handle.assignment], dim=1)
    for x, positions, _ in seen:
        assert positions.shape == x.shape[:2]
        for row, left in zip(positions.tolist(), last.tolist(), strict=True):
            assert set(left) <= set(row)
    if not any(isinstance(recipe, ToMe) for recipe in recipes):
        assert all(torch.equal(positions, last) for _, positions, _ in seen)


# Divided attention


def rows_of(model: VideoViT, clip: Tensor) -> list[list[Token]]:
    """Embedded tokens of one sample, time in rows."""
    x = iter(model.embeddings(clip[None], torch.zeros(1, dtype=torch.long))[0])
    return [[Token(next(x), 16 * t + p, [16 * t + p]) for p in range(16)] for t in range(4)]


def attended(model: VideoViT, module, norm, tokens: list[Token]) -> tuple[list[Token], Tensor]:
    """One row of tokens behind its attention, and its keys [H, N, D]."""
    x = torch.stack([token.value for token in tokens])
    places = torch.tensor([token.place for token in tokens])
    table = model._table(SHAPE, torch.device("cpu"))
    turned = None if table is None else (table[0][places], table[1][places])
    q, k, v = (y[0] for y in module.project(norm(x)[None], turned))
    x = x + module.out(attend(q, k, v)[0])
    return [Token(y, t.place, t.members) for y, t in zip(x, tokens, strict=True)], k


def vote(keys: list[Tensor], frames: int, r: int) -> dict[int, int]:
    """Frames to merge: {even frame: odd frame} by the similarity averaged over places."""

    def alike(a: int, b: int) -> float:
        scores = [torch.cosine_similarity(k[:, a].mean(0), k[:, b].mean(0), dim=0) for k in keys]
        return float(torch.stack(scores).mean())

    pairs = []
    for a in range(0, frames, 2):
        best, negative = max((alike(a, b), -b) for b in range(1, frames, 2))
        pairs.append((-best, a, -negative))
    return {a: b for _, a, b in sorted(pairs)[: min(r, frames // 2)]}


@torch.no_grad()
def merged_by_hand(model: VideoViT, clip: Tensor, frames: int, patches: int) -> Tensor:
    rows = rows_of(model, clip)
    for layer in model.layers:
        columns, keys = [], []
        for column in zip(*rows, strict=True):
            # Whatever patch a token shows by now, along time only its time counts.
            timed = [Token(t.value, t.place // 16 * 16, t.members) for t in column]
            mixed, k = attended(model, layer.temporal, layer.norm0, timed)
            back = zip(mixed, column, strict=True)
            columns.append([Token(m.value, t.place, t.members) for m, t in back])
            keys.append(k)
        into = vote(keys, len(rows), frames) if len(rows) > 1 else {}
        rows = [list(row) for row in zip(*(oracles.merge(c, into) for c in columns), strict=True)]
        for i, row in enumerate(rows):
            mixed, k = attended(model, layer.attention, layer.norm1, row)
            found = oracles.match(list(k.mean(0)), min(patches, len(row) // 2))
            merged = oracles.merge(mixed, found)
            after = [t.value + layer.mlp(layer.norm2(t.value)) for t in merged]
            rows[i] = [Token(y, t.place, t.members) for y, t in zip(after, merged, strict=True)]
    return model.heads["left"](model.norm(mean_of([t for row in rows for t in row])))[None]


@pytest.mark.parametrize("kind", ["divided", "divided learned"])
@pytest.mark.parametrize(("frames", "patches"), [(1, 0), (0, 3), (1, 3)])
def test_TESTA_on_divided_attention_equals_the_loops(kind, frames, patches):
    model, pixels = MODELS[kind], tiny.clip(2, still=0.0)
    with accelerate(model, TESTA(frames=frames, patches=patches)) as handle:
        got = catalogue.logits(model, pixels)
    wanted = torch.cat([merged_by_hand(model, clip, frames, patches) for clip in pixels])
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE
    f, p = 4, 16
    for count in handle.report().tokens_per_layer:
        assert count == f * p
        f, p = max(f - frames, f - f // 2), max(p - patches, p - p // 2)


@torch.no_grad()
def test_UniformPool_on_divided_attention_keeps_the_positions_of_the_corners():
    model, pixels = MODELS["divided"], tiny.clip(2)
    with accelerate(model, UniformPool(factor=(2, 1, 2))) as handle:
        got = catalogue.logits(model, pixels)
    assert handle.report().tokens_per_layer == [16] * 4
    x = model.embeddings(pixels, torch.zeros(2, dtype=torch.long)).unflatten(1, SHAPE)
    x = x.unflatten(3, (2, 2)).mean(4).unflatten(1, (2, 2)).mean(2).flatten(1, 3)
    table = model._table(SHAPE, pixels.device)
    corners = torch.arange(64).reshape(SHAPE)[::2, :, ::2].flatten()
    for layer in model.layers:
        x = layer(x, (2, 8), (table[0][corners], table[1][corners]))
    wanted = model.heads["left"](model.norm(x.mean(1)))
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE


def test_UniformPool_then_TESTA_shrinks_a_pooled_grid():
    model, pixels = MODELS["divided"], tiny.clip(2)
    with accelerate(model, UniformPool(factor=(1, 2, 1)), TESTA(frames=1, patches=1)) as handle:
        catalogue.logits(model, pixels)
    assert handle.report().tokens_per_layer == [4 * 8, 3 * 7, 2 * 6, 1 * 5]


def test_sites_are_modules_in_the_order_they_run():
    for kind, kinds in (("class", ["joint"]), ("divided", ["temporal", "spatial"])):
        sites = adapter_for(MODELS[kind]).sites(MODELS[kind])
        assert [site.kind for site in sites] == ["input", *kinds * 4]
        for site in sites:
            MODELS[kind].get_submodule(site.name)


# Refusals


@pytest.mark.parametrize(
    ("kind", "recipe", "text"),
    [
        ("mean", ATS(), "pools by the mean of its tokens"),
        ("class", TESTA(), "jointly over space and time"),
        ("mean", TESTA(), "jointly over space and time"),
        ("divided", ToMe(), r"only structured reductions \(UniformPool, TESTA\)"),
        ("divided", RLT(), "only structured reductions"),
        ("divided", UniformPool(proportional=True), "proportional=False"),
        ("encoder", ToMe(), "use the joint or the divided kind"),
        ("encoder", TempScale(), "use the joint or the divided kind"),
        ("dot-product", UniformPool(), "use the joint or the divided kind"),
    ],
)
def test_refusals_say_what_is_missing_and_touch_nothing(kind, recipe, text):
    before = catalogue.snapshot(MODELS[kind])
    with pytest.raises(UnsupportedError, match=text):
        accelerate(MODELS[kind], recipe)
    catalogue.assert_untouched(MODELS[kind], before)


# Training


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("class", RandomDrop()),
        ("class", ToMe(r=6)),
        ("class", RLT()),
        ("mean", ToMe(r=6, proportional=False)),
        ("mean", EVAD(keep_ratio=0.6)),
        ("divided", TESTA(frames=1, patches=3)),
        ("divided", UniformPool()),
    ],
    ids=str,
)
def test_gradients_reach_the_weights_in_training_mode(kind, recipe):
    model = build(kind).train()
    with accelerate(model, recipe):
        logits = model(tiny.clip(2), task=torch.tensor([0, 1])).logits
        dense = model(tiny.clip(2), task="mask").logits
        (logits.square().sum() + dense.square().sum()).backward()
    assert model.training
    grads = {name: value.grad for name, value in model.named_parameters()}
    assert not [name for name, g in grads.items() if g is None or not g.any()]
    assert all(bool(g.isfinite().all()) for g in grads.values())


def test_gradients_are_those_of_a_model_without_the_dropped_tokens():
    model, pixels = build("class"), tiny.clip(2)
    with accelerate(model, RandomDrop(keep_ratio=0.4)) as handle:
        model(pixels).logits.square().sum().backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    kept = handle.assignment[0].anchor
    table = model._table(SHAPE, pixels.device, 1)
    x = model.embeddings(pixels, torch.zeros(2, dtype=torch.long))[:, kept[0]]
    for layer in model.layers:
        x = layer(x, kept, table)
    model.heads["left"](model.norm(x[:, 0])).square().sum().backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    for name, grad in got.items():
        scale = float(wanted[name].abs().max())
        assert catalogue.difference(grad, wanted[name]) <= 1e-4 * max(scale, 1.0), name


# By name


def test_weights_that_come_with_tubelet_load_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "ASSETS", tmp_path)
    with pytest.raises(ModelError, match="no weights 'tubelet-vit'"):
        load_model("tubelet-vit")
    weights.save_weights(tmp_path / "tubelet-vit", MODELS["class"], record={})
    loaded = load_model("tubelet-vit", dtype=torch.bfloat16)
    assert (loaded.random_weights, loaded.notes) == (False, ())
    assert (loaded.mean, loaded.std) == ((0.5,) * 3, (0.225,) * 3)
    assert (loaded.clip.frames, loaded.clip.size, loaded.clip.tubelet) == (8, (32, 32), (2, 8, 8))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    with accelerate(loaded.model, ToMe(r=6)):
        assert catalogue.logits(loaded.model, tiny.clip().bfloat16()).shape == (1, 7)
