"""Everything tubelet raises on purpose.

TubeletError
├── ShapeError            a tensor, grid or plan whose shape or values do not fit
├── UnsupportedError      this model, device or recipe cannot do that, with the reason
├── NoMatchingSitesError  a recipe found no place to act in this model
├── ConflictError         two recipes want the same stage at the same place
├── RecipeError           unknown recipe, unknown field, or a value out of range
├── ModelError            unknown model name, or weights that do not load
└── ClipError             a clip that is missing, corrupt, empty, too short or too small

NoEffectWarning           a recipe ran and never changed anything
"""


class TubeletError(Exception):
    """Base of every error that tubelet raises on purpose."""


class ShapeError(TubeletError, ValueError):
    """A tensor, grid or plan has a shape or values that do not fit."""


class UnsupportedError(TubeletError, RuntimeError):
    """The model, device or recipe cannot do what was asked; the message says why."""


class NoMatchingSitesError(TubeletError, LookupError):
    """A recipe matched no site; the message lists what it looked for and what exists."""


class ConflictError(TubeletError, ValueError):
    """Two recipes claim the same stage at the same site, or a model is accelerated twice."""


class RecipeError(TubeletError, ValueError):
    """An unknown recipe or field, or a value outside its range."""


class ModelError(TubeletError, ValueError):
    """An unknown model name, or weights that could not be loaded."""


class ClipError(TubeletError, ValueError):
    """A clip that is missing, corrupt, empty, without video, too short or too small."""


class NoEffectWarning(UserWarning):
    """A recipe ended without having changed anything."""
