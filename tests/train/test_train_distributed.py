"""Two processes on one machine train what one process with the whole batch trains."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from tubelet.core.errors import TubeletError
from tubelet.train.config import TrainConfig
from tubelet.train.distributed import open_world
from tubelet.train.log import read_log
from tubelet.train.loop import train


class Halves:
    """Eight samples per step, of which each process sees its part; one head per half."""

    def __init__(self, rank, size):
        # Other weights in each process: those of the first must win.
        torch.manual_seed(rank)
        self.rank, self.count = rank, 8 // size
        self.model = nn.ModuleDict({"body": nn.Linear(4, 4), "a": nn.Linear(4, 1)})
        self.model["b"] = nn.Linear(4, 1)
        # A layout that is not row-major must be shared as well.
        body = self.model["body"]
        body.weight = nn.Parameter(body.weight.detach().t().contiguous().t())
        self.evaluations = 0

    def batch(self, seed):
        return None

    def loss(self, batch, step, generator):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        hidden = self.model["body"](x)
        mine = range(self.rank * self.count, (self.rank + 1) * self.count)
        errors = [(self.model["ab"[i // 4]](hidden[i]) - x[i].sum()).square() for i in mine]
        loss = torch.cat(errors).mean()
        names = {i // 4 for i in mine}
        return loss, {f"half {name}": torch.tensor(float(name)) for name in names}

    def evaluate(self):
        self.evaluations += 1
        return {"sum": sum(float(p.sum()) for p in self.model.parameters())}


def settings(batch):
    return TrainConfig(
        steps=6, batch=batch, precision="fp32", log_every=3, learning_rate=0.01, clip_norm=0.5
    )


def train_rank(rank, port, folder):
    """One of two processes, in the environment that torchrun makes."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    objective = Halves(rank, 2)
    with open_world("cpu") as world:
        result = train(objective, settings(4), folder / f"rank{world.rank}")
        timed = TrainConfig(minutes=0.005, batch=4, precision="fp32", log_every=20)
        counted = train(Halves(rank, 2), timed, folder / "timed")
        resumed = train(Halves(rank, 2), timed, folder / "timed", resume=True)
    torch.save(
        {
            "steps": (counted.steps, resumed.steps),
            "model": objective.model.state_dict(),
            "metrics": result.metrics,
            "evaluations": objective.evaluations,
        },
        folder / f"{rank}.pt",
    )
    # Gloo's threads now and then abort an interpreter that shuts down; the work is done by then.
    os._exit(0)


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train_rank, (port, tmp_path), nprocs=2)
    alone = Halves(0, 1)
    result = train(alone, settings(8), tmp_path / "alone")
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, weight in alone.model.state_dict().items():
        assert torch.equal(both[0]["model"][name], both[1]["model"][name])
        assert torch.allclose(both[0]["model"][name], weight, atol=1e-6, rtol=0)
    # A budget gives all processes the same number of steps, whatever their clocks say.
    assert len({steps for part in both for steps in part["steps"]}) == 1
    # The first process alone writes and evaluates; all get the figures.
    assert not (tmp_path / "rank1").exists()
    assert [part["evaluations"] for part in both] == [1, 0]
    assert both[0]["metrics"] == both[1]["metrics"] == pytest.approx(result.metrics, abs=1e-4)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("rank0", "alone")]
    for mine, reference in zip(*logs, strict=True):
        if "loss" in mine:
            assert mine["loss"] == pytest.approx(reference["loss"], rel=1e-5)
            assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
            assert mine["metrics"] == reference["metrics"] == {"half 0": 0.0, "half 1": 1.0}


def test_one_process_needs_no_group():
    with open_world("cpu") as world:
        assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
        assert not torch.distributed.is_initialized()
        assert world.gather(3) == [3]
        assert world.from_first("x") == "x"


@pytest.mark.parametrize("value", ["two", "0", ""])
def test_an_environment_that_makes_no_sense(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(TubeletError, match="WORLD_SIZE"), open_world("cpu"):
        pass
