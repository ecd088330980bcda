"""What the papers claim of recipes for key-value caches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tubelet.core.context import Site
from tubelet.core.errors import RecipeError, UnsupportedError
from tubelet.core.kv import ReadContext, StoreContext
from tubelet.ops.score import white_noise
from tubelet.recipes import DyCokeDecoding, TidalDecode, ZipCache


def site(layer: int, num_layers: int = 32) -> Site:
    return Site(name=f"layers.{layer}", layer=layer, num_layers=num_layers, kind="llm")


def test_a_new_token_sees_all_tokens_of_the_layer_before():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 1, 8, generator=generator)
    k = torch.randn(2, 9, 8, generator=generator)
    context = replace(read_context(1, torch.ones(4, 9), {}), query=q, keys=k, scale=0.3)
    wanted = (q @ k.repeat_interleave(2, 0).mT * 0.3).softmax(-1)[:, 0]
    assert torch.allclose(context.attention(), wanted, atol=1e-6)


def test_ZipCache_counts_what_later_tokens_give_to_tokens_stored_before_for_nothing():
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(4, 40, 8, generator=generator)
    k = torch.randn(2, 40, 8, generator=generator)
    late = StoreContext(site=site(0), queries=q[:, 25:], keys=k, scale=0.3)
    assert (late.num_before, late.num_tokens) == (25, 15)
    logits = q @ k.repeat_interleave(2, 0).mT * 0.3
    dense = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).softmax(-1)
    recipe = ZipCache(latest=0.4, sampled=0, salient=0.2)
    given = dense.mean(0)[34:, 25:].sum(0)
    seen = 6 - (torch.arange(15) - 9).clamp(min=0)
    wanted = (given / seen).topk(3).indices.sort().values
    bits = recipe.store(late)
    assert bits is not None
    assert (bits == 4).nonzero()[:, 0].tolist() == wanted.tolist()


def store_context(weights: Tensor) -> StoreContext:
    """Tokens whose causal attention is proportional to `weights` [n, n] in both of two heads."""
    num = len(weights)
    return StoreContext(
        site=site(0),
        queries=weights.log().expand(2, num, num),
        keys=torch.eye(num)[None],
        scale=1.0,
    )


def test_ZipCache_divides_what_a_token_receives_by_how_many_samples_could_see_it():
    weights = torch.ones(20, 20)
    # The last four tokens are samples. Together they give the first tokens more than the last,
    # of which each is seen by fewer.
    weights[:, 16:] = 1.5
    bits = ZipCache(latest=0.2, sampled=0, salient=0.2).store(store_context(weights))
    assert bits is not None
    assert bits.tolist() == [2] * 16 + [4] * 4
    share = weights.tril() / weights.tril().sum(1, keepdim=True)
    summed = share[16:].sum(0)
    assert summed[:16].min() > summed[18:].max(), "without the division the first would win"


def test_ZipCache_asks_only_its_samples():
    weights = torch.ones(20, 20)
    weights[:19, 3] = 50
    weights[19, 7] = 2
    bits = ZipCache(latest=0.05, sampled=0, salient=0.05).store(store_context(weights))
    assert bits is not None
    assert bits.argmax() == 7
    every = ZipCache(latest=1, sampled=0, salient=0.05).store(store_context(weights))
    assert every is not None
    assert every.argmax() == 3


def test_ZipCache_samples_the_latest_tokens_and_as_many_random_others():
    recipe = ZipCache(latest=0.05, sampled=0.1)
    places = recipe._samples(200, torch.device("cpu")).tolist()
    assert places == sorted(set(places))
    assert places[-10:] == list(range(190, 200))
    assert len(places) == 10 + 20
    assert places == recipe._samples(200, torch.device("cpu")).tolist()
    assert places != ZipCache(sampled=0.1, seed=1)._samples(200, torch.device("cpu")).tolist()
    assert max(places[:20]) - min(places[:20]) > 95
    # A seed means the same samples for ever: published figures depend on it.
    loudest = white_noise(190, 0).topk(20).indices
    assert places[:20] == loudest.sort().values.tolist()


@pytest.mark.parametrize("num", [1, 7, 100, 1300])
def test_ZipCache_gives_exactly_its_share_of_the_tokens_more_bits(num):
    generator = torch.Generator().manual_seed(num)
    q, k = torch.randn(4, num, 8, generator=generator), torch.randn(2, num, 8, generator=generator)
    context = StoreContext(site=site(3), queries=q, keys=k, scale=0.35)
    bits = ZipCache(salient_bits=8).store(context)
    assert bits is not None
    assert bits.bincount(minlength=9)[[2, 8]].tolist() == [num - round(0.6 * num), round(0.6 * num)]


def test_ZipCache_takes_widths_that_a_cache_can_hold():
    with pytest.raises(RecipeError, match="one of 2, 4, 8, 16, got 3"):
        ZipCache(other_bits=3)


def read_context(
    layer: int, weights: Tensor, state: dict[str, Any], video: list[int] | None = None
) -> ReadContext:
    """A new token whose attention in the layer before is `weights` [H, M]; one head in the cache
    for two."""
    heads, num = weights.shape
    shown = torch.zeros(num, dtype=torch.bool)
    shown[video or []] = True
    return ReadContext(
        site=site(layer),
        num_tokens=num,
        kv_heads=heads // 2,
        video=shown,
        query=weights.log()[:, None],
        keys=torch.eye(num).expand(heads // 2, num, num),
        scale=1.0,
        state=state,
    )


def weights_of(*best: tuple[int, ...], num: int = 12) -> Tensor:
    """[H, num] attention that falls over the places that each head names."""
    found = torch.full((len(best), num), 0.01)
    for head, places in enumerate(best):
        for rank, place in enumerate(places):
            found[head, place] = 1 / (rank + 1)
    return found / found.sum(1, keepdim=True)


def test_TidalDecode_reads_behind_a_finding_layer_what_that_layer_found():
    recipe, state = TidalDecode(tokens=2), {}
    found = recipe.read(read_context(3, weights_of((4, 9), (4, 9), (1, 7), (1, 7)), state))
    assert found.tolist() == [[4, 9], [1, 7]]
    other = weights_of((0, 1), (0, 1), (0, 1), (0, 1))
    for layer in range(4, 9):
        # Whatever the layers between attend to, the choice persists.
        again = recipe.read(read_context(layer, other, state))
        assert torch.equal(again, found)
    later = recipe.read(read_context(10, other, state))
    assert later.tolist() == [[0, 1], [0, 1]]
    assert torch.equal(recipe.read(read_context(30, weights_of(*[(5, 6)] * 4), state)), later)


def test_TidalDecode_finds_anew_for_each_token():
    recipe, state = TidalDecode(tokens=1), {}
    for place in (3, 8):
        found = recipe.read(read_context(3, weights_of((place,), (place,)), state))
        assert found.tolist() == [[place]]


def test_TidalDecode_lets_heads_of_one_head_of_the_cache_find_together():
    weights = torch.full((2, 12), 0.01)
    weights[0, 2], weights[1, 3], weights[:, 5] = 0.4, 0.4, 0.3
    found = TidalDecode(tokens=1).read(read_context(3, weights / weights.sum(1, keepdim=True), {}))
    assert found.tolist() == [[5]]


def test_TidalDecode_acts_behind_its_first_layer_and_not_on_those_that_find():
    recipe = TidalDecode()
    assert [n for n in range(12) if recipe.acts_on(site(n))] == [3, 4, 5, 6, 7, 8, 10, 11]
    assert recipe.read(read_context(3, weights_of((1,), (1,)), {})) is None
    with pytest.raises(RecipeError, match="at least one layer"):
        TidalDecode(layers=())


VIDEO = [2, 3, 4, 5, 6, 7, 8, 9]


def test_DyCokeDecoding_reads_all_text_and_the_video_tokens_attended_to_most():
    recipe, state = DyCokeDecoding(keep_ratio=0.25), {}
    # Only the mean over heads puts the last above place 7.
    weights = weights_of((0, 6, 9), (6, 9, 7))
    found = recipe.read(read_context(3, weights, state, VIDEO))
    assert found.tolist() == [[0, 1, 6, 9, 10, 11]]
    for layer in (4, 31):
        other = read_context(layer, weights_of((2, 3), (2, 3)), state, VIDEO)
        assert torch.equal(recipe.read(other), found)
    assert [n for n in range(6) if recipe.acts_on(site(n))] == [3, 4, 5]


def test_DyCokeDecoding_keeps_its_choice_while_steps_look_alike():
    recipe, state = DyCokeDecoding(keep_ratio=1 / 8), {}
    like = torch.ones(2, 12)
    like[:, 4] = 1.5
    first = recipe.read(read_context(3, like / like.sum(1, keepdim=True), state, VIDEO))
    assert first.tolist() == [[0, 1, 4, 10, 11]]
    like[:, 5] = 1.6
    second = recipe.read(read_context(3, like / like.sum(1, keepdim=True), state, VIDEO))
    assert torch.equal(second, first), "nearly the attention of the step before"
    third = recipe.read(read_context(3, weights_of((8,), (8,)), state, VIDEO))
    assert third.tolist() == [[0, 1, 8, 10, 11]]


def test_DyCokeDecoding_prunes_steps_that_look_alike_too():
    recipe, state = DyCokeDecoding(keep_ratio=0.5), {}
    for _ in range(3):
        found = recipe.read(read_context(3, weights_of((5, 6, 7, 8), (5, 6, 7, 8)), state, VIDEO))
        assert found.tolist() == [[0, 1, 5, 6, 7, 8, 10, 11]]


def test_DyCokeDecoding_starts_each_prompt_afresh():
    recipe = DyCokeDecoding(keep_ratio=1 / 8)
    for place in (4, 5):
        weights = torch.ones(2, 12)
        weights[:, place] = 1.2
        context = read_context(3, weights / weights.sum(1, keepdim=True), {}, VIDEO)
        assert recipe.read(context).tolist() == [[0, 1, place, 10, 11]]


def test_DyCokeDecoding_has_nothing_to_say_without_a_video():
    assert DyCokeDecoding().read(read_context(3, weights_of((1,), (1,)), {})) is None


def test_DyCokeDecoding_waits_for_the_device_in_its_first_step_only():
    recipe, state = DyCokeDecoding(keep_ratio=0.5), {}
    recipe.read(read_context(3, weights_of((5, 6, 7, 8), (5, 6, 7, 8)), state, VIDEO))

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero")
            return func(*args, **(kwargs or {}))

    later = read_context(3, weights_of((2, 3), (4, 5), num=13), state, VIDEO)
    deeper = read_context(9, weights_of((2, 3), (4, 5), num=13), state, VIDEO)
    with Waits():
        found, again = recipe.read(later), recipe.read(deeper)
    assert found is not None
    assert found.tolist() == [[0, 1, 2, 3, 4, 5, 10, 11, 12]]
    assert again is found


def test_DyCokeDecoding_refuses_layers_that_hold_fewer_tokens():
    recipe, state = DyCokeDecoding(keep_ratio=0.5), {}
    recipe.read(read_context(3, weights_of((5, 6), (7, 8)), state, VIDEO))
    shorter = read_context(20, weights_of((1, 2), (1, 2), num=9), state, [2, 3, 4])
    with pytest.raises(UnsupportedError, match="layer 20 holds 9 where layer 3 holds 12"):
        recipe.read(shorter)
