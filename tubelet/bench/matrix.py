"""Which recipe runs on which model, and why not where it does not."""

from dataclasses import fields
from typing import Any

from tubelet.core.fields import describe_type
from tubelet.core.handle import ModelAdapter
from tubelet.core.recipe import Recipe
from tubelet.models.catalogue import adapters, refusal
from tubelet.models.encoder import EncoderAdapter
from tubelet.recipes import catalogue


def support() -> list[dict[str, Any]]:
    """One entry per model variant: name, classes, presets, and recipe -> reason or None."""
    return [
        {
            "model": variant,
            "classes": list(adapter.classes),
            "presets": _presets(adapter, variant),
            "recipes": {name: refusal(cls, lacks) for name, cls in catalogue().items()},
        }
        for adapter in adapters()
        for variant, lacks in adapter.variants().items()
    ]


def _presets(adapter: ModelAdapter, variant: str) -> list[str]:
    if not isinstance(adapter, EncoderAdapter):
        return []
    return [n for n, s in adapter.presets.items() if adapter.variant_of(s) == variant]


def methods() -> list[dict[str, Any]]:
    """One entry per recipe: citation, stage, fields with defaults, identity, verification."""
    return [
        {
            "name": name,
            "summary": (cls.__doc__ or "").strip().splitlines()[0],
            "paper": None if cls.paper is None else str(cls.paper),
            "url": None if cls.paper is None else cls.paper.url,
            "stage": cls.stage,
            "needs": sorted(cls.requires),
            "identity": cls.identity,
            "verified": cls.verified,
            "fields": _fields(cls),
        }
        for name, cls in catalogue().items()
    ]


def _fields(cls: type[Recipe]) -> list[dict[str, Any]]:
    return [
        {
            "name": field.name,
            "type": describe_type(cls, field.name),
            "default": field.default,
            "bounds": field.metadata["bounds"],
            "doc": field.metadata["doc"],
        }
        for field in fields(cls)
    ]
