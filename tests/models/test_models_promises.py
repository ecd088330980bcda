"""What users rely on when recipes meet, and what is refused rather than done wrongly."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tubelet.core.assignment import TokenAssignment
from tubelet.core.errors import UnsupportedError
from tubelet.core.recipe import TokenReduction
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapters, refusal
from tubelet.models.video_llm import VideoLLMAdapter
from tubelet.recipes import EVAD, RLT, RandomDrop, TempScale, ToMe, UniformPool
from tubelet.recipes import catalogue as all_recipes
from tubelet.testing import catalogue, tiny


@dataclass(frozen=True, kw_only=True)
class Probe(TokenReduction):
    """Looks at the statistics of layer 1 and changes nothing."""

    statistics: ClassVar[frozenset[str]] = frozenset({"received", "entropy", "rows"})
    seen: ClassVar[list] = []

    def acts_on(self, site):
        return site.kind == "joint" and site.layer == 1

    def plan(self, ctx):
        self.seen.append(ctx.statistics())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("temper", [TempScale(temperature=0.5), TempScale(trained_tokens=500)])
@pytest.mark.parametrize("before", [UniformPool(factor=(1, 1, 2), proportional=True), RLT()])
def test_statistics_are_of_the_tempered_biased_call(batch, temper, before) -> None:
    model = catalogue.stir(tiny.build("videomae"))
    Probe.seen.clear()
    with accelerate(model, before, temper, Probe()):
        catalogue.logits(model, tiny.clip(batch))
    for stats in Probe.seen:
        num = stats.q.shape[2]
        temperature = temper.temperature
        if temper.trained_tokens is not None:
            temperature = torch.tensor(500.0).log() / torch.tensor(float(num)).log()
        logits = stats.q @ stats.k.transpose(-1, -2) * 16**-0.5 / temperature
        if stats.key_bias is not None:
            logits = logits + stats.key_bias[:, None, None]
        weights = logits.softmax(-1)
        torch.testing.assert_close(stats.received(), weights.sum(2).mean(1), atol=1e-4, rtol=1e-4)
        entropy = torch.special.entr(weights).sum(-1).mean(1)
        torch.testing.assert_close(stats.entropy(), entropy, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(stats.rows([2])[:, :, 0], weights[:, :, 2], atol=1e-5, rtol=1e-4)
    assert len(Probe.seen) == (batch if before == RLT() else 1)


@dataclass(frozen=True, kw_only=True)
class FirstHalf(TokenReduction):
    """Keeps the first half along one axis of divided attention."""

    requires: ClassVar[frozenset[str]] = frozenset({"divided"})
    kind: str = "spatial"

    def acts_on(self, site):
        return site.kind == self.kind and site.layer == 1

    def plan(self, ctx):
        half = ctx.num_tokens // 2
        kept = torch.arange(half).expand(ctx.hidden.shape[0], half)
        return TokenAssignment.keep(kept, ctx.num_tokens)


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_drops_in_divided_attention_are_recorded_as_drops(kind) -> None:
    model = tiny.build("timesformer")
    with accelerate(model, FirstHalf(kind=kind)) as handle:
        catalogue.logits(model, tiny.clip(1))
        (assignment,) = handle.assignment
    assignment.check()
    video = assignment.index[0, 1:].reshape(8, 16)
    gone = video[:, 8:] if kind == "spatial" else video[4:]
    assert bool((gone == -1).all())
    assert int((assignment.index < 0).sum()) == 64
    assert int((assignment.index == 0).sum()) == 1


def test_RLT_ignores_what_the_host_never_reads() -> None:
    model = tiny.build("vjepa2")
    still = tiny.clip(1, still=1.1)[:, :1].expand(-1, 8, -1, -1, -1)
    wide = torch.randn(1, 8, 3, 36, 36)
    wide[..., :32, :32] = still
    for pixels in (still, wide):
        with accelerate(model, RLT()) as handle:
            catalogue.logits(model, pixels)
            assert handle.assignment[0].num_out == 16


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("name", tiny.HOSTS)
def test_outputs_of_single_layers_are_refused(name, option) -> None:
    model = tiny.build(name)
    with (
        accelerate(model, UniformPool()),
        torch.no_grad(),
        pytest.raises(UnsupportedError, match=option),
    ):
        model(tiny.clip(1), **{option: True})


def test_changing_the_attention_under_recipes_is_refused() -> None:
    model = tiny.build("videomae")
    with accelerate(model, RLT()):
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedError, match="attention implementation was changed"):
            catalogue.logits(model, tiny.clip(2))


def test_a_head_on_the_first_token_refuses_reductions() -> None:
    model = tiny.build("videomae", use_mean_pooling=False)
    for recipe in (RandomDrop(), ToMe(), UniformPool()):
        with pytest.raises(UnsupportedError, match="first video token"):
            accelerate(model, recipe)
    with accelerate(model.videomae, RandomDrop()) as handle:
        assert handle.report().recipes == ("RandomDrop",)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = tiny.HOSTS["videomae"]()
    with pytest.raises(UnsupportedError, match="meta"):
        accelerate(model, EVAD())


def test_float64_hosts_take_a_size_bias_and_entropy() -> None:
    from tubelet.recipes import VidTLDR

    model = catalogue.stir(tiny.build("videomae"))
    pixels = tiny.clip(2, still=0.0)
    recipes = (UniformPool(factor=(1, 1, 2), proportional=True), VidTLDR())
    with accelerate(model, *recipes):
        single = catalogue.logits(model, pixels)
    model = model.double()
    with accelerate(model, *recipes):
        double = catalogue.logits(model, pixels.double())
    torch.testing.assert_close(single.double(), double, atol=1e-3, rtol=1e-3)


LANGUAGE_STAGES = {"prompt", "layers", "prefill", "cache", "cache reads"}


@pytest.mark.parametrize("adapter", adapters(), ids=lambda adapter: adapter.family)
def test_only_language_models_are_said_to_take_recipes_for_prompts_and_caches(adapter) -> None:
    for lacks in adapter.variants().values():
        stages = {cls.stage for cls in all_recipes().values() if refusal(cls, lacks) is None}
        if isinstance(adapter, VideoLLMAdapter):
            assert stages == LANGUAGE_STAGES
        else:
            assert not stages & LANGUAGE_STAGES
