"""The tasks: what is asked, how many answers there are, and what can be had without the skill."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tubelet.train.clips.collisions import MAX_COUNT
from tubelet.train.clips.scenes import DIRECTIONS, GLYPH_FRAMES
from tubelet.train.clips.shells import SLOTS, shuffled_floor
from tubelet.train.clips.sprites import GLYPHS


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question about a clip.

    Attributes:
        name: As given to `make_clips`.
        title: A few words.
        classes: Number of answers; 1 for the dense task, which has one answer per token.
        frames: Length of a clip unless asked otherwise.
        chance: Accuracy of guessing.
        floors: Best accuracy of a model that is denied something, by what it is denied.
        doc: The question, with the meaning of the labels.
        refused: Backgrounds on which the question has no answer.
    """

    name: str
    title: str
    classes: int
    frames: int = 16
    chance: float
    floors: dict[str, float] = field(default_factory=dict)
    doc: str
    refused: tuple[str, ...] = ()

    @property
    def floor(self) -> float:
        """Best accuracy without the skill that the task is about."""
        return max([self.chance, *self.floors.values()])


def needle_floor(kept: int | Sequence[int], frames: int = 32) -> float:
    """Accuracy on `needle` of a model that sees only some frames and is right where it can be.

    Args:
        kept: Number of evenly spaced frames, or the indices of the frames.
        frames: Length of the clip.

    Returns:
        Share of clips that show the glyph in a kept frame, plus a guess on the others.
    """
    if isinstance(kept, int):
        kept = [int((i + 0.5) * frames / kept) for i in range(kept)]
    starts = frames - GLYPH_FRAMES + 1
    seen = sum(any(s <= k < s + GLYPH_FRAMES for k in kept) for s in range(starts))
    return 1 / GLYPHS + (1 - 1 / GLYPHS) * seen / starts


COLLISIONS_ONE_FRAME = 0.64
"""Measured: a small network that knows all disc centres in one frame, the best of 16 frames."""

EGO_MOTION_ON_SCREEN = 0.58
"""Measured: the best guess from the sprite's exact motion on the screen, the ground unseen; a
camera at the speeds of the `pan` background leaves 0.52."""

_HEADINGS = "0 right, 1 down right, 2 down, and so on clockwise"

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="direction",
            title="direction of the red sprite",
            classes=DIRECTIONS,
            chance=1 / DIRECTIONS,
            floors={"single frame": 1 / DIRECTIONS, "shuffled": 1 / 2},
            doc=f"Which way does the red sprite move? {_HEADINGS}. Shuffled frames show its axis.",
        ),
        Task(
            name="needle",
            title="glyph that flashes up",
            classes=GLYPHS,
            frames=32,
            chance=1 / GLYPHS,
            floors={"single frame": needle_floor(1)},
            doc="Which glyph is shown for two frames? Its number. `needle_floor` gives the best "
            "accuracy of a model that sees only some frames.",
        ),
        Task(
            name="collisions",
            title="did red hit blue",
            classes=2,
            chance=1 / 2,
            floors={"single frame": COLLISIONS_ONE_FRAME},
            doc="Does the red disc touch the blue one? 1 yes, 0 no, though nearly.",
        ),
        Task(
            name="collision-count",
            title="number of collisions",
            classes=MAX_COUNT + 1,
            chance=1 / (MAX_COUNT + 1),
            doc=f"How often do discs collide? {MAX_COUNT} stands for {MAX_COUNT} or more.",
        ),
        Task(
            name="counterfactual",
            title="would red hit blue",
            classes=2,
            chance=1 / 2,
            floors={"what happens": 1 / 2},
            doc="Without the ringed disc, would red touch blue? 1 yes, 0 no.",
        ),
        Task(
            name="shells",
            title="shell game",
            classes=SLOTS,
            chance=1 / SLOTS,
            floors={"single frame": 1 / SLOTS, "shuffled": shuffled_floor()},
            doc="In which slot does the sprite end that carries a dot at first? 0 left, 1 middle, "
            "2 right. Shuffled frames show which pairs swap, not in which order.",
        ),
        Task(
            name="ego-motion",
            title="direction in the world",
            classes=DIRECTIONS,
            chance=1 / DIRECTIONS,
            floors={
                "single frame": 1 / DIRECTIONS,
                "shuffled": 1 / 2,
                "background hidden": EGO_MOTION_ON_SCREEN,
            },
            doc=f"Which way does the sprite move over the ground? {_HEADINGS}. The camera moves.",
            refused=("black",),
        ),
        Task(
            name="mask",
            title="where the objects are",
            classes=1,
            chance=0.0,
            doc="Which tokens show a moving sprite? See `ClipBatch.dense_labels`.",
        ),
    )
}

CORE_TASKS = ("direction", "needle", "collisions", "shells", "ego-motion")
"""The five tasks of the core score."""
