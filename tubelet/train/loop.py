"""The training loop: AdamW, a cosine, an average of the weights, and runs that can be resumed."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tubelet.core.errors import ShapeError, TubeletError
from tubelet.train import checkpoint as checkpoints
from tubelet.train import log as logs
from tubelet.train.config import Schedule, TrainConfig, batch_seed, learning_rate
from tubelet.train.curves import curve_summary
from tubelet.train.distributed import World, open_world
from tubelet.train.optimise import Average, make_optimizer
from tubelet.train.timing import SpeedMeasure, Stopwatch, Tally, merged_means

CONFIG_FILE = "config.json"

WARM_STEPS = 3
"""First steps of a process, which compile and allocate; they are not timed."""

GRACE = 1.05
"""Training ends early, and says so, when it takes this many times its budget."""

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, steps done, and steps in all (None while being measured)."""


class Objective(Protocol):
    """What is trained, and for what.

    Attributes:
        model: Its parameters that require gradients are trained. It is on the run's device.

    Two more are used when there: `compile()`, called instead of `model.compile()` when the
    configuration asks for compilation, and `identity`, a dict of plain values (task, sizes) that
    a checkpoint keeps and that must be the same when the run is resumed.
    """

    model: nn.Module

    def batch(self, seed: int) -> Any:
        """A training batch on the device, decided by `seed` in [0, 2**40)."""
        ...

    def loss(
        self, batch: Any, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss, and metrics as detached 0-dim tensors on the device.

        Called under autocast when precision is bf16. `generator` lives on the device and is
        seeded anew for each step, as is torch's global one.
        """
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures of the averaged weights, which are in the model during the call.

        Called on rank 0 only, without gradients, in eval mode and under the run's precision.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What came of a run.

    Args:
        steps: Steps done, over all resumed parts.
        planned_steps: Steps that the learning rate was laid out for; more than `steps` only if
            the run was cut short because its time was over.
        seconds: Training time without compilation and evaluation.
        samples_per_second: Clips per second of training time, over all processes.
        curve: Short loss curve, see `curve_summary`; empty except on rank 0.
        metrics: What `Objective.evaluate` returned at the end.
        checkpoint: The final checkpoint.
    """

    steps: int
    planned_steps: int
    seconds: float
    samples_per_second: float
    curve: dict[str, list[float | None]]
    metrics: dict[str, float]
    checkpoint: Path

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record, without the path."""
        return {name: value for name, value in asdict(self).items() if name != "checkpoint"}


def train(
    objective: Objective,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train `objective.model` in place; on return it is in eval mode with its averaged weights.

    Writes `config.json`, `log.jsonl` and `checkpoint.pt` to `out`. A resumed run continues bit
    for bit on the same hardware. torch's global generators are left as they were. Under torchrun
    every process calls this; enter `open_world(config.device)` first to know the device.

    With `minutes`, the first steps (after those that compile) measure the speed, the number of
    steps is fixed from it, and only if time runs out by 5 % is the run ended before that number.

    Args:
        objective: What to train.
        config: How.
        out: Folder of the run, made when missing. Several machines must share it.
        resume: Go on from the checkpoint in `out`.
        progress: Called at every log line.

    Raises:
        TubeletError: `out` holds a run and `resume` is False, a loss or gradient is not finite,
            or the last checkpoint cannot be written.
        ModelError: With `resume`, there is no checkpoint, or a damaged or another run's one.
        ShapeError: The loss is no scalar that depends on the model.
        UnsupportedError: The device does not exist.
    """
    with open_world(config.device) as world, _own_randomness(world.device):
        run = _Run(objective, config, Path(out), world, progress)
        try:
            run.start(resume)
            run.loop()
            return run.finish()
        finally:
            run.log.close()


class _Run:
    """State of one call of `train`."""

    def __init__(
        self,
        objective: Objective,
        config: TrainConfig,
        out: Path,
        world: World,
        progress: Progress | None,
    ) -> None:
        self.objective, self.config, self.out, self.world = objective, config, out, world
        self.model = objective.model
        self.progress = progress if progress is not None and world.first else None
        self.path = out / checkpoints.FILE
        self.log = logs.Log(None)
        _check_device(self.model, world.device)
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if not named:
            raise TubeletError("no parameter of the model requires gradients; nothing to train")
        self.trained = list(named)
        self.parameters = list(named.values())
        self.optimizer = make_optimizer(self.model, config)
        self.average = Average(named, config.ema) if config.ema is not None else None
        self.generator = torch.Generator(device=world.device)
        self.identity = _plain(getattr(objective, "identity", {}))
        self.schedule = Schedule(config.steps)
        self.end = config.steps
        self.step = self.timed_steps = self.last_saved = 0
        self.watch = Stopwatch(world.device)
        self.tally = Tally(world.device)
        self.saved_at = time.monotonic()
        self.reported = (0, 0.0)

    def start(self, resume: bool) -> None:
        """Read or refuse what is in the folder, share the weights, open the log, compile."""
        if resume:
            self._restore(checkpoints.read_checkpoint(self.path))
        elif self.world.from_first(self.path.exists()):
            raise TubeletError(
                f"{self.out} already holds a run; resume it, or choose another folder"
            )
        self.world.share_weights(self.model)
        if self.average is not None and not resume:
            self.average.restart()
        if self.world.first:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TubeletError(f"cannot make folder {self.out}: {error.strerror}") from None
            self.config.to_json(self.out / CONFIG_FILE)
            self.log = logs.Log(self.out / logs.FILE, self.step if resume else None)
        if self.config.compile:
            getattr(self.objective, "compile", self.model.compile)()
        self.model.train()

    def loop(self) -> None:
        """All steps that are left."""
        left = math.inf if self.end is None else self.end - self.step
        # A run of one or two steps times its last one rather than nothing.
        untimed = self.step + int(max(0, min(WARM_STEPS, left - 1)))
        measure = SpeedMeasure(self.config.minutes) if self.end is None else None
        self.reported = (self.timed_steps, self.watch.seconds)
        if self.step == untimed:
            self.watch.resume()
        while self.end is None or self.step < self.end:
            self._train_step()
            if self.step == untimed:
                self.watch.resume()
            elif self.step > untimed:
                self.timed_steps += 1
                if self.end is None and measure is not None:
                    self._fix_steps(measure)
            self._keep_to_budget()
            if self.step == self.end or self.step % self.config.log_every == 0:
                self._report()
            every = self.config.eval_every
            if every and self.step % every == 0 and self.step != self.end:
                self._evaluate()
        self.watch.pause()

    def finish(self) -> TrainResult:
        """Last checkpoint, averaged weights for good, last evaluation."""
        self._save_last()
        metrics = self._evaluate()
        if self.average is not None:
            self.average.apply()
        self.model.eval()
        self.log.close()
        records = logs.read_log(self.out / logs.FILE) if self.world.first else []
        clips = self.timed_steps * self.config.batch * self.world.size
        seconds = self.watch.seconds
        return TrainResult(
            steps=self.step,
            planned_steps=self.schedule.total or self.step,
            seconds=seconds,
            samples_per_second=clips / seconds if seconds else 0.0,
            curve=curve_summary(records),
            metrics=metrics,
            checkpoint=self.path,
        )

    def _train_step(self) -> None:
        step = self.step
        seed = batch_seed(self.config.seed, self.world.rank, step)
        # Dropout draws from the global generators, so a resumed run needs them seeded as well.
        torch.manual_seed(seed)
        self.generator.manual_seed(seed)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.schedule, step)
        batch = self.objective.batch(seed)
        with self._precision():
            loss, metrics = self.objective.loss(batch, step, self.generator)
        if loss.ndim or not loss.requires_grad:
            raise ShapeError(
                f"the loss has shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}; "
                "return a scalar that depends on the model"
            )
        loss.backward()
        self.world.average_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(step)
        values = {**metrics, "loss": loss, "grad_norm": norm}
        self.tally.add(step, values, finite=("loss", "grad_norm"))
        self.step += 1

    def _fix_steps(self, measure: SpeedMeasure) -> None:
        """Once the speed is known, decide how many steps fit the budget."""
        if self.timed_steps != measure.next_look:
            return
        # One clock for all, or processes would disagree on where the next block ends.
        more = measure.look(self.timed_steps, self.world.from_first(self.watch.drained()))
        if more is not None:
            self.end = self.step + more
            self.schedule = Schedule(self.end, self.step)
            self.log.write(step=self.step, note=f"{self.end} steps fit {self.config.minutes} min")

    def _keep_to_budget(self) -> None:
        """End the run at this step when its time is over."""
        minutes = self.config.minutes
        if minutes is None or self.step == self.end:
            return
        # Processes must agree, which costs a round trip: only where they wait anyway.
        if self.world.size > 1 and self.step % self.config.log_every:
            return
        if not self.world.from_first(self.watch.seconds > GRACE * 60 * minutes):
            return
        self.end = self.step
        if self.schedule.total is None:
            self.schedule = Schedule(self.step, self.step)
        self.log.write(
            step=self.step,
            warning=f"stopped before step {self.schedule.total}: {GRACE} x the budget of "
            f"{minutes} min has passed; the learning rate had not come down to its end",
        )

    def _report(self) -> None:
        """One log line; stops at a loss that is not finite; a checkpoint when one is due."""
        values, bad = merged_means(self.world.gather(self.tally.read()))
        self.tally = Tally(self.world.device)
        if bad is not None:
            kept = f"; the checkpoint of step {self.last_saved} is kept" if self.last_saved else ""
            raise TubeletError(f"loss or gradient of step {bad} is not finite{kept}")
        seconds = self.watch.seconds
        steps, spent = self.timed_steps - self.reported[0], seconds - self.reported[1]
        self.reported = (self.timed_steps, seconds)
        clips = steps * self.config.batch * self.world.size
        self.log.write(
            step=self.step,
            seconds=round(seconds, 3),
            loss=values.pop("loss"),
            lr=self.optimizer.param_groups[0]["lr"],
            grad_norm=values.pop("grad_norm"),
            clips_per_second=round(clips / spent, 1) if spent > 0 else None,
            metrics=values,
        )
        self._tell()
        if self.end is not None and self.step < self.end:
            self._save_if_due()

    def _tell(self) -> None:
        if self.progress is None:
            return
        what = "training"
        if self.end is not None and self.timed_steps:
            left = (self.end - self.step) * self.watch.seconds / self.timed_steps
            what = f"training, {logs.duration(left)} left"
        self.progress(what, self.step, self.end)

    def _save_if_due(self) -> None:
        due = time.monotonic() - self.saved_at >= 60 * self.config.checkpoint_minutes
        if not (due and self.world.first):
            return
        self.saved_at = time.monotonic()
        try:
            self._save()
        except OSError as error:
            self.log.write(step=self.step, warning=f"no checkpoint: {self._unsaved(error)}")

    def _save_last(self) -> None:
        if self.step == self.last_saved:
            return
        problem = None
        if self.world.first:
            try:
                self._save()
            except OSError as error:
                problem = self._unsaved(error)
                self.log.write(step=self.step, warning=f"no last checkpoint: {problem}")
        problem = self.world.from_first(problem)
        if problem is not None:
            raise TubeletError(f"the trained weights could not be written: {problem}")

    def _unsaved(self, error: OSError) -> str:
        kept = f"the weights of step {self.last_saved} survive at {self.path}"
        if not self.last_saved:
            kept = "no earlier checkpoint exists"
        return f"{error.strerror or error}; {kept}"

    def _save(self) -> None:
        checkpoints.write_checkpoint(
            self.path,
            checkpoints.Checkpoint(
                step=self.step,
                total=self.schedule.total,
                end=self.end,
                measured=self.schedule.measured,
                seconds=self.watch.seconds,
                timed_steps=self.timed_steps,
                processes=self.world.size,
                config=self.config.to_dict(),
                identity=self.identity,
                model=self.model.state_dict(),
                trained=self.trained,
                average=self.average.weights if self.average is not None else None,
                optimizer=self.optimizer.state_dict()["state"],
            ),
        )
        self.last_saved = self.step

    def _restore(self, saved: checkpoints.Checkpoint) -> None:
        checkpoints.check_resumable(
            self.path,
            saved,
            config=self.config.to_dict(),
            identity=self.identity,
            processes=self.world.size,
            model=self.model,
        )
        self.model.load_state_dict(saved.model)
        # Settings come from the configuration; fused or not depends on this machine.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved.optimizer, "param_groups": groups})
        if self.average is not None:
            self.average.load(saved.average)
        self.step = self.last_saved = saved.step
        self.schedule = Schedule(saved.total, saved.measured)
        self.end = saved.end
        self.timed_steps = saved.timed_steps
        self.watch.add(saved.seconds)

    def _evaluate(self) -> dict[str, float]:
        """Figures with the averaged weights, off the clock, from rank 0."""
        running = self.watch.pause()
        metrics: dict[str, float] = {}
        if self.world.first:
            if self.progress is not None:
                self.progress("evaluating", self.step, self.end)
            with self._evaluating(), torch.no_grad(), self._precision():
                metrics = {name: float(v) for name, v in self.objective.evaluate().items()}
            self.log.write(step=self.step, evaluation=metrics)
        metrics = self.world.from_first(metrics)
        if running:
            self.watch.resume()
        return metrics

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.model.eval()
        try:
            with self.average.applied() if self.average is not None else nullcontext():
                yield
        finally:
            self.model.train()

    def _precision(self) -> torch.autocast:
        on = self.config.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=on)


def _check_device(model: nn.Module, device: torch.device) -> None:
    found = {parameter.device for parameter in model.parameters()}
    if found - {device}:
        places = ", ".join(sorted(map(str, found)))
        raise TubeletError(f"the model is on {places}, this process trains on {device}; move it")


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    try:
        # Tuples become lists, as they will be when read back.
        return json.loads(json.dumps(identity))
    except (TypeError, ValueError) as error:
        raise TubeletError(f"identity of the objective must be plain values: {error}") from None


def _own_randomness(device: torch.device) -> AbstractContextManager[None]:
    return torch.random.fork_rng([device.index] if device.type == "cuda" else [])
