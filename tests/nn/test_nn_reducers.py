"""Trained reducers: each test states what a module does and fails when that step is gone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from tubelet.core.errors import ModelError, UnsupportedError
from tubelet.core.grid import TokenGrid
from tubelet.nn.reducers import REDUCERS, Reducers, ReducersConfig, build_reducers
from tubelet.nn.reducers.clusters import density_peaks
from tubelet.nn.reducers.geometry import Cells, coordinates
from tubelet.nn.rotary import apply_rotary, rotary_table
from tubelet.testing import catalogue

WIDTH, HEADS = 32, 2
GRID = TokenGrid(frames=4, height=4, width=4, before=1)
GRIDDED = ("token-slimming", "lookup", "semantic-tokens")
WITH_WAY_BACK = (*GRIDDED, "hot")

every = pytest.mark.parametrize("name", REDUCERS)


def reducer(name, stirred=True):
    """A module in eval mode; stirred, because many layers start at zero."""
    module = build_reducers(WIDTH, HEADS, max_slots=12, names=[name])[name].eval()
    return catalogue.stir(module) if stirred else module


def tokens(batch=2, grid=GRID, seed=0):
    x = torch.randn(batch, grid.num_video, WIDTH, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(grid.num_video).expand(batch, -1)


# All


@every
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sides", [(4, 4, 4), (2, 3, 5), (1, 1, 7)])
def test_any_budget_on_any_grid(name, training, sides):
    frames, height, width = sides
    grid = TokenGrid(frames=frames, height=height, width=width)
    x, place = tokens(2, grid)
    module = reducer(name).train(training)
    for num in (1, 2, 3, 5, grid.num_video // 2, grid.num_video):
        num = min(num, grid.num_video)
        plan = module(x, place, grid, num)
        plan.assignment.check()
        assert plan.num_out == num or (name in GRIDDED and 1 <= plan.num_out < num)
        assert plan.hidden.shape == (2, plan.num_out, WIDTH)
        assert bool(plan.hidden.isfinite().all())
        if plan.recover is not None:
            assert plan.recover(plan.hidden).shape == x.shape
        assert (plan.recover is not None) == (name in WITH_WAY_BACK)


@every
def test_every_parameter_gets_a_gradient(name):
    module, (x, place) = reducer(name).train(), tokens()
    plan = module(x.requires_grad_(), place, GRID, 16)
    # What the host's later attention makes of the tokens and of their weight as keys.
    weight = 0.0 if plan.log_weight is None else plan.log_weight
    share = (plan.hidden.mean(-1) + weight).softmax(1)
    out = plan.hidden if plan.recover is None else plan.recover(plan.hidden * share[..., None])
    loss = out.square().sum() + torch.einsum("bk,bkc->bc", share, plan.hidden).square().sum()
    loss.backward()
    without = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert bool(x.grad.isfinite().all())


@every
def test_less_than_700_thousand_parameters_at_width_256(name):
    module = build_reducers(256, 4, names=[name])[name]
    assert sum(p.numel() for p in module.parameters()) < 700_000


@pytest.mark.parametrize("name", WITH_WAY_BACK)
def test_without_way_back_the_tokens_are_the_same(name):
    module, (x, place) = reducer(name), tokens()
    one, other = module(x, place, GRID, 16), module(x, place, GRID, 16, recover=False)
    assert torch.equal(one.hidden, other.hidden)
    assert other.recover is None


@pytest.mark.parametrize("name", GRIDDED)
def test_pooling_a_grid_with_holes_is_refused(name):
    x, place = tokens()
    with pytest.raises(UnsupportedError, match="whole grid of 64 video tokens, and only 60"):
        reducer(name)(x[:, :60], place[:, :60], GRID, 16)


@pytest.mark.parametrize("name", ["gumbel-keep", "vtm", "hot"])
def test_selection_runs_on_what_an_earlier_reduction_left(name):
    x, place = tokens()
    left = torch.tensor([1, 4, 5, 20, 33, 60])
    plan = reducer(name)(x[:, left], place[:, left], GRID, 3)
    plan.assignment.check()


def test_configuration_and_weights_survive():
    config = ReducersConfig(width=WIDTH, heads=HEADS, names=("vtm", "hot"))
    again = ReducersConfig.from_dict(config.to_dict())
    assert again == config
    reducers = Reducers(again)
    assert reducers.names == tuple(reducers) == ("vtm", "hot")
    Reducers(config).load_state_dict(reducers.state_dict())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"names": ("ToMe",)}, "no reducer 'ToMe'"),
        ({"heads": 5}, "divide the width"),
        ({"max_slots": 0}, "at least one slot"),
    ],
)
def test_impossible_configurations_are_refused(changes, text):
    with pytest.raises(ModelError, match=text):
        ReducersConfig(**{"width": WIDTH, "heads": HEADS, **changes})
    with pytest.raises(ModelError, match="not a configuration"):
        ReducersConfig.from_dict({"depth": 3})


# Gumbel keep


def test_gumbel_keep_takes_the_highest_logits():
    module, (x, place) = reducer("gumbel-keep"), tokens()
    plan = module(x, place, GRID, 20)
    best = module.logits(x, 20).topk(20).indices.sort().values
    assert torch.equal(plan.assignment.anchor, best)
    assert torch.equal(plan.hidden, plan.assignment.reduce(x))
    assert plan.log_weight is None


def test_gumbel_keep_logit_reads_the_token_and_the_mean():
    module, (x, _) = reducer("gumbel-keep"), tokens(1)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(module.logits(x, 20)[0, 3], x)
    reach = grad[0].norm(dim=-1)
    others = torch.cat([reach[:3], reach[4:]])
    assert bool((others > 0).all())
    assert reach[3] > 5 * others.max()


def test_gumbel_keep_training_samples_and_leaves_values_alone():
    module, (x, place) = reducer("gumbel-keep").train(), tokens()
    plans = [module(x, place, GRID, 20) for _ in range(3)]
    assert len({tuple(plan.assignment.anchor.flatten().tolist()) for plan in plans}) == 3
    for plan in plans:
        assert torch.equal(plan.hidden, plan.assignment.reduce(x))
        assert not plan.log_weight.any()


def test_gumbel_keep_noise_follows_the_logits():
    module, (x, place) = reducer("gumbel-keep").train(), tokens(1)
    with torch.no_grad():
        module.score[2].weight.mul_(50)
        anchors = module(x.expand(200, -1, -1), place.expand(200, -1), GRID, 16).assignment.anchor
    counts = torch.bincount(anchors.flatten(), minlength=64).float()
    logits = module.logits(x, 16)[0]
    assert counts[logits.topk(16).indices].mean() > 1.5 * counts[(-logits).topk(16).indices].mean()


@pytest.mark.parametrize("path", ["key weight", "token"])
def test_gumbel_keep_score_gets_its_gradient_by_both_paths(path):
    module, (x, place) = reducer("gumbel-keep").train(), tokens()
    plan = module(x, place, GRID, 20)
    out = plan.log_weight[0, 4] if path == "key weight" else plan.hidden[0, 4].sum()
    kept = int(plan.assignment.anchor[0, 4])
    wanted = torch.autograd.grad(F.logsigmoid(module.logits(x, 20))[0, kept], module.score[2].bias)
    (found,) = torch.autograd.grad(out, module.score[2].bias)
    scale = 1.0 if path == "key weight" else x[0, kept].sum()
    torch.testing.assert_close(found, wanted[0] * scale)


def test_gumbel_keep_penalty_is_the_squared_gap_to_the_budget():
    module, (x, place) = reducer("gumbel-keep", stirred=False).train(), tokens()
    torch.nn.init.zeros_(module.score[2].weight)
    for bias, mean in ((0.0, 0.25), (3.0, 1 / (1 + 3 * torch.tensor(-3.0).exp()))):
        torch.nn.init.constant_(module.score[2].bias, bias)
        module(x, place, GRID, 16)
        assert float(module.penalty().detach()) == pytest.approx(
            (float(mean) - 0.25) ** 2, abs=1e-6
        )
        assert float(module.penalty()) == 0.0, "a penalty was collected twice"
    module.eval()(x, place, GRID, 16)
    assert float(module.penalty()) == 0.0


def test_gumbel_keep_penalty_averages_the_passes_and_is_not_copied():
    module, (x, place) = reducer("gumbel-keep").train(), tokens()
    single = []
    for num in (8, 40):
        module(x, place, GRID, num)
        single.append(module.penalty())
        module(x, place, GRID, num)
        module(x, place, GRID, 64 - num)
        assert len(copy.deepcopy(module)._pending) == 0
        pickle.dumps(module)
        module.penalty()
    module(x, place, GRID, 8)
    module(x, place, GRID, 40)
    torch.testing.assert_close(module.penalty(), torch.stack(single).mean())


def test_gumbel_keep_context_tokens_ignore_the_score():
    module, (x, place) = reducer("gumbel-keep"), tokens()
    chosen = module(x, place, GRID, 16, context=16).assignment.anchor
    other = module(-x, place, GRID, 16, context=16).assignment.anchor
    assert torch.equal(chosen, other)
    half = module(x, place, GRID, 16, context=8).assignment.anchor
    scored = module(x, place, GRID, 16).assignment.anchor
    assert all(set(h.tolist()) & set(c.tolist()) for h, c in zip(half, chosen, strict=True))
    assert not torch.equal(half, scored)


def test_gumbel_keep_learns_which_tokens_carry_the_answer():
    # An eighth of the tokens is marked and carries the label; the readout is the weighted mean.
    module, chance = reducer("gumbel-keep").train(), torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(module.parameters(), 1e-2)

    def sample():
        x = torch.randn(16, 64, WIDTH, generator=chance)
        marked = torch.rand(16, 64, generator=chance).argsort(1) < 8
        label = torch.randn(16, 1, generator=chance).sign()
        x[..., 0] = torch.where(marked, 3.0, 0.0)
        x[..., 1] = torch.where(marked, 2 * label, 0.0)
        return x, marked, label[:, 0]

    place = torch.arange(64).expand(16, -1)
    for _ in range(60):
        x, _, label = sample()
        plan = module(x, place, GRID, 8)
        read = (plan.log_weight.softmax(1) * plan.hidden[..., 1]).sum(1)
        loss = (read - 2 * label).square().mean() + module.penalty()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, marked, _ = sample()
    kept = module.eval()(x, place, GRID, 8).assignment.anchor
    assert marked.gather(1, kept).float().mean() > 0.9


# Video token merging


def test_vtm_merges_into_the_nearest_salient_token_weighted_by_saliency():
    module = reducer("vtm", stirred=False)
    module.norm = torch.nn.Identity()
    with torch.no_grad():
        module.saliency.weight.zero_()
        module.saliency.weight[0, 0] = 1.0
        module.saliency.bias.zero_()
    x = torch.zeros(1, 4, WIDTH)
    x[0, :, 0] = torch.tensor([2.0, -1.0, 3.0, -2.0])  # saliency: 0 and 2 stay
    x[0, :, 1] = torch.tensor([9.0, 5.0, -9.0, -5.0])  # 1 is like 0, 3 is like 2
    plan = module(x, torch.arange(4)[None], TokenGrid(frames=1, height=1, width=4), 2)
    assert plan.assignment.anchor.tolist() == [[0, 2]]
    assert plan.assignment.index.tolist() == [[0, 0, 1, 1]]
    s = x[0, :, 0].sigmoid()
    wanted = torch.stack(
        [
            (s[0] * x[0, 0] + s[1] * x[0, 1]) / (s[0] + s[1]),
            (s[2] * x[0, 2] + s[3] * x[0, 3]) / (s[2] + s[3]),
        ]
    )
    torch.testing.assert_close(plan.hidden[0], wanted)


@pytest.mark.parametrize("path", ["mean", "key weight"])
def test_vtm_saliency_gets_its_gradient_by_both_paths(path):
    module, (x, place) = reducer("vtm").train(), tokens()
    plan = module(x, place, GRID, 20)
    out = plan.hidden.square().sum() if path == "mean" else plan.log_weight.sum()
    (grad,) = torch.autograd.grad(out, module.saliency.weight)
    assert bool((grad != 0).all())
    assert not plan.log_weight.any()
    assert not plan.assignment.weight.requires_grad, "the record would hold the graph"
    assert module.eval()(x, place, GRID, 20).log_weight is None


# Token slimming


def test_slimming_rows_add_up_to_one_over_tokens():
    module, (x, place) = reducer("token-slimming"), tokens()
    cells = Cells(GRID, 16, x)
    weights = module.weights(x, place, GRID, cells)
    assert weights.shape == (2, 16, 64)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 16))
    torch.testing.assert_close(module(x, place, GRID, 16).hidden, weights @ x)


def test_slimming_weights_read_the_tokens_the_slot_and_the_place():
    module, (x, place) = reducer("token-slimming"), tokens()
    cells = Cells(GRID, 16, x)
    weights = module.weights(x, place, GRID, cells)
    assert not torch.allclose(weights, module.weights(x.flip(-1), place, GRID, cells))
    with torch.no_grad():
        module.slots.add_(torch.randn(module.slots.shape))
    assert not torch.allclose(weights, module.weights(x, place, GRID, cells))
    # At first every slot looks around itself.
    fresh = reducer("token-slimming", stirred=False)
    nearest = fresh.weights(torch.zeros_like(x), place, GRID, cells).argmax(-1)
    assert torch.equal(cells.assignment.index.gather(1, nearest)[0], torch.arange(16))


def test_slimming_returns_by_the_same_weights_over_slots():
    module, (x, place) = reducer("token-slimming", stirred=False), tokens()
    plan = module(x, place, GRID, 16)
    final = torch.randn(2, 16, WIDTH)
    weights = module.weights(x, place, GRID, Cells(GRID, 16, x))
    back = weights / weights.sum(1, keepdim=True)
    wanted = torch.einsum("bkn,bkc->bnc", back, final)
    # The channel MLP starts at zero; once stirred it sees the tokens of before as well.
    torch.testing.assert_close(plan.recover(final), wanted)
    assert not torch.allclose(catalogue.stir(module)(x, place, GRID, 16).recover(final), wanted)


# Lookup


def lookup_logits(module, x, place, cells):
    """Logits [B, H, K, N] of the read, by plain products."""

    def heads(y):
        return y.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    pooled = cells.assignment.reduce(x)
    q = heads(module.compressed(module.norm_compressed(pooled)))
    k = heads(module.lookup(module.norm_lookup(x)))
    q = apply_rotary(q, *rotary_table(cells.centre, q.shape[-1]))
    k = apply_rotary(k, *rotary_table(coordinates(place, GRID), q.shape[-1]))
    return q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5


def test_lookup_reads_from_all_tokens_onto_the_pooled_grid():
    module, (x, place) = reducer("lookup"), tokens()
    cells = Cells(GRID, 16, x)
    share = lookup_logits(module, x, place, cells).softmax(-1)
    value = module.value_read(module.norm_lookup(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    read = module.out_read((share @ value).transpose(1, 2).flatten(2))
    wanted = cells.assignment.reduce(x) + read
    torch.testing.assert_close(module(x, place, GRID, 16).hidden, wanted, atol=1e-5, rtol=1e-4)


def test_lookup_writes_over_the_transpose_of_the_logits_of_the_read():
    module, (x, place) = reducer("lookup"), tokens()
    plan, cells = module(x, place, GRID, 16), Cells(GRID, 16, x)
    final = torch.randn(2, 16, WIDTH)
    share = lookup_logits(module, x, place, cells).transpose(-1, -2).softmax(-1)
    value = module.value_write(module.norm_write(final)).unflatten(-1, (HEADS, -1))
    written = module.out_write((share @ value.transpose(1, 2)).transpose(1, 2).flatten(2))
    x = x + (final - plan.hidden)[:, cells.assignment.index[0]] + written
    torch.testing.assert_close(plan.recover(final), x + module.mlp(x), atol=1e-5, rtol=1e-4)


def test_a_fresh_lookup_equals_pooling():
    module, (x, place) = reducer("lookup", stirred=False), tokens()
    plan, pooled = module(x, place, GRID, 16), Cells(GRID, 16, x).assignment.reduce(x)
    assert torch.equal(plan.hidden, pooled)
    torch.testing.assert_close(plan.recover(plan.hidden), x)
    # What the layers add reaches every token once.
    final = plan.hidden + torch.randn(2, 16, WIDTH)
    torch.testing.assert_close(plan.recover(final).mean(1), final.mean(1), atol=1e-5, rtol=1e-4)


# Semantic tokens


def test_semantic_tokens_depend_on_every_token_beyond_its_seed():
    module, (x, place) = reducer("semantic-tokens"), tokens(1)
    hidden, change = module(x, place, GRID, 8).hidden, torch.randn(WIDTH)
    index = Cells(GRID, 8, x).assignment.index[0]
    for cell in range(8):
        # Two tokens of one window move apart; the window's mean, its seed, stays.
        first, second = (index == cell).nonzero()[:2, 0]
        moved = x.clone()
        moved[0, first] += change
        moved[0, second] -= change
        assert bool(((module(moved, place, GRID, 8).hidden - hidden).norm(dim=-1) > 1e-3).all())


def test_semantic_tokens_are_pooled_seeds_refined_by_layer_scale():
    module, (x, place) = reducer("semantic-tokens", stirred=False), tokens()
    torch.nn.init.zeros_(module.position.weight)
    torch.nn.init.zeros_(module.position.bias)
    torch.nn.init.zeros_(module.common)
    pooled = Cells(GRID, 8, x).assignment.reduce(x)
    hidden = module(x, place, GRID, 8).hidden
    assert 0 < catalogue.difference(hidden, pooled) < 1e-3
    with torch.no_grad():
        for scale in module.layer_scale:
            scale.fill_(0.0)
    assert torch.equal(module(x, place, GRID, 8).hidden, pooled)


def test_semantic_tokens_take_a_global_set_in_the_second_block_only():
    module, (x, place) = reducer("semantic-tokens"), tokens()
    queries = []
    for block in module.refine:
        block.norm_query.register_forward_hook(lambda m, args, out: queries.append(args[0]))
    module(x, place, GRID, 8)
    before = list(queries)
    queries.clear()
    with torch.no_grad():
        module.common.add_(1.0)
    module(x, place, GRID, 8)
    assert torch.equal(before[0], queries[0])
    torch.testing.assert_close(queries[1] - before[1], torch.ones_like(queries[1]))


def test_tokens_query_the_semantic_ones_on_their_way_back():
    module, (x, place) = reducer("semantic-tokens"), tokens(1)
    plan = module(x, place, GRID, 8)
    final = plan.hidden.detach().requires_grad_()
    (grad,) = torch.autograd.grad(plan.recover(final)[0, 0].square().sum(), final)
    assert bool((grad[0].norm(dim=-1) > 0).all()), "token 0 sees its own semantic token only"


# HoT


def mixture(clusters=4, each=16, seed=0):
    """Clusters of each size around an exact centre, shuffled; returns tokens, labels, centres."""
    chance = torch.Generator().manual_seed(seed)
    middles = F.layer_norm(torch.randn(clusters, WIDTH, generator=chance), (WIDTH,))
    x = middles.repeat_interleave(each, 0)
    noise = 0.3 * torch.randn(x.shape, generator=chance)
    noise[::each] = 0
    # Two close companions make the centre the densest point of its cluster.
    noise[1::each] *= 0.1
    noise[2::each] *= 0.1
    labels = torch.arange(clusters).repeat_interleave(each)
    order = torch.randperm(len(x), generator=chance)
    close = torch.arange(len(x)) % each < 3
    return (x + noise)[order][None], labels[order], close[order]


def test_hot_keeps_one_centre_of_each_cluster_in_order():
    x, labels, close = mixture()
    plan = reducer("hot")(x, torch.arange(64)[None], GRID, 4)
    kept = plan.assignment.anchor[0]
    assert sorted(labels[kept].tolist()) == [0, 1, 2, 3]
    assert bool(close[kept].all()), "a centre is not in the dense middle"
    assert kept.tolist() == sorted(kept.tolist())
    # Everyone else belongs to the centre of its own cluster.
    assert torch.equal(labels[kept][plan.assignment.index[0]], labels)
    assert plan.assignment.size[0].tolist() == [16.0] * 4


def test_density_peaks_equal_the_loops():
    x = torch.randn(1, 12, WIDTH)
    unit = F.layer_norm(x[0], (WIDTH,)).double()
    gaps = torch.cdist(unit, unit) / WIDTH**0.5
    density = []
    for i in range(12):
        near = sorted(gaps[i, j].item() for j in range(12) if j != i)[:2]
        density.append(torch.tensor(-sum(d * d for d in near) / 2).exp().item())
    wanted = []
    for i in range(12):
        denser = [gaps[i, j].item() for j in range(12) if density[j] > density[i]]
        wanted.append(density[i] * (min(denser) if denser else gaps[i].max().item()))
    torch.testing.assert_close(density_peaks(x)[0], torch.tensor(wanted), atol=1e-5, rtol=1e-4)


def test_density_peaks_of_equal_tokens_prefer_the_first():
    x = torch.randn(1, 1, WIDTH).expand(1, 5, WIDTH).clone()
    x[0, 3:] = -x[0, 3:]
    module = reducer("hot")
    kept = module.select(x, 2).anchor[0].tolist()
    # The densest pair of copies is 0, 1, 2: each has two equal neighbours.
    assert kept == [0, 3]


def test_hot_adds_learned_positions_and_recovers_by_attention():
    module, (x, place) = reducer("hot", stirred=False), tokens(1)
    plan = module(x, place, GRID, 8)
    assert torch.equal(plan.hidden, x[:, plan.assignment.anchor[0]])
    gain = torch.randn(1, 8, WIDTH)
    back = plan.recover(plan.hidden + gain)
    torch.testing.assert_close(back, x + gain[:, plan.assignment.index[0]])
    module = catalogue.stir(module)
    plan = module(x, place, GRID, 8)
    assert not torch.allclose(plan.hidden, x[:, plan.assignment.anchor[0]])
    final = plan.hidden.detach().requires_grad_()
    (grad,) = torch.autograd.grad(plan.recover(final)[0, 0].square().sum(), final)
    assert bool((grad[0].norm(dim=-1) > 0).all()), "token 0 sees its own centre only"
