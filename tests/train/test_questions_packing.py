"""A packed row answers each question exactly as the host does when asked it alone."""

import pytest
import torch

from tubelet.models.accelerate import accelerate
from tubelet.nn.video_llm import SPECIAL, VideoLLM, VideoLLMConfig
from tubelet.nn.video_tower import as_pictures
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.nn.weights import save_weights
from tubelet.recipes import RandomPrompt
from tubelet.train.objectives import normalised
from tubelet.train.questions import SLOTS, make_questions, words
from tubelet.train.questions.packing import answers, packed_mask, packed_positions, to_slots


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> VideoLLM:
    torch.manual_seed(5)
    shape = {"width": 32, "depth": 2, "heads": 2, "frames": 8, "size": (32, 32)}
    path = tmp_path_factory.mktemp("vit") / "enc"
    save_weights(path, VideoViT(VideoViTConfig(**shape, tasks={"direction": 8})), record={})
    config = VideoLLMConfig(
        words=words(), encoder=str(path), taps=(0, 2), width=32, depth=2, heads=2, mlp_width=64
    )
    model = VideoLLM(config).eval()
    with torch.no_grad():
        for value in model.host.model.language_model.parameters():
            value.add_(torch.randn(value.shape) * 0.2)
    return model


@pytest.fixture(scope="module")
def batch():
    return make_questions(8, 3, frames=8, size=32)


def alone(llm: VideoLLM, batch, clip: int, question: str) -> torch.Tensor:
    """Logits [2, V] of the first answer token and of what follows the right answer."""
    given = llm.prompts([question])
    (answer,) = [a for _, q, a in batch.texts(clip) if q == question][:1]
    number = llm.tokenizer.convert_tokens_to_ids(answer)
    ids = torch.cat([given["input_ids"], torch.tensor([[number]])], dim=1)
    pictures = as_pictures(normalised(batch.pixels[[clip]]), 2)
    out = llm.host(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=pictures)
    return out.logits[0, -2:]


@torch.inference_mode()
def test_every_slot_equals_its_question_asked_alone(llm, batch):
    video = llm.video_tokens(normalised(batch.pixels))
    kept = torch.arange(llm.num_video).expand(len(batch), -1)
    logits = answers(llm, video, kept, to_slots(batch))
    for clip in (0, 3, 5, 7):
        for slot, (_, question, _) in enumerate(batch.texts(clip)):
            assert torch.allclose(logits[clip, slot], alone(llm, batch, clip, question), atol=1e-4)


@pytest.mark.parametrize("positions", ["keep", "compact"])
@torch.inference_mode()
def test_dropped_tokens_are_what_a_recipe_would_drop(llm, batch, positions):
    recipe = RandomPrompt(keep_ratio=0.25, positions=positions)
    with accelerate(llm.host, recipe) as handle:
        wanted = [alone(llm, batch, clip, batch.texts(clip)[0][1]) for clip in (1, 6)]
        kept = handle.assignment[0].anchor
    assert kept.shape == (1, llm.num_video // 4)
    video = llm.video_tokens(normalised(batch.pixels[[1, 6]]))
    # The recipe draws the same tokens for every clip of this size.
    kept = kept.expand(2, -1)
    left = video.gather(1, kept[..., None].expand(-1, -1, video.shape[-1]))
    slots = to_slots(batch)
    some = type(slots)(slots.ids[[1, 6]], slots.asked[[1, 6]], slots.wanted[[1, 6]])
    logits = answers(llm, left, kept, some, compact=positions == "compact")
    for found, one in zip(logits[:, 0], wanted, strict=True):
        assert torch.allclose(found, one, atol=1e-4)


@torch.inference_mode()
def test_a_question_sees_no_other(llm, batch):
    video = llm.video_tokens(normalised(batch.pixels))
    kept = torch.arange(llm.num_video).expand(len(batch), -1)
    slots = to_slots(batch)
    before = answers(llm, video, kept, slots)
    changed = slots.ids.clone()
    changed[:, 1] = torch.randint(5, 50, changed[:, 1].shape)
    after = answers(llm, video, kept, type(slots)(changed, slots.asked, slots.wanted))
    others = [slot for slot in range(SLOTS) if slot != 1]
    assert torch.equal(before[:, others], after[:, others])
    assert not torch.equal(before[:4, 1], after[:4, 1])


@torch.inference_mode()
def test_nothing_of_a_video_can_be_left(llm, batch):
    none = torch.zeros(len(batch), 0, dtype=torch.long)
    logits = answers(llm, torch.zeros(len(batch), 0, 32), none, to_slots(batch))
    # Without a video the same question has the same answer about every clip.
    told: dict[str, torch.Tensor] = {}
    for clip in range(len(batch)):
        for slot, (_, question, _) in enumerate(batch.texts(clip)):
            found = logits[clip, slot, 0]
            assert torch.allclose(told.setdefault(question, found), found, atol=1e-5)


def test_slots_are_words_an_answer_an_end_and_padding(batch):
    slots = to_slots(batch)
    known = [*SPECIAL, *words()]
    for clip in range(len(batch)):
        asked = batch.texts(clip)
        for slot in range(SLOTS):
            row = [known[number] for number in slots.ids[clip, slot]]
            if slot >= len(asked):
                assert slots.wanted[clip, slot].tolist() == [-100, -100]
                continue
            _, question, answer = asked[slot]
            said = question.split()
            rest = ["<pad>"] * (len(row) - len(said) - 2)
            assert row == [*said, answer, "<end>", *rest]
            assert row[slots.asked[clip, slot]] == "?"
            assert [known[n] for n in slots.wanted[clip, slot]] == [answer, "<end>"]


def test_mask_and_positions_by_hand():
    mask = packed_mask(2, 2, 2, torch.device("cpu"))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    kept = torch.tensor([[0, 3], [1, 2]])
    keep = packed_positions(kept, 4, 2, 2, False)
    assert keep.tolist() == [[0, 1, 4, 5, 6, 7, 6, 7], [0, 2, 3, 5, 6, 7, 6, 7]]
    compact = packed_positions(kept, 4, 2, 2, True)
    assert compact.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5]] * 2
