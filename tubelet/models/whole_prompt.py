"""What a caller gives `generate` for a whole prompt, while the host runs a shorter one."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tubelet.models.prompt import Prompt


def asked(model: Any, given: Mapping[str, Any], inputs: Mapping[str, Any], name: str) -> Any:
    """An option of a generation, wherever it is set: call, its config, the model's config.

    Args:
        given: Named arguments of `generate`.
        inputs: Its further arguments.
    """
    value = inputs.get(name)
    for source in (given.get("generation_config"), model.generation_config):
        value = getattr(source, name, None) if value is None else value
    return value


def inferred_mask(
    model: Any, given: Mapping[str, Any], inputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The mask that the host's `generate` makes where none is given; see `asked`.

    Ids of padding are padding, unless they also end answers.
    """
    ids, pad = inputs.get("input_ids"), asked(model, given, inputs, "pad_token_id")
    if ids is None or pad is None or inputs.get("attention_mask") is not None:
        return {}
    ends = asked(model, given, inputs, "eos_token_id")
    inferred = pad not in (ends if isinstance(ends, list | tuple) else [ends])
    return {"attention_mask": ids.ne(pad).long()} if inferred else {}


class WholePrompt:
    """The prompts of a run as the user gave them.

    Args:
        ids: [B, S] of the whole prompts.
        prompt: The shorter ones.
    """

    def __init__(self, ids: Tensor, prompt: Prompt) -> None:
        self.ids, self.prompt = ids, prompt

    def in_front(self, tokens: Tensor) -> Tensor:
        """Tokens [B * copies, short + n] of the host with the whole prompt in front."""
        front = self.ids.repeat_interleave(len(tokens) // len(self.ids), 0).to(tokens.device)
        return torch.cat([front, tokens[:, self.prompt.length :]], dim=1)

    def lengths(
        self, model: Any, given: Mapping[str, Any], inputs: Mapping[str, Any]
    ) -> dict[str, int]:
        """Lengths in total as the host has to count them; see `asked`."""
        unset, found = type(model.generation_config)(), {}
        for name in ("max_length", "min_length"):
            value = asked(model, given, inputs, name)
            if value and value != getattr(unset, name):
                found[name] = max(value - self.dropped, 0)
        return found

    @property
    def dropped(self) -> int:
        """Tokens that the host does not see, padding included."""
        return self.prompt.width - self.prompt.length

    def shown(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` whose functions look at the whole prompt."""
        wrapped = {
            "logits_processor": lambda many: self._each(many, _Processor),
            "stopping_criteria": lambda many: self._each(many, _Criterion),
            "prefix_allowed_tokens_fn": self._allowed,
            "streamer": lambda streamer: _Streamer(streamer, self),
        }
        return given | {
            name: wrap(given[name]) for name, wrap in wrapped.items() if given.get(name) is not None
        }

    def _each(self, many: Sequence[Any], kind: "type[_Looks]") -> Any:
        """A list of the same type, as it may be one that is called as a whole."""
        result = copy.copy(many)
        result[:] = [self._at_length(one) or kind(one, self) for one in many]  # type: ignore[index]
        return result

    def _at_length(self, one: Any) -> Any:
        """A limit to the length in total, which the host has to know as one; None for others."""
        from transformers import MaxLengthCriteria

        if not isinstance(one, MaxLengthCriteria):
            return None
        limit = copy.copy(one)
        limit.max_length -= self.dropped
        return limit

    def _allowed(self, allowed: Callable[[int, Tensor], Any]) -> Callable[[int, Tensor], Any]:
        def shown(number: int, tokens: Tensor) -> Any:
            # The number counts prompts or their samples, so the prompt is found by its tokens.
            same = (self.prompt.ids == tokens[: self.prompt.length].to(self.ids.device)).all(1)
            front = self.ids[int(same.int().argmax())].to(tokens.device)
            return allowed(number, torch.cat([front, tokens[self.prompt.length :]]))

        return shown


class _Looks:
    """Stands for something of the user's; what is not overridden is answered by that."""

    def __init__(self, inner: Any, whole: WholePrompt) -> None:
        self._inner, self._whole = inner, whole

    def __getattr__(self, name: str) -> Any:
        if name in ("_inner", "_whole"):
            raise AttributeError(name)
        return getattr(self._inner, name)


class _Processor(_Looks):
    """transformers passes further arguments to processors by their signature, which has none."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._inner(self._whole.in_front(input_ids), scores)


class _Criterion(_Looks):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._inner(self._whole.in_front(input_ids), scores, **kwargs)


class _Streamer(_Looks):
    """The first tokens that a streamer gets are the prompt."""

    _started = False

    def put(self, value: Tensor) -> None:
        whole, self._started = not self._started, True
        self._inner.put(self._whole.ids.to(value.device) if whole else value)
