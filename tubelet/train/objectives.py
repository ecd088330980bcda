"""What is trained: an encoder on procedural clips, its reducers elastically, a video generator.

Each objective serves `tubelet.train.loop.train`: a batch from an integer seed, a loss, and an
evaluation on seeds that training never sees.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.core.recipe import Recipe
from tubelet.models.accelerate import accelerate
from tubelet.nn.dit import VideoDiT
from tubelet.nn.flow import SHIFT, generate, training_loss
from tubelet.nn.vit import VideoViT
from tubelet.nn.weights import PIXEL_MEAN, PIXEL_STD
from tubelet.recipes.learned import LEARNED_KEEPS, LEARNED_LAYERS
from tubelet.train.clips import TEST_SEED, ClipBatch, make_clips
from tubelet.train.clips.scenes import GLYPH_FRAMES
from tubelet.train.detector import detect
from tubelet.train.world import ATTRIBUTES, make_world

EXPOSURE = (GLYPH_FRAMES, 16)
"""Frames that the needle's glyph is shown in training; with two frames only, learning to find it
takes several times as long to begin."""

TOLD_WHERE = ("needle",)
"""Tasks whose object is so rare that its tokens are asked for the answer as well: the class token
alone gets no useful gradient from a glyph on 4 of 1,024 tokens."""

EVALUATION_BACKGROUNDS = ("static", "noise", "pan")

Corruption = Callable[[Tensor, int], Tensor]
"""(pixels [B, T, 3, H, W], seed) to pixels of the same shape; for control models."""


def normalised(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as tubelet's encoders take them."""
    return (pixels - PIXEL_MEAN) / PIXEL_STD


class EncoderObjective:
    """Several tasks at once on mixed backgrounds; every step sees every task.

    Args:
        model: The encoder, on its device.
        tasks: Tasks trained on; each has a head of that name.
        batch: Clips per task and step.
        size: Side of the clips in pixels.
        background: As in `make_clips`.
        corrupt: Applied to training and test clips alike; for control models.
        test_clips: Clips per task and background in `evaluate`.
    """

    def __init__(
        self,
        model: VideoViT,
        *,
        tasks: Sequence[str],
        batch: int,
        size: int = 64,
        background: str = "mixed",
        corrupt: Corruption | None = None,
        test_clips: int = 1024,
    ) -> None:
        self.model, self.tasks, self.batch_size, self.size = model, tuple(tasks), batch, size
        self.background, self.corrupt, self.test_clips = background, corrupt, test_clips
        self.device = next(model.parameters()).device
        self.features: Callable[..., tuple[Tensor, Tensor]] = model.features
        self.identity = {
            "tasks": list(self.tasks),
            "size": size,
            "background": background,
            "corrupt": None if corrupt is None else getattr(corrupt, "__name__", str(corrupt)),
        }

    def compile(self) -> None:
        """Fuse the encoder; its two clip lengths become two graphs."""
        self.features = torch.compile(self.model.features, dynamic=False)

    def batch(self, seed: int) -> list[ClipBatch]:
        """Clips of every task; the glyph of the needle is often shown for longer than in tests."""
        return [self._clips(task, seed, self.background, EXPOSURE) for task in self.tasks]

    def _clips(self, task: str, seed: int, background: str, exposure: tuple[int, int]) -> ClipBatch:
        return make_clips(
            task,
            self.batch_size,
            seed,
            background=background,
            device=self.device,
            size=self.size,
            exposure=exposure,
        )

    def _pixels(self, clips: ClipBatch, seed: int) -> Tensor:
        pixels = clips.pixels if self.corrupt is None else self.corrupt(clips.pixels, seed)
        return normalised(pixels)

    def loss(
        self, batch: list[ClipBatch], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over tasks of the cross-entropy in units of a blind guess."""
        losses, metrics = self._task_losses(batch, step)
        return torch.stack(losses).mean(), metrics

    def _task_losses(
        self, batch: list[ClipBatch], step: int
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        for group in _by_length(batch):
            pixels = torch.cat([self._pixels(clips, step) for clips in group])
            names = self.model.config.task_names
            numbers = [torch.full_like(clips.labels, names.index(clips.task)) for clips in group]
            hidden, pooled = self.features(pixels, torch.cat(numbers))
            rows = zip(hidden.split(self.batch_size), pooled.split(self.batch_size), strict=True)
            for clips, (tokens, summary) in zip(group, rows, strict=True):
                loss, score = self._answer(clips, tokens, summary)
                losses.append(loss)
                metrics[clips.task] = score
        return losses, metrics

    def _answer(self, clips: ClipBatch, tokens: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy (dense tasks: intersection over union) of one task."""
        config = self.model.config
        if clips.task in config.dense_tasks:
            head = self.model.dense_heads[clips.task]
            logits = head(tokens[:, config.class_tokens :])[..., 0].float()
            wanted = clips.dense_labels(config.tubelet)
            loss = F.binary_cross_entropy_with_logits(logits, wanted.float()) / math.log(2)
            return loss, iou(logits.detach() > 0, wanted)
        logits = self.model.heads[clips.task](pooled).float()
        loss = F.cross_entropy(logits, clips.labels) / math.log(logits.shape[1])
        if clips.task in TOLD_WHERE:
            loss = loss + self._token_loss(clips, tokens)
        return loss, (logits.detach().argmax(1) == clips.labels).float().mean()

    def _token_loss(self, clips: ClipBatch, tokens: Tensor) -> Tensor:
        """The task's own head on every token that shows the object: where to look."""
        config = self.model.config
        logits = self.model.heads[clips.task](tokens[:, config.class_tokens :]).float()
        shown = clips.token_mask("relevant", config.tubelet).float()
        labels = clips.labels[:, None].expand(shown.shape)
        each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return (each * shown).sum() / shown.sum().clamp(min=1) / math.log(logits.shape[2])

    def evaluate(self) -> dict[str, float]:
        """Score per task and background on test seeds, as "task/background"."""
        scores: dict[str, float] = {}
        for task in self.tasks:
            for background in EVALUATION_BACKGROUNDS:
                parts = [
                    self._score(task, background, TEST_SEED + chunk)
                    for chunk in range(math.ceil(self.test_clips / self.batch_size))
                ]
                scores[f"{task}/{background}"] = float(torch.stack(parts).mean())
        return scores

    @torch.inference_mode()
    def _score(self, task: str, background: str, seed: int) -> Tensor:
        clips = self._clips(task, seed, background, (GLYPH_FRAMES, GLYPH_FRAMES))
        number = self.model.config.task_names.index(task)
        hidden, pooled = self.model.features(
            self._pixels(clips, seed), torch.full_like(clips.labels, number)
        )
        return self._answer(clips, hidden, pooled)[1]


class ElasticObjective(EncoderObjective):
    """An encoder with token recipes on it, another recipe and budget in every step.

    The loss is the tasks' own plus the divergence from the dense model that training started
    with (knowledge distillation, Hinton et al., 2015, arXiv:1503.02531).

    Args:
        model: A trained encoder with `reducers`.
        recipes: Called with a layer and a keep ratio; one of them is drawn per step.
        layers: The layer that reduces is drawn from these.
        keep_ratios: Range that the keep ratio is drawn from, log-uniformly.
        dense_share: Share of the steps without any recipe, so that the dense model stays good.
        distil: Weight of the divergence.
        teacher: The dense model to stay close to; None is `model` as it is now.
        options: As for `EncoderObjective`.
    """

    def __init__(
        self,
        model: VideoViT,
        *,
        recipes: Sequence[Callable[[int, float], Recipe]],
        layers: Sequence[int] = LEARNED_LAYERS,
        keep_ratios: tuple[float, float] = LEARNED_KEEPS,
        dense_share: float = 0.1,
        distil: float = 1.0,
        teacher: VideoViT | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self.recipes, self.layers = tuple(recipes), tuple(layers)
        self.keep_ratios = keep_ratios
        self.dense_share, self.distil = dense_share, distil
        self.identity |= {
            "recipes": [str(recipe(self.layers[0], keep_ratios[0])) for recipe in self.recipes],
            "layers": list(self.layers),
            "keep_ratios": list(keep_ratios),
            "dense_share": dense_share,
            "distil": distil,
        }
        dense = copy.deepcopy(model) if teacher is None else teacher
        self.teacher = dense.eval().requires_grad_(False)
        self._teach: Callable[..., tuple[Tensor, Tensor]] = self.teacher.features

    def compile(self) -> None:
        """Fuse the teacher; the student changes its token counts in every step."""
        self._teach = torch.compile(self.teacher.features, dynamic=False)

    def draw(self, step: int) -> Recipe | None:
        """The recipe of a step; None is dense. The same for every process."""
        chance = torch.rand(4, generator=torch.Generator().manual_seed(step)).tolist()
        if chance[0] < self.dense_share:
            return None
        low, high = (math.log(ratio) for ratio in self.keep_ratios)
        ratio = math.exp(low + (high - low) * chance[1])
        layer = self.layers[int(chance[3] * len(self.layers))]
        return self.recipes[int(chance[2] * len(self.recipes))](layer, ratio)

    def loss(
        self, batch: list[ClipBatch], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Task losses and divergence from the teacher under the recipe of this step."""
        recipe = self.draw(step)
        if recipe is None:
            return super().loss(batch, step, generator)
        with accelerate(self.model, recipe):
            total, metrics = super().loss(batch, step, generator)
        return total + self.model.reducers.penalty(), metrics

    def _answer(self, clips: ClipBatch, tokens: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        loss, score = super()._answer(clips, tokens, pooled)
        if not torch.is_grad_enabled() or self.distil == 0:
            return loss, score
        return loss + self.distil * self._divergence(clips, tokens, pooled), score

    def _divergence(self, clips: ClipBatch, tokens: Tensor, pooled: Tensor) -> Tensor:
        config = self.model.config
        number = config.task_names.index(clips.task)
        with torch.no_grad():
            hidden, summary = self._teach(
                normalised(clips.pixels), torch.full_like(clips.labels, number)
            )
        if clips.task in config.dense_tasks:
            return F.mse_loss(tokens.float(), hidden.float())
        mine = self.model.heads[clips.task](pooled).float().log_softmax(-1)
        theirs = self.teacher.heads[clips.task](summary).float().log_softmax(-1)
        return F.kl_div(mine, theirs, log_target=True, reduction="batchmean")


class DiffusionObjective:
    """Flow matching on the generated world, with attributes dropped for guidance.

    Args:
        model: The generator, on its device.
        batch: Clips per step.
        shift: Shift of the training times towards noise; smaller clips want less.
        test_clips: Clips generated in `evaluate`; 0 skips it.
    """

    def __init__(
        self, model: VideoDiT, *, batch: int, shift: float = SHIFT, test_clips: int = 16
    ) -> None:
        self.model, self.batch_size, self.shift = model, batch, shift
        self.test_clips = test_clips
        self.device = next(model.parameters()).device
        self.identity = {**model.config.to_dict(), "shift": shift}
        self._forward: Callable[..., Tensor] = model

    def compile(self) -> None:
        """Fuse the generator."""
        self._forward = torch.compile(self.model, dynamic=False)

    def batch(self, seed: int) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1] and attributes."""
        config = self.model.config
        world = make_world(
            self.batch_size, seed, device=self.device, frames=config.frames, size=config.size[0]
        )
        return world.pixels, world.attributes

    def loss(
        self, batch: tuple[Tensor, Tensor], step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The flow-matching loss."""
        return training_loss(self._forward, *batch, generator, shift=self.shift), {}

    @torch.inference_mode()
    def evaluate(self) -> dict[str, float]:
        """Share of generated clips in which the detector finds the attribute asked for."""
        if self.test_clips == 0:
            return {}
        generator = torch.Generator().manual_seed(TEST_SEED)
        wanted = torch.stack(
            [
                torch.randint(len(values), (self.test_clips,), generator=generator)
                for values in ATTRIBUTES.values()
            ],
            dim=1,
        )
        found = []
        for number, row in enumerate(wanted):
            pixels = generate(self.model, row[None].to(self.device), seed=TEST_SEED + number)
            found.append(detect(pixels.float())[0].cpu())
        right = (torch.stack(found) == wanted).float().mean(0)
        return {name: float(share) for name, share in zip(ATTRIBUTES, right, strict=True)}


def iou(found: Tensor, wanted: Tensor) -> Tensor:
    """Intersection over union of two masks, over the whole batch."""
    union = (found | wanted).sum().clamp(min=1)
    return (found & wanted).sum() / union


def shuffled(pixels: Tensor, seed: int) -> Tensor:
    """Every clip's frames in another random order."""
    generator = torch.Generator(device=pixels.device).manual_seed(seed % 2**63)
    noise = torch.rand(pixels.shape[:2], generator=generator, device=pixels.device)
    order = noise.argsort(1)[:, :, None, None, None].expand_as(pixels)
    return pixels.gather(1, order)


def single_frame(pixels: Tensor, seed: int) -> Tensor:
    """Every clip as one of its frames, repeated."""
    generator = torch.Generator(device=pixels.device).manual_seed(seed % 2**63)
    noise = torch.rand(pixels.shape[:2], generator=generator, device=pixels.device)
    chosen = noise.argmax(1)[:, None, None, None, None].expand_as(pixels)
    return pixels.gather(1, chosen)


def _by_length(batch: Sequence[ClipBatch]) -> list[list[ClipBatch]]:
    lengths: dict[int, list[ClipBatch]] = {}
    for clips in batch:
        lengths.setdefault(clips.pixels.shape[1], []).append(clips)
    return list(lengths.values())
