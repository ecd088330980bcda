"""Training of the video language model: what is in the loss, what is dropped, what is reported."""

import math

import pytest
import torch

from tubelet.core.errors import UnsupportedError
from tubelet.nn.video_llm import VideoLLM, VideoLLMConfig
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.nn.weights import load_weights, save_weights
from tubelet.ops.select import budget
from tubelet.train.config import TrainConfig
from tubelet.train.jobs import QUICK_KINDS, Setup, job, save
from tubelet.train.loop import train
from tubelet.train.objectives_llm import (
    COMPACT_SHARE,
    DENSE_SHARE,
    KEEPS,
    QuestionObjective,
)
from tubelet.train.questions import KINDS, words
from tubelet.train.questions.make import OBJECT_KINDS, TASK_KINDS


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    torch.manual_seed(5)
    shape = {"width": 64, "depth": 1, "heads": 2, "frames": 8, "size": (32, 32)}
    path = tmp_path_factory.mktemp("vit") / "enc"
    save_weights(path, VideoViT(VideoViTConfig(**shape, tasks={"direction": 8})), record={})
    return str(path)


def objective(encoder: str, width: int = 32, **changes) -> QuestionObjective:
    torch.manual_seed(2)
    config = VideoLLMConfig(
        words=words(), encoder=encoder, taps=(0,), width=width, depth=2, heads=2, mlp_width=64
    )
    fields = {"batch": 8, "settle": 0, "test_clips": 8}
    return QuestionObjective(VideoLLM(config), **{**fields, **changes})


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The loss


def test_the_loss_is_the_mean_over_kinds_in_units_of_a_blind_guess(encoder):
    made = objective(encoder, batch=64)
    made.draw = lambda step: (1.0, False)
    with torch.no_grad():
        made.model.host.lm_head.weight.zero_()
    batch = made.batch(0)
    asked = [list(KINDS)[number] for number in batch.kind.unique().tolist() if number >= 0]
    loss, metrics = made.loss(batch, 0, noise())
    # Equal logits over all words cost log V, whatever the kind; the end counts a tenth.
    size = math.log(made.model.host.config.text_config.vocab_size)
    wanted = sum(size / -math.log(KINDS[name].chance) for name in asked) / len(asked)
    assert loss.item() == pytest.approx(wanted + 0.1 * size, rel=1e-4)
    assert set(metrics) == {"answered", *OBJECT_KINDS}
    assert not any(value.requires_grad or value.ndim for value in metrics.values())


def test_tasks_take_turns_beside_the_objects(encoder):
    made = objective(encoder, batch=16)
    seen = []
    for seed in range(4):
        batch = made.batch(seed)
        numbers = batch.kind.flatten().unique().tolist()
        asked = {list(KINDS)[number] for number in numbers if number >= 0}
        assert len(asked & set(OBJECT_KINDS)) > 3
        seen += asked - set(OBJECT_KINDS)
    assert sorted(seen) == sorted(TASK_KINDS)


def test_a_model_of_tasks_only_is_asked_all_of_them(encoder):
    made = objective(encoder, batch=4, kinds=("shell", "glyph"))
    assert made.batch(0).kind.unique().tolist() == [
        -1, *sorted(list(KINDS).index(name) for name in ("shell", "glyph"))
    ]  # fmt: skip


def test_only_answers_and_ends_are_in_the_loss(encoder):
    made = objective(encoder)
    batch = made.batch(0)
    logits = []
    made.model.host.lm_head.register_forward_hook(lambda m, a, out: logits.append(out))
    made.loss(batch, 0, noise())[0].backward()
    # Two tokens per slot are ever asked for.
    assert logits[0].shape[:2] == (8, 2 * batch.kind.shape[1])
    assert all(p.grad is None for p in made.model.tower.parameters())
    trained = [p for p in made.model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_the_loss_falls_on_one_batch(encoder):
    made = objective(encoder)
    batch = made.batch(0)
    trained = [p for p in made.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for step in range(25):
        loss, _ = made.loss(batch, step, noise())
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.4 * losses[0]


# What is kept


def test_steps_draw_their_share_of_tokens_and_settle_first(encoder):
    made = objective(encoder, settle=50)
    drawn = [made.draw(step) for step in range(2000)]
    assert set(drawn[:50]) == {(1.0, False)}
    later = drawn[50:]
    assert {ratio for ratio, _ in later} == {1.0, *KEEPS}
    dense = sum(ratio == 1 for ratio, _ in later) / len(later)
    assert dense == pytest.approx(DENSE_SHARE, abs=0.04)
    compact = [compact for ratio, compact in later if ratio < 1]
    assert sum(compact) / len(compact) == pytest.approx(COMPACT_SHARE, abs=0.05)
    assert not any(compact for ratio, compact in later if ratio == 1)


def test_kept_tokens_are_exact_in_number_in_order_and_of_many_patterns(encoder):
    made = objective(encoder)
    kept = made._kept(200, 0.25, noise())
    assert kept.shape == (200, budget(64, 0.25))
    assert (kept.diff(dim=1) > 0).all()
    assert torch.equal(kept, made._kept(200, 0.25, noise()))
    per_frame = torch.stack([(kept // 16 == f).sum(1) for f in range(4)], 1).float().std(1)
    # Some clips lose whole frames, in others all frames keep a share.
    assert per_frame.max() > 5
    assert per_frame.min() < 1.5
    assert torch.equal(made._kept(2, 1.0, noise()), torch.arange(64).expand(2, -1))


def test_a_blind_model_gets_no_video_and_shuffled_frames_are_others(encoder):
    blind = objective(encoder, sees="nothing")
    assert blind._kept(3, 1.0, noise()).shape == (3, 0)
    batch = blind.batch(0)
    one = blind.loss(batch, 0, noise())[0]
    batch.pixels.zero_()
    assert torch.equal(blind.loss(batch, 0, noise())[0], one)
    mixed, plain = objective(encoder, sees="shuffled"), objective(encoder)
    batch = plain.batch(0)
    assert torch.equal(mixed.batch(0).pixels, batch.pixels)
    assert not torch.equal(mixed._video(batch.pixels, 0), plain._video(batch.pixels, 0))
    with pytest.raises(UnsupportedError, match="video, shuffled, nothing"):
        objective(encoder, sees="sound")


# Evaluation


def test_evaluation_names_every_kind_way_and_chance(encoder):
    made = objective(encoder, kinds=("colour", "hit"))
    with torch.no_grad():
        made.model.host.lm_head.weight.zero_()
        made.model.host.lm_head.weight[made.model.tokenizer.convert_tokens_to_ids("yes")] = 1.0
    made.model.host.model.language_model.norm.weight.data.fill_(0)
    made.model.host.lm_head.register_forward_hook(
        lambda m, a, out: out.index_fill(
            -1, torch.tensor([made.model.tokenizer.convert_tokens_to_ids("yes")]), 9.0
        )
    )
    scores = made.evaluate()
    ways = ("", "/kept-0.25", "/shuffled", "/wrong-clip", "/chance")
    assert set(scores) == {f"{kind}{way}" for kind in made.kinds for way in ways}
    # Who always says yes is right in half of the clips of balanced answers, and on no colour.
    assert scores["hit"] == scores["hit/wrong-clip"] == pytest.approx(0.5, abs=0.2)
    assert scores["colour"] == 0
    assert scores["colour/chance"] == KINDS["colour"].chance
    assert set(objective(encoder, kinds=("hit",), sees="nothing").evaluate()) == {
        "hit", "hit/chance",
    }  # fmt: skip


# Runs


def test_a_resumed_run_goes_on_bit_for_bit(encoder, tmp_path):
    def run(folder: str, steps: int, resume: bool = False):
        made = objective(encoder, settle=1)
        config = TrainConfig(
            steps=steps, batch=8, precision="fp32", ema=0.9, checkpoint_minutes=0, log_every=1
        )
        train(made, config, tmp_path / folder, resume=resume)
        return made.model

    whole = run("whole", 4).state_dict()
    # The cut run plans four steps and loses its process behind the second.
    made, calls = objective(encoder, settle=1), []
    plain = made.batch

    def failing(seed: int):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(seed)

    made.batch = failing
    config = TrainConfig(
        steps=4, batch=8, precision="fp32", ema=0.9, checkpoint_minutes=0, log_every=1
    )
    with pytest.raises(KeyboardInterrupt):
        train(made, config, tmp_path / "cut")
    again = run("cut", 4, resume=True).state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(
    ("name", "sees"),
    [("video-llm", "video"), ("video-llm-blind", "nothing"), ("video-llm-shuffled", "shuffled")],
)
def test_jobs_build_what_they_say_and_write_what_loads(name, sees, tmp_path):
    setup = Setup(device=torch.device("cpu"), seed=3, batch=2, quick=True)
    made = job(name).build(setup)
    assert (made.sees, made.kinds) == (sees, QUICK_KINDS)
    assert made.model.config.encoder == "tubelet-vit-small"
    again = job(name).build(setup).model.state_dict()
    assert all(torch.equal(value, again[n]) for n, value in made.model.state_dict().items())
    loss, _ = made.loss(made.batch(0), 0, noise())
    loss.backward()
    (path,) = save(job(name), made.model, tmp_path, {"command": "tubelet train"})
    assert path.stat().st_size < 1_000_000
    loaded = load_weights(path, expect="VideoLLM")
    assert loaded.config == made.model.config
    start = job(name).build(Setup(**{**vars(setup), "init": str(path)}))
    assert start.model.config == made.model.config


def test_the_real_size_fits_what_is_shipped():
    made = job("video-llm").build(Setup(device=torch.device("cpu"), seed=0, batch=2))
    stored = sum(value.numel() for value in made.model.state_dict().values())
    assert 2 * stored < 12_000_000
    assert made.model.num_video == 512
    assert made.model.clip_shape == (16, 64, 64)
    assert made.kinds == tuple(KINDS)
    assert made.notes["dropped"]
