"""tubelet's own small video language model: a real LLaVA-OneVision around a `VideoViT`.

The host is transformers' own `LlavaOnevisionForConditionalGeneration` with a small Qwen2, so every
recipe for prompts serves it. Only its vision tower is ours: a trained `VideoViT`, which stays as
it is and has a weights file of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from tubelet.core.errors import ModelError, UnsupportedError
from tubelet.nn.video_tower import VideoTower, tower_config
from tubelet.nn.vit import VideoViTConfig
from tubelet.nn.weights import load_weights, read_card

PAD, START, END, VIDEO, UNKNOWN = "<pad>", "<start>", "<end>", "<video>", "<unknown>"
SPECIAL = (PAD, START, END, VIDEO, UNKNOWN)
"""Special words; their numbers are their places here."""


@dataclass(frozen=True, kw_only=True)
class VideoLLMConfig:
    """Everything that decides the shape of a `VideoLLM`.

    Args:
        words: Vocabulary of questions and answers, without `SPECIAL`.
        encoder: Weights of the vision tower, a shipped name or a path, see `load_weights`.
        encoder_sha256: Their checksum; None takes whatever is found and remembers it.
        taps: Layers of the encoder that the projector sees, side by side; 0 is in front of the
            first. Early ones still show colours, late ones know what moves where.
        task: The encoder's task prompt.
        pooled: Halve the rows and columns of tokens.
        width, depth, heads, mlp_width: Of the language model.

    Raises:
        ModelError: A value is out of range, or the words are not distinct.
    """

    words: tuple[str, ...]
    encoder: str = "tubelet-vit"
    encoder_sha256: str | None = None
    taps: tuple[int, ...] = (2, 6, 12)
    task: str = "mask"
    pooled: bool = False
    width: int = 256
    depth: int = 6
    heads: int = 4
    mlp_width: int = 768

    def __post_init__(self) -> None:
        for name in ("words", "taps"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = (self.width, self.depth, self.heads, self.mlp_width)
        if any(not isinstance(n, int) or n < 1 for n in sizes) or self.width % (2 * self.heads):
            raise ModelError(
                "a VideoLLM needs whole sizes of at least 1 and a width of even channels per "
                f"head, got width, depth, heads, mlp_width {sizes}"
            )
        if not self.taps or any(not isinstance(n, int) or n < 0 for n in self.taps):
            raise ModelError(f"a VideoLLM taps at least one layer from 0 on, got {self.taps}")
        if len({*self.words, *SPECIAL}) < len(self.words) + len(SPECIAL) or not self.words:
            raise ModelError("the words of a VideoLLM must differ from each other and be some")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "VideoLLMConfig":
        """Inverse of `to_dict`; unknown names raise ModelError."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ModelError(f"not a VideoLLM configuration: {error}") from None


class VideoLLM(nn.Module):
    """The host, its tokenizer and its frozen encoder.

    Attributes:
        host: A `LlavaOnevisionForConditionalGeneration`; `tubelet.accelerate` takes it.
        tokenizer: A `PreTrainedTokenizerFast` over the model's words.

    Raises:
        ModelError: The encoder is missing, not the one that the model was trained with, or does
            not fit the configuration.
    """

    def __init__(self, config: VideoLLMConfig) -> None:
        super().__init__()
        card = read_card(config.encoder)
        if config.encoder_sha256 not in (None, card.sha256):
            raise ModelError(
                f"this video language model was trained with another {config.encoder}: its "
                f"checksum begins with {config.encoder_sha256[:12]}, here {card.sha256[:12]}"
            )
        self.config = replace(config, encoder_sha256=card.sha256)
        encoder = load_weights(config.encoder, expect="VideoViT")
        self.host = LlavaOnevisionForConditionalGeneration(_host_config(config, encoder.config))
        self.host.generation_config.update(eos_token_id=2, pad_token_id=0, do_sample=False)
        weights = encoder.state_dict()
        self.tower.video.load_state_dict({n: weights[n] for n in self.tower.video.state_dict()})
        self.tower.video.requires_grad_(False)
        self.tokenizer = build_tokenizer(config.words)

    @property
    def tower(self) -> VideoTower:
        """The vision tower."""
        return self.host.model.vision_tower

    @property
    def clip_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the clips it takes."""
        shape = self.tower.video.config
        return shape.frames, *shape.size

    @property
    def num_video(self) -> int:
        """Video tokens of a clip, without the line break behind them."""
        shape = self.tower.video.config
        num = math.prod(shape.grid(shape.frames, *shape.size))
        return num // 4 if self.config.pooled else num

    def video_tokens(self, clips: Float[Tensor, "b t 3 h w"]) -> Float[Tensor, "b n c"]:
        """Projected tokens of normalised clips, without the line break.

        The same as the host's `get_video_features`, without projecting each token four times.
        """
        tokens = self.tower.tokens(clips)
        projected = self.host.model.multi_modal_projector(tokens.to(self.host.dtype))
        if not self.config.pooled:
            return projected
        maps = projected.unflatten(1, (self.tower.config.num_frames, -1)).flatten(0, 1)
        return self.host.model.apply_pooling(maps).unflatten(0, (len(clips), -1)).flatten(1, 2)

    def prompts(self, questions: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of one clip's video and each question, left-padded.

        Raises:
            UnsupportedError: A question has words that the model does not know, or none.
        """
        rows = [self._words(question) for question in questions]
        longest = max(map(len, rows))
        front = [SPECIAL.index(START), *[SPECIAL.index(VIDEO)] * (self.num_video + 1)]
        ids = [[0] * (longest - len(row)) + front + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * (len(front) + len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def _words(self, question: str) -> list[int]:
        ids = self.tokenizer(question, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UnsupportedError("the question is empty; ask something")
        unknown = SPECIAL.index(UNKNOWN)
        if min(ids) < len(SPECIAL):
            spans = self.tokenizer(question, return_offsets_mapping=True, add_special_tokens=False)
            places = zip(spans["offset_mapping"], ids, strict=True)
            strange = [question[a:b] for (a, b), number in places if number <= unknown]
            raise UnsupportedError(
                f"the model does not know {', '.join(map(repr, strange))}. It knows: "
                f"{' '.join(self.config.words)}"
            )
        mark = self.tokenizer.convert_tokens_to_ids("?")
        return ids if ids[-1] == mark or mark == unknown else [*ids, mark]

    # The frozen encoder has a file of its own, so neither weights nor checkpoints repeat it.

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The weights, without those of the frozen encoder."""
        whole = super().state_dict(*args, **kwargs)
        return {name: w for name, w in whole.items() if not _is_elsewhere(name)}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """Takes what `state_dict` gives."""
        here = super().state_dict()
        kept = {name: w for name, w in here.items() if _is_elsewhere(name)}
        return super().load_state_dict({**state, **kept}, *args, **kwargs)


def _is_elsewhere(name: str) -> bool:
    return name.startswith("host.model.vision_tower.video.")


def build_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; case does not matter, and `?` and `,` are words."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    numbers = {word: number for number, word in enumerate((*SPECIAL, *words))}
    inner = Tokenizer(models.WordLevel(numbers, unk_token=UNKNOWN))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?,.!]"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[VIDEO],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _host_config(config: VideoLLMConfig, encoder: VideoViTConfig) -> LlavaOnevisionConfig:
    text = {
        "model_type": "qwen2",
        "vocab_size": len(SPECIAL) + len(config.words),
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        # The usual 0.02 is meant for much wider models; here nothing would reach the answer.
        "initializer_range": 0.7 * config.width**-0.5,
        "pad_token_id": SPECIAL.index(PAD),
        "bos_token_id": SPECIAL.index(START),
        "eos_token_id": SPECIAL.index(END),
    }
    # Images have no token of their own: the number behind the vocabulary never occurs.
    return LlavaOnevisionConfig(
        text_config=text,
        vision_config=tower_config(encoder, config.taps, config.task, config.pooled),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=len(SPECIAL) + len(config.words),
        video_token_index=SPECIAL.index(VIDEO),
    )
