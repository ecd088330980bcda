"""`fuse_vision`: the vision tower of a video LLM by faster operations, until taken back."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from tubelet.core.errors import ConflictError, UnsupportedError
from tubelet.core.handle import Handle
from tubelet.kernels.triton_support import unavailable
from tubelet.models import vision_operations as ops
from tubelet.models.accelerate import is_accelerated
from tubelet.models.watched_attention import is_held

TOWERS = ("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration")
"""Hosts with a vision tower of the kind that is fused here."""

POOLS = ("LlavaOnevisionForConditionalGeneration",)
"""Hosts that pool frames by a kernel much slower than a matrix product."""

_MARK = "_tubelet_fusion"
"""Attribute of the changed part of a model that holds its fusion."""


def fuse_vision(model: Any) -> "VisionFusion":
    """Let a video LLM's vision tower compute the same by faster operations.

    Of Qwen2.5-VL and Qwen3-VL: all frames or windows of one length in one attention call (where
    the tower uses torch's fused attention), the rotary embedding as one kernel, the patch embedding
    as a matrix product, and in half precision on CUDA padded copies of an MLP whose width is
    awkward for it, and RMSNorm as one kernel. Of LLaVA-OneVision: the pooling of frames as a
    matrix product. What would not pay where the model lies stays the host's. Weights, names and
    shapes stay as they are; results differ by rounding. `accelerate` comes after it. Parts of a
    tower with weights of another kind (quantised, adapters) or with hooks stay the host's.
    `torch.compile` leaves the fused attention out of its graphs, so not with `fullgraph=True`; and
    `nn.DataParallel` would run copies with the weights of the original: fuse none of these.

    Args:
        model: `Qwen2_5_VLForConditionalGeneration`, `Qwen3VLForConditionalGeneration` or
            `LlavaOnevisionForConditionalGeneration` of transformers.

    Returns:
        What was done, also a context manager that takes it back.

    Raises:
        UnsupportedError: Another class, or the model has no weights yet (meta device).
        ConflictError: The model is fused or accelerated already, or shares its tower's config
            with a model that is accelerated.

    Example:
        >>> with tubelet.fuse_vision(model), tubelet.accelerate(model, VidCom2()) as handle:
        ...     ids = model.generate(**inputs)
    """
    name = type(model).__name__
    if name not in (*TOWERS, *POOLS):
        known = ", ".join((*TOWERS, *POOLS))
        raise UnsupportedError(f"{name} has no vision tower that is fused here; known: {known}")
    if any(hasattr(part, _MARK) for part in model.modules()):
        raise ConflictError(f"the vision tower of this {name} is fused already; remove() first")
    if is_accelerated(model):
        raise ConflictError(f"this {name} is accelerated already; fuse_vision comes first")
    if any(weight.is_meta for weight in model.parameters()):
        raise UnsupportedError(f"this {name} has no weights yet (meta device)")
    fusion = VisionFusion(model)
    try:
        if name in TOWERS:
            _fuse_tower(model.model.visual, fusion)
        else:
            _fuse_pooling(model.model, fusion)
        if not fusion.steps:
            raise UnsupportedError(
                f"nothing in the vision tower of this {name} could be fused: its modules are not "
                "those of transformers, or something else stands around them"
            )
    except BaseException:
        fusion.remove()
        raise
    return fusion


@dataclass(frozen=True)
class Step:
    """One thing that is computed another way.

    Args:
        words: What it is.
        active: Whether it is in effect where the model lies now.
    """

    words: str
    active: Callable[[], bool]


class VisionFusion:
    """What `fuse_vision` did to a model; a context manager that takes it back at the end."""

    def __init__(self, model: Any) -> None:
        self.steps: list[Step] = []
        self._model = model
        self._changes = Handle(model, ())
        self._methods: list[tuple[nn.Module, str, MethodType]] = []
        self._fused = True

    @property
    def done(self) -> tuple[str, ...]:
        """What is computed another way where the model lies now, in words."""
        return tuple(step.words for step in self.steps if step.active()) if self._fused else ()

    def __str__(self) -> str:
        return ", ".join(self.done) or "nothing fused"

    def override(self, modules: Sequence[nn.Module], name: str, by: Callable[..., Any]) -> bool:
        """Put a function in place of a method of all these modules, or of none of them.

        Returns:
            Whether it was done: not where there is no module, or one has a method of its own,
            such as one that moves its weights.
        """
        if not modules or any(name in vars(module) for module in modules):
            return False
        for module in modules:
            # Bound to the module, so that a copy of it computes with its own weights.
            method = MethodType(by, module)
            setattr(module, name, method)
            self._methods.append((module, name, method))
            self.on_remove(lambda module=module: delattr(module, name))
        return True

    def add(self, words: str, active: Callable[[], bool] = lambda: True) -> None:
        """Tell of one thing that is computed another way."""
        self.steps.append(Step(words, active))

    def on_remove(self, undo: Callable[[], object]) -> None:
        """Register how to take one change back; undone last in, first out."""
        self._changes.on_remove(undo)

    def remove(self) -> None:
        """Give the model back exactly as it was. Calling it twice is harmless.

        Raises:
            ConflictError: The model is accelerated, or something else was put around what is
                fused; nothing was changed.
        """
        if not self._fused:
            return
        kind = type(self._model).__name__
        if is_accelerated(self._model):
            raise ConflictError(f"recipes are on this {kind}; remove() them before its fusion")
        for module, name, method in self._methods:
            if vars(module).get(name) is not method:
                raise ConflictError(
                    f"{name} of a {type(module).__name__} in this {kind} was replaced after its "
                    "fusion, by hooks for offloading for instance; take that back first"
                )
        self._fused = False
        self._changes.remove()

    def __deepcopy__(self, memo: Any) -> "VisionFusion":
        raise UnsupportedError("a model with a fused vision tower cannot be copied; remove() first")

    def __reduce__(self) -> Any:
        raise UnsupportedError("a model with a fused vision tower cannot be saved; remove() first")

    def __enter__(self) -> "VisionFusion":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.remove()
        except ConflictError as conflict:
            if error is None:
                raise
            # What went wrong inside matters more.
            error.add_note(f"the vision tower stays fused: {conflict}")


# Qwen's towers


def _fuse_tower(tower: Any, fusion: VisionFusion) -> None:
    if is_held(tower.config):
        raise ConflictError(
            "this vision tower shares its config with one of a model that is accelerated; build "
            "each from a copy of the config, or remove() first"
        )
    _mark(tower, fusion)
    _fuse_attention(tower, fusion)
    _fuse_patches(tower, fusion)
    _fuse_mlps(tower, fusion)
    _fuse_norms(tower, fusion)


def _mark(part: nn.Module, fusion: VisionFusion) -> None:
    setattr(part, _MARK, fusion)
    fusion.on_remove(lambda: delattr(part, _MARK))


def _fuse_attention(tower: Any, fusion: VisionFusion) -> None:
    modules = list(_parts(tower, "attn"))
    if not all(map(_rotates, modules)) or not fusion.override(modules, "forward", ops.attention):
        return
    qkv = modules[0].qkv
    fusion.add("rotary embedding", lambda: unavailable(qkv.weight.device) is None)
    if tower.config._attn_implementation == "sdpa":
        _pack(tower, fusion)
        fusion.add("frames packed", lambda: ops.PACKED in tower.config._attn_implementation)


def _rotates(module: Any) -> bool:
    """Whether an attention module is of the kind that `ops.attention` stands in for."""
    taken = inspect.signature(type(module).forward).parameters
    known = ("qkv", "proj", "num_heads", "scaling", "attention_dropout", "config")
    return {"cu_seqlens", "position_embeddings"} <= set(taken) and all(
        hasattr(module, name) for name in known
    )


def _pack(tower: Any, fusion: VisionFusion) -> None:
    """Let the tower name the packed attention in a config of its own: others may share its."""
    from transformers import AttentionInterface

    AttentionInterface.register(ops.PACKED, ops.packed_attention)
    hook = tower.register_forward_pre_hook(ops.begin)
    fusion.on_remove(hook.remove)
    shared = tower.config
    own = copy.copy(shared)
    # The setter of a model would look for a package of kernels behind a name with "flash" in it.
    own._attn_implementation = ops.PACKED
    fusion.on_remove(lambda: _keep_choice(own, shared))
    for module in tower.modules():
        if vars(module).get("config") is shared:
            module.config = own
            fusion.on_remove(lambda module=module: setattr(module, "config", shared))


def _keep_choice(own: Any, shared: Any) -> None:
    """Attention that somebody chose for the tower meanwhile stays chosen."""
    if own._attn_implementation != ops.PACKED:
        shared._attn_implementation = own._attn_implementation


def _fuse_patches(tower: Any, fusion: VisionFusion) -> None:
    embed = getattr(tower, "patch_embed", None)
    fits = ops.cuts_patches(getattr(embed, "proj", None))
    if embed is not None and fits and fusion.override([embed], "forward", ops.embed_patches):
        fusion.add("patch embedding")


def _fuse_mlps(tower: Any, fusion: VisionFusion) -> None:
    modules = list(_parts(tower, "mlp"))
    layers = [ops.layers_of(module) for module in modules]
    if not layers or not all(layers):
        return
    last = layers[0][-1]
    width, extra = last.in_features, -last.in_features % ops.ALIGNMENT
    # Rows of half precision count, to which the model may yet be cast.
    if width % 8 == 0 or not fusion.override(modules, "forward", ops.padded_mlp):
        return
    weights = len(layers[0]) * last.out_features * (width + extra)
    size = weights * last.weight.element_size() / 1e6
    fusion.add(
        f"MLP padded {width} -> {width + extra} ({size:.1f} MB of copies at a time)",
        lambda: last.weight.is_cuda and ops.uneven(last),
    )


def _fuse_norms(tower: Any, fusion: VisionFusion) -> None:
    modules = [
        module
        for module in tower.modules()
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    ]
    if fusion.override(modules, "forward", ops.rms_norm):
        fusion.add("RMSNorm", lambda: modules[0].weight.is_cuda)


def _parts(tower: Any, name: str) -> Iterator[Any]:
    blocks = getattr(tower, "blocks", ())
    return (getattr(block, name) for block in blocks if hasattr(block, name))


# Pooling


def _fuse_pooling(base: Any, fusion: VisionFusion) -> None:
    if not callable(getattr(type(base), "apply_pooling", None)):
        return
    _mark(base, fusion)
    fusion.on_remove(lambda: vars(base).pop(ops.POOLING, None))
    if fusion.override([base], "apply_pooling", ops.pool):
        fusion.add("pooling as a matrix product")
