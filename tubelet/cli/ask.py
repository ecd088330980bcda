"""`tubelet ask`."""

import os
import time
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.table import Table

from tubelet.cli.app import Json, app, console, print_json, progress_bar
from tubelet.cli.clips import FPS
from tubelet.core.errors import UnsupportedError

MODEL, SAMPLE = "tubelet-llm", "sample"
ANSWER_TOKENS = 4
"""Answers are single words and an end; a few more show a model that does not stop."""

TIMES = ("decode video", "vision", "plan", "prompt", "prefill", "answer")


@app.command()
def ask(
    clip: Annotated[str, typer.Argument(help="A video file, or 'sample': objects on the move.")],
    question: Annotated[str, typer.Argument(help='Such as "which way does the red square go?"')],
    recipe: Annotated[
        list[str] | None,
        typer.Option(help='Such as "EVS(keep_ratio=0.25)"; join with + to combine. Repeatable.'),
    ] = None,
    model: Annotated[str, typer.Option(help="A trained VideoLLM: name or file.")] = MODEL,
    top: Annotated[int, typer.Option(min=1, help="Likeliest words to show.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Ask tubelet's small video language model about a clip: dense, then with each recipe."""
    with progress_bar(quiet=as_json) as tell:
        result = _answers(clip, question, tuple(recipe or ()), model, top, device, tell)
    if as_json:
        return print_json(result)
    table = Table(
        "variant", "answer", "likeliest words", "video tokens", *TIMES,
        title=question, title_justify="left", caption=f"times in ms; {result['shows']}",
        caption_justify="left",
    )  # fmt: skip
    for row in result["answers"]:
        words = ", ".join(f"{entry['word']} {entry['probability']:.0%}" for entry in row["top"])
        kept = f"{row['kept']} of {row['video_tokens']}"
        times = [f"{1000 * row['seconds'][name]:.1f}" for name in TIMES]
        table.add_row(row["variant"], row["answer"], words, kept, *times)
    console.print(table)


def _answers(
    source: str,
    question: str,
    recipes: tuple[str, ...],
    model: str,
    top: int,
    device: str,
    tell: Any,
) -> dict[str, Any]:
    """Everything that can be wrong is found before the model runs."""
    from tubelet.bench.generators.combinations import name_of, read_combinations, refuse_early
    from tubelet.bench.run import hush_transformers
    from tubelet.models.load import checked_device
    from tubelet.nn.video_tower import as_pictures
    from tubelet.nn.weights import PIXEL_MEAN, PIXEL_STD, load_weights
    from tubelet.video import normalise

    variants = [(), *read_combinations(recipes)]
    place = checked_device(device)
    tell("loading the model", 0, 1)
    hush_transformers()
    llm = load_weights(model, expect="VideoLLM", device=place)
    refuse_early(llm.host, variants[1:])
    known = llm.host.config.get_text_config().vocab_size
    if top > known:
        raise UnsupportedError(f"--top {top}: the model knows {known} words")
    prompt = {name: x.to(place) for name, x in llm.prompts([question]).items()}
    tell("decoding the clip", 0, 1)
    started = time.perf_counter()
    clip, shows = _open(source, llm)
    depth = llm.tower.video.config.tubelet[0]
    pixels = normalise(clip.frames, (PIXEL_MEAN,) * 3, (PIXEL_STD,) * 3)[None]
    pixels = as_pictures(pixels, depth)
    decoding = time.perf_counter() - started
    inputs = {**prompt, "pixel_values_videos": pixels.to(place)}
    _reply(llm, inputs, ANSWER_TOKENS)
    rows = []
    for number, recipes_on in enumerate(variants):
        tell("answering", number, len(variants))
        row = _ask(llm, inputs, recipes_on, top)
        row["seconds"] = {"decode video": decoding, **row["seconds"]}
        rows.append({"variant": name_of(recipes_on), **row})
    told = {"clip": clip.source, "shows": shows, "question": question, "model": model}
    return told | {"answers": rows}


def _open(source: str, llm: Any) -> tuple[Any, str]:
    """The clip at the model's length and size, and what is known about it."""
    import torch

    from tubelet.train.questions import sample_objects
    from tubelet.video import Clip, read_clip

    frames, *size = llm.clip_shape
    if source != SAMPLE or os.path.exists(source):
        unknown = "the model was trained on clips of simple objects, like that of 'sample'"
        return read_clip(source, num_frames=frames, size=(size[0], size[1])), unknown
    drawn = sample_objects(frames, size[0])
    pictures = (drawn.pixels[0] * 255).round().byte()
    times = torch.arange(frames, dtype=torch.float64) / FPS
    clip = Clip(pictures, times, "rendered sample clip", float(FPS))
    return clip, f"in the clip {', '.join(drawn.texts(0))}"


def _ask(llm: Any, inputs: dict[str, Any], recipes: tuple[Any, ...], top: int) -> dict[str, Any]:
    """Answer, likeliest words, tokens and times of one variant."""
    from tubelet.bench.llm.clock import StageClock
    from tubelet.models.accelerate import accelerate

    host = llm.host
    with StageClock(host, host.model.language_model, host.device) as clock:
        watched = [clock.watched(recipe) for recipe in recipes]
        with accelerate(host, *watched) if watched else nullcontext() as handle:
            split = clock.first_token(lambda: _reply(llm, inputs, 1))
            left = None if handle is None else handle.assignment
            layers = None if handle is None else handle.report().tokens_per_layer
    with accelerate(host, *recipes) if recipes else nullcontext():
        started = time.perf_counter()
        reply = _reply(llm, inputs, ANSWER_TOKENS)
        whole = time.perf_counter() - started
    new = reply.sequences[0, inputs["input_ids"].shape[1] :]
    likely = reply.scores[0][0].float().softmax(-1).topk(top)
    words = llm.tokenizer.convert_ids_to_tokens(likely.indices.tolist())
    pairs = zip(words, likely.values.tolist(), strict=True)
    return {
        "answer": llm.tokenizer.decode(new, skip_special_tokens=True) or "nothing",
        "top": [{"word": word, "probability": share} for word, share in pairs],
        "video_tokens": llm.num_video,
        "kept": llm.num_video if left is None else left[0].num_out,
        "tokens_per_layer": layers,
        "seconds": {
            "vision": split.vision,
            "plan": split.plan,
            "prompt": split.prompt,
            "prefill": split.llm,
            "answer": max(whole - split.total, 0.0),
        },
    }


def _reply(llm: Any, inputs: dict[str, Any], tokens: int) -> Any:
    return llm.host.generate(
        **inputs, max_new_tokens=tokens, output_scores=True, return_dict_in_generate=True
    )
