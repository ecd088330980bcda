"""Sparse prefill at work on tiny video language models, against masks applied by hand."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tubelet.core.assignment import TokenAssignment
from tubelet.core.block_mask import BlockMask
from tubelet.core.context import Site
from tubelet.core.errors import NoEffectWarning, NoMatchingSitesError, UnsupportedError
from tubelet.core.plan import AttentionPlan
from tubelet.core.prefill import PrefillContext
from tubelet.core.prompt import LayerContext
from tubelet.core.recipe import LayerReduction, SparsePrefill, param
from tubelet.models.accelerate import accelerate
from tubelet.recipes import EVS, AShape, FastV, GridAttention, RandomPrompt, VerticalSlash
from tubelet.testing import catalogue, catalogue_llm, tiny_llm

HOSTS = {name: tiny_llm.build(name) for name in tiny_llm.HOSTS}
BLOCK = (16, 16)
RECIPES = {
    "AShape": AShape(block=BLOCK, window=20, sink=4),
    "VerticalSlash": VerticalSlash(block=(4, 4), window=4, vertical=6, slash=8, sink=2),
    "GridAttention": GridAttention(block=(4, 4), window=6, sink=2),
}
hosts = pytest.mark.parametrize("host", HOSTS)
recipes = pytest.mark.parametrize("name", RECIPES)
# The runtime is the same for all, so every host and every recipe is tried once.
pairs = pytest.mark.parametrize(
    ("host", "name"),
    [(host, "VerticalSlash") for host in HOSTS]
    + [("qwen3_vl", name) for name in RECIPES if name != "VerticalSlash"],
)
# The identity point is asked for on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::tubelet.core.errors.NoEffectWarning")
BOUND = 2e-4


@cache
def prompt(host: str, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Prompts whose questions differ in length, so that all but one are padded."""
    return tiny_llm.prompt(host, [[4]] * batch, seed=seed, question=(9, 6))


@dataclass(frozen=True, kw_only=True)
class Given(SparsePrefill):
    """Block pairs drawn from the length alone, for all heads, diagonals among them."""

    identity: ClassVar = {}
    reordered: bool = param(False, "tokens are shuffled first")

    def plan(self, ctx: PrefillContext) -> AttentionPlan:
        num, generator = ctx.num_tokens, torch.Generator().manual_seed(ctx.num_tokens)
        blocks = -(-num // 16)
        kept = torch.rand(1, 1, blocks, blocks, generator=generator) < 0.4
        kept |= torch.eye(blocks, dtype=torch.bool)
        mask = BlockMask.from_dense(kept, block=BLOCK, num_queries=num, num_keys=num)
        order = torch.randperm(num, generator=generator)[None] if self.reordered else None
        return AttentionPlan(mask=mask, order=order)


def seen_by(recipe: SparsePrefill, num: int) -> Tensor:
    """[N, N] pairs that `Given` leaves of a prompt of that length."""
    ctx = PrefillContext(
        site=Site(name="", layer=0, num_layers=1, kind="llm"),
        grids=(),
        query=torch.zeros(1, 1, num, 1),
        key=torch.zeros(1, 1, num, 1),
        value=torch.zeros(1, 1, num, 1),
        scale=1.0,
        video=torch.zeros(num, dtype=torch.long),
        place=torch.zeros(num, dtype=torch.long),
    )
    plan = recipe.plan(ctx)
    assert plan.mask is not None
    tokens, table = plan.mask.token_mask()[0, 0], torch.zeros(num, num, dtype=torch.bool)
    order = torch.arange(num) if plan.order is None else plan.order[0]
    table[order[:, None], order] = tokens
    return table.tril()


def by_hand(model: Any, inputs: dict[str, Tensor], mask: Callable[[int, int], Tensor]) -> Tensor:
    """Logits [B, V] behind each prompt's last token, with the host's own attention under a mask
    [N, N] given for (row, real tokens) in every layer."""
    base = model.model
    text = base.text_model if hasattr(base, "text_model") else base.language_model
    real = inputs["attention_mask"].bool()

    def replaced(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        width = real.shape[1]
        table = torch.zeros(len(real), 1, width, width, dtype=torch.bool)
        for row, valid in enumerate(real):
            columns = valid.nonzero()[:, 0]
            table[row, 0, columns[:, None], columns] = mask(row, len(columns))
        # Padding must see something, or it is not a number.
        table |= torch.eye(width, dtype=torch.bool)
        return args, {**kwargs, "attention_mask": table}

    hooks = [layer.register_forward_pre_hook(replaced, with_kwargs=True) for layer in text.layers]
    try:
        return catalogue_llm.logits(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()


@hosts
@pytest.mark.parametrize("recipe", [Given(), Given(reordered=True)], ids=["in order", "moved"])
def test_padded_prompts_see_what_the_plan_says(host, recipe):
    model, inputs = HOSTS[host], prompt(host)
    wanted = by_hand(model, inputs, lambda row, num: seen_by(recipe, num))
    dense = catalogue_llm.logits(model, inputs)
    with accelerate(model, recipe):
        found = catalogue_llm.logits(model, inputs)
    assert (found - wanted).abs().max() < BOUND
    assert (dense - wanted).abs().max() > 100 * BOUND


def test_padding_on_the_right_is_no_different():
    inputs = prompt("llava_onevision")
    pad = int((~inputs["attention_mask"].bool()).sum(1).max())
    assert pad
    rolled = {
        **inputs,
        **{
            name: torch.stack(
                [
                    row.roll(-int((~real.bool()).sum()))
                    for row, real in zip(inputs[name], inputs["attention_mask"], strict=True)
                ]
            )
            for name in ("input_ids", "attention_mask")
        },
    }
    model = HOSTS["llava_onevision"]
    ends = rolled["attention_mask"].sum(1) - 1
    with accelerate(model, Given()), torch.no_grad():
        left = model(**inputs).logits[:, -1]
        right = model(**rolled).logits[torch.arange(2), ends]
    assert (left - right).abs().max() < BOUND


@pairs
def test_the_answer_sees_everything_however_it_is_generated(host, name):
    """The first token is the sparse prompt's; later ones are the same with a cache and without."""
    model, inputs = HOSTS[host], prompt(host)
    catalogue_llm.modes_agree(model, RECIPES[name], inputs, BOUND)
    catalogue_llm.modes_agree(model, RECIPES[name], prompt(host, 1), BOUND)
    with accelerate(model, RECIPES[name]):
        beams = {"num_beams": 2, "max_new_tokens": 2, "do_sample": False}
        assert model.generate(**inputs, **beams).shape[1] == inputs["input_ids"].shape[1] + 2


@pairs
def test_recipe_acts_and_its_identity_is_the_dense_model_bit_for_bit(host, name):
    catalogue_llm.acts(HOSTS[host], RECIPES[name], prompt(host))
    catalogue_llm.identity_equals_dense(HOSTS[host], RECIPES[name], prompt(host))


@pairs
def test_remove_restores_and_errors_leave_the_model_usable(host, name):
    catalogue_llm.remove_restores(HOSTS[host], RECIPES[name], prompt(host))
    catalogue_llm.error_leaves_it_usable(HOSTS[host], RECIPES[name], prompt(host))


@pairs
def test_padded_batch_equals_its_prompts_and_nothing_survives(host, name):
    singles = [
        tiny_llm.prompt(host, [[4]], seed=seed, question=(words,))
        for seed, words in enumerate((9, 6))
    ]
    model, recipe = HOSTS[host], RECIPES[name]
    catalogue_llm.batch_equals_singles(model, recipe, prompt(host), singles, BOUND)
    catalogue_llm.state_never_survives(model, recipe, prompt(host), prompt(host, 3, seed=5))


@recipes
def test_recipe_runs_in_half_precision_and_survives_text_and_pickle(name):
    catalogue_llm.runs_in(HOSTS["qwen2_5_vl"], RECIPES[name], prompt("qwen2_5_vl"), torch.bfloat16)
    catalogue.survives_serialisation(RECIPES[name])
    catalogue.known_requirements(RECIPES[name])


def contexts(model: Any, inputs: dict[str, Tensor], *company: Any) -> list[PrefillContext]:
    """What a recipe saw in each layer of one forward pass."""
    seen: list[PrefillContext] = []
    spy = catalogue.spying(RECIPES["AShape"], lambda ctx, plan: seen.append(ctx))
    with accelerate(model, *company, spy):
        catalogue_llm.logits(model, inputs)
    return seen


@hosts
def test_recipes_know_which_token_is_where_in_which_video(host):
    videos = [[4]] if tiny_llm.HOSTS[host].images else [[4, 4]]
    inputs = tiny_llm.prompt(host, videos, question=(9,))
    ctx = contexts(HOSTS[host], inputs)[0]
    assert ctx.num_tokens == inputs["input_ids"].shape[1]
    assert [grid.num_video for grid in ctx.grids] == [16 * n for n in videos[0]]
    for number, frames in enumerate(videos[0]):
        assert ctx.place[ctx.video == number].tolist() == list(range(16 * frames))
    ids = inputs["input_ids"][0]
    assert bool((ids[ctx.video >= 0] == tiny_llm.HOSTS[host].placeholder).all())
    assert not bool(ctx.place[ctx.video < 0].any())


@hosts
def test_shorter_prompts_tell_which_tokens_are_left(host):
    inputs = prompt(host)
    seen = contexts(HOSTS[host], inputs, RandomPrompt(keep_ratio=0.25))
    whole = contexts(HOSTS[host], inputs)
    for ctx, full in zip(seen, whole, strict=True):
        left = ctx.place[ctx.video >= 0]
        assert len(left) == 16
        assert bool((left.diff() > 0).all())
        assert left.tolist() != list(range(16))
        assert int((ctx.video < 0).sum()) == int((full.video < 0).sum())


@hosts
def test_layers_behind_a_cut_attend_sparsely_over_what_is_left(host):
    layer = max(2, tiny_llm.HOSTS[host].deepstack)
    cut = FastV(layer=layer, keep_ratio=0.5)
    model, inputs = HOSTS[host], prompt(host, 1)
    seen = contexts(model, inputs, cut)
    assert [int((c.video >= 0).sum()) for c in seen] == [64] * layer + [32] * (4 - layer)
    # A mask that keeps everything leaves what the cut alone gives.
    with accelerate(model, cut):
        alone = catalogue_llm.answer(model, inputs)
    with accelerate(model, cut, Everything()) as handle:
        found = catalogue_llm.answer(model, inputs)
    assert torch.equal(found[0], alone[0])
    assert (found[1] - alone[1]).abs().max() < BOUND
    assert handle.report().mean_density == 1.0


@dataclass(frozen=True, kw_only=True)
class Everything(SparsePrefill):
    """A mask that leaves nothing out but what is later."""

    identity: ClassVar = {}

    def plan(self, ctx: PrefillContext) -> AttentionPlan:
        blocks = -(-ctx.num_tokens // 16)
        kept = torch.ones(1, 1, blocks, blocks, dtype=torch.bool).tril()
        sizes = {"num_queries": ctx.num_tokens, "num_keys": ctx.num_tokens}
        return AttentionPlan(mask=BlockMask.from_dense(kept, block=BLOCK, **sizes))


@dataclass(frozen=True, kw_only=True)
class First(LayerReduction):
    """Keeps the first half of the video tokens in front of layer 2."""

    identity: ClassVar = {}

    def acts_on(self, site: Site) -> bool:
        return site.kind == "llm" and site.layer == 2

    def plan(self, ctx: LayerContext) -> TokenAssignment:
        kept = torch.arange(ctx.num_tokens // 2)[None]
        return TokenAssignment.keep(kept, ctx.num_tokens)


@pytest.mark.parametrize("company", [EVS(keep_ratio=0.4), First()])
@recipes
def test_reduced_prompts_generate_alike_in_every_way(name, company):
    model, inputs = HOSTS["qwen3_vl"], prompt("qwen3_vl")
    with accelerate(model, company, RECIPES[name]):
        wanted = catalogue_llm.answer(model, inputs)
        for mode in ({"cache_implementation": "static"}, {"use_cache": False}):
            found = catalogue_llm.answer(model, inputs, **mode)
            assert torch.equal(found[0], wanted[0])
            assert (found[1] - wanted[1]).abs().max() < BOUND


def test_only_the_prompt_is_sparse_and_the_report_says_how():
    model, inputs = HOSTS["qwen2_5_vl"], prompt("qwen2_5_vl", 1)
    recipe = replace(RECIPES["AShape"], dense_layers=1)
    with accelerate(model, recipe) as handle:
        catalogue_llm.answer(model, inputs)
    report = handle.report()
    assert sum(report.attention.values()) == 3
    assert [call["layer"] for call in report.densities()] == [1, 2, 3]
    num = inputs["input_ids"].shape[1]
    listed = seen_blocks(recipe, num)
    blocks = -(-num // 16)
    for call in report.densities():
        wanted = listed / (blocks * (blocks + 1) / 2)
        assert call["heads"] == pytest.approx([wanted] * len(call["heads"]))
    assert not report.fallbacks


def seen_blocks(recipe: AShape, num: int) -> int:
    """Block pairs of an A-shape, counted one by one."""
    blocks = range(-(-num // 16))
    return sum(
        first * 16 < recipe.sink or (row * 16 - (first * 16 + 15)) < recipe.window
        for row in blocks
        for first in blocks
        if first <= row
    )


def test_dense_layers_are_the_host_s_own():
    model, inputs = HOSTS["internvl"], prompt("internvl")
    assert torch.equal(
        catalogue_llm.logits(model, inputs),
        _with(model, replace(RECIPES["AShape"], window=10_000), inputs),
    )
    with pytest.raises(NoMatchingSitesError):
        accelerate(model, replace(RECIPES["AShape"], dense_layers=4))


def _with(model: Any, recipe: SparsePrefill, inputs: dict[str, Tensor]) -> Tensor:
    with accelerate(model, recipe):
        return catalogue_llm.logits(model, inputs)


def test_short_prompts_that_stay_dense_are_counted_and_warned_about():
    model, inputs = HOSTS["internvl"], prompt("internvl")
    with pytest.warns(NoEffectWarning), accelerate(model, AShape()) as handle:
        catalogue_llm.logits(model, inputs)
    assert handle.report().fallbacks == {"AShape: its plan is dense": 8}


@pytest.mark.parametrize("host", ["qwen2_5_vl", "llava_onevision"])
def test_prompts_in_parts_are_refused(host):
    model, inputs = HOSTS[host], prompt(host, 1)
    dense = catalogue_llm.logits(model, inputs)
    handle = accelerate(model, RECIPES["AShape"])
    with pytest.raises(UnsupportedError, match="came in parts; leave prefill_chunk_size out"):
        catalogue_llm.answer(model, inputs, prefill_chunk_size=20)
    handle.remove()
    assert torch.equal(catalogue_llm.logits(model, inputs), dense)


def test_models_with_sliding_windows_are_refused():
    model = tiny_llm.build("llava_onevision")
    model.model.language_model.config.layer_types[1] = "sliding_attention"
    with pytest.raises(UnsupportedError, match="full attention; this model has sliding_attention"):
        accelerate(model, RECIPES["AShape"])
    assert not model.model.language_model.config._attn_implementation.startswith("tubelet")


def test_verification_measures_the_loss_and_a_limit_makes_calls_dense():
    model, inputs = HOSTS["qwen2_5_vl"], prompt("qwen2_5_vl")
    dense = catalogue_llm.logits(model, inputs)
    with accelerate(model, RECIPES["AShape"], verify=2) as handle:
        catalogue_llm.logits(model, inputs)
    checks = handle.report().verified()
    assert len(checks) == 8
    assert all(check["error"] > 1e-3 for check in checks)
    assert all(0 < check["recall"] < 1 for check in checks)
    with accelerate(model, Everything(), verify=2) as handle:
        catalogue_llm.logits(model, inputs)
    assert all(check["error"] < 1e-5 for check in handle.report().verified())
    assert all(check["recall"] > 0.9999 for check in handle.report().verified())
    with accelerate(model, RECIPES["AShape"], verify=2, max_error=1e-4) as handle:
        found = catalogue_llm.logits(model, inputs)
    assert (found - dense).abs().max() < BOUND
    assert handle.report().fallbacks == {"AShape: error above 0.0001": 8}


def test_a_named_implementation_is_used_or_refused():
    model, inputs = HOSTS["qwen2_5_vl"], prompt("qwen2_5_vl")
    with accelerate(model, RECIPES["AShape"], impl="reference") as handle:
        catalogue_llm.logits(model, inputs)
    assert list(handle.report().attention) == [f"{RECIPES['AShape']}: reference"]
    with (
        accelerate(model, RECIPES["AShape"], impl="sdpa"),
        pytest.raises(UnsupportedError, match=r"'sdpa' cannot run this: .*no block lists"),
    ):
        catalogue_llm.logits(model, inputs)


def test_two_prefill_recipes_need_layers_of_their_own():
    from tubelet.core.errors import ConflictError

    with pytest.raises(ConflictError, match="both decide prefill"):
        accelerate(HOSTS["internvl"], RECIPES["AShape"], RECIPES["GridAttention"])
