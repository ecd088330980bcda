"""Samples that come to differ in length: one pass for the whole batch, results as one by one."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import ShapeError, UnsupportedError
from tubelet.core.learned import LearnedPlan
from tubelet.core.recipe import RaggedReduction
from tubelet.kernels.attention import CallStatistics, packed_attention
from tubelet.models import runtime
from tubelet.models.accelerate import accelerate
from tubelet.models.groups import Packing, TokenGroup, padded_call, part_of_call, unpack
from tubelet.ops.select import cdf_sample
from tubelet.recipes import ATS, RLT, TempScale, ToMe, UniformPool, VidTLDR
from tubelet.testing import catalogue, tiny, tolerances

SAMPLING = ATS(first_layer=1, samples=0.5)
CHAINS = {
    "RLT": [RLT()],
    "ATS": [SAMPLING],
    "RLT, ATS": [RLT(), SAMPLING],
}
MIXED = {
    "merged before": [UniformPool(factor=(1, 1, 2), proportional=True), SAMPLING],
    "merged behind": [RLT(), ToMe(r=4)],
    "merged between": [RLT(), VidTLDR(share=(0.1, 0.1)), ATS(first_layer=2, samples=0.4)],
    "tempered by length": [RLT(), SAMPLING, TempScale(trained_tokens=500)],
}
LENGTHS = (3, 1, 4)


@pytest.fixture(scope="module")
def vivit() -> Any:
    return catalogue.stir(tiny.build("vivit"))


class Calls(TorchDispatchMode):
    """Counts operator calls outside the attention kernel, which on a CPU goes by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += not self.paused
        return func(*args, **(kwargs or {}))

    def without(self, function):
        def run(*args, **options):
            self.paused = True
            try:
                return function(*args, **options)
            finally:
                self.paused = False

        return run


def calls_of(model, recipes, batch, monkeypatch):
    calls = Calls()
    with monkeypatch.context() as patch, accelerate(model, *recipes) as handle:
        patch.setattr(runtime, "packed_attention", calls.without(packed_attention))
        with calls:
            catalogue.logits(model, tiny.clip(batch))
        assert len({plan.num_out for plan in handle.assignment}) > 1
    return calls.names


@pytest.mark.parametrize("chain", CHAINS)
def test_the_number_of_operator_calls_does_not_depend_on_the_batch(vivit, chain, monkeypatch):
    few, many = (calls_of(vivit, CHAINS[chain], batch, monkeypatch) for batch in (3, 12))
    assert few == many
    # Each would wait for the device once more; the counts are read by `tolist` alone.
    waits = [name for name in many if "nonzero" in name or "_local_scalar_dense" in name]
    assert not waits


@pytest.mark.parametrize("chain", [*CHAINS, *MIXED])
def test_a_batch_keeps_what_its_samples_keep_alone(vivit, chain):
    recipes, pixels = {**CHAINS, **MIXED}[chain], tiny.clip(3)
    with accelerate(vivit, *recipes) as handle:
        together = catalogue.logits(vivit, pixels)
        plans = handle.assignment
        assert len(plans) == 3
        for sample, plan in enumerate(plans):
            alone = catalogue.logits(vivit, pixels[sample : sample + 1])
            assert catalogue.difference(together[sample], alone[0]) <= tolerances.SPLIT_BATCH
            plan.check()
            (wanted,) = handle.assignment
            for name in TokenAssignment.TENSORS:
                torch.testing.assert_close(getattr(plan, name), getattr(wanted, name))
            assert plan.copies == wanted.copies


@dataclass(frozen=True, kw_only=True)
class Thin(RaggedReduction):
    """Keeps tokens by the value of a channel, and notes what it was shown."""

    seen: ClassVar[list] = []

    def acts_on(self, site):
        return site.kind == "joint" and site.layer >= 1

    def keep(self, ctx):
        self.seen.append(ctx)
        mask = ctx.hidden[..., 0] > -1
        mask[:, :1] = True
        return mask


@dataclass(frozen=True, kw_only=True)
class ThinPadded(Thin):
    """The same, of padded samples."""

    takes_padding: ClassVar[bool] = True


@pytest.mark.parametrize(("recipe", "times"), [(Thin(), [3] + [1] * 6), (ThinPadded(), [3] * 3)])
def test_only_a_recipe_that_takes_padding_sees_any(vivit, recipe, times):
    Thin.seen.clear()
    with accelerate(vivit, recipe) as handle:
        together = catalogue.logits(vivit, tiny.clip(3))
        shown, last = list(Thin.seen), [plan.num_out for plan in handle.assignment]
        singles = torch.cat([catalogue.logits(vivit, clip[None]) for clip in tiny.clip(3)])
    assert [len(ctx.hidden) for ctx in shown] == times
    assert catalogue.difference(together, singles) <= tolerances.SPLIT_BATCH
    assert shown[0].valid is None
    assert len(set(last)) > 1
    if recipe.takes_padding:
        assert [int(n) for n in shown[1].valid.sum(1)] != [shown[1].num_tokens] * 3
        for ctx in shown[1:]:
            assert bool((ctx.size[~ctx.valid] == 0).all())
            assert bool((ctx.anchor[:, 1:] > ctx.anchor[:, :-1])[ctx.valid[:, 1:]].all())
    else:
        assert all(ctx.valid is None for ctx in shown)


def packing(lengths=LENGTHS):
    return Packing.of(lengths, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def test_packing_pads_and_packs():
    x = torch.arange(1.0, 9.0)[None]
    padded = packing().pad(x)
    assert padded.tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]]
    assert torch.equal(packing().pack(padded), x)
    wide = torch.randn(1, 8, 2, 5)
    assert torch.equal(packing().pack(packing().pad(wide)), wide)


@pytest.mark.parametrize("biased", [False, True])
def test_statistics_of_padded_samples_are_those_of_each_sample(biased):
    q, k, v = (torch.randn(1, 2, 8, 6) for _ in "qkv")
    bias = torch.rand(1, 8) if biased else None
    _, lse = packed_attention(q, k, v, LENGTHS, scale=0.7, key_bias=bias)
    whole = CallStatistics(q, k, v, 0.7, lse, bias)
    padded, parts = padded_call(whole, packing()), samples(LENGTHS)
    weight = torch.rand(1, 8)
    for b, part in enumerate(parts):
        own = part_of_call(whole, part)
        live, gone = slice(part.num), slice(part.num, None)
        by_token = {
            "keys": (padded.keys()[b, live], own.keys()[0]),
            "rows": (padded.rows([0])[b, :, 0, live], own.rows([0])[0, :, 0]),
            "value_norm": (padded.value_norm()[b, :, live], own.value_norm()[0]),
            "entropy": (padded.entropy()[b, live], own.entropy()[0]),
            "received": (padded.received()[b, live], own.received()[0]),
            "weighted": (
                padded.received(packing().pad(weight))[b, live],
                own.received(part.view(weight, True))[0],
            ),
        }
        for name, (found, wanted) in by_token.items():
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, msg=name)
        assert bool((padded.rows([0])[b, ..., gone] == 0).all())
        assert bool((padded.received()[b, gone] == 0).all())


def samples(lengths):
    """One group per sample, kept from the front of 6 tokens."""
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    kept = TokenGroup.whole(len(lengths), 6, torch.device("cpu")).keep(mask)
    assert kept is not None
    return kept[0].split()


def test_keeping_twice_equals_keeping_each_sample_twice():
    group = TokenGroup.whole(3, 7, torch.device("cpu"))
    first = torch.rand(3, 7) < 0.7
    first[:, 2] = True
    kept = group.keep(first)
    assert kept is not None
    group, rows = kept
    assert rows.tolist() == first.flatten().nonzero()[:, 0].tolist()
    second = torch.rand(3, group.num) < 0.5
    second[:, 0] = True
    # What is said of padding must not matter.
    later = group.keep(second | ~group.packing.valid)
    assert later is not None
    for b, part in enumerate(later[0].split()):
        plan = TokenAssignment.keep_where(first[b : b + 1])[0]
        plan = plan.compose(TokenAssignment.keep_where(second[b : b + 1, : plan.num_out])[0])
        assert (part.first, part.batch, part.num, part.packing) == (b, 1, plan.num_out, None)
        for name in TokenAssignment.TENSORS:
            assert torch.equal(getattr(part.origin, name), getattr(plan, name)), name
        assert torch.equal(part.anchor, plan.anchor)
        assert torch.equal(part.size, plan.size)
    starts = [part.start for part in later[0].split()]
    assert starts == [0, later[0].lengths[0], sum(later[0].lengths[:2])]


def test_learned_weights_follow_ragged_tokens():
    plan = TokenAssignment.keep(torch.tensor([[0, 1, 2], [1, 2, 3]]), 4)
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    learned = LearnedPlan(assignment=plan, hidden=torch.zeros(2, 3, 1), log_weight=weight)
    group = TokenGroup.whole(2, 4, torch.device("cpu")).after(learned, 0)
    for mask, wanted in (
        ([[True, True, True], [False, True, True]], [[1.0, 2.0, 3.0, 5.0, 6.0]]),
        ([[False, True, True], [True, True, False]], [[2.0, 3.0, 5.0, 6.0]]),
    ):
        kept = group.keep(torch.tensor(mask))
        assert kept is not None
        group = kept[0]
        assert group.log_weight.tolist() == wanted
    assert [part.log_weight.tolist() for part in group.split()] == [[[2.0, 3.0]], [[5.0, 6.0]]]


def test_what_a_packed_group_refuses():
    group = TokenGroup.whole(2, 3, torch.device("cpu"))
    every = torch.ones(2, 3, dtype=torch.bool)
    assert group.keep(every) is None
    none_left = every.clone()
    none_left[1] = False
    with pytest.raises(ShapeError, match="sample 1 of 2 keeps none of its 3 tokens"):
        group.keep(none_left)
    plan = TokenAssignment.keep(torch.tensor([[0, 1], [0, 2]]), 3)
    learned = LearnedPlan(assignment=plan, hidden=torch.zeros(2, 2, 1), recover=lambda y: y)
    with pytest.raises(UnsupportedError, match="cannot follow a learned"):
        group.after(learned, 0).keep(torch.tensor([[True, True], [True, False]]))


def test_unpacking_a_merge_behind_a_drop_in_several_samples():
    parts = samples((4, 2))
    merge = TokenAssignment.merge(
        torch.tensor([[0, 0, 2, 3]]), torch.tensor([[0, 2, 3]]), torch.ones(1, 4)
    )
    origins = [parts[0].origin.compose(merge), parts[1].origin]
    hidden = torch.randn(1, 5, 2)
    wanted = torch.cat([origins[0].restore(hidden[:, :3]), origins[1].restore(hidden[:, 3:])])
    torch.testing.assert_close(unpack(hidden, origins), wanted)


def test_a_padded_assignment_pads_with_nothing():
    mask = torch.tensor([[False, True, True], [False, False, True]])
    plan, lengths = TokenAssignment.keep_padded(mask)
    assert lengths == (2, 1)
    assert plan.index.tolist() == [[-1, 0, 1], [-1, -1, 0]]
    assert plan.anchor.tolist() == [[1, 2], [2, 0]]
    assert plan.size.tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("kind", ["random", "zero", "equal", "one", "ties"])
@pytest.mark.parametrize("levels", [1, 3, 40])
def test_cdf_sampling_of_padded_rows_equals_that_of_each_row(kind, levels):
    lengths = (1, 2, 7, 20, 13)
    valid = torch.arange(20) < torch.tensor(lengths)[:, None]
    score = {
        "random": torch.rand(5, 20),
        "zero": torch.zeros(5, 20),
        "equal": torch.full((5, 20), 0.3),
        "one": torch.eye(20)[:1].expand(5, 20),
        "ties": torch.randint(0, 3, (5, 20)).float(),
    }[kind]
    kept = cdf_sample(score.masked_fill(~valid, torch.nan), levels, valid)
    assert not bool(kept[~valid].any())
    for row, mask, length in zip(score, kept, lengths, strict=True):
        assert torch.equal(mask[:length], cdf_sample(row[:length], levels))


def test_a_single_sample_stays_unpacked(vivit):
    with accelerate(vivit, RLT(), SAMPLING) as handle:
        catalogue.logits(vivit, tiny.clip(1))
        assert handle.assignment[0].num_out < 65
        assert not [what for what in handle.report().attention if "packed" in what]
