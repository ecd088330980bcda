"""Attention of one prompt in one layer of a language model, computed where it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptStatistics:
    """See `tubelet.core.prompt.LayerStatistics`.

    Args:
        q: [H, n, D] queries of the prompt's tokens, padding included.
        k: [Hkv, n, D] their keys.
        scale: Factor on the logits.
        real: [n] bool, False at padding.
        video: [N] int64, places of the video tokens among the n.
        behind: [Q] int64, places of the text behind the last video.
    """

    q: Tensor
    k: Tensor
    scale: float
    real: Tensor
    video: Tensor
    behind: Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.real.sum())

    def rows(self, queries: Sequence[int], softmax: bool = True) -> Tensor:
        """[H, len(queries), N] float32 attention to the video tokens."""
        places = self.real.nonzero()[:, 0][list(queries)]
        heads, groups = self.q.shape[0], self.q.shape[0] // self.k.shape[0]
        rows = self.q[:, places].float().unflatten(0, (heads // groups, groups))
        logits = rows @ self.k.float()[:, None].transpose(-1, -2) * self.scale
        logits = logits.flatten(0, 1)
        if not softmax:
            return logits[..., self.video]
        numbers = torch.arange(self.q.shape[1], device=places.device)
        hidden = ~self.real | (numbers > places[:, None])
        return logits.masked_fill(hidden, -torch.inf).softmax(-1)[..., self.video]

    def question(self) -> list[int]:
        """Places of the text behind the last video among the real tokens."""
        return self._among_real(self.behind)

    def video_places(self) -> list[int]:
        """Places of the video tokens among the real tokens."""
        return self._among_real(self.video)

    def queries(self) -> Tensor:
        """[H, M, D] of the real tokens."""
        return self.q[:, self.real]

    def keys(self) -> Tensor:
        """[H, M, D] of the real tokens, one per query head."""
        groups = self.q.shape[0] // self.k.shape[0]
        return self.k[:, self.real].repeat_interleave(groups, dim=0)

    def video_queries(self) -> Tensor:
        """[H, N, D]."""
        return self.q[:, self.video]

    def video_keys(self) -> Tensor:
        """[H, N, D], one per query head."""
        groups = self.q.shape[0] // self.k.shape[0]
        return self.k[:, self.video].repeat_interleave(groups, dim=0)

    def _among_real(self, places: Tensor) -> list[int]:
        return (self.real.cumsum(0)[places] - 1).tolist()
