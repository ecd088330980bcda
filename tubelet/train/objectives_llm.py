"""What the video language model is trained for: answers to questions about procedural clips."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.errors import UnsupportedError
from tubelet.nn.video_llm import VideoLLM
from tubelet.ops.select import budget
from tubelet.train.clips import TEST_SEED
from tubelet.train.clips.dice import constant
from tubelet.train.objectives import EXPOSURE, normalised, shuffled
from tubelet.train.questions import KINDS, QuestionBatch, make_questions
from tubelet.train.questions.make import OBJECT_KINDS
from tubelet.train.questions.packing import answers, to_slots

KEEPS = (0.6, 0.35, 0.2, 0.1)
"""Shares of the video tokens that training keeps in the steps that drop some."""

DENSE_SHARE, COMPACT_SHARE = 0.4, 0.25
"""Steps that keep every token, and of the others those that renumber positions."""

SETTLE = 1000
"""First steps, which keep every token: what is asked is learned before it is made harder."""

TESTED_KEEP = 0.25
"""Share of tokens, chosen at random, that the evaluation keeps beside all of them."""

END_WEIGHT = 0.1
"""Of the token that ends an answer, which is always the same."""

SEES = ("video", "shuffled", "nothing")

ALL_KINDS_FROM = 64
"""Clips of a batch from which on every kind about objects is asked, so that its score is one."""


class QuestionObjective:
    """Questions about mixed clips; only answers are in the loss.

    The encoder is frozen. In part of the steps only some video tokens are left, drawn at random
    by tokens, frames and places, so that a shortened prompt is nothing new to the model.

    Args:
        llm: The model, on its device.
        batch: Clips per step; a clip of objects is asked about up to `SLOTS` times.
        kinds: Kinds of questions.
        sees: "video"; "shuffled" frames or "nothing" at all for control models.
        background: As in `make_clips`.
        settle: First steps, which keep every token.
        test_clips: Clips per kind in `evaluate`.

    Attributes:
        notes: What a card has to say about the prompts of the training.

    Raises:
        UnsupportedError: An unknown `sees`.
    """

    def __init__(
        self,
        llm: VideoLLM,
        *,
        batch: int,
        kinds: Sequence[str] = tuple(KINDS),
        sees: str = "video",
        background: str = "mixed",
        settle: int = SETTLE,
        test_clips: int = 1024,
    ) -> None:
        if sees not in SEES:
            raise UnsupportedError(f"a model sees one of {', '.join(SEES)}, not {sees!r}")
        self.model, self.batch_size, self.kinds = llm, batch, tuple(kinds)
        self.sees, self.background, self.test_clips = sees, background, test_clips
        self.settle = settle
        self.constant = tuple(name for name in self.kinds if name in OBJECT_KINDS)
        self.device = next(llm.parameters()).device
        self.notes = {
            "kinds": list(self.kinds),
            "sees": sees,
            "background": background,
            "tasks_per_step": 1,
            "keep_ratios": [1.0, *KEEPS],
            "dense_steps_first": settle,
            "dense_share": DENSE_SHARE,
            "compact_share": COMPACT_SHARE,
            "dropped": "random mixtures of tokens, frames and places; recipes play no part",
        }
        self.identity = {**llm.config.to_dict(), **self.notes}

    def compile(self) -> None:
        """Fuse the encoder, and the layers of the language model for each length of a prompt."""
        # Every keep ratio is a graph, with and without gradients; beyond the limit none is used.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 8 * (len(KEEPS) + 2))
        tower = self.model.tower
        tower.layers_of = torch.compile(tower.layers_of, dynamic=False)
        for layer in self.model.host.model.language_model.layers:
            layer.compile(dynamic=False)

    def batch(self, seed: int) -> QuestionBatch:
        """Clips of objects and, in turns, of one task, whose simulation takes longest.

        Glyphs are often shown longer than in tests.
        """
        asked, tasks = self.constant, [k for k in self.kinds if k not in self.constant]
        if not asked:
            asked = self.kinds
        elif tasks:
            asked = (*asked, tasks[seed % len(tasks)])
        return self._questions(self.batch_size, seed, asked, (EXPOSURE[0], 8))

    def _questions(
        self, batch: int, seed: int, kinds: Sequence[str], exposure: tuple[int, int]
    ) -> QuestionBatch:
        frames, size, _ = self.model.clip_shape
        return make_questions(
            batch,
            seed,
            kinds=kinds,
            background=self.background,
            device=self.device,
            frames=frames,
            size=size,
            exposure=exposure,
        )

    def draw(self, step: int) -> tuple[float, bool]:
        """(share of the video tokens that stay, whether positions are renumbered) of a step."""
        chance = torch.rand(3, generator=torch.Generator().manual_seed(step)).tolist()
        if step < self.settle or chance[0] < DENSE_SHARE:
            return 1.0, False
        return KEEPS[int(chance[1] * len(KEEPS))], chance[2] < COMPACT_SHARE

    def loss(
        self, batch: QuestionBatch, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over kinds of the answers' cross-entropy in units of a blind guess."""
        ratio, compact = self.draw(step)
        video = self._video(batch.pixels, step)
        kept = self._kept(len(video), ratio, generator)
        slots = to_slots(batch)
        logits = answers(self.model, _picked(video, kept), kept, slots, compact).float()
        each = F.cross_entropy(logits.flatten(0, 2), slots.wanted.flatten(), reduction="none")
        answer, end = each.unflatten(0, slots.wanted.shape).unbind(-1)
        right = (logits[..., 0, :].detach().argmax(-1) == slots.wanted[..., 0]).float()
        losses, scores, there = self._by_kind(batch.kind, answer, right)
        asked = (batch.kind >= 0).sum()
        loss = losses.sum() / there.sum() + END_WEIGHT * end.sum() / asked
        metrics = {"answered": right.sum() / asked}
        if self.batch_size >= ALL_KINDS_FROM:
            each = dict(zip(self.kinds, scores.unbind(), strict=True))
            metrics |= {name: each[name] for name in self.constant}
        return loss, metrics

    def _by_kind(self, kind: Tensor, answer: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        """[kinds] loss in guesses, accuracy, and whether the batch has any of the kind."""
        names = list(KINDS)
        numbers = constant(tuple(names.index(name) for name in self.kinds), kind.device)
        guesses = constant(tuple(-math.log(KINDS[n].chance) for n in self.kinds), kind.device)
        mine = (kind.flatten() == numbers[:, None]).float()
        count = mine.sum(1).clamp(min=1)
        losses = mine @ answer.flatten() / count / guesses
        return losses, mine @ right.flatten() / count, mine.any(1).float()

    def _video(self, pixels: Tensor, seed: int) -> Tensor:
        """[B, N, C] projected tokens of clips as this model sees them."""
        if self.sees == "shuffled":
            pixels = shuffled(pixels, seed)
        return self.model.video_tokens(normalised(pixels))

    def _kept(self, batch: int, ratio: float, generator: torch.Generator) -> Tensor:
        """[B, K] ascending tokens that stay: patterns from single tokens to frames and places."""
        num = self.model.num_video
        if self.sees == "nothing":
            return torch.zeros(batch, 0, dtype=torch.long, device=self.device)
        if ratio == 1:
            return torch.arange(num, device=self.device).expand(batch, -1)
        frames = self.model.tower.config.num_frames
        shapes = ((frames, num // frames), (frames, 1), (1, num // frames), (3, 1))
        token, frame, place, weight = (
            torch.rand(batch, *shape, generator=generator, device=self.device) for shape in shapes
        )
        by_token, by_frame, by_place = weight[..., None].unbind(1)
        score = (by_token * token + by_frame * frame + by_place * place).flatten(1)
        return score.topk(budget(num, ratio)).indices.sort(1).values

    def evaluate(self) -> dict[str, float]:
        """Accuracy per kind on test seeds, with what it is worth beside it.

        "KIND" keeps every token, "KIND/kept-0.25" random ones, "KIND/shuffled" has frames in
        random order, "KIND/wrong-clip" the video of another clip, "KIND/chance" is a guess.
        """
        scores: dict[str, float] = {}
        for name in self.kinds:
            chunks = math.ceil(self.test_clips / self.batch_size)
            parts = [self._scores(name, TEST_SEED + chunk) for chunk in range(chunks)]
            for way in parts[0]:
                right = torch.cat([part[way] for part in parts])
                scores[name if way == "all" else f"{name}/{way}"] = float(right.mean())
            scores[f"{name}/chance"] = KINDS[name].chance
        return scores

    @torch.inference_mode()
    def _scores(self, name: str, seed: int) -> dict[str, Tensor]:
        """Right or wrong for each question of one kind, by what the model is given."""
        clips = self._questions(self.batch_size, seed, (name,), (EXPOSURE[0], EXPOSURE[0]))
        slots = to_slots(clips)
        there = clips.kind >= 0
        generator = torch.Generator(device=self.device).manual_seed(seed)
        whole = self._kept(len(clips), 1.0, generator)

        def right(video: Tensor, kept: Tensor) -> Tensor:
            logits = answers(self.model, _picked(video, kept), kept, slots)[..., 0, :]
            return (logits.argmax(-1) == slots.wanted[..., 0])[there].float()

        video = self._video(clips.pixels, seed)
        found = {"all": right(video, whole)}
        if self.sees == "video":
            some = self._kept(len(clips), TESTED_KEEP, generator)
            found[f"kept-{TESTED_KEEP:g}"] = right(video, some)
            found["shuffled"] = right(self._video(shuffled(clips.pixels, seed), seed), whole)
            found["wrong-clip"] = right(video.roll(1, 0), whole)
        return found


def _picked(video: Tensor, kept: Tensor) -> Tensor:
    if kept.shape[1] == video.shape[1]:
        return video
    return video.gather(1, kept[..., None].expand(-1, -1, video.shape[-1]))
