"""Several questions about one clip in one row: a question sees the video and itself, no other.

A row is `<start>`, the video, its line break, then one slot per question: words, answer, end. All
slots have the positions that follow the video, so every question is asked as it would be alone.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.nn.video_llm import END, PAD, SPECIAL, START, VideoLLM
from tubelet.train.questions.make import QuestionBatch

FRONT, BEHIND = 1, 1
"""Tokens before the video (`<start>`) and behind it (the line break)."""


@dataclass(frozen=True)
class Slots:
    """Questions as tokens of a model.

    Attributes:
        ids: int64 `[B, Q, W]`, words, the answer, `<end>`, padding.
        asked: int64 `[B, Q]`, place of the last word of the question, which the answer follows.
        wanted: int64 `[B, Q, 2]`, what follows `asked` and the answer; -100 in empty slots.
    """

    ids: Int[Tensor, "b q w"]
    asked: Int[Tensor, "b q"]
    wanted: Int[Tensor, "b q 2"]


def to_slots(batch: QuestionBatch) -> Slots:
    """Words become token numbers, answers and ends are put behind their questions."""
    first = len(SPECIAL)
    words = torch.nn.functional.pad(batch.question, (0, 2), value=-1)
    ids = torch.where(words >= 0, words + first, SPECIAL.index(PAD))
    length = (batch.question >= 0).sum(-1, keepdim=True)
    end = torch.full_like(length, SPECIAL.index(END))
    answer = (batch.answer + first)[..., None]
    ids = ids.scatter(-1, length, answer).scatter(-1, length + 1, end)
    wanted = torch.cat([answer, end], dim=-1).masked_fill(batch.kind[..., None] < 0, -100)
    return Slots(ids, (length[..., 0] - 1).clamp(min=0), wanted)


def packed_mask(
    front: int, slots: int, width: int, device: torch.device
) -> Bool[Tensor, "1 1 s s"]:
    """True where a token of a row (rows of the mask) may look.

    Args:
        front: Tokens that every question sees.
        slots, width: Number and length of the questions.
    """
    place = torch.arange(front + slots * width, device=device)
    slot = torch.where(place < front, -1, (place - front) // width)
    seen = (slot[None] == -1) | (slot[:, None] == slot[None])
    return (seen & (place[:, None] >= place[None]))[None, None]


def packed_positions(
    kept: Int[Tensor, "b k"], num_video: int, slots: int, width: int, compact: bool
) -> Int[Tensor, "b s"]:
    """Positions of a row whose video has kept the tokens `kept`.

    Args:
        num_video: Tokens of the whole video.
        compact: Count what is there; else everything keeps the place that it had.
    """
    batch, count = kept.shape
    if compact:
        kept = torch.arange(count, device=kept.device).expand(batch, -1)
        num_video = count
    start = kept.new_zeros(batch, 1)
    line_break = start + FRONT + num_video
    words = torch.arange(width, device=kept.device).repeat(slots) + line_break + BEHIND
    return torch.cat([start, kept + FRONT, line_break, words], dim=1)


def answers(
    llm: VideoLLM,
    video: Float[Tensor, "b k c"],
    kept: Int[Tensor, "b k"],
    slots: Slots,
    compact: bool = False,
) -> Float[Tensor, "b q 2 v"]:
    """Logits of the answer to every question and of what follows it.

    Args:
        video: Projected tokens that are left of each clip, in order; may be none at all.
        kept: Which of the clip's tokens they are.
    """
    host, (batch, count, width) = llm.host, slots.ids.shape
    embed = host.get_input_embeddings()
    start = embed(kept.new_full((batch, 1), SPECIAL.index(START)))
    line_break = host.model.image_newline.expand(batch, 1, -1)
    row = torch.cat([start, video, line_break, embed(slots.ids.flatten(1))], dim=1)
    front = FRONT + video.shape[1] + BEHIND
    hidden = host.model.language_model(
        inputs_embeds=row,
        attention_mask={"full_attention": packed_mask(front, count, width, row.device)},
        position_ids=packed_positions(kept, llm.num_video, count, width, compact),
        use_cache=False,
    ).last_hidden_state
    where = torch.stack([slots.asked, slots.asked + 1], dim=-1)
    where = where + (front + torch.arange(count, device=row.device) * width)[:, None]
    picked = hidden.gather(1, where.flatten(1)[..., None].expand(-1, -1, hidden.shape[-1]))
    return host.lm_head(picked).unflatten(1, (count, 2))
