"""Test questions: one about each clip, of all kinds together, the same for everything measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tubelet.core.errors import ModelError
from tubelet.nn.video_llm import VideoLLM
from tubelet.nn.video_tower import as_pictures
from tubelet.train.clips import TEST_SEED
from tubelet.train.objectives import normalised
from tubelet.train.questions import make_questions, words

PART = 16
"""Questions of each kind that are drawn, asked and shared out among processes together."""

DRAWS = 64
"""Generator seeds of a part and kind; not every clip has an answer to every kind."""

CALIBRATION_SEED = 2**39
"""First generator seed of the clips that thresholds are searched on: neither training nor test."""


@dataclass(frozen=True, kw_only=True)
class Quiz:
    """One question about each clip.

    Args:
        pixels: [B, T, 3, H, W] in [0, 1].
        questions, answers: In words.
        kinds: Of the questions; equally many of each, kind after kind.
    """

    pixels: Tensor
    questions: list[str]
    answers: list[str]
    kinds: list[str]

    def __len__(self) -> int:
        return len(self.questions)

    def cut(self, each: int) -> "Quiz":
        """The first questions of each kind."""
        seen: dict[str, int] = {}
        rows = []
        for row, kind in enumerate(self.kinds):
            seen[kind] = seen.get(kind, 0) + 1
            if seen[kind] <= each:
                rows.append(row)
        return self.rows(rows)

    def rows(self, rows: Sequence[int]) -> "Quiz":
        """Some questions."""
        return Quiz(
            pixels=self.pixels[torch.tensor(rows, device=self.pixels.device)],
            questions=[self.questions[row] for row in rows],
            answers=[self.answers[row] for row in rows],
            kinds=[self.kinds[row] for row in rows],
        )

    def split(self, most: int) -> list["Quiz"]:
        """In batches of at most `most`."""
        places = range(len(self))
        return [self.rows(places[start : start + most]) for start in places[::most]]


def draw_quiz(
    llm: VideoLLM,
    kinds: Sequence[str],
    background: str,
    part: int,
    each: int,
    device: torch.device,
    first_seed: int = TEST_SEED,
) -> Quiz:
    """Questions `part * PART` to `part * PART + each` of each kind on a background."""
    found = [_of_kind(llm, kind, background, part, device, first_seed) for kind in kinds]
    whole = Quiz(
        pixels=torch.cat([quiz.pixels for quiz in found]),
        questions=[text for quiz in found for text in quiz.questions],
        answers=[text for quiz in found for text in quiz.answers],
        kinds=[kind for quiz in found for kind in quiz.kinds],
    )
    return whole.cut(each)


def _of_kind(
    llm: VideoLLM, kind: str, background: str, part: int, device: torch.device, first_seed: int
) -> Quiz:
    frames, size, _ = llm.clip_shape
    pixels, texts = [], []
    seed = first_seed + part * DRAWS
    while len(texts) < PART:
        drawn = make_questions(
            PART,
            seed,
            kinds=(kind,),
            background=background,
            device=device,
            frames=frames,
            size=size,
        )
        rows = (drawn.kind[:, 0] >= 0).nonzero()[:, 0].tolist()
        pixels.append(drawn.pixels[rows])
        texts += [drawn.texts(row)[0] for row in rows]
        seed += 1
    return Quiz(
        pixels=torch.cat(pixels)[:PART],
        questions=[question for _, question, _ in texts[:PART]],
        answers=[answer for *_, answer in texts[:PART]],
        kinds=[kind] * PART,
    )


def check_words(llm: VideoLLM, name: str) -> None:
    """Refuse a model that does not know the words of the questions.

    Raises:
        ModelError: Naming some that it lacks.
    """
    missing = [word for word in words() if word not in llm.config.words]
    if missing:
        raise ModelError(
            f"{name} does not know {len(missing)} words of the questions, among them "
            f"{', '.join(missing[:3])}; train it on all kinds"
        )


class Prompts:
    """A quiz as a model takes it.

    Attributes:
        inputs: Of the host, on its device.
        wanted: [B] ids of the answers.
    """

    def __init__(self, llm: VideoLLM, quiz: Quiz) -> None:
        weights, depth = next(llm.parameters()), llm.tower.video.config.tubelet[0]
        pictures = as_pictures(normalised(quiz.pixels), depth)
        given = llm.prompts(quiz.questions) | {"pixel_values_videos": pictures.to(weights.dtype)}
        self.inputs = {name: x.to(weights.device) for name, x in given.items()}
        ids = llm.tokenizer.convert_tokens_to_ids(quiz.answers)
        self.wanted = torch.tensor(ids, device=weights.device)
        self.front = 1 + llm.num_video + 1
        """Tokens of the start, the video and its line break."""

    def __len__(self) -> int:
        return len(self.wanted)

    @cached_property
    def by_length(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Rows and inputs of the prompts of each length, without padding."""
        lengths = self.inputs["attention_mask"].sum(1)
        found = []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            own = {name: x[rows] for name, x in self.inputs.items()}
            cut = {name: own[name][:, -length:] for name in ("input_ids", "attention_mask")}
            found.append((rows, own | cut))
        return found
