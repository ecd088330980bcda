"""Kinds of questions: their answers, their wordings, and what guessing is worth."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, auto

from tubelet.train.questions.scene import COLOURS, SHAPES
from tubelet.train.world import ATTRIBUTES

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
YES_NO = ("no", "yes")
OBJECTS = "objects"
"""Name of the clips of `make_objects`; the other clips are tasks of `tubelet.train.clips`."""


class Asks(IntEnum):
    """What a wording wants to know; decides how its answer is found in the simulation."""

    DIRECTION = 0
    COLOUR = auto()
    SHAPE = auto()
    COUNT = auto()
    WHEN = auto()
    EXISTS = auto()
    FIRST_COLOUR = auto()
    FIRST_SHAPE = auto()
    LAST_COLOUR = auto()
    LAST_SHAPE = auto()
    BEFORE = auto()
    AFTER = auto()
    LABEL = auto()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of question.

    Attributes:
        name: Short name.
        title: A few words.
        clips: `OBJECTS` or a task of `tubelet.train.clips`.
        answers: Answers in the order of their numbers; all single words.
        wordings: Ways to ask, by what exactly is asked. C and S stand for colour and shape of
            the object meant, D and T for those of a second one.
        chance: Accuracy of the best guess from the question alone. Answers of collision clips
            are only nearly balanced, see `make_clips`.
    """

    name: str
    title: str
    clips: str
    answers: tuple[str, ...]
    wordings: tuple[tuple[Asks, str], ...]
    chance: float

    def texts(self) -> Iterator[str]:
        """Every wording."""
        return (text for _, text in self.wordings)


def _named(asks: Asks, *texts: str) -> tuple[tuple[Asks, str], ...]:
    """Wordings with X and Y for objects, each named by colour, by shape and by both."""
    names = (("C S", "D T"), ("C one", "D one"), ("S", "T"))
    return tuple((asks, t.replace("X", x).replace("Y", y)) for t in texts for x, y in names)


def _plain(asks: Asks, *texts: str) -> tuple[tuple[Asks, str], ...]:
    return tuple((asks, text) for text in texts)


def _compared(colour: Asks, shape: Asks, word: str) -> tuple[tuple[Asks, str], ...]:
    """The answer repeats how the objects are named."""
    texts = (f"which appears {word} , the X or the Y ?", f"what comes {word} , the X or the Y ?")
    names = ((colour, "C one", "D one"), (shape, "S", "T"))
    return tuple((asks, t.replace("X", x).replace("Y", y)) for t in texts for asks, x, y in names)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="direction",
            title="direction of a named object",
            clips=OBJECTS,
            answers=ATTRIBUTES["direction"],
            wordings=_named(
                Asks.DIRECTION,
                "which way does the X go ?",
                "which way does the X move ?",
                "in which direction does the X move ?",
                "where is the X heading ?",
            ),
            chance=1 / 8,
        ),
        Kind(
            name="colour",
            title="colour of a shape",
            clips=OBJECTS,
            answers=COLOURS,
            wordings=_plain(
                Asks.COLOUR,
                "what colour is the S ?",
                "which colour does the S have ?",
                "what is the colour of the S ?",
                "what color is the S ?",
            ),
            chance=1 / len(COLOURS),
        ),
        Kind(
            name="shape",
            title="shape of a coloured object",
            clips=OBJECTS,
            answers=SHAPES,
            wordings=_plain(
                Asks.SHAPE,
                "what shape is the C one ?",
                "which shape does the C object have ?",
                "what is the shape of the C object ?",
            ),
            chance=1 / len(SHAPES),
        ),
        Kind(
            name="count",
            title="number of objects",
            clips=OBJECTS,
            answers=NUMBERS[1:5],
            wordings=_plain(
                Asks.COUNT,
                "how many objects are there ?",
                "how many objects appear ?",
                "what is the number of objects ?",
            ),
            chance=1 / 4,
        ),
        Kind(
            name="when",
            title="third in which an object appears",
            clips=OBJECTS,
            answers=("beginning", "middle", "end"),
            wordings=_named(
                Asks.WHEN,
                "when does the X appear ?",
                "in which part of the clip does the X appear ?",
                "when is the X seen first ?",
            ),
            chance=1 / 3,
        ),
        Kind(
            name="order",
            title="which of two objects appears first",
            clips=OBJECTS,
            answers=(*COLOURS, *SHAPES, *YES_NO),
            wordings=(
                *_compared(Asks.FIRST_COLOUR, Asks.FIRST_SHAPE, "first"),
                *_compared(Asks.LAST_COLOUR, Asks.LAST_SHAPE, "last"),
                *_named(Asks.BEFORE, "does the X appear before the Y ?"),
                *_named(Asks.AFTER, "does the X appear after the Y ?"),
            ),
            # The question names both objects, or asks for yes or no.
            chance=1 / 2,
        ),
        Kind(
            name="exists",
            title="whether there is such an object",
            clips=OBJECTS,
            answers=YES_NO,
            wordings=_named(Asks.EXISTS, "is there a X ?", "does a X appear ?"),
            chance=1 / 2,
        ),
        Kind(
            name="hit",
            title="did red hit blue",
            clips="collisions",
            answers=YES_NO,
            wordings=_plain(
                Asks.LABEL,
                "does the red disc hit the blue disc ?",
                "do the red disc and the blue disc touch ?",
                "does the red one collide with the blue one ?",
            ),
            chance=1 / 2,
        ),
        Kind(
            name="collisions",
            title="number of collisions, four or more as four",
            clips="collision-count",
            answers=NUMBERS[:5],
            wordings=_plain(
                Asks.LABEL,
                "how many collisions are there ?",
                "how often do discs collide ?",
                "what is the number of collisions ?",
            ),
            chance=1 / 5,
        ),
        Kind(
            name="shell",
            title="place where the marked shell ends",
            clips="shells",
            answers=("left", "middle", "right"),
            wordings=_plain(
                Asks.LABEL,
                "where does the marked shell end ?",
                "which shell has the dot ?",
                "where is the dot at the end ?",
            ),
            chance=1 / 3,
        ),
        Kind(
            name="glyph",
            title="glyph that flashes up",
            clips="needle",
            answers=NUMBERS,
            wordings=_plain(
                Asks.LABEL,
                "which glyph flashes up ?",
                "which glyph appears ?",
                "what is the number of the glyph ?",
            ),
            chance=1 / 10,
        ),
    )
}
"""Every kind by name."""

PLACES = {"C": COLOURS, "S": SHAPES, "D": COLOURS, "T": SHAPES}
"""What the letters in wordings stand for."""


def words() -> tuple[str, ...]:
    """Every word of questions and answers, in alphabetical order."""
    found = {*COLOURS, *SHAPES}
    for kind in KINDS.values():
        found |= set(kind.answers)
        found |= {word for text in kind.texts() for word in text.split() if word not in PLACES}
    return tuple(sorted(found))
