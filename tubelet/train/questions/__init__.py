"""Questions about procedural clips, with answers from the simulation.

Answers are single words and independent of the wording; see `KINDS` for what guessing is worth.
"""

from tubelet.train.questions.kinds import KINDS, Kind, words
from tubelet.train.questions.make import SLOTS, QuestionBatch, make_questions
from tubelet.train.questions.scene import Objects, make_objects, sample_objects

__all__ = [
    "KINDS",
    "SLOTS",
    "Kind",
    "Objects",
    "QuestionBatch",
    "make_objects",
    "make_questions",
    "sample_objects",
    "words",
]
