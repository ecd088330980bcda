"""Learned reductions on hosts: each test fails when the step that makes the method is gone."""

import dataclasses

import pytest
import torch

from tubelet.core.context import Site, TokenContext
from tubelet.core.errors import RecipeError, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.core.handle import CAPABILITIES
from tubelet.core.recipe import LearnedReduction
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapters
from tubelet.models.encoder import EncoderAdapter
from tubelet.nn.reducers import REDUCERS, build_reducers
from tubelet.nn.reducers.geometry import Cells
from tubelet.recipes import (
    ATS,
    EVAD,
    RLT,
    VTM,
    GumbelKeep,
    HoT,
    LookupViT,
    RandomDrop,
    STViT,
    TokenSlimming,
    UniformPool,
)
from tubelet.recipes import catalogue as all_recipes
from tubelet.recipes.learned import at_layer
from tubelet.testing import catalogue, tiny, tolerances

MODULES = {
    GumbelKeep: "gumbel-keep",
    TokenSlimming: "token-slimming",
    LookupViT: "lookup",
    VTM: "vtm",
    STViT: "semantic-tokens",
    HoT: "hot",
}
GRIDDED = (TokenSlimming, LookupViT, STViT)
each = pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)


def at(cls, layer=1, keep_ratio=0.25, **fields):
    """The recipe at one layer of a tiny host."""
    where = {"layers": (layer,)} if cls is GumbelKeep else {"layer": layer}
    return cls(keep_ratio=keep_ratio, **where, **fields)


def build(name, seed=0):
    return catalogue.stir(tiny.build(name, seed, reducers=True))


@pytest.fixture(scope="module")
def hosts():
    return {name: build(name) for name in ("videomae", "vivit", "vjepa2")}


def encoder(model):
    return getattr(model, model.base_model_prefix)


# All


def test_at_layer_reduces_once_there():
    assert at_layer("GumbelKeep", 1, 0.3) == GumbelKeep(keep_ratio=0.3, layers=(1,))
    assert at_layer("HoT", 0, 0.3) == HoT(keep_ratio=0.3, layer=0)
    with pytest.raises(RecipeError, match=r"no learned recipe 'ToMe'; known: .*GumbelKeep"):
        at_layer("ToMe", 0, 0.3)


def test_every_learned_recipe_asks_for_a_module_that_exists():
    learned = {cls for cls in all_recipes().values() if issubclass(cls, LearnedReduction)}
    assert learned == set(MODULES)
    assert set(MODULES.values()) == set(REDUCERS)
    for cls, name in MODULES.items():
        assert cls.requires == {"any subset", f"trained {name}"}
    assert {need for need in CAPABILITIES if need.startswith("trained ")} == {
        f"trained {name}" for name in REDUCERS
    }


@each
@pytest.mark.parametrize("name", ["videomae", "vivit"])
def test_the_module_of_that_name_does_the_work(hosts, cls, name):
    model, recipe, pixels = hosts[name], at(cls), tiny.clip(2)
    ((ctx, plan),) = catalogue.record(model, recipe, pixels)
    lead, video = ctx.protected, ctx.hidden[:, ctx.protected :]
    place = torch.arange(64).expand(2, -1)
    module = encoder(model).reducers[MODULES[cls]]
    wanted = module(video, place, ctx.grid, 16)
    assert torch.equal(plan.hidden[:, lead:], wanted.hidden)
    assert torch.equal(plan.hidden[:, :lead], ctx.hidden[:, :lead])
    if wanted.recover is not None:
        final = torch.randn(plan.hidden.shape)
        back = plan.recover(final)
        assert torch.equal(back[:, lead:], wanted.recover(final[:, lead:]))
        assert torch.equal(back[:, :lead], final[:, :lead])


@each
@pytest.mark.parametrize("ratio", [1e-6, 0.3, 0.95])
def test_any_keep_ratio_leaves_at_least_one_token(hosts, cls, ratio):
    model = hosts["vivit"]
    with accelerate(model, at(cls, keep_ratio=ratio)) as handle:
        catalogue.logits(model, tiny.clip(1))
    left = handle.report().tokens_per_layer[-1] - 1
    wanted = max(1, -int(-64 * ratio // 1))
    assert left == wanted or (cls in GRIDDED and 0.7 * wanted <= left < wanted)


@each
def test_impossible_fields_are_refused(cls):
    for layer, keep_ratio in ((1, 0.0), (1, 1.5), (-1, 0.5)):
        with pytest.raises(RecipeError, match=r"must be >"):
            at(cls, layer, keep_ratio=keep_ratio)


@each
def test_a_host_without_the_module_is_refused_with_the_reason(cls):
    model = tiny.build("videomae")
    before, name = catalogue.snapshot(model), MODULES[cls]
    with pytest.raises(UnsupportedError, match=rf"no reducers\['{name}'\]; `tubelet train`"):
        accelerate(model, at(cls))
    catalogue.assert_untouched(model, before)
    # Another module does not help; on the model itself it is found as well as on its encoder.
    other = next(other for other in REDUCERS if other != name)
    model.reducers = build_reducers(48, 3, names=[other])
    with pytest.raises(UnsupportedError, match=name):
        accelerate(model, at(cls))
    model.reducers = build_reducers(48, 3, names=[name])
    accelerate(model, at(cls)).remove()


@each
def test_no_family_of_hugging_face_claims_to_carry_the_module(cls):
    need = f"trained {MODULES[cls]}"
    for adapter in adapters():
        if isinstance(adapter, EncoderAdapter) and adapter.family != "VideoViT":
            for variant, lacks in adapter.variants().items():
                assert lacks.keys() & {need, "any subset"}, variant


def test_a_context_without_the_module_names_it_and_its_source():
    site = Site(name="layer", layer=2, num_layers=4, kind="joint")
    ctx = TokenContext(
        site=site,
        grid=TokenGrid(frames=1, height=1, width=4),
        hidden=torch.randn(1, 4, 8),
        size=torch.ones(1, 4),
        anchor=torch.arange(4)[None],
        modules={"hot": None},
    )
    with pytest.raises(UnsupportedError, match=r"module 'vtm' \(it has hot\); `tubelet train`"):
        VTM(keep_ratio=0.5).transform(ctx)
    assert dataclasses.replace(ctx, modules={"vtm": 3}).trained("vtm") == 3


@each
@pytest.mark.parametrize("name", ["videomae", "vivit"])
def test_training_reaches_the_module_and_the_host(cls, name):
    model, weight = build(name).train(), torch.randn(2, 7)
    base = encoder(model)
    with accelerate(model, at(cls)):
        hidden = base(tiny.clip(2)).last_hidden_state
        (model(tiny.clip(2)).logits * weight).sum().add(hidden.square().sum()).backward()
    module = base.reducers[MODULES[cls]]
    without = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    rest = [n for n, p in base.named_parameters() if p.grad is None and "reducers" not in n]
    assert not rest
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@each
def test_a_training_step_with_random_budgets_moves_the_loss(cls):
    model, target = build("vivit").train(), torch.tensor([1, 4])
    module = encoder(model).reducers[MODULES[cls]]
    optimiser = torch.optim.SGD(module.parameters(), 0.05)
    losses = []
    for step in range(12):
        torch.manual_seed(0)
        with accelerate(model, at(cls, layer=0, keep_ratio=(0.2, 0.4)[step % 2])):
            loss = torch.nn.functional.cross_entropy(model(tiny.clip(2)).logits, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-2:]) < sum(losses[:2])


# One by one


@pytest.mark.parametrize("name", ["videomae", "vivit"])
def test_GumbelKeep_in_training_weighs_later_keys_by_a_factor_of_one(name):
    model, pixels = build(name), tiny.clip(2)
    seen = []
    recipe = catalogue.spying(at(GumbelKeep), lambda ctx, plan: seen.append(plan))
    with accelerate(model.train(), recipe) as handle:
        torch.manual_seed(3)
        noisy = model(pixels).logits
        weight = torch.autograd.grad(noisy.square().sum(), seen[0].log_weight)[0]
    assert bool((weight != 0).any(1).all()), "no gradient through attention"
    assert not seen[0].log_weight.any()
    assert handle.report().attention == {"as in the host": 2, "sdpa, learned weight": 2}
    # The same tokens kept without any weight give the same values.
    kept = seen[0].assignment
    plain = build(name)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Same(RandomDrop):
        """Keeps the tokens that training kept."""

        def acts_on(self, site):
            return site.kind == "joint" and site.layer == 1

        def plan(self, ctx):
            return kept

    with accelerate(plain, Same()):
        wanted = catalogue.logits(plain, pixels)
    assert catalogue.difference(noisy, wanted) <= tolerances.ORACLE


def test_GumbelKeep_drops_at_each_of_its_layers(hosts):
    model = hosts["vivit"]
    with accelerate(model, GumbelKeep(keep_ratio=0.5, layers=(0, 2))) as handle:
        catalogue.logits(model, tiny.clip(2))
    assert handle.report().tokens_per_layer == [65, 33, 33, 17]


def test_GumbelKeep_context_is_a_share_of_the_kept_tokens(hosts):
    ((_, plan),) = catalogue.record(hosts["videomae"], at(GumbelKeep, context=1.0), tiny.clip(2))
    anchors = plan.assignment.anchor
    assert torch.equal(anchors[0], anchors[1]), "what is random does not depend on the sample"
    ((_, plan),) = catalogue.record(hosts["videomae"], at(GumbelKeep), tiny.clip(2))
    assert not torch.equal(plan.assignment.anchor[0], plan.assignment.anchor[1])


def test_TokenSlimming_slots_are_means_of_all_tokens(hosts):
    model = hosts["videomae"]
    ((ctx, plan),) = catalogue.record(model, at(TokenSlimming), tiny.clip(2))
    module = encoder(model).reducers["token-slimming"]
    place = torch.arange(64).expand(2, -1)
    weights = module.weights(ctx.hidden, place, ctx.grid, Cells(ctx.grid, 16, ctx.hidden))
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 16))
    assert bool((weights > 0).all())
    torch.testing.assert_close(plan.hidden, weights @ ctx.hidden)


def test_LookupViT_of_a_fresh_module_equals_pooling_at_that_layer():
    model, pixels = tiny.build("videomae", reducers=True), tiny.clip(2)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Pooled(UniformPool):
        """The same boxes as the compressed grid."""

        def acts_on(self, site):
            return site.kind == "joint" and site.layer == 1

    with accelerate(model, at(LookupViT)), torch.no_grad():
        got = encoder(model)(pixels).last_hidden_state.mean(1)
    with accelerate(model, Pooled(factor=(1, 2, 2))), torch.no_grad():
        wanted = encoder(model)(pixels).last_hidden_state.mean(1)
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE


def test_LookupViT_updates_every_lookup_token_at_the_end(hosts):
    model, pixels = hosts["videomae"], tiny.clip(1)
    base, distinct = encoder(model), []
    for recover in (True, False):
        with accelerate(model, at(LookupViT, recover=recover)), torch.no_grad():
            distinct.append(len(base(pixels).last_hidden_state[0].unique(dim=0)))
    assert distinct == [64, 16]


def test_VTM_merges_the_least_salient_into_the_most_similar_salient(hosts):
    model = hosts["videomae"]
    ((ctx, plan),) = catalogue.record(model, at(VTM), tiny.clip(2))
    module = encoder(model).reducers["vtm"]
    saliency = module.saliency(module.norm(ctx.hidden))[..., 0].sigmoid()
    kept = saliency.topk(16).indices.sort().values
    assert torch.equal(plan.assignment.anchor, kept)
    unit = torch.nn.functional.normalize(ctx.hidden, dim=-1)
    for b in range(2):
        slot = (unit[b] @ unit[b, kept[b]].T).argmax(-1)
        slot[kept[b]] = torch.arange(16)
        assert torch.equal(plan.assignment.index[b], slot)
        for k in range(16):
            share = saliency[b] * (slot == k)
            mean = (share[:, None] * ctx.hidden[b]).sum(0) / share.sum()
            torch.testing.assert_close(plan.hidden[b, k], mean, atol=1e-5, rtol=1e-4)


def test_STViT_semantic_tokens_see_all_tokens_and_tokens_see_them(hosts):
    model = hosts["videomae"]
    ((ctx, plan),) = catalogue.record(model, at(STViT), tiny.clip(1))
    hidden = ctx.hidden.clone()
    hidden[0, 63] += 10 * torch.randn(48)
    moved = at(STViT).transform(dataclasses.replace(ctx, hidden=hidden)).hidden
    assert bool((moved != plan.hidden).any(-1).all()), "a semantic token sees its window only"
    final = plan.hidden.clone()
    final[0, 0] += 10 * torch.randn(48)
    before, after = plan.recover(plan.hidden), plan.recover(final)
    assert bool((before != after).any(-1).all()), "a token sees its own semantic token only"


def test_HoT_keeps_centres_in_order_and_recovers_all_tokens(hosts):
    model = hosts["videomae"]
    ((ctx, _),) = catalogue.record(model, at(HoT), tiny.clip(1))
    # Four kinds of tokens, in turns; the first of each kind has exact copies around it.
    kinds = torch.randn(4, 48)
    hidden = kinds.repeat(16, 1)[None] + 0.1 * torch.randn(1, 64, 48)
    hidden[0, 8:20] = kinds.repeat(3, 1)
    plan = at(HoT, keep_ratio=4 / 64).transform(dataclasses.replace(ctx, hidden=hidden))
    assert plan.assignment.anchor.tolist() == [[8, 9, 10, 11]]
    assert torch.equal(plan.assignment.index[0], torch.arange(64) % 4)
    back = plan.recover(torch.randn(1, 4, 48))
    assert back.shape == (1, 64, 48)
    assert len(back[0].unique(dim=0)) == 64


# Several reductions in one run


@pytest.mark.parametrize(
    "recipes",
    [
        (RandomDrop(keep_ratio=0.5), at(HoT)),
        (RandomDrop(keep_ratio=0.5), at(GumbelKeep), at(HoT, layer=2, keep_ratio=0.5)),
        (at(TokenSlimming, keep_ratio=0.5), at(HoT, layer=2, keep_ratio=0.5)),
        (at(LookupViT, keep_ratio=0.5), EVAD(keep_ratio=0.5, depths=(0.75,))),
        (RLT(), at(HoT, keep_ratio=0.5)),
        (RLT(), at(GumbelKeep, keep_ratio=0.5), EVAD(keep_ratio=0.9, depths=(0.75,))),
        (RLT(), at(VTM, keep_ratio=0.5)),
    ],
    ids=lambda recipes: " + ".join(r.name for r in recipes),
)
@pytest.mark.parametrize("name", ["vivit", "vjepa2"])
def test_reductions_compose_stage_by_stage(hosts, name, recipes):
    model, pixels = hosts[name], tiny.clip(2)
    with accelerate(model, *recipes) as handle, torch.no_grad():
        together = model(pixels).logits
        counts = [a.num_out for a in handle.assignment]
        for assignment in handle.assignment:
            assignment.check()
            assert assignment.num_in == encoder(model)(pixels).last_hidden_state.shape[1]
        singles = torch.cat([model(clip[None]).logits for clip in pixels])
    assert bool(together.isfinite().all())
    assert len(set(counts)) == (2 if RLT() in recipes else 1)
    assert catalogue.difference(together, singles) <= 2 * tolerances.SPLIT_BATCH


def test_the_way_back_runs_before_what_came_earlier_is_undone(hosts):
    model, pixels = hosts["videomae"], tiny.clip(1)
    recipes = (RandomDrop(keep_ratio=0.5), at(HoT, keep_ratio=0.5))
    with accelerate(model, *recipes) as handle, torch.no_grad():
        hidden = encoder(model)(pixels).last_hidden_state[0]
    drop = handle.assignment[0].index[0] < 0
    # The 32 that were kept at first come back one by one; those dropped share one value.
    assert int(drop.sum()) == 32
    assert len(hidden[~drop].unique(dim=0)) == 32
    assert len(hidden[drop].unique(dim=0)) == 1
    torch.testing.assert_close(hidden[drop][0], hidden[~drop].mean(0), atol=1e-4, rtol=1e-3)


def test_counts_per_sample_behind_a_way_back_for_the_batch_are_refused(hosts):
    model, after = hosts["vivit"], ATS(first_layer=2, samples=0.2, min_tokens=1)
    with (
        accelerate(model, at(TokenSlimming), after),
        pytest.raises(UnsupportedError, match="first"),
    ):
        catalogue.logits(model, tiny.clip(2))
    with accelerate(model, at(TokenSlimming, recover=False), after):
        assert bool(catalogue.logits(model, tiny.clip(2)).isfinite().all())


def test_pooling_behind_a_drop_is_refused(hosts):
    model = hosts["vivit"]
    with (
        accelerate(model, RandomDrop(), at(LookupViT)),
        pytest.raises(UnsupportedError, match="put it before other reductions"),
    ):
        catalogue.logits(model, tiny.clip(2))


def test_a_learned_weight_trains_in_packed_batches():
    model = build("vivit").train()
    with accelerate(model, RLT(), at(GumbelKeep)) as handle:
        model(tiny.clip(2)).logits.square().sum().backward()
    assert len(handle.assignment) == 2
    module = encoder(model).reducers["gumbel-keep"]
    assert bool(module.score[0].weight.grad.any())


def test_vjepa2_pooler_sees_what_a_way_back_filled(hosts):
    model, pixels = hosts["vjepa2"], tiny.clip(2)
    # What EVAD drops is filled before the way back runs.
    recipes = (at(HoT, keep_ratio=0.75), EVAD(keep_ratio=0.5, depths=(0.75,)))
    with accelerate(model, *recipes) as handle, torch.no_grad():
        got = model(pixels).logits
        hidden = model.vjepa2(pixels, skip_predictor=True).last_hidden_state
    assert bool((handle.assignment[0].index < 0).any())
    with torch.no_grad():
        wanted = model.classifier(model.pooler(hidden))
    assert catalogue.difference(got, wanted) <= tolerances.ORACLE
