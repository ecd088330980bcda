"""Every answer is found again from the question's own words and the state of the simulation."""

from collections import Counter

import pytest
import torch

from tubelet.core.errors import ClipError, UnsupportedError
from tubelet.train.clips import make_clips
from tubelet.train.questions import KINDS, SLOTS, make_questions, words
from tubelet.train.questions.kinds import OBJECTS, PLACES
from tubelet.train.questions.make import OBJECT_KINDS, TASK_KINDS
from tubelet.train.questions.scene import COLOURS, SHAPES

NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COMPASS = ["right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right"]


def described(objects, clip: int) -> list[dict]:
    """The objects of a clip in words."""
    return [
        {
            "colour": COLOURS[objects.colour[clip, i]],
            "shape": SHAPES[objects.shape[clip, i]],
            "direction": COMPASS[objects.direction[clip, i]],
            "start": int(objects.start[clip, i]),
        }
        for i in range(objects.present.shape[1])
        if objects.present[clip, i]
    ]


def named(question: str, things: list[dict]) -> list[dict]:
    """What is meant, in the order in which it is named: by colour, by shape or by both."""
    said = question.split()
    found = []
    for place, word in enumerate(said):
        if word in COLOURS:
            follows = said[place + 1]
            fits = [t for t in things if t["colour"] == word]
            if follows in SHAPES:
                fits = [t for t in fits if t["shape"] == follows]
            found.append(fits[0] if fits else None)
        elif word in SHAPES and said[place - 1] not in COLOURS:
            found.append(next((t for t in things if t["shape"] == word), None))
    return found


def answered(kind: str, question: str, things: list[dict], frames: int) -> str:
    """The answer, worked out slowly."""
    if kind == "count":
        return NUMBER_WORDS[len(things)]
    meant = named(question, things)
    if kind == "exists":
        return "no" if meant == [None] else "yes"
    if kind == "order":
        one, two = meant
        if question.startswith("does"):
            before = one["start"] < two["start"]
            return "yes" if before == ("before" in question) else "no"
        pick = min if " first " in question else max
        asked = pick(meant, key=lambda t: t["start"])
        return asked["colour"] if one["colour"] in question else asked["shape"]
    (one,) = meant
    if kind == "when":
        return ("beginning", "middle", "end")[one["start"] * 3 // frames]
    return one[kind]


@pytest.mark.parametrize("frames", [16, 24])
def test_answers_about_objects_follow_from_the_scene(frames):
    batch = make_questions(60, 1, kinds=OBJECT_KINDS, size=32, frames=frames)
    seen = Counter()
    for clip in range(60):
        things = described(batch.objects, clip)
        asked = batch.texts(clip)
        assert len(asked) == SLOTS
        for kind, question, answer in asked:
            seen[kind] += 1
            assert answer == answered(kind, question, things, frames), question
            assert answer in KINDS[kind].answers
            if kind == "order":
                one, two = named(question, things)
                assert abs(one["start"] - two["start"]) >= frames / 8
    assert set(seen) == set(OBJECT_KINDS)


@pytest.mark.parametrize("name", TASK_KINDS)
def test_answers_about_tasks_are_the_labels_of_their_clips(name):
    batch = make_questions(6, 4, kinds=(name,), size=32)
    clips = make_clips(KINDS[name].clips, 6, 4, background="mixed", frames=16, size=32)
    assert torch.equal(batch.pixels, clips.pixels)
    for clip, label in enumerate(clips.labels.tolist()):
        ((kind, _, answer),) = batch.texts(clip)
        assert (kind, answer) == (name, KINDS[name].answers[label])
    assert batch.objects is None


def test_labels_mean_what_the_answers_say():
    assert KINDS["hit"].answers == ("no", "yes")
    assert KINDS["shell"].answers == ("left", "middle", "right")
    assert KINDS["glyph"].answers == tuple(NUMBER_WORDS)
    assert KINDS["collisions"].answers == tuple(NUMBER_WORDS[:5])
    assert KINDS["direction"].answers == tuple(COMPASS)


@pytest.mark.parametrize("name", OBJECT_KINDS)
def test_guessing_from_the_question_alone_is_worth_chance(name):
    batch = make_questions(1200, 2, kinds=(name,), size=32, frames=8)
    by_wording: dict[str, Counter] = {}
    for clip in range(len(batch)):
        for _, question, answer in batch.texts(clip):
            said = [w for w in question.split() if w in COLOURS or w in SHAPES]
            # Which of the things named, or which word, is all that a guess could go by.
            key = " ".join("X" if w in said else w for w in question.split())
            by_wording.setdefault(key, Counter())[
                said.index(answer) if answer in said else answer
            ] += 1
    total = sum(sum(count.values()) for count in by_wording.values())
    best = sum(max(count.values()) for count in by_wording.values()) / total
    assert best == pytest.approx(KINDS[name].chance, abs=0.05)
    assert best >= KINDS[name].chance


def test_a_batch_mixes_clips_and_kinds():
    batch = make_questions(16, 3, size=32)
    assert len(batch) == 16
    kinds = [[kind for kind, _, _ in batch.texts(clip)] for clip in range(16)]
    assert [len(asked) for asked in kinds] == [SLOTS] * 8 + [1] * 8
    assert [asked[0] for asked in kinds[8:]] == [k for k in TASK_KINDS for _ in range(2)]
    assert ((batch.kind < 0) == (batch.answer < 0)).all()
    assert ((batch.kind < 0) == (batch.question < 0).all(-1)).all()


def test_order_is_asked_only_where_two_objects_come_apart():
    batch = make_questions(40, 6, kinds=("order",), size=32, frames=8)
    alone = batch.objects.present.sum(1) == 1
    assert alone.any()
    assert (batch.kind[alone] < 0).all()
    assert (batch.kind[~alone] >= 0).any()


def test_a_seed_decides_everything():
    first, again, other = (make_questions(8, seed, size=32) for seed in (3, 3, 4))
    for name in ("pixels", "question", "answer", "kind"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.pixels, other.pixels)
    assert not torch.equal(first.question, other.question)


def test_words_are_closed_and_wordings_are_questions():
    known = words()
    assert list(known) == sorted(set(known))
    for kind in KINDS.values():
        assert all(answer in known and " " not in answer for answer in kind.answers)
        texts = list(kind.texts())
        assert len(set(texts)) == len(texts) >= 3
        for text in texts:
            assert text.endswith(" ?")
            assert set(text.split()) <= {*known, *PLACES}
        assert kind.chance == pytest.approx(1 / len(kind.answers)) or kind.name == "order"
        assert kind.clips == OBJECTS or kind.name in TASK_KINDS


@pytest.mark.parametrize(
    ("batch", "kinds", "error", "text"),
    [
        (8, ("size",), UnsupportedError, "'size'"),
        (8, (), UnsupportedError, "no kind was named"),
        (4, None, ClipError, "need 5 clips"),
        (0, ("colour",), ClipError, "need 1 clips"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused(batch, kinds, error, text):
    with pytest.raises(error, match=text) as caught:
        make_questions(batch, 0, kinds=kinds)
    assert "\n" not in str(caught.value)
