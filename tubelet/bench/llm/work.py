"""Operations of a prompt's first token, and the speed-up that they bound.

Matrix products, convolutions and attention are counted, two operations per multiply-accumulate;
a causal token attends to half of the prompt. Video decoding, norms, softmax, and what a recipe
does to decide are left out, so the quotient of two counts is a bound: it is met if every
operation takes the same time and deciding takes none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tubelet.core.grid import TokenGrid
from tubelet.models.llm_inputs import geometry_of


@dataclass(frozen=True)
class Work:
    """Operations up to the first token.

    Args:
        vision: Vision tower and projector, whatever is kept.
        linear: Matrix products of the language model's layers.
        attention: Its attention calls.
        head: Its output layer, on the last token.
    """

    vision: float
    linear: float
    attention: float
    head: float

    @property
    def llm(self) -> float:
        """Of the language model."""
        return self.linear + self.attention + self.head

    @property
    def total(self) -> float:
        """Of both."""
        return self.vision + self.llm

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        names = ("vision", "linear", "attention", "head", "llm", "total")
        return {name: getattr(self, name) for name in names}


def count_work(
    config: Any,
    grid: TokenGrid,
    tokens: Sequence[float],
    densities: Mapping[int, float] | None = None,
) -> Work:
    """Operations for one prompt.

    Args:
        config: Of the model.
        grid: Video tokens that the vision tower makes.
        tokens: Tokens of the prompt, text included, entering each layer of the language model.
        densities: Share of causal attention that a layer computes; 1 where it is not named.

    Raises:
        UnsupportedError: The family is none of `tubelet.models.llm_inputs`.
    """
    geometry_of(config)
    text = config.get_text_config()
    width, heads = text.hidden_size, text.num_attention_heads
    each = getattr(text, "head_dim", None) or width // heads
    keys = text.num_key_value_heads * each
    weights = width * (2 * heads * each + 2 * keys + 3 * text.intermediate_size)
    return Work(
        vision=_VISION[config.model_type](config, grid),
        linear=sum(2 * weights * n for n in tokens),
        attention=sum(
            2 * n * n * heads * each * (densities or {}).get(layer, 1)
            for layer, n in enumerate(tokens)
        ),
        head=2 * width * text.vocab_size,
    )


def bound(dense: Work, reduced: Work) -> float:
    """Largest speed-up of vision tower and prefill."""
    return dense.total / reduced.total


def _merged(vision: Any, patches: int, gates: int) -> float:
    """A Qwen tower without attention: patch embedding, `gates` + 1 products per MLP, its merger."""
    width, unit = vision.hidden_size, vision.spatial_merge_size**2
    embed = 3 * vision.temporal_patch_size * vision.patch_size**2 * width
    layer = 4 * width**2 + (gates + 1) * width * vision.intermediate_size
    merger = (unit * width) ** 2 + unit * width * vision.out_hidden_size
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    return 2 * (patches * (embed + vision.depth * layer) + patches // unit * mergers * merger)


def _qwen3(config: Any, grid: TokenGrid) -> float:
    vision = config.vision_config
    frame = grid.per_frame * vision.spatial_merge_size**2
    attention = 4 * frame**2 * vision.hidden_size * vision.depth
    return _merged(vision, frame * grid.frames, gates=1) + grid.frames * attention


def _qwen25(config: Any, grid: TokenGrid) -> float:
    vision = config.vision_config
    unit = vision.spatial_merge_size**2
    frame = grid.per_frame * unit
    window = vision.window_size // vision.patch_size // vision.spatial_merge_size
    rows, columns = (
        [min(window, n - start) for start in range(0, n, window)] for n in (grid.height, grid.width)
    )
    windows = sum((unit * h * w) ** 2 for h in rows for w in columns)
    whole = len(vision.fullatt_block_indexes)
    pairs = whole * frame**2 + (vision.depth - whole) * windows
    attention = 4 * pairs * vision.hidden_size
    return _merged(vision, frame * grid.frames, gates=2) + grid.frames * attention


def _llava(config: Any, grid: TokenGrid) -> float:
    vision, width = config.vision_config, config.get_text_config().hidden_size
    own = vision.hidden_size
    frame = (vision.image_size // vision.patch_size) ** 2
    layer = 4 * own**2 + 2 * own * vision.intermediate_size
    embed = 3 * vision.patch_size**2 * own
    # Patches are projected before they are pooled.
    projector = own * width + width**2
    linear = 2 * frame * (embed + vision.num_hidden_layers * layer + projector)
    return grid.frames * (linear + 4 * frame**2 * own * vision.num_hidden_layers)


_VISION = {"qwen2_5_vl": _qwen25, "qwen3_vl": _qwen3, "llava_onevision": _llava}
