"""tubelet: makes video transformers fast.

    import tubelet
    from tubelet.recipes import ToMe

    with tubelet.accelerate(model, ToMe(r=64)) as handle:
        output = model(**inputs)
    print(handle.report())

Names are loaded on first use, so importing tubelet costs little more than importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tubelet.bench.compare import compare
    from tubelet.core.handle import Handle
    from tubelet.models.accelerate import accelerate
    from tubelet.models.load import load_model
    from tubelet.models.vision_fusion import fuse_vision
    from tubelet.recipes import load_plan

__version__ = "0.1.0"

_HOMES = {
    "Handle": "tubelet.core.handle",
    "accelerate": "tubelet.models.accelerate",
    "compare": "tubelet.bench.compare",
    "fuse_vision": "tubelet.models.vision_fusion",
    "load_model": "tubelet.models.load",
    "load_plan": "tubelet.recipes",
}

__all__ = ["Handle", "accelerate", "compare", "fuse_vision", "load_model", "load_plan"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tubelet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
