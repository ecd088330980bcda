"""What `tubelet train` can train, by name, with the settings that the shipped weights had."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tubelet.core.errors import ModelError
from tubelet.nn.dit import VideoDiT, VideoDiTConfig
from tubelet.nn.reducers import Reducers, ReducersConfig
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.nn.weights import load_weights, read_card, save_weights
from tubelet.recipes.learned import at_layer, learned_recipes
from tubelet.train.clips import TASKS
from tubelet.train.objectives import (
    DiffusionObjective,
    ElasticObjective,
    EncoderObjective,
    shuffled,
    single_frame,
)

ENCODER_TASKS = (
    "direction",
    "needle",
    "collisions",
    "shells",
    "ego-motion",
    "collision-count",
    "mask",
)

LEARNED = tuple(learned_recipes())

TRAINED = "tubelet-vit"
"""The encoder that jobs with reducers start from."""

QUICK_LLM = {
    "encoder": "tubelet-vit-small",
    "taps": (0, 1),
    "pooled": True,
    "width": 64,
    "depth": 2,
    "heads": 2,
    "mlp_width": 192,
}
QUICK_KINDS = ("colour", "count", "when")
"""A language model, and what it is asked on black backgrounds, that learns something in two minutes
on a CPU."""

QUICK_SHAPE = {"width": 64, "depth": 4, "heads": 1}
"""An encoder that learns something in a minute on a CPU. Learned recipes reduce at up to the third
layer, so it needs a fourth."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a job is built with.

    Args:
        device: Where it trains.
        seed: Seed of the initial weights.
        batch: Clips per step (of each task, for encoders).
        init: Weights to start from, a shipped name or a path; None starts from random ones.
        size: Side of the clips in pixels; None is the model's own.
        quick: A much smaller model and evaluation, for CPUs and tests.
    """

    device: torch.device
    seed: int
    batch: int
    init: str | None = None
    size: int | None = None
    quick: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """One thing that can be trained.

    Args:
        name: As given to `tubelet train`.
        summary: One line for people.
        build: Makes the objective.
        weights: Name of the weights file that it writes.
        init: Weights that it starts from unless told otherwise; quick runs start from none.
        batch, learning_rate, ema, minutes: Defaults; minutes are for one H200.
        quick_batch: Batch of the quick mode.
    """

    name: str
    summary: str
    build: Callable[[Setup], Any]
    weights: str
    init: str | None = None
    batch: int = 64
    quick_batch: int = 8
    learning_rate: float = 1e-3
    ema: float = 0.999
    minutes: float = 8.0


def job(name: str) -> Job:
    """The job of a name: one of `jobs()`, a task, or a learned recipe.

    Raises:
        ModelError: Unknown name.
    """
    known = jobs()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {close[0]}" if close else ""
    raise ModelError(f"nothing to train is called {name!r}{hint}. Known: {', '.join(known)}")


def jobs() -> dict[str, Job]:
    """Every job by name."""
    small = {"width": 128, "depth": 8, "heads": 2}
    listed = [
        Job(
            name="encoder",
            summary="the encoder for all tasks",
            build=_encoder,
            weights="tubelet-vit",
        ),
        Job(
            name="encoder-small",
            summary="a smaller dense encoder at about a quarter of the compute: the baseline "
            "that token reduction has to beat",
            build=partial(_encoder, shape=small),
            weights="tubelet-vit-small",
        ),
        Job(
            name="elastic",
            summary="the trained reducers and the encoder under them, at random budgets",
            build=_elastic,
            weights="tubelet-vit-elastic",
            init=TRAINED,
            batch=24,
            learning_rate=2e-4,
        ),
        Job(
            name="generator",
            summary="the video diffusion transformer on the generated world",
            build=_generator,
            weights="tubelet-dit",
            batch=16,
            quick_batch=2,
            learning_rate=6e-4,
            minutes=20.0,
        ),
    ]
    for title, corrupt in (("shuffled", shuffled), ("single-frame", single_frame)):
        listed.append(
            Job(
                name=f"control-{title}",
                summary=f"a small encoder on clips with {title} input: must stay at the floor",
                build=partial(_encoder, shape=small, corrupt=corrupt),
                weights=f"control-{title}",
            )
        )
    listed += _language_jobs()
    for task in TASKS.values():
        build = partial(_encoder, tasks=(task.name,))
        listed.append(
            Job(
                name=task.name,
                summary=f"an encoder for {task.title} alone",
                build=build,
                weights=f"encoder-{task.name}",
            )
        )
    listed += [
        Job(
            name=name,
            summary=f"{name} and the encoder under it, at random budgets",
            build=partial(_elastic, names=(name,)),
            weights=f"tubelet-vit-{name.lower()}",
            init=TRAINED,
            batch=24,
            learning_rate=2e-4,
        )
        for name in LEARNED
    ]
    return {entry.name: entry for entry in listed}


def save(entry: Job, model: nn.Module, out: Path, record: dict[str, Any]) -> list[Path]:
    """Write the weights of a finished job; trained reducers get a file of their own."""
    reducers = getattr(model, "reducers", None)
    if reducers is None:
        return [save_weights(out / entry.weights, model, record=record, summary=entry.summary)]
    attached = f"{entry.weights}-reducers"
    parts = save_weights(
        out / attached, reducers, record=record, summary=f"modules of {', '.join(reducers.names)}"
    )
    whole = save_weights(
        out / entry.weights, model, record=record, summary=entry.summary, attach=attached
    )
    return [whole, parts]


def _encoder(
    setup: Setup,
    shape: dict[str, int] | None = None,
    tasks: tuple[str, ...] = ENCODER_TASKS,
    corrupt: Any = None,
) -> EncoderObjective:
    config = _encoder_config(setup, tasks, shape or {})
    model = _start(VideoViT, config, setup)
    options = _options(setup, config.size[0])
    return EncoderObjective(model, tasks=tasks, corrupt=corrupt, **options)


def _encoder_config(setup: Setup, tasks: tuple[str, ...], shape: dict[str, int]) -> VideoViTConfig:
    classes = {n: TASKS[n].classes for n in tasks if n != "mask"}
    dense = tuple(n for n in tasks if n == "mask")
    size = 64 if setup.size is None else setup.size
    changes = {**shape, **(QUICK_SHAPE if setup.quick else {})}
    return VideoViTConfig(tasks=classes, dense_tasks=dense, size=(size, size), **changes)


def _elastic(setup: Setup, names: tuple[str, ...] = LEARNED) -> ElasticObjective:
    if setup.init is None and setup.quick:
        model = _start(VideoViT, _encoder_config(setup, ENCODER_TASKS, {}), setup)
        # There is nothing to learn from a teacher with random weights.
        distil, name = 0.0, None
    else:
        start = setup.init or TRAINED
        model = load_weights(start, expect="VideoViT").to(setup.device)
        distil, name = 1.0, _teacher(start)
    config = model.config
    if getattr(model, "reducers", None) is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setup.seed)
            model.reducers = Reducers(ReducersConfig(width=config.width, heads=config.heads))
        model.reducers.to(setup.device)
    recipes = [partial(at_layer, name) for name in names]
    options = _options(setup, setup.size or config.size[0])
    objective = ElasticObjective(
        model.train(),
        recipes=recipes,
        tasks=config.task_names,
        distil=distil,
        teacher=None if name is None else load_weights(name).to(setup.device),
        **options,
    )
    # A run that is resumed needs the same teacher, which no checkpoint holds.
    objective.identity["teacher"] = None if name is None else read_card(name).sha256
    return objective


def _teacher(start: str) -> str:
    """Whose answers are kept to: the start's own, or the shipped encoder's where the start was
    trained from it and has lost a little already."""
    card, shipped = read_card(start), read_card(TRAINED)
    return TRAINED if card.attach is not None and card.config == shipped.config else start


def _generator(setup: Setup) -> DiffusionObjective:
    config = VideoDiTConfig()
    if setup.quick:
        config = replace(config, width=64, depth=2, heads=1, size=(32, 32), frames=8)
    if setup.size is not None:
        config = replace(config, size=(setup.size, setup.size))
    model = _start(VideoDiT, config, setup)
    return DiffusionObjective(model, batch=setup.batch, test_clips=0 if setup.quick else 16)


def _language_jobs() -> list[Job]:
    ways = {
        "video-llm": (
            "video",
            "the small video language model on the frozen encoder",
            "tubelet-llm",
        ),
        "video-llm-blind": ("nothing", "a control without any video: must stay at chance", None),
        "video-llm-shuffled": ("shuffled", "a control on frames in random order", None),
    }
    return [
        Job(
            name=name,
            summary=summary,
            build=partial(_language, sees=sees),
            weights=weights or name,
            batch=256,
            quick_batch=32,
            learning_rate=1e-3,
            minutes=20.0,
        )
        for name, (sees, summary, weights) in ways.items()
    ]


def _language(setup: Setup, sees: str) -> Any:
    # transformers is loaded only for these jobs.
    from tubelet.nn.video_llm import VideoLLM, VideoLLMConfig
    from tubelet.train.objectives_llm import QuestionObjective
    from tubelet.train.questions import words

    if setup.init is not None:
        llm = load_weights(setup.init, expect="VideoLLM")
    else:
        config = VideoLLMConfig(words=words(), **(QUICK_LLM if setup.quick else {}))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setup.seed)
            llm = VideoLLM(config)
    quick = {"kinds": QUICK_KINDS, "background": "black", "settle": 100, "test_clips": 64}
    size = llm.clip_shape[1]
    if setup.size not in (None, size):
        raise ModelError(
            f"the encoder of this model takes clips of {size} pixels, not {setup.size}"
        )
    return QuestionObjective(
        llm.to(setup.device).train(),
        batch=setup.batch,
        sees=sees,
        **(quick if setup.quick else {}),
    )


def _start(kind: Any, config: Any, setup: Setup) -> Any:
    """A model of this configuration: seeded random weights, or those of `setup.init`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setup.seed)
        model = kind(config)
    if setup.init is not None:
        start = load_weights(setup.init, expect=kind.__name__)
        weights = {n: w for n, w in start.state_dict().items() if not n.startswith("reducers.")}
        try:
            model.load_state_dict(weights)
        except RuntimeError:
            raise ModelError(
                f"the weights {setup.init} have another shape than this job's model"
            ) from None
    return model.to(setup.device).train()


def _options(setup: Setup, size: int) -> dict[str, Any]:
    tests = setup.batch if setup.quick else 512
    return {"batch": setup.batch, "size": size, "test_clips": tests}
