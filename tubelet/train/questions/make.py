"""`make_questions`: clips and what is asked about them, drawn together on any device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tubelet.core.errors import ClipError, UnsupportedError
from tubelet.train.clips import make_clips
from tubelet.train.clips.dice import Dice, constant
from tubelet.train.clips.scenery import MIXED
from tubelet.train.clips.scenes import GLYPH_FRAMES
from tubelet.train.questions.kinds import KINDS, OBJECTS, PLACES, YES_NO, Asks, words
from tubelet.train.questions.scene import COLOURS, SHAPES, Objects, make_objects

SLOTS = 8
"""Questions asked about one clip of objects; other clips have an answer to one only."""

LEAST_GAP = 2 / 16
"""Two objects appear one after the other if so much of the clip lies between them."""

OBJECT_KINDS = tuple(name for name, kind in KINDS.items() if kind.clips == OBJECTS)
TASK_KINDS = tuple(name for name in KINDS if name not in OBJECT_KINDS)


@dataclass(frozen=True)
class QuestionBatch:
    """Clips with up to `SLOTS` questions each. Words are numbers into `words()`, -1 is none.

    Attributes:
        pixels: float32 `[B, T, 3, H, W]`, RGB in [0, 1].
        question: int64 `[B, Q, L]`, words of each question, then -1.
        answer: int64 `[B, Q]`, the word that answers it; -1 where a slot is empty.
        kind: int64 `[B, Q]`, into the names of `KINDS`; -1 where a slot is empty.
        objects: What the first clips show, those of `make_objects`; None without any.
    """

    pixels: Float[Tensor, "b t 3 h w"]
    question: Int[Tensor, "b q l"]
    answer: Int[Tensor, "b q"]
    kind: Int[Tensor, "b q"]
    objects: Objects | None

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def texts(self, clip: int) -> list[tuple[str, str, str]]:
        """(kind, question, answer) of each question about one clip."""
        known, names = words(), tuple(KINDS)
        rows = zip(
            *(x[clip].tolist() for x in (self.kind, self.question, self.answer)), strict=True
        )
        return [
            (names[kind], " ".join(known[w] for w in question if w >= 0), known[answer])
            for kind, question, answer in rows
            if kind >= 0
        ]


@torch.no_grad()
def make_questions(
    batch: int,
    seed: int,
    *,
    kinds: Sequence[str] | None = None,
    background: str = MIXED,
    device: torch.device | str = "cpu",
    frames: int = 16,
    size: int = 64,
    exposure: tuple[int, int] = (GLYPH_FRAMES, GLYPH_FRAMES),
) -> QuestionBatch:
    """Draw clips and questions about them.

    Args:
        batch: Clips, at least one for each sort of clips that the kinds need. An eighth goes to
            each task, the rest to clips of objects.
        seed: From 0. The same arguments give the same batch on the same type of device. Seeds
            from `TEST_SEED` on are reserved for testing.
        kinds: Names in `KINDS`; all of them if None.
        background, device, frames, size, exposure: As for `make_clips`.

    Raises:
        UnsupportedError: An unknown kind or background.
        ClipError: A number is out of range.
    """
    chosen = _chosen(kinds)
    shares = _shares(batch, chosen)
    device = torch.device(device)
    options = {"background": background, "device": device, "frames": frames, "size": size}
    parts: list[QuestionBatch] = []
    dice = Dice("questions", seed, device)
    asked = tuple(name for name in OBJECT_KINDS if name in chosen)
    if asked:
        scenes = make_objects(shares.pop(OBJECTS), seed, **options)
        parts.append(_about_objects(dice, scenes, asked))
    for name, count in shares.items():
        clips = make_clips(
            KINDS[name].clips,
            count,
            seed,
            exposure=exposure if name == "glyph" else (GLYPH_FRAMES, GLYPH_FRAMES),
            **options,
        )
        parts.append(_about_task(dice, name, clips.pixels, clips.labels))
    whole = QuestionBatch(
        *(torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS), None
    )
    return replace(whole, objects=parts[0].objects)


_TENSORS = ("pixels", "question", "answer", "kind")


def _chosen(kinds: Sequence[str] | None) -> tuple[str, ...]:
    chosen = tuple(KINDS) if kinds is None else tuple(kinds)
    unknown = [name for name in chosen if name not in KINDS]
    if unknown or not chosen:
        what = f"no kind of question is called {unknown[0]!r}" if unknown else "no kind was named"
        raise UnsupportedError(f"{what}; known: {', '.join(KINDS)}")
    return chosen


def _shares(batch: int, chosen: Sequence[str]) -> dict[str, int]:
    """Clips of each task kind, and of objects for what is left."""
    tasks = [name for name in TASK_KINDS if name in chosen]
    objects = any(name in OBJECT_KINDS for name in chosen)
    if batch < len(tasks) + objects:
        raise ClipError(
            f"{', '.join(chosen)} need {len(tasks) + objects} clips or more, got a batch of {batch}"
        )
    if objects:
        shares = dict.fromkeys(tasks, max(1, batch // 8))
        while batch - sum(shares.values()) < 1:
            shares = dict.fromkeys(tasks, shares[tasks[0]] - 1)
        return {OBJECTS: batch - sum(shares.values()), **shares}
    return {name: batch * (i + 1) // len(tasks) - batch * i // len(tasks)
            for i, name in enumerate(tasks)}  # fmt: skip


def _about_task(dice: Dice, name: str, pixels: Tensor, labels: Tensor) -> QuestionBatch:
    """One question about each clip of a task, whose answer is its label."""
    table = wordings()
    kind = _numbers((name,), dice.device).expand(len(labels), 1)
    which = table.draw(dice, kind)
    answers = constant(tuple(words().index(w) for w in KINDS[name].answers), dice.device)
    question = constant(table.tokens, dice.device)[which]
    empty = (0, SLOTS - 1)
    pad = torch.nn.functional.pad
    return QuestionBatch(
        pixels,
        pad(question, (0, 0, *empty), value=-1),
        pad(answers[labels][:, None], empty, value=-1),
        pad(kind, empty, value=-1),
        None,
    )


def _about_objects(dice: Dice, scenes: Objects, asked: tuple[str, ...]) -> QuestionBatch:
    """`SLOTS` questions about each clip; fewer only where nothing asked for has an answer."""
    table, device = wordings(), dice.device
    shape = (len(scenes.present), SLOTS)
    pair, ordered = _pairs(dice, scenes)
    luck = dice.uniform(0, 1, *shape, len(asked))
    if "order" in asked:
        luck[..., asked.index("order")] -= (~ordered[:, None]).float()
    best, chosen = luck.max(-1)
    kind, empty = _numbers(asked, device)[chosen], best < 0
    which = table.draw(dice, kind)
    asks = constant(table.asks, device)[which]
    # Which objects are meant: a pair for comparisons, else any that is there.
    free = dice.uniform(0, 1, *shape, scenes.present.shape[1]) * scenes.present[:, None]
    compares = (asks >= Asks.FIRST_COLOUR) & (asks <= Asks.AFTER)
    one = torch.where(compares, pair[:, :1], free.argmax(-1))
    two = pair[:, 1:].expand_as(one)
    there = (asks != Asks.EXISTS) | (dice.uniform(0, 1, *shape) < 0.5)
    question = _fill(constant(table.tokens, device)[which], scenes, one, two, there)
    return QuestionBatch(
        scenes.pixels,
        question.masked_fill(empty[..., None], -1),
        _answers(scenes, asks, one, two, there).masked_fill(empty, -1),
        kind.masked_fill(empty, -1),
        scenes,
    )


def _pairs(dice: Dice, scenes: Objects) -> tuple[Int[Tensor, "b 2"], Bool[Tensor, " b"]]:
    """Two objects of each clip, in random order, that do not appear together; if there are."""
    frames = scenes.pixels.shape[1]
    apart = (scenes.start[:, :, None] - scenes.start[:, None]).abs() >= LEAST_GAP * frames
    both = scenes.present[:, :, None] & scenes.present[:, None] & apart
    flat = both.flatten(1)
    best = (dice.uniform(0, 1, *flat.shape) * flat).argmax(1)
    count = scenes.present.shape[1]
    return torch.stack([best // count, best % count], dim=1), flat.any(1)


def _fill(tokens: Tensor, scenes: Objects, one: Tensor, two: Tensor, there: Tensor) -> Tensor:
    """Wordings with the names of the objects in the places of `PLACES`."""
    for number, letter in enumerate(PLACES):
        is_colour = PLACES[letter] is COLOURS
        values = scenes.colour if is_colour else scenes.shape
        absent = scenes.absent[:, 0 if is_colour else 1, None]
        meant = values.gather(1, one if letter in "CS" else two)
        word = _numbers_of(PLACES[letter], tokens.device)[torch.where(there, meant, absent)]
        tokens = torch.where(tokens == -2 - number, word[..., None], tokens)
    return tokens


def _answers(
    scenes: Objects, asks: Tensor, one: Tensor, two: Tensor, there: Tensor
) -> Int[Tensor, "b q"]:
    """The word that answers each question, from the state of the simulation."""
    device = asks.device
    colours, shapes = _numbers_of(COLOURS, device), _numbers_of(SHAPES, device)
    directions, counts, thirds, no_yes = (
        _numbers_of(answers, device)
        for answers in (
            KINDS["direction"].answers,
            KINDS["count"].answers,
            KINDS["when"].answers,
            YES_NO,
        )
    )

    def of(values: Tensor, which: Tensor) -> Tensor:
        return values.gather(1, which)

    before = of(scenes.start, one) < of(scenes.start, two)
    first, last = torch.where(before, one, two), torch.where(before, two, one)
    count = scenes.present.sum(1, keepdim=True).expand_as(one) - 1
    known = {
        Asks.DIRECTION: directions[of(scenes.direction, one)],
        Asks.COLOUR: colours[of(scenes.colour, one)],
        Asks.SHAPE: shapes[of(scenes.shape, one)],
        Asks.COUNT: counts[count],
        Asks.WHEN: thirds[of(scenes.third, one)],
        Asks.EXISTS: no_yes[there.long()],
        Asks.FIRST_COLOUR: colours[of(scenes.colour, first)],
        Asks.FIRST_SHAPE: shapes[of(scenes.shape, first)],
        Asks.LAST_COLOUR: colours[of(scenes.colour, last)],
        Asks.LAST_SHAPE: shapes[of(scenes.shape, last)],
        Asks.BEFORE: no_yes[before.long()],
        Asks.AFTER: no_yes[(~before).long()],
    }
    every = torch.stack([known[ask] for ask in sorted(known)], dim=-1)
    return every.gather(-1, asks[..., None])[..., 0]


@dataclass(frozen=True)
class Wordings:
    """All wordings of all kinds, as tables.

    Attributes:
        tokens: Words of each wording, filled up with -1; places for names are -2, -3, ...
        asks: What each wants to know.
        first, count: Range of wordings of each kind.
    """

    tokens: tuple[tuple[int, ...], ...]
    asks: tuple[int, ...]
    first: tuple[int, ...]
    count: tuple[int, ...]

    def draw(self, dice: Dice, kind: Int[Tensor, "b q"]) -> Int[Tensor, "b q"]:
        """A random wording of each kind."""
        first, count = (constant(x, kind.device)[kind] for x in (self.first, self.count))
        return first + (dice.uniform(0, 1, *kind.shape) * count).long()


@cache
def wordings() -> Wordings:
    """The tables of `KINDS`."""
    number = {word: i for i, word in enumerate(words())}
    number |= {letter: -2 - i for i, letter in enumerate(PLACES)}
    longest = max(len(text.split()) for kind in KINDS.values() for text in kind.texts())
    tokens, asks, first, count = [], [], [], []
    for kind in KINDS.values():
        first.append(len(tokens))
        count.append(len(kind.wordings))
        for ask, text in kind.wordings:
            row = [number[word] for word in text.split()]
            tokens.append((*row, *[-1] * (longest - len(row))))
            asks.append(int(ask))
    return Wordings(tuple(tokens), tuple(asks), tuple(first), tuple(count))


def _numbers(kinds: Sequence[str], device: torch.device) -> Tensor:
    names = tuple(KINDS)
    return constant(tuple(names.index(name) for name in kinds), device)


def _numbers_of(answers: Sequence[str], device: torch.device) -> Tensor:
    known = words()
    return constant(tuple(known.index(word) for word in answers), device)
