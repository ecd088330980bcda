"""What is trained: batches, losses, the token loss, elastic steps, control corruptions."""

import math
from functools import partial

import pytest
import torch

from tubelet.nn.dit import VideoDiT, VideoDiTConfig
from tubelet.nn.flow import training_loss
from tubelet.nn.reducers import build_reducers
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.ops.select import budget
from tubelet.recipes import VTM, GumbelKeep
from tubelet.recipes.learned import at_layer
from tubelet.train.clips import TASKS, TEST_SEED, make_clips
from tubelet.train.objectives import (
    EVALUATION_BACKGROUNDS,
    EXPOSURE,
    DiffusionObjective,
    ElasticObjective,
    EncoderObjective,
    iou,
    shuffled,
    single_frame,
)
from tubelet.train.world import ATTRIBUTES, make_world

NAMES = ("direction", "needle", "mask")


def encoder(**changes) -> VideoViT:
    torch.manual_seed(1)
    fields = {"width": 32, "depth": 4, "heads": 2, "mlp_ratio": 2.0, "size": (32, 32)}
    tasks = {name: TASKS[name].classes for name in NAMES[:2]}
    return VideoViT(
        VideoViTConfig(**{**fields, "tasks": tasks, "dense_tasks": ("mask",), **changes})
    )


def objective(**changes) -> EncoderObjective:
    fields = {"tasks": NAMES, "batch": 2, "size": 32, "test_clips": 3}
    return EncoderObjective(encoder(), **{**fields, **changes})


def elastic(recipes=(GumbelKeep,), **changes) -> ElasticObjective:
    model = encoder()
    model.reducers = build_reducers(32, heads=2)
    drawn = [partial(at, recipe) for recipe in recipes]
    fields = {"tasks": NAMES, "batch": 2, "size": 32, "test_clips": 2}
    return ElasticObjective(model.train(), recipes=drawn, **{**fields, **changes})


def at(recipe, layer: int, ratio: float):
    return at_layer(recipe.__name__, layer, ratio)


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Encoders


def test_a_batch_has_every_task_and_is_decided_by_its_seed():
    made = objective()
    first, again, other = (made.batch(seed) for seed in (3, 3, 4))
    assert [clips.task for clips in first] == list(NAMES)
    assert [len(clips) for clips in first] == [2, 2, 2]
    assert [clips.pixels.shape[1] for clips in first] == [16, 32, 16]
    for one, two, three in zip(first, again, other, strict=True):
        assert torch.equal(one.pixels, two.pixels)
        assert not torch.equal(one.pixels, three.pixels)


def test_training_shows_the_glyph_for_longer_than_tests_do(monkeypatch):
    lengths = {}

    def spy(task, batch, seed, **options):
        lengths.setdefault(seed >= TEST_SEED, set()).add(options["exposure"])
        return make_clips(task, batch, seed, **options)

    monkeypatch.setattr("tubelet.train.objectives.make_clips", spy)
    made = objective(tasks=("needle",), batch=1, test_clips=1)
    made.batch(0)
    made.evaluate()
    assert lengths == {False: {EXPOSURE}, True: {(2, 2)}}


def test_the_loss_is_the_mean_over_tasks_in_units_of_a_blind_guess():
    made = objective(tasks=("direction", "mask"))
    loss, metrics = made.loss(made.batch(0), 0, noise())
    # Fresh heads answer evenly: each task then costs one blind guess.
    assert loss.item() == pytest.approx(1, abs=0.15)
    assert set(metrics) == {"direction", "mask"}
    assert not any(value.requires_grad or value.ndim for value in metrics.values())


def test_the_loss_falls_on_one_batch():
    made = objective()
    batch = made.batch(0)
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        loss, _ = made.loss(batch, step, noise())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.75 * losses[0]


def test_tasks_of_several_lengths_are_scored_against_their_own_labels():
    made = objective(tasks=("needle", "direction", "mask"))
    batch = made.batch(0)
    _, together = made.loss(batch, 0, noise())
    whole = made.loss(batch, 0, noise())[0].item()
    parts = [made.loss([clips], 0, noise()) for clips in batch]
    assert whole == pytest.approx(sum(loss.item() for loss, _ in parts) / 3, rel=1e-4)
    for clips, (_, alone) in zip(batch, parts, strict=True):
        assert together[clips.task] == alone[clips.task]


def test_the_needle_is_asked_at_the_tokens_that_show_it():
    made = objective(tasks=("needle",))
    clips = made.batch(0)[0]
    config = made.model.config
    shown = clips.token_mask("relevant", config.tubelet)
    hidden = torch.randn(2, 1 + shown.shape[1], config.width, requires_grad=True)
    made._token_loss(clips, hidden).backward()
    assert made.model.heads["needle"].weight.grad.abs().sum() > 0
    assert torch.equal(hidden.grad[:, 1:].abs().sum(-1) > 0, shown)
    assert not hidden.grad[:, 0].any()
    # The mean over these tokens, in units of a blind guess.
    logits = made.model.heads["needle"](hidden[:, 1:]).log_softmax(-1)
    each = [-logits[b, n, clips.labels[b]] for b, n in shown.nonzero().tolist()]
    wanted = torch.stack(each).mean() / math.log(10)
    assert made._token_loss(clips, hidden).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_clip_that_does_not_show_the_needle_asks_no_token():
    made = objective(tasks=("needle",))
    clips = made.batch(0)[0]
    clips.relevant.zero_()
    hidden = torch.randn(2, 1 + 256, 32, requires_grad=True)
    loss = made._token_loss(clips, hidden)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not made.model.heads["needle"].weight.grad.any()


def test_the_token_loss_is_part_of_the_needle_only():
    made = objective(tasks=("direction", "needle"))
    direction, needle = made.batch(0)
    for clips, extra in ((direction, False), (needle, True)):
        num = 128 if clips is direction else 256
        tokens, pooled = torch.randn(2, 1 + num, 32), torch.randn(2, 32)
        logits = made.model.heads[clips.task](pooled)
        plain = torch.nn.functional.cross_entropy(logits, clips.labels) / math.log(logits.shape[1])
        added = made._answer(clips, tokens, pooled)[0] - plain
        wanted = made._token_loss(clips, tokens) if extra else torch.zeros(())
        assert torch.allclose(added, wanted, atol=1e-5)


def test_evaluation_names_every_task_and_background_and_stays_in_range():
    made = objective(tasks=("needle", "mask"), test_clips=1)
    scores = made.evaluate()
    assert set(scores) == {f"{n}/{b}" for n in made.tasks for b in EVALUATION_BACKGROUNDS}
    assert all(0 <= score <= 1 for score in scores.values())
    # Nothing that evaluation leaves behind may stop training.
    made.loss(made.batch(0), 0, noise())[0].backward()


def test_evaluation_scores_what_the_model_answers():
    made = objective(tasks=("direction",), test_clips=16, batch=16)
    with torch.no_grad():
        made.model.heads["direction"].weight.zero_()
        made.model.heads["direction"].bias.copy_(torch.arange(8.0))
    # Labels are balanced, so a constant answer is right in one of eight.
    assert set(made.evaluate().values()) == {1 / 8}


def test_intersection_over_union():
    found, wanted = (torch.tensor(row) for row in ([True, True, False], [False, True, True]))
    assert iou(found, wanted).item() == pytest.approx(1 / 3)
    assert iou(found & False, wanted & False) == 0


# Control models


def clip_of_numbers(batch: int = 3, frames: int = 8) -> torch.Tensor:
    """Every frame of every clip is another number."""
    values = torch.arange(batch * frames, dtype=torch.float32).view(batch, frames, 1, 1, 1)
    return values.expand(batch, frames, 3, 4, 4).clone()


def test_shuffled_clips_keep_their_frames_in_another_order():
    pixels = clip_of_numbers()
    mixed = shuffled(pixels, 5)
    assert torch.equal(mixed[:, :, 0, 0, 0].sort(1).values, pixels[:, :, 0, 0, 0])
    assert (mixed == mixed[:, :, :1, :1, :1]).all()
    order = mixed[:, :, 0, 0, 0] - pixels[:, :1, 0, 0, 0]
    assert not torch.equal(order[0], order[1])
    assert torch.equal(mixed, shuffled(pixels, 5))
    assert not torch.equal(mixed, shuffled(pixels, 6))


def test_single_frame_clips_repeat_one_of_their_frames():
    pixels = clip_of_numbers(batch=40)
    still = single_frame(pixels, 5)
    assert (still == still[:, :1]).all()
    chosen = still[:, 0, 0, 0, 0] - pixels[:, 0, 0, 0, 0]
    assert set(chosen.tolist()) == set(range(8))
    assert torch.equal(still, single_frame(pixels, 5))
    assert not torch.equal(still, single_frame(pixels, 6))


def test_control_models_see_corrupt_clips_in_training_and_test(monkeypatch):
    seen = []
    made = objective(tasks=("direction",), corrupt=single_frame, test_clips=2)
    features = made.model.features

    def spy(pixels, numbers):
        seen.append(bool((pixels == pixels[:, :1]).all()))
        return features(pixels, numbers)

    made.features = spy
    monkeypatch.setattr(made.model, "features", spy)
    made.loss(made.batch(0), 0, noise())
    made.evaluate()
    assert len(seen) == 4
    assert all(seen)
    assert made.identity["corrupt"] == "single_frame"
    assert objective().identity["corrupt"] is None


# Elastic training


def test_what_a_step_draws_depends_on_its_number_alone():
    made, again = elastic((GumbelKeep, VTM)), elastic((GumbelKeep, VTM))
    drawn = [made.draw(step) for step in range(400)]
    torch.manual_seed(9)
    assert drawn == [again.draw(step) for step in range(400)]
    kept = [recipe for recipe in drawn if recipe is not None]
    assert 400 - len(kept) == pytest.approx(40, abs=20)
    assert sum(type(recipe) is VTM for recipe in kept) == pytest.approx(len(kept) / 2, abs=45)
    ratios = sorted(recipe.keep_ratio for recipe in kept)
    assert ratios[0] >= 0.05
    assert ratios[-1] <= 0.75
    # Log-uniform: half of them below the geometric mean of the ends, 0.19.
    assert ratios[len(ratios) // 2] == pytest.approx(0.194, abs=0.05)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_dense_share_is_honoured_at_its_ends(share):
    made = elastic(dense_share=share)
    assert all((made.draw(step) is None) == bool(share) for step in range(50))


def forwards(model) -> list:
    return [layer.__dict__.get("forward") for layer in model.layers]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_step_leaves_the_model_clean_and_the_teacher_as_it_was(share):
    made = elastic(dense_share=share, tasks=("direction", "mask"))
    before = {name: value.clone() for name, value in made.teacher.state_dict().items()}
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.1)
    loss, metrics = made.loss(made.batch(0), 1, noise())
    assert set(metrics) == set(made.tasks)
    assert math.isfinite(loss.item())
    assert forwards(made.model) == [None] * 4
    assert all(layer.attention.runtime is None for layer in made.model.layers)
    assert not made.model._forward_hooks
    assert not made.model.embeddings._forward_hooks
    loss.backward()
    optimizer.step()
    assert not made.teacher.training
    assert made.model.training
    for name, value in made.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(p.requires_grad or p.grad is not None for p in made.teacher.parameters())
    assert not torch.equal(made.model.norm.weight, made.teacher.norm.weight)


def test_an_error_in_a_step_leaves_the_model_clean(monkeypatch):
    made = elastic(dense_share=0.0)
    monkeypatch.setattr(made, "_answer", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.loss(made.batch(0)[:1], 1, noise())
    assert forwards(made.model) == [None] * 4


def test_the_recipe_of_the_step_acts_on_the_model(monkeypatch):
    made = elastic(dense_share=0.0)
    lengths = []
    mlp = made.model.layers[-1].mlp
    mlp.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    batch = made.batch(0)[:1]
    made.loss(batch, 1, noise())
    ratio = made.draw(1).keep_ratio
    assert lengths == [1 + budget(128, ratio)]
    monkeypatch.setattr(made, "draw", lambda step: None)
    made.loss(batch, 1, noise())
    assert lengths[1:] == [129]


def test_the_penalty_reaches_the_scorer_of_gumbel_keep(monkeypatch):
    made = elastic(dense_share=0.0, distil=0.0, tasks=("direction",))
    scorer = made.model.reducers["gumbel-keep"].score
    with torch.no_grad():
        scorer[-1].bias.fill_(2.0)  # keeps more than the budget
    batch = made.batch(0)
    # Without the tasks nothing but the penalty is left.
    monkeypatch.setattr(made, "_answer", lambda clips, hidden, pooled: (pooled.sum() * 0,) * 2)
    loss, _ = made.loss(batch, 1, noise())
    loss.backward()
    assert loss.item() > 0.01
    assert scorer[-1].bias.grad.item() > 0
    assert float(made.model.reducers.penalty()) == 0


def test_the_divergence_is_zero_at_first_and_grows_with_the_model():
    made = elastic(dense_share=1.0, tasks=("direction", "mask"))
    batch = made.batch(0)
    plain, _ = EncoderObjective.loss(elastic(distil=0.0), batch, 0, noise())
    assert made.loss(batch, 0, noise())[0].item() == pytest.approx(plain.item(), abs=1e-5)
    with torch.no_grad():
        made.model.norm.bias += torch.linspace(-1, 1, 32)
    changed, _ = made.loss(batch, 0, noise())
    made.distil = 0.0
    without, _ = made.loss(batch, 0, noise())
    assert changed.item() > without.item() + 0.01


def test_elastic_evaluation_is_that_of_the_dense_model():
    made = elastic(tasks=("direction",))
    wanted = objective(tasks=("direction",), test_clips=2).evaluate()
    made.model.eval()
    assert made.evaluate() == wanted


def test_runs_of_other_recipes_are_told_apart():
    one, other = elastic(), elastic((VTM,))
    assert one.identity != other.identity
    assert one.identity["tasks"] == list(NAMES)


# The generator


def generator(**changes) -> DiffusionObjective:
    torch.manual_seed(1)
    fields = {"width": 16, "depth": 1, "heads": 2, "frames": 4, "size": (32, 32)}
    return DiffusionObjective(VideoDiT(VideoDiTConfig(**fields)), batch=2, **changes)


def test_the_generator_is_trained_on_its_own_size_and_length():
    made = generator(shift=2.0, test_clips=0)
    pixels, attributes = made.batch(3)
    world = make_world(2, 3, frames=4, size=32)
    assert torch.equal(pixels, world.pixels)
    assert torch.equal(attributes, world.attributes)
    loss, metrics = made.loss((pixels, attributes), 0, noise(7))
    wanted = training_loss(made.model, pixels, attributes, noise(7), shift=2.0)
    assert metrics == {}
    assert loss.item() == wanted.item()
    loss.backward()
    assert made.identity["shift"] == 2.0
    assert made.evaluate() == {}


def test_generated_clips_are_scored_by_the_detector(monkeypatch):
    made = generator(test_clips=3)
    asked = []

    def perfect(model, attributes, seed):
        asked.append((tuple(attributes[0].tolist()), seed))
        return make_world(1, seed, frames=4, size=64, attributes=attributes).pixels

    monkeypatch.setattr("tubelet.train.objectives.generate", perfect)
    assert made.evaluate() == dict.fromkeys(ATTRIBUTES, 1.0)
    assert len(set(asked)) == 3
    assert min(seed for _, seed in asked) >= TEST_SEED


def test_evaluation_runs_the_real_sampler():
    made = generator(test_clips=1)
    scores = made.evaluate()
    assert set(scores) == set(ATTRIBUTES)
    assert scores == made.evaluate()
    assert all(score in (0.0, 1.0) for score in scores.values())
