"""Asking a small video LLM under recipes, against the packed way in which it is trained."""

import pytest
import torch

from tubelet.bench.answers.ask import ask, encoded_once, search
from tubelet.bench.answers.quiz import PART, Prompts, check_words, draw_quiz
from tubelet.bench.answers.run import QUICK_MODEL, shape_of
from tubelet.bench.answers.settings import Sweep, make_variants
from tubelet.core.errors import ModelError
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.nn.video_llm import SPECIAL, VideoLLM, VideoLLMConfig
from tubelet.recipes import (
    AShape,
    DyCokeDecoding,
    FastV,
    FoPru,
    LLaVAScissor,
    RandomPrompt,
    UniformFrames,
    ZipCache,
)
from tubelet.train.clips import TEST_SEED
from tubelet.train.objectives import normalised
from tubelet.train.questions import KINDS, make_questions, words
from tubelet.train.questions.packing import answers, to_slots

CPU = torch.device("cpu")
ASKED = ("direction", "hit")


@pytest.fixture(scope="module")
def llm() -> VideoLLM:
    torch.manual_seed(3)
    return VideoLLM(VideoLLMConfig(words=words(), **QUICK_MODEL)).eval()


@pytest.fixture(scope="module")
def prompts(llm) -> Prompts:
    return Prompts(llm, draw_quiz(llm, ASKED, "static", 0, 3, CPU))


def packed(llm: VideoLLM, recipe=None) -> torch.Tensor:
    """[6] words that the packed path answers, from the tokens that a recipe keeps."""
    found = []
    for kind in ASKED:
        batch = make_questions(PART, TEST_SEED, kinds=(kind,), background="static")
        clips = normalised(batch.pixels[:3])
        kept = torch.arange(llm.num_video).expand(3, -1)
        if recipe is not None:
            given = Prompts(llm, draw_quiz(llm, (kind,), "static", 0, 3, CPU)).inputs
            with accelerate(llm.host, recipe) as handle:
                llm.host(**given)
                kept = torch.cat([plan.anchor for plan in handle.assignment])
        video = llm.video_tokens(clips)
        video = video.gather(1, kept[..., None].expand(-1, -1, video.shape[-1]))
        slots = to_slots(batch)
        slots = type(slots)(slots.ids[:3], slots.asked[:3], slots.wanted[:3])
        found.append(answers(llm, video, kept, slots)[:, 0, 0].argmax(-1))
    return torch.cat(found)


def wanting(prompts: Prompts, ids: torch.Tensor) -> Prompts:
    """The same prompts with other right answers."""
    other = object.__new__(Prompts)
    other.__dict__.update(prompts.__dict__, wanted=ids)
    return other


@pytest.mark.parametrize("recipe", [None, UniformFrames(keep_ratio=0.25)], ids=str)
@torch.inference_mode()
def test_answers_are_those_of_the_packed_path(llm, prompts, recipe):
    recipes = () if recipe is None else (recipe,)
    said = packed(llm, recipe)
    assert ask(llm, wanting(prompts, said), recipes).right.all()
    changed = said.clone()
    changed[4] += 1
    assert ask(llm, wanting(prompts, changed), recipes).right.tolist() == [True] * 4 + [False, True]


@torch.inference_mode()
def test_a_question_read_from_the_cache_of_the_video_is_answered_alike(llm, prompts, monkeypatch):
    from tubelet.bench.answers import ask as module

    direct = llm.host(**prompts.inputs, logits_to_keep=1).logits[:, -1]
    assert torch.allclose(module._behind_the_video(llm, prompts), direct, atol=1e-4)
    lengths = prompts.inputs["attention_mask"].sum(1)
    assert len(lengths.unique()) > 1
    assert sorted(torch.cat([rows for rows, _ in prompts.by_length]).tolist()) == list(range(6))
    for _, inputs in prompts.by_length:
        assert inputs["attention_mask"].all()
        assert (inputs["input_ids"][:, 0] == SPECIAL.index("<start>")).all()
    # Every word of the question is a step that reads less.
    seen = []
    monkeypatch.setattr(DyCokeDecoding, "read", lambda self, ctx: seen.append(ctx.num_tokens))
    ask(llm, prompts, (DyCokeDecoding(layer=1),))
    steps = [ids.shape[1] - prompts.front for ids in (i["input_ids"] for _, i in prompts.by_length)]
    rows = [len(rows) for rows, _ in prompts.by_length]
    layers = QUICK_MODEL["depth"] - 1
    assert len(seen) == sum(s * r for s, r in zip(steps, rows, strict=True)) * layers
    assert min(seen) == prompts.front + 1


def test_what_was_used_is_told(llm, prompts):
    depth = QUICK_MODEL["depth"]
    inside = ask(llm, prompts, (FastV(layer=1, keep_ratio=0.25),)).used
    shares = (inside.entering, inside.layers, inside.last)
    assert shares == pytest.approx((1, (1 + 0.25 * (depth - 1)) / depth, 0.25))
    front = ask(llm, prompts, (RandomPrompt(keep_ratio=0.25),)).used
    assert (front.entering, front.layers, front.last) == pytest.approx((0.25, 0.25, 0.25))
    assert (front.density, front.stored, front.read) == (None, None, None)
    sparse = ask(llm, prompts, (AShape(block=(16, 16), window=16, sink=1),)).used
    assert sparse.entering == 1
    assert 0.1 < sparse.density < 0.6
    stored = ask(llm, prompts, (ZipCache(),)).used
    assert 0.1 < stored.stored < 0.4
    read = ask(llm, prompts, (DyCokeDecoding(layer=2, keep_ratio=0.25),)).used
    # Half of the layers read a quarter of the video and all that is no video.
    assert 0.625 < read.read < 0.66
    assert read.stored is None


def test_the_encoder_runs_once_for_a_batch_unless_it_is_watched(llm, prompts):
    calls = []
    layer = llm.tower.video.layers[0]
    hook = layer.register_forward_hook(lambda *call: calls.append(1))
    other = Prompts(llm, draw_quiz(llm, ASKED, "noise", 0, 3, CPU))
    plain = ask(llm, prompts, (RandomPrompt(),))
    calls.clear()
    with encoded_once(llm):
        ask(llm, prompts, ())
        assert ask(llm, prompts, (RandomPrompt(),)).right.equal(plain.right)
        assert len(calls) == 1
        ask(llm, prompts, (FoPru(layer=-1),))
        assert len(calls) == 2
        ask(llm, prompts, ())
        assert len(calls) == 2
        ask(llm, other, ())
        ask(llm, prompts, ())
        assert len(calls) == 4
    ask(llm, prompts, ())
    assert len(calls) == 5
    assert "layers_of" not in vars(llm.tower)
    hook.remove()


def test_layers_that_are_hooked_are_seen_with_shared_features(llm, prompts):
    seen = []
    with encoded_once(llm):
        ask(llm, prompts, ())
        hook = llm.tower.encoder.layers[0].register_forward_hook(lambda *call: seen.append(1))
        ask(llm, prompts, ())
        hook.remove()
    assert len(seen) == 1


def test_a_threshold_is_searched_that_meets_the_budget(llm, prompts):
    sweep = Sweep(make=lambda x: (LLaVAScissor(threshold=1 - 10**-x),), low=0.0, high=4.0)
    for keep in (0.3, 0.6):
        found = search(llm, prompts, sweep, keep)
        assert ask(llm, prompts, found).used.last == pytest.approx(keep, abs=0.05)


def test_every_family_runs_at_its_budget(llm):
    lacks = adapter_for(llm.host).lacks(llm.host)
    variants, notes = make_variants((0.25,), shape_of(llm), lacks=lacks)
    few = Prompts(llm, draw_quiz(llm, ("when",), "pan", 0, 2, CPU))
    assert all("class token" in note or "30% of this video" in note for note in notes)
    free = {"HoliTom", "FreeVideoLLM", "KFFocus", "AIMPruning", "PruneVid"}
    with encoded_once(llm):
        for variant in variants:
            recipes = variant.recipes
            if variant.sweep is not None:
                recipes = search(llm, few, variant.sweep, variant.keep)
            used = ask(llm, few, recipes).used
            if variant.kind in ("prompt", "layers") and variant.family not in free:
                assert used.last == pytest.approx(variant.keep, abs=0.06), variant.name


# Questions


def test_questions_of_a_kind_do_not_depend_on_the_others(llm):
    alone = draw_quiz(llm, ("order",), "pan", 1, 5, CPU)
    among = draw_quiz(llm, ("colour", "order"), "pan", 1, 5, CPU)
    assert among.kinds == ["colour"] * 5 + ["order"] * 5
    assert among.questions[5:] == alone.questions
    assert torch.equal(among.pixels[5:], alone.pixels)
    other = draw_quiz(llm, ("order",), "pan", 2, 5, CPU)
    assert not torch.equal(other.pixels, alone.pixels)
    parts = among.split(4)
    assert [len(part) for part in parts] == [4, 4, 2]
    assert [text for part in parts for text in part.questions] == among.questions


def test_every_kind_has_a_full_part_with_its_answers(llm):
    quiz = draw_quiz(llm, tuple(KINDS), "static", 0, PART, CPU)
    assert len(quiz) == PART * len(KINDS)
    for kind, answer in zip(quiz.kinds, quiz.answers, strict=True):
        assert answer in KINDS[kind].answers
    ids = Prompts(llm, quiz.cut(1)).wanted.tolist()
    said = [llm.tokenizer.convert_ids_to_tokens(number) for number in ids]
    assert said == quiz.cut(1).answers


def test_a_model_without_the_words_is_refused(llm):
    short = VideoLLM(VideoLLMConfig(words=("red", "blue"), **QUICK_MODEL))
    with pytest.raises(ModelError, match=r"short does not know .* words"):
        check_words(short, "short")
    check_words(llm, "whole")
