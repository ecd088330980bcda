"""Generation by hand: no cache, explicit masks, tokens removed from plain tensors.

Nothing of tubelet's runtimes is used. The dense host gives embeddings and positions of the whole
prompt; from there on everything is done with its bare layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Whole:
    """One dense prompt as the language model of the host gets it.

    Args:
        embeds: [1, S, C].
        positions: [1, S], or [3, 1, S] for three axes.
        video: [S] bool, video tokens that recipes may drop.
        planes: [V, C] each, what is added to visual tokens behind the first layers.
        visual: [S] bool, where the planes are added.
    """

    embeds: Tensor
    positions: Tensor
    video: Tensor
    planes: tuple[Tensor, ...] = ()
    visual: Tensor | None = None


def text_model(model: Any) -> Any:
    base = model.model
    return base.text_model if hasattr(base, "text_model") else base.language_model


@torch.no_grad()
def whole(model: Any, name: str, inputs: dict[str, Tensor], placeholder: int) -> Whole:
    """What the dense host gives its language model for a single prompt without padding."""
    seen: dict[str, Any] = {}
    hook = text_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    ids = inputs["input_ids"][0]
    video = ids == placeholder
    if name == "llava_onevision":
        # The last placeholder of a video is a line break; videos are runs of placeholders.
        after = torch.cat([ids[1:], ids.new_zeros(1)])
        video = video & (after == placeholder)
    if name == "video_llava":
        video[video.nonzero()[::17, 0]] = False
    positions = seen.get("position_ids")
    if positions is None:
        positions = torch.arange(len(ids))[None]
    positions = positions[-3:] if positions.ndim == 3 else positions
    planes = tuple(seen.get("deepstack_visual_embeds") or ())
    return Whole(seen["inputs_embeds"], positions, video, planes, ids == placeholder)


def without(prompt: Whole, kept: Tensor, compact: bool = False) -> Whole:
    """The prompt with only some of its video tokens; `kept` counts among these."""
    stays = ~prompt.video
    stays[prompt.video.nonzero()[kept, 0]] = True
    columns = stays.nonzero()[:, 0]
    assert prompt.visual is not None
    positions = prompt.positions[..., columns]
    if compact:
        positions = torch.arange(len(columns)).expand_as(positions)
    return replace(
        prompt,
        embeds=prompt.embeds[:, columns],
        positions=positions,
        video=prompt.video[columns],
        planes=tuple(plane[stays[prompt.visual]] for plane in prompt.planes),
        visual=prompt.visual[columns],
    )


@torch.no_grad()
def generate(
    model: Any,
    prompt: Whole,
    steps: int,
    cuts: Sequence[tuple[int, Tensor]] = (),
    forced: Sequence[int] | None = None,
) -> tuple[list[int], Tensor]:
    """Greedy tokens and logits [steps, V], everything computed again for each token.

    Args:
        cuts: (layer, columns of the prompt that its layers from there on see), ascending; each
            counts among the prompt's columns of the model's input.
        forced: Tokens to take instead of the most likely ones.
    """
    text, length = text_model(model), prompt.embeds.shape[1]
    embeds, positions = prompt.embeds, prompt.positions
    tokens, logits = [], []
    for step in range(steps):
        out = _forward(text, embeds, positions, prompt, dict(cuts), length)
        logits.append(model.lm_head(out[:, -1])[0])
        token = int(logits[-1].argmax()) if forced is None else forced[step]
        tokens.append(token)
        added = model.get_input_embeddings()(torch.tensor([[token]]))
        embeds = torch.cat([embeds, added], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
    return tokens, torch.stack(logits)


def _forward(
    text: Any,
    embeds: Tensor,
    positions: Tensor,
    prompt: Whole,
    cuts: dict[int, Tensor],
    length: int,
) -> Tensor:
    num = embeds.shape[1]
    columns, hidden = torch.arange(num), embeds
    tables = text.rotary_emb(embeds, positions)
    for index, layer in enumerate(text.layers):
        if index in cuts:
            stays = torch.cat([cuts[index], torch.arange(length, num)])
            hidden = hidden[:, torch.isin(columns, stays)]
            columns = columns[torch.isin(columns, stays)]
        mask = torch.full((len(columns), len(columns)), torch.finfo(hidden.dtype).min).triu(1)
        hidden = layer(
            hidden,
            attention_mask=mask[None, None],
            position_embeddings=tuple(table[:, columns] for table in tables),
        )
        if index < len(prompt.planes):
            assert prompt.visual is not None
            assert not cuts.keys() & set(range(index + 1))
            spots = prompt.visual.nonzero()[:, 0]
            hidden = hidden.clone()
            hidden[0, spots] += prompt.planes[index]
    return text.norm(hidden)
