"""Procedural clips with a question each, drawn in batches on any device.

What a clip shows is random and independent of its answer, except for what the question is about;
labels come from the simulation. See `TASKS` for the questions.
"""

from tubelet.train.clips.batch import MIN_COVER, ClipBatch
from tubelet.train.clips.dice import TEST_SEED
from tubelet.train.clips.make import make_clips
from tubelet.train.clips.scenery import BACKGROUNDS
from tubelet.train.clips.tasks import CORE_TASKS, TASKS, Task, needle_floor

__all__ = [
    "BACKGROUNDS",
    "CORE_TASKS",
    "MIN_COVER",
    "TASKS",
    "TEST_SEED",
    "ClipBatch",
    "Task",
    "make_clips",
    "needle_floor",
]
