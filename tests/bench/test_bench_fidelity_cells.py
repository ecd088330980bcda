"""Cells of the fidelity bench on planted models and clips, where the right answer is known."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tubelet.bench.fidelity.cells import CHUNK, Cell, clip_batches, evaluate_cell, iou
from tubelet.bench.fidelity.hosts import Host
from tubelet.bench.fidelity.oracle import evenly
from tubelet.bench.fidelity.probes import Features, probe_scores
from tubelet.bench.fidelity.result import decode_scores, encode_scores
from tubelet.bench.fidelity.run import Request, checked_cells, control_floors, measure
from tubelet.bench.fidelity.stats import difference, score
from tubelet.bench.fidelity.summary import controls
from tubelet.bench.fidelity.transforms import (
    fewer_frames,
    lower_resolution,
    shuffled_frames,
    single_frame,
)
from tubelet.bench.fidelity.variants import make_variants
from tubelet.nn.vit import VideoViT, VideoViTConfig
from tubelet.train.clips import make_clips

FRAMES, SIDE = 8, 32


@dataclass
class Planted:
    """Clips with one bright token where the label is 1, at a random place."""

    pixels: Tensor
    labels: Tensor
    lit: Tensor

    def token_mask(self, which: str, tubelet: tuple[int, int, int]) -> Tensor:
        return self.lit


def planted(task: str, batch: int, seed: int, *, background: str, device, leak=False) -> Planted:
    generator = torch.Generator().manual_seed(seed % 1_000_003)
    labels = torch.arange(batch) % 2
    grid = (FRAMES // 2, SIDE // 8, SIDE // 8)
    place = torch.randint(grid[0] * grid[1] * grid[2], (batch,), generator=generator)
    lit = torch.zeros(batch, grid[0] * grid[1] * grid[2], dtype=torch.bool)
    lit[torch.arange(batch), place] = labels.bool()
    boxes = lit.reshape(batch, *grid).float()
    pixels = boxes.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    pixels = pixels[:, :, None].repeat(1, 1, 3, 1, 1)
    if leak:
        pixels[:, :, 1] += 0.3 * labels[:, None, None, None]
    return Planted(pixels, labels, lit)


@pytest.fixture(scope="module")
def reader() -> Host:
    """A model that says 1 exactly when some token it still has is bright."""
    config = VideoViTConfig(
        width=16, depth=2, heads=2, frames=FRAMES, size=(SIDE, SIDE), pool="mean",
        tasks={"collisions": 2}, dense_tasks=(),
    )  # fmt: skip
    model = VideoViT(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.norm.weight.fill_(1)
        for layer in model.layers:
            layer.norm1.weight.fill_(1)
            layer.norm2.weight.fill_(1)
        model.embeddings.patch.weight[0].fill_(1 / 384)
        model.embeddings.patch.bias[0] = 0.5 / 0.225
        model.embeddings.patch.bias[1] = 1
        black = (torch.zeros(1, FRAMES, 3, SIDE, SIDE) - 0.5) / 0.225
        dark = model(black).last_hidden_state[0, 0, 0]
        model.heads["collisions"].weight[1, 0] = 1
        model.heads["collisions"].bias[1] = -dark - 0.005
    return Host(name="reader", role="dense", model=model, checksum="0")


def run(host: Host, make, num: int = 128, keeps=(1.0, 0.5, 0.25)) -> Cell:
    batches = clip_batches(
        make, "collisions", "static", num, 64, host.tubelet, torch.device("cpu"), 2**40
    )
    empty = Cell(
        task="collisions", background="static", chance=0.5, floors=control_floors("collisions")
    )
    return evaluate_cell(
        empty,
        make_variants([host], keeps, ["ToMe"]),
        batches,
        lambda v, pixels: v.host.geometry(pixels.shape[1], tuple(pixels.shape[3:])),
        {},
    )


def test_the_oracle_beats_random_drop_where_one_token_counts(reader) -> None:
    cell = run(reader, planted, keeps=(1.0, 0.25))
    scores = {name: float(entry.scores.mean()) for name, entry in cell.entries.items()}
    assert scores["dense"] == 1
    assert scores["oracle 0.25"] == 1
    # Half of the clips have nothing to find; random drop finds a quarter of the rest.
    assert scores["RandomDrop 0.25"] == pytest.approx(0.625, abs=0.1)
    assert difference([cell.entries["oracle 0.25"].scores], [cell.entries["RandomDrop 0.25"].scores]
                      ).significant  # fmt: skip
    assert scores["shuffled labels"] == pytest.approx(0.5, abs=0.15)


def test_shares_and_costs_are_what_ran(reader) -> None:
    cell = run(reader, planted, num=32)
    shares = {name: entry.share for name, entry in cell.entries.items()}
    assert shares["dense"] == 1
    assert shares["RandomDrop 0.25"] == shares["oracle 0.25"] == 0.25
    assert shares["fewer frames 0.5"] == shares["fewer frames, own times 0.5"] == 0.5
    assert shares["lower resolution 0.25"] == 0.25
    macs = {name: entry.macs for name, entry in cell.entries.items()}
    # Embedding the tokens is paid in full.
    assert macs["RandomDrop 0.25"] < 0.5 * macs["dense"]
    assert macs["fewer frames 0.5"] < 0.55 * macs["dense"]
    assert cell.entries["RandomDrop 0.25"].setting == "RandomDrop(keep_ratio=0.25)"


def test_a_test_set_does_not_depend_on_the_batch(reader) -> None:
    def scores(batch: int) -> Tensor:
        batches = clip_batches(
            planted, "collisions", "static", 50, batch, reader.tubelet, torch.device("cpu"), 7
        )
        return torch.cat([clips.relevant for clips in batches])

    assert torch.equal(scores(CHUNK), scores(2 * CHUNK))
    assert len(scores(2 * CHUNK)) == 50
    assert not torch.equal(scores(CHUNK)[:10], scores(CHUNK)[CHUNK : CHUNK + 10])


def _rows(cell: Cell) -> dict[str, bool | None]:
    from tubelet.bench.fidelity.result import Fidelity, Line

    lines = {n: Line(family=n, kind="control", regime="training-free", keep=None)
             for n in cell.entries}  # fmt: skip
    whole = Fidelity(
        seed_name="0", quick=False, precision="float32", clips=1, first_seed=0,
        core_tasks=(), models=[], environment={}, variants=lines, cells=[cell],
    )  # fmt: skip
    return {row["control"]: row["fine"] for row in controls(whole)}


def _probed(make, num: int = 192) -> Cell:
    from tubelet.bench.fidelity.cells import Entry

    def features(seed: int) -> Features:
        return Features(
            clip_batches(
                make, "collisions", "static", num, 64, (2, 8, 8), torch.device("cpu"), seed
            )
        )

    found = probe_scores(features(1), features(2**40), classes=2)
    cell = Cell(
        task="collisions", background="static", chance=0.5, floors=control_floors("collisions")
    )
    for name, scores in found.items():
        cell.entries[name] = Entry(setting=name, share=0, macs=0, scores=scores)
    return cell


def noise(task: str, batch: int, seed: int, *, background: str, device) -> Planted:
    generator = torch.Generator().manual_seed(seed % 1_000_003)
    pixels = torch.rand(batch, FRAMES, 3, SIDE, SIDE, generator=generator)
    return Planted(pixels, torch.arange(batch) % 2, torch.zeros(batch, 64, dtype=torch.bool))


def test_probes_stay_at_chance_without_a_leak_and_find_one() -> None:
    assert set(_rows(_probed(noise)).values()) == {True}
    leaky = _probed(lambda *a, **k: planted(*a, leak=True, **k))
    assert set(_rows(leaky).values()) == {False}
    assert all(float(entry.scores.mean()) > 0.95 for entry in leaky.entries.values())


def test_the_single_frame_control_fails_where_one_frame_is_enough(reader) -> None:
    def standing(*args, **named) -> Planted:
        clips = planted(*args, **named)
        lit = clips.lit.reshape(-1, FRAMES // 2, 16).any(1, keepdim=True)
        tall = lit.reshape(-1, 1, 1, 4, 4).repeat_interleave(8, 3).repeat_interleave(8, 4)
        clips.pixels = tall.float().expand(-1, FRAMES, 3, -1, -1).contiguous()
        return clips

    keeps = (1.0,)
    assert _rows(run(reader, standing, 64, keeps))["single frame"] is False
    assert _rows(run(reader, planted, 64, keeps))["single frame"] is True


def test_clip_transforms_keep_what_they_say() -> None:
    clip = torch.arange(16.0)[None, :, None, None, None].expand(2, 16, 3, 64, 64)
    few = fewer_frames(0.25, (2, 8, 8))(clip)
    assert few[0, :, 0, 0, 0].tolist() == [4, 5, 12, 13]
    assert evenly(8, 0.75) == [0, 2, 3, 4, 6, 7]
    host = Host(name="t", role="dense", checksum="0",
                model=VideoViT(VideoViTConfig(width=16, depth=1, heads=2)))  # fmt: skip
    grid = host.geometry(16, (64, 64)).grid
    assert lower_resolution(0.25, (2, 8, 8), grid)(clip).shape == (2, 16, 3, 32, 32)
    assert lower_resolution(0.5, (2, 8, 8), grid)(clip).shape == (2, 16, 3, 48, 48)
    mixed = shuffled_frames(clip)
    assert mixed[0, :, 0, 0, 0].tolist() != clip[0, :, 0, 0, 0].tolist()
    assert torch.equal(mixed.sort(1).values, clip)
    assert not torch.equal(mixed[0], mixed[1])
    assert single_frame(clip).unique().tolist() == [8]


def test_iou_of_masks() -> None:
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    b = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert iou(a, b).tolist() == [pytest.approx(1 / 3), 1]


def test_scores_survive_their_text() -> None:
    bits = (torch.rand(77) < 0.3).float()
    assert torch.equal(decode_scores(encode_scores(bits)), bits)
    wide = torch.rand(9)
    assert torch.allclose(decode_scores(encode_scores(wide)), wide, atol=1e-3)


def test_the_dense_task_is_scored_on_the_whole_grid() -> None:
    torch.manual_seed(0)
    model = VideoViT(VideoViTConfig(width=16, depth=4, heads=2)).eval()
    host = Host(name="t", role="dense", model=model, checksum="0")
    request = Request(
        out=Path(), tasks=("mask",), backgrounds=("static",), keeps=(1.0, 0.5),
        recipes=("ToMe",), clips=4, latency=False,
    )  # fmt: skip
    found = measure(request, [host], checked_cells(request), lambda *a: None, make_clips)
    entries = found.cells[0].entries
    assert {"dense", "lower resolution 0.5", "fewer frames 0.5", "ToMe 0.5"} <= entries.keys()
    for entry in entries.values():
        assert entry.scores.shape == (4,)
        assert 0 <= float(score([entry.scores]).value) <= 1
