"""The loop on toy problems: what is optimised, how, for how long, and what is evaluated."""

import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tubelet.core.errors import ShapeError, TubeletError, UnsupportedError
from tubelet.train import timing
from tubelet.train.config import (
    MEASURING_RAMP,
    SEED_LIMIT,
    Schedule,
    TrainConfig,
    batch_seed,
    learning_rate,
)
from tubelet.train.log import read_log
from tubelet.train.loop import train


class Regression:
    """y = sum of x, from a linear layer; remembers what it was asked."""

    def __init__(self, model=None, scale=1.0):
        torch.manual_seed(1)
        self.model = nn.Linear(4, 1) if model is None else model
        self.scale = scale
        self.seeds, self.history, self.evaluated = [], [], []
        self.draws = []

    def batch(self, seed):
        self.seeds.append(seed)
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))

    def loss(self, batch, step, generator):
        self.history.append([p.detach().clone() for p in self.model.parameters()])
        self.draws.append(float(torch.rand((), generator=generator)))
        error = self.model(batch) - batch.sum(1, keepdim=True)
        loss = self.scale * error.float().square().mean()
        return loss, {"error": error.detach().abs().mean()}

    def evaluate(self):
        assert not torch.is_grad_enabled()
        assert not self.model.training
        self.evaluated.append([p.detach().clone() for p in self.model.parameters()])
        return {"size": sum(float(p.sum()) for p in self.model.parameters())}


def config(**changes):
    base = {"steps": 20, "batch": 8, "precision": "fp32", "log_every": 5, "warmup": 0.1}
    return TrainConfig(**{**base, **changes})


# -- configuration


def test_config_survives_json(tmp_path):
    made = config(betas=(0.8, 0.9), ema=None)
    assert TrainConfig.from_dict(made.to_dict()) == made
    train(Regression(), made, tmp_path)
    assert TrainConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == made


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"minutes": 1}, "either minutes or steps"),
        ({"steps": None}, "either minutes or steps"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"steps": None, "minutes": float("nan")}, "minutes is nan"),
        ({"batch": 0}, "batch is 0; give a whole number of at least 1"),
        ({"learning_rate": -1}, "learning_rate is -1; give a number above 0"),
        ({"learning_rate": "1"}, "learning_rate is '1'"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": 0.9}, "betas"),
        ({"warmup": 1.0}, "warmup is 1.0; give a number at least 0 and below 1"),
        ({"final_ratio": 1.5}, "final_ratio"),
        ({"ema": 1.0}, "ema is 1.0; give a number above 0 and below 1"),
        ({"clip_norm": 0}, "clip_norm"),
        ({"precision": "fp16"}, "precision is 'fp16'; use 'bf16' or 'fp32'"),
        ({"compile": 1}, "compile"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"log_every": 0}, "log_every"),
        ({"checkpoint_minutes": -1}, "checkpoint_minutes"),
        ({"eval_every": 0}, "eval_every"),
    ],
)
def test_config_refuses_what_makes_no_sense(changes, words):
    with pytest.raises(TubeletError, match=words.replace("(", r"\(")):
        config(**changes)


def test_config_from_dict_names_unknown_and_missing_fields():
    with pytest.raises(TubeletError, match=r"\['speed'\]"):
        TrainConfig.from_dict({"batch": 1, "steps": 1, "speed": 2})
    with pytest.raises(TubeletError, match="batch"):
        TrainConfig.from_dict({"steps": 1})


# -- learning rate and seeds


def test_learning_rate_warms_up_and_follows_half_a_cosine():
    made = config(steps=100, learning_rate=2.0, warmup=0.1, final_ratio=0.25)
    rates = [learning_rate(made, Schedule(100), step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    assert max(rates) == rates[9] == 2.0
    assert rates[54] == pytest.approx(2.0 * (1 + 0.25) / 2)
    assert rates[-1] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))


def test_learning_rate_goes_on_from_the_measuring_steps():
    made = config(steps=None, minutes=1, learning_rate=1.0, warmup=0.1)
    before = [learning_rate(made, Schedule(None), step) for step in range(30)]
    after = [learning_rate(made, Schedule(1000, 30), step) for step in range(1000)]
    assert before == after[:30] == pytest.approx([i / MEASURING_RAMP for i in range(1, 31)])
    # The rest of the warm-up is one straight line from there to the peak at step 100.
    rises = [b - a for a, b in itertools.pairwise(after[29:100])]
    assert rises == pytest.approx([rises[0]] * len(rises))
    assert after[99] == pytest.approx(1.0)
    assert after[100] < 1.0
    # A shorter warm-up still takes as many steps again as were measured.
    short = config(steps=None, minutes=1, learning_rate=1.0, warmup=0.0)
    rates = [learning_rate(short, Schedule(1000, 30), step) for step in range(1000)]
    assert rates.index(max(rates)) == 59


def test_learning_rate_of_a_run_that_ends_right_after_measuring():
    made = config(steps=None, minutes=1, learning_rate=1.0)
    assert all(0 < learning_rate(made, Schedule(31, 30), step) <= 1 for step in range(31))


def test_batch_seeds_stay_below_the_test_seeds_and_differ():
    from tubelet.train.clips import TEST_SEED

    assert SEED_LIMIT == TEST_SEED
    triples = itertools.product((0, 1, 2**63 - 1), range(4), range(200))
    seeds = [batch_seed(*triple) for triple in triples]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 0
    assert max(seeds) < SEED_LIMIT
    # They fill the range: the mean of 2400 uniform draws lies within 5 sigma of the middle.
    assert abs(sum(seeds) / len(seeds) / SEED_LIMIT - 0.5) < 5 / math.sqrt(12 * len(seeds))


def test_each_step_gets_its_own_documented_seed_and_noise(tmp_path):
    objective = Regression()
    train(objective, config(steps=4, seed=3), tmp_path)
    assert objective.seeds == [batch_seed(3, 0, step) for step in range(4)]
    draws = [
        float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
        for seed in objective.seeds
    ]
    assert objective.draws == draws


# -- optimisation


def test_it_learns_and_says_how(tmp_path):
    calls = []
    result = train(
        Regression(),
        config(steps=300, learning_rate=0.05, ema=0.9, weight_decay=0.0),
        tmp_path,
        progress=lambda *call: calls.append(call),
    )
    assert result.curve["loss"][-1] < 1e-3 < 1 < result.curve["loss"][0]
    assert result.metrics["size"] == pytest.approx(4, abs=0.1)
    assert result.steps == result.planned_steps == 300
    lines = read_log(tmp_path / "log.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(5, 301, 5))
    assert {"step", "seconds", "loss", "lr", "grad_norm", "clips_per_second", "metrics"} == {
        *steps[0]
    }
    assert lines[-1] == {"step": 300, "evaluation": result.metrics}
    assert calls[0][1:] == (5, 300)
    assert "left" in calls[0][0]


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path):
    objective = Regression()
    losses = []
    plain = objective.loss

    def loss(*args):
        out = plain(*args)
        losses.append((out[0].item(), out[1]["error"].item()))
        return out

    objective.loss = loss
    train(objective, config(steps=10), tmp_path)
    for line, part in zip(read_log(tmp_path / "log.jsonl"), (losses[:5], losses[5:]), strict=False):
        assert line["loss"] == pytest.approx(sum(a for a, _ in part) / 5)
        assert line["metrics"]["error"] == pytest.approx(sum(b for _, b in part) / 5)


class Zoo(nn.Module):
    """One of each kind of parameter, none of which gets a gradient but zero."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv3d(1, 2, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(3, 4)
        self.positions = nn.Parameter(torch.ones(1, 5, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_only_weight_matrices_are_decayed(tmp_path):
    class Still(Regression):
        def loss(self, batch, step, generator):
            total = sum(p.sum() for p in self.model.parameters() if p.requires_grad)
            return 0.0 * total, {}

    model = Zoo()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(Still(model), config(weight_decay=1.0, learning_rate=0.01, ema=None), tmp_path)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {
        "linear.weight",
        "conv.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert (model.linear.weight.abs() < before["linear.weight"].abs()).all()


def test_frozen_parameters_stay(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1))
    before = model[0].weight.clone()
    train(Regression(model), config(), tmp_path)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(TubeletError, match="nothing to train"):
        train(Regression(model.requires_grad_(False)), config(), tmp_path / "b")


def test_gradients_are_clipped_to_the_norm(tmp_path):
    norms = []

    def see(optimizer, args, kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(nn.utils.get_total_norm(grads)))

    hook = register_optimizer_step_pre_hook(see)
    try:
        train(Regression(scale=1e4), config(steps=5, clip_norm=0.5), tmp_path)
    finally:
        hook.remove()
    assert norms == pytest.approx([0.5] * 5, rel=1e-4)
    # The log tells the norm before clipping.
    assert read_log(tmp_path / "log.jsonl")[0]["grad_norm"] > 100


def test_the_average_is_evaluated_and_kept(tmp_path):
    objective = Regression()
    train(objective, config(steps=12, ema=0.5, eval_every=6, learning_rate=0.1), tmp_path)
    assert len(objective.evaluated) == 2
    average = [p.clone() for p in objective.history[0]]
    # history[i] are the weights before step i, so after step i - 1.
    for step in range(6):
        decay = min(0.5, (1 + step) / (10 + step))
        now = objective.history[step + 1]
        average = [decay * a + (1 - decay) * b for a, b in zip(average, now, strict=True)]
    for mine, seen in zip(average, objective.evaluated[0], strict=True):
        assert torch.allclose(mine, seen, atol=1e-6)
        assert not torch.allclose(seen, objective.history[6][0].reshape(-1)[0], atol=1e-4)
    # The model ends with the average that was evaluated, ready to be saved.
    for kept, seen in zip(objective.model.parameters(), objective.evaluated[1], strict=True):
        assert torch.equal(kept, seen)
    assert not objective.model.training


def test_evaluation_in_between_changes_nothing(tmp_path):
    class Rude(Regression):
        def evaluate(self):
            torch.rand(3)
            return super().evaluate()

    plain, watched = Regression(), Rude()
    train(plain, config(), tmp_path / "a")
    train(watched, config(eval_every=3), tmp_path / "b")
    assert len(watched.evaluated) == 7
    for a, b in zip(plain.history, watched.history, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_without_average_the_last_weights_are_evaluated(tmp_path):
    objective = Regression()
    train(objective, config(ema=None), tmp_path)
    assert not torch.equal(objective.history[-1][0], objective.evaluated[0][0])
    assert torch.equal(objective.model.weight, objective.evaluated[0][0])


def test_bf16_runs_the_loss_under_autocast_and_keeps_fp32_weights(tmp_path):
    kinds = []

    class Watching(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            kinds.append(out.dtype)
            return out

    model = Watching(4, 1)
    train(Regression(model), config(steps=1, precision="bf16"), tmp_path / "a")
    train(Regression(model), config(steps=1), tmp_path / "b")
    assert kinds == [torch.bfloat16, torch.float32]
    assert model.weight.dtype == torch.float32


def test_compile_is_asked_of_the_objective_only_when_wanted(tmp_path):
    class Compiling(Regression):
        compiled = 0

        def compile(self):
            self.compiled += 1

    plain, fast = Compiling(), Compiling()
    train(plain, config(steps=1), tmp_path / "a")
    train(fast, config(steps=1, compile=True), tmp_path / "b")
    assert (plain.compiled, fast.compiled) == (0, 1)


def test_global_randomness_is_left_alone(tmp_path):
    objective = Regression()
    before = torch.get_rng_state()
    train(objective, config(steps=2), tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


# -- clear errors


@pytest.mark.parametrize("loss", [torch.ones(3, requires_grad=True) * 1, torch.ones(())])
def test_a_loss_that_cannot_be_minimised_is_refused(tmp_path, loss):
    objective = Regression()
    objective.loss = lambda *_: (loss, {})
    with pytest.raises(ShapeError, match="return a scalar that depends on the model"):
        train(objective, config(), tmp_path)


def test_devices_are_checked(tmp_path):
    with pytest.raises(TubeletError, match="on meta, this process trains on cpu"):
        train(Regression(nn.Linear(4, 1, device="meta")), config(), tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="no CUDA GPU"):
            train(Regression(), config(device="cuda"), tmp_path)


# -- the budget, on a clock of its own


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    made = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    return made


class Timed(Regression):
    """Takes a given number of seconds per step, and long to compile and to evaluate."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.takes = clock, seconds

    def loss(self, batch, step, generator):
        self.clock.now += 500.0 if step == 0 else self.takes(step)
        return super().loss(batch, step, generator)

    def evaluate(self):
        self.clock.now += 1000.0
        return super().evaluate()


def test_minutes_fix_the_number_of_steps_from_the_measured_speed(tmp_path, clock):
    objective = Timed(clock, lambda step: 0.125)
    result = train(objective, config(steps=None, minutes=0.5, eval_every=100), tmp_path)
    # 30 s of 0.125 s, after 3 steps that are not timed.
    assert result.steps == result.planned_steps == 243
    assert result.seconds == pytest.approx(30.0)
    assert result.samples_per_second == pytest.approx(64.0)
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines if "note" in line] == [34]
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert rates[30] == pytest.approx(30 / MEASURING_RAMP * 1e-3)
    assert rates[70] > 0.9e-3
    assert rates[243] == pytest.approx(1e-5)
    assert {line["clips_per_second"] for line in lines if "lr" in line} == {64.0}


def test_a_run_that_becomes_slow_ends_early_and_says_so(tmp_path, clock):
    objective = Timed(clock, lambda step: 0.125 if step < 150 else 0.25)
    result = train(objective, config(steps=None, minutes=0.5), tmp_path)
    assert (result.steps, result.planned_steps) == (203, 243)
    assert 1.05 * 30 < result.seconds <= 1.05 * 30 + 0.25
    warnings = [line for line in read_log(tmp_path / "log.jsonl") if "warning" in line]
    assert warnings[0]["step"] == 203
    assert "stopped before step 243" in warnings[0]["warning"]
    assert objective.evaluated
    again = Timed(clock, lambda step: 0.125)
    resumed = train(again, config(steps=None, minutes=0.5), tmp_path, resume=True)
    assert resumed.steps == 203
    assert again.history == []
    assert torch.equal(again.model.weight, objective.model.weight)


def test_steps_longer_than_the_budget_end_it(tmp_path, clock):
    result = train(Timed(clock, lambda _: 60), config(steps=None, minutes=0.5), tmp_path)
    assert result.steps == 4


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_shortest_runs_are_timed_too(tmp_path, clock, steps):
    result = train(Timed(clock, lambda _: 2.0), config(steps=steps), tmp_path)
    assert result.seconds == {1: 500.0, 2: 2.0, 5: 4.0}[steps]
    assert result.samples_per_second > 0
