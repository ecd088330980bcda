"""Checkpoints: going on bit for bit, and what full disks, damage and NaN do to them."""

import errno
import resource

import pytest
import torch
from torch import nn

from tubelet.core.errors import ModelError, TubeletError
from tubelet.train import checkpoint as checkpoints
from tubelet.train.checkpoint import read_checkpoint
from tubelet.train.config import TrainConfig
from tubelet.train.log import read_log
from tubelet.train.loop import train


class Stop(Exception):
    """Stands for a power cut."""


class Toy:
    """A small net with dropout, noise and batch statistics: all that a resume can get wrong."""

    identity = {"task": "sum", "sizes": (4, 1)}  # noqa: RUF012

    def __init__(self, width=6, stop_at=None, nan_at=None, init=0):
        torch.manual_seed(init)
        self.model = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 1)
        )
        self.stop_at, self.nan_at = stop_at, nan_at

    def batch(self, seed):
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))

    def loss(self, batch, step, generator):
        if step == self.stop_at:
            raise Stop
        noise = torch.randn(batch.shape, generator=generator)
        loss = (self.model(batch + 0.1 * noise) - batch.sum(1, keepdim=True)).square().mean()
        return (loss * float("nan") if step == self.nan_at else loss), {}

    def evaluate(self):
        return {"sum": sum(float(p.double().sum()) for p in self.model.parameters())}


def config(**changes):
    base = {"steps": 10, "batch": 8, "precision": "fp32", "log_every": 5, "checkpoint_minutes": 0}
    return TrainConfig(**{**base, **changes})


def same(a, b):
    """Whether nested values with tensors in them are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("ema", [0.9, None])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_steps_equal_five_and_five(tmp_path, ema, precision):
    settings = config(ema=ema, precision=precision)
    whole = Toy()
    result = train(whole, settings, tmp_path / "whole")
    with pytest.raises(Stop):
        train(Toy(stop_at=7), settings, tmp_path / "parts")
    assert read_checkpoint(tmp_path / "parts" / "checkpoint.pt").step == 5
    # Other initial weights, other global randomness: all must come from the checkpoint.
    parts = Toy(init=99)
    torch.rand(17)
    resumed = train(parts, settings, tmp_path / "parts", resume=True)
    assert same(whole.model.state_dict(), parts.model.state_dict())
    assert resumed.metrics == result.metrics
    first, second = (
        vars(read_checkpoint(tmp_path / name / "checkpoint.pt")) for name in ("whole", "parts")
    )
    for name in ("model", "average", "optimizer", "step", "total", "end"):
        assert same(first[name], second[name]), name
    assert len(first["optimizer"]) == 6
    keep = ("step", "loss", "lr", "grad_norm", "evaluation")
    logs = [
        [{k: line.get(k) for k in keep} for line in read_log(tmp_path / name / "log.jsonl")]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_the_moving_average_is_saved_beside_the_weights(tmp_path):
    toy = Toy()
    train(toy, config(ema=0.9), tmp_path)
    saved = read_checkpoint(tmp_path / "checkpoint.pt")
    assert not same(saved.average["0.weight"], saved.model["0.weight"])
    assert same(saved.average["0.weight"], toy.model[0].weight.detach())


def test_lines_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    with pytest.raises(Stop):
        train(Toy(stop_at=7), config(), tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    train(Toy(), config(), tmp_path, resume=True)
    steps = [line["step"] for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert steps == [5, 10]


def test_a_finished_run_resumes_to_the_same_result(tmp_path):
    first, second = Toy(), Toy(init=5)
    result = train(first, config(), tmp_path)
    again = train(second, config(), tmp_path, resume=True)
    assert same(first.model.state_dict(), second.model.state_dict())
    assert (again.metrics, again.steps) == (result.metrics, result.steps)


def test_checkpoints_wait_their_minutes(tmp_path):
    with pytest.raises(Stop):
        train(Toy(stop_at=7), config(checkpoint_minutes=60), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


# -- refusals


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    train(Toy(), config(), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(TubeletError, match="already holds a run; resume it"):
        train(Toy(), config(), tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_nothing_to_resume_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no checkpoint at"):
        train(Toy(), config(), tmp_path, resume=True)


def test_other_settings_are_refused_by_name(tmp_path):
    train(Toy(), config(), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "config.json").read_bytes()
    other = config(learning_rate=0.5, steps=12)
    with pytest.raises(ModelError, match=r"steps \(10 there, 12 now\); learning_rate \(0.001 th"):
        train(Toy(), other, tmp_path, resume=True)
    toy = Toy()
    toy.identity = {"task": "product", "sizes": (4, 1)}
    with pytest.raises(ModelError, match=r"task \(sum there, product now\)$"):
        train(toy, config(), tmp_path, resume=True)
    after = (tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "config.json").read_bytes()
    assert before == after


def test_settings_without_influence_may_differ(tmp_path):
    train(Toy(), config(), tmp_path)
    train(Toy(), config(log_every=3, checkpoint_minutes=9, eval_every=2), tmp_path, resume=True)


def test_other_architectures_are_refused_by_name(tmp_path):
    train(Toy(), config(), tmp_path)
    with pytest.raises(ModelError, match=r"another architecture.*0\.weight \(\(6, 4\) float32 th"):
        train(Toy(width=7), config(), tmp_path, resume=True)
    toy = Toy()
    toy.model[0].bias.requires_grad_(False)
    with pytest.raises(ModelError, match=r"0\.bias \(trained in one only\)"):
        train(toy, config(), tmp_path, resume=True)


def test_an_identity_that_cannot_be_kept_is_refused_at_once(tmp_path):
    toy = Toy()
    toy.identity = {"model": toy.model}
    with pytest.raises(TubeletError, match="plain values"):
        train(toy, config(), tmp_path)


@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "other file", "older"])
def test_damaged_checkpoints_are_named(tmp_path, damage):
    train(Toy(), config(), tmp_path)
    path = tmp_path / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[len(data) // 2] ^= 1
    versions = {
        "empty": b"",
        "cut": data[:-100],
        "bit": data,
        "other file": b"PK" + data,
        "older": data.replace(b"checkpoint 1\n", b"checkpoint 0\n", 1),
    }
    path.write_bytes(versions[damage])
    words = {"cut": "damaged or was cut off", "bit": "damaged", "older": "another version"}
    with pytest.raises(ModelError, match=words.get(damage, "no tubelet checkpoint")):
        train(Toy(), config(), tmp_path, resume=True)


# -- full disks


@pytest.fixture
def full_disk(monkeypatch):
    """Call with the numbers of the writes that fail, half-way."""

    def prepare(*failing):
        calls = []

        def write(path, *parts):
            calls.append(path)
            data = b"".join(parts)
            if len(calls) not in failing:
                return plain(path, data)
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        plain = checkpoints.write_bytes
        monkeypatch.setattr(checkpoints, "write_bytes", write)
        return calls

    return prepare


def test_a_full_disk_on_the_way_costs_one_warning(tmp_path, full_disk):
    calls = full_disk(2)
    seen = []

    class Looking(Toy):
        def loss(self, batch, step, generator):
            if step == 4:
                seen.append(read_checkpoint(tmp_path / "checkpoint.pt").step)
                seen.append(sorted(path.name for path in tmp_path.iterdir()))
            return super().loss(batch, step, generator)

    result = train(Looking(), config(log_every=2, steps=8), tmp_path)
    assert seen == [2, ["checkpoint.pt", "config.json", "log.jsonl"]]
    assert result.steps == read_checkpoint(result.checkpoint).step == 8
    assert len(calls) == 4
    warnings = [line for line in read_log(tmp_path / "log.jsonl") if "warning" in line]
    assert [line["step"] for line in warnings] == [4]
    assert "No space left on device; the weights of step 2 survive at" in warnings[0]["warning"]


def test_a_full_disk_at_the_end_names_what_survives(tmp_path, full_disk):
    full_disk(2)
    with pytest.raises(TubeletError, match=r"No space left.*step 5 survive at .*checkpoint\.pt"):
        train(Toy(), config(), tmp_path)
    assert read_checkpoint(tmp_path / "checkpoint.pt").step == 5
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_from_the_start(tmp_path, full_disk):
    full_disk(1, 2)
    with pytest.raises(TubeletError, match="no earlier checkpoint exists"):
        train(Toy(), config(), tmp_path)


def test_a_real_limit_of_the_operating_system(tmp_path):
    checkpoint = read_checkpoint(train(Toy(), config(), tmp_path / "run").checkpoint)
    path = tmp_path / "checkpoint.pt"
    checkpoints.write_checkpoint(path, checkpoint)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.write_checkpoint(path, checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["checkpoint.pt"]


# -- what is not finite


def test_nan_stops_with_its_step_and_keeps_the_good_checkpoint(tmp_path):
    with pytest.raises(TubeletError, match=r"step 7 is not finite; the checkpoint of step 5 is"):
        train(Toy(nan_at=7), config(), tmp_path)
    saved = read_checkpoint(tmp_path / "checkpoint.pt")
    assert saved.step == 5
    assert all(tensor.isfinite().all() for tensor in saved.model.values())
    healed = Toy()
    train(healed, config(), tmp_path, resume=True)
    whole = Toy()
    train(whole, config(), tmp_path / "whole")
    assert same(healed.model.state_dict(), whole.model.state_dict())


def test_a_gradient_that_is_not_finite_stops_as_well(tmp_path):
    class Root(Toy):
        def loss(self, batch, step, generator):
            loss, metrics = super().loss(batch, step, generator)
            # The square root is 0, its slope infinite.
            return loss + (0.0 * loss).sqrt() if step == 3 else loss, metrics

    with pytest.raises(TubeletError, match="gradient of step 3 is not finite"):
        train(Root(), config(), tmp_path)
