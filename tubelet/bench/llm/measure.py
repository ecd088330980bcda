"""Measuring one model: the dense run, then each recipe predicted, observed and timed against it."""

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tubelet.bench.compare import Progress
from tubelet.bench.generators.combinations import Combination, name_of
from tubelet.bench.llm.clock import Split, StageClock
from tubelet.bench.llm.inputs import Task, make_prompts
from tubelet.bench.llm.result import Agreement, Kept, Row, Throughput
from tubelet.bench.llm.work import Work, bound, count_work
from tubelet.bench.measure import interleaved, median, peak_memory, seconds
from tubelet.core.errors import TubeletError
from tubelet.core.recipe import Recipe
from tubelet.models.accelerate import accelerate
from tubelet.models.catalogue import adapter_for
from tubelet.models.llm_presets import LoadedLLM

Announce = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One greedy answer.

    Args:
        tokens: [B, T] ids.
        logits: [B, V] float32 of the first token.
    """

    tokens: Tensor
    logits: Tensor


class LLMBench:
    """One model and one task.

    Args:
        loaded: The model.
        task: What every variant answers.
        device: Where the model is.
        repeats: Timed rounds of dense and recipe in turns.
        new_tokens: Answer tokens behind the first.
        concurrencies: Batches whose throughput is measured.
        progress: Told what happens.
        announce: Told each bound before anything is timed, and the measurement after it.
    """

    def __init__(
        self,
        loaded: LoadedLLM,
        task: Task,
        device: torch.device,
        *,
        repeats: int,
        new_tokens: int,
        concurrencies: Sequence[int],
        progress: Progress,
        announce: Announce,
    ) -> None:
        self.loaded, self.model, self.task, self.device = loaded, loaded.model, task, device
        self.repeats, self.new_tokens = repeats, new_tokens
        self.concurrencies = concurrencies
        self.progress, self.announce = progress, announce
        self.text = adapter_for(self.model).text_model(self.model)
        self.inputs = make_prompts(loaded, task, 1)
        self.reference: Answer | None = None
        self.base: Row | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of one prompt, video and text."""
        return self.inputs["input_ids"].shape[1]

    # Variants

    def dense(self) -> Row:
        """The reference of all others.

        Raises:
            TubeletError: The model does not answer the prompt at all.
        """
        self.progress("dense: warming up", 0, 1)
        row, tokens = Row(name="dense"), [float(self.prompt_tokens)] * len(self.text.layers)
        try:
            work = self._count(tokens)
            self.announce(
                f"dense: {self.prompt_tokens:,} tokens, {work.vision / 1e12:.4g} TFLOP of vision "
                f"tower and {work.llm / 1e12:.4g} TFLOP of language model to the first token"
            )
            row.tokens_per_layer, row.work, row.bound = tokens, work.to_dict(), 1.0
            self.reference = self._observe((), row)
            row.kept = Kept(entering=1, layers=1, operations=1, cache=1)
            row.agreement = Agreement(kl=0.0, first=True, match=1.0)
            self._time((), row)
            self._throughputs((), row)
        except Exception as error:
            self._free()
            raise TubeletError(f"the dense model was not measured: {reason(error)}") from error
        self.base = row
        return row

    def attempt(self, recipes: Combination) -> Row:
        """A recipe's row, or one with what stopped it: building the model again takes minutes."""
        name = name_of(recipes)
        row = Row(name=name, recipes=[recipe.to_dict() for recipe in recipes])
        try:
            self._measure(recipes, row)
        except Exception as error:
            row.error = reason(error)
            self.announce(f"{name}: not measured: {row.error}")
        self._free()
        return row

    def _measure(self, recipes: Combination, row: Row) -> None:
        self.progress(f"{row.name}: warming up", 0, 1)
        answer = self._observe(recipes, row)
        assert self.base is not None
        densities = by_layer(row.report["densities"])
        if densities:
            row.density = sum(densities.values()) / len(densities)
        work = self._count(row.tokens_per_layer, densities)
        whole = Work(**{f.name: self.base.work[f.name] for f in dataclasses.fields(Work)})
        row.work, row.bound = work.to_dict(), bound(whole, work)
        row.kept = self._kept(row, work, whole)
        row.agreement = self._agreement(answer)
        self.announce(f"{row.name}: {_keeping(row)}: at most {row.bound:.2f}x to the first token")
        self._time(recipes, row)
        self.announce(
            f"{row.name}: measured {row.speedup:.2f}x, {row.of_bound:.0%} of the bound; deciding "
            f"takes {row.plan_share:.2%}"
        )
        self._throughputs(recipes, row)

    # Parts of a variant

    def _observe(self, recipes: Combination, row: Row) -> Answer:
        """Everything but time: answer, report, cache, memory. Also the warm-up."""
        with self._on_model(recipes) as handle:
            answer = self._answer(self.inputs, 1 + self.new_tokens)
            if handle is not None:
                row.report = handle.report().to_dict()
                whole = [float(self.prompt_tokens)] * len(self.text.layers)
                row.tokens_per_layer = row.report["tokens_per_layer"] or whole
            kept: list[Any] = []
            row.memory = peak_memory(
                lambda: kept.append(self._generate(self.inputs, 1).past_key_values), self.device
            )
            row.cache_bytes = cache_bytes(kept[0])
        if not bool(answer.logits.isfinite().all()):
            raise TubeletError("the logits of the first token are not finite")
        return answer

    def _time(self, recipes: Combination, row: Row) -> None:
        """First token and whole answer, in turns with the dense model."""
        variants = [(), recipes] if recipes else [()]
        splits: list[list[Split]] = [[] for _ in variants]

        def first(number: int) -> Callable[[], float]:
            def run() -> float:
                with StageClock(self.model, self.text, self.device) as clock:
                    watched = [clock.watched(recipe) for recipe in variants[number]]
                    with self._on_model(watched):
                        split = clock.first_token(lambda: self._generate(self.inputs, 1))
                splits[number].append(split)
                return split.total

            return run

        def whole(number: int) -> Callable[[], float]:
            def run() -> float:
                with self._on_model(variants[number]):
                    return seconds(
                        lambda: self._generate(self.inputs, 1 + self.new_tokens), self.device
                    )

            return run

        def turns(make: Callable[[int], Callable[[], float]], what: str) -> list[list[float]]:
            runs = [make(number) for number in range(len(variants))]
            return interleaved(
                runs, self.repeats, lambda: self.progress(f"{row.name}: {what}", 0, 1)
            )

        short, long = turns(first, "first token"), turns(whole, "answer")
        row.first_samples, row.dense_samples = short[-1], short[0]
        row.first = median(short[-1])
        row.speedup = median(short[0]) / row.first
        row.split, row.dense_split = middle(splits[-1]), middle(splits[0])
        rates = [self._rate(a, b) for a, b in zip(short, long, strict=True)]
        row.decode = rates[-1]
        if rates[0] is not None and rates[-1] is not None:
            row.decode_speedup = rates[-1] / rates[0]
        if 1 in self.concurrencies:
            alone = Throughput(concurrency=1, together=1, **self._requests(1, median(long[-1])))
            ratio = median(long[0]) / median(long[-1])
            row.throughput.append(dataclasses.replace(alone, over_dense=ratio))

    def _rate(self, short: Sequence[float], long: Sequence[float]) -> float | None:
        """Tokens per second behind the first; None where noise is longer than the answer."""
        spent = median(long) - median(short)
        return self.new_tokens / spent if spent > 0 else None

    def _throughputs(self, recipes: Combination, row: Row) -> None:
        for batch in self.concurrencies:
            if batch != 1:
                row.throughput.append(self._throughput(recipes, row.name, batch))

    def _throughput(self, recipes: Combination, name: str, batch: int) -> Throughput:
        """All prompts at once, or in the largest parts that memory allows."""
        why = ""
        for together in _parts(batch):
            try:
                spent = self._serve(recipes, name, batch, together)
            except torch.OutOfMemoryError as error:
                why = reason(error)
                self._free()
            except Exception as error:
                why = reason(error)
                break
            else:
                rates = self._requests(batch, spent)
                dense = rates["requests"] if self.base is None else self._dense_requests(batch)
                ratio = None if dense is None else rates["requests"] / dense
                return Throughput(concurrency=batch, together=together, over_dense=ratio, **rates)
        found = Throughput(concurrency=batch, error=why)
        self.announce(f"{name}: {batch} prompts at once: {found.error}")
        self._free()
        return found

    def _serve(self, recipes: Combination, name: str, batch: int, together: int) -> float:
        """Seconds for `batch` answers, `together` at once, behind a batch that warms up."""
        inputs = make_prompts(self.loaded, self.task, together)
        spent = []
        with self._on_model(recipes):
            for number in range(1 + batch // together):
                self.progress(f"{name}: {batch} prompts, {together} at once", number, None)
                spent.append(
                    seconds(lambda: self._generate(inputs, 1 + self.new_tokens), self.device)
                )
        return sum(spent[1:])

    def _requests(self, batch: int, spent: float) -> dict[str, float]:
        answers = batch / spent
        tokens = answers * (1 + self.new_tokens)
        return {"seconds": spent, "requests": answers, "tokens": tokens}

    def _dense_requests(self, batch: int) -> float | None:
        assert self.base is not None
        return next(e.requests for e in self.base.throughput if e.concurrency == batch)

    # Pieces

    def _on_model(self, recipes: Sequence[Recipe]) -> AbstractContextManager[Any]:
        return accelerate(self.model, *recipes) if recipes else nullcontext()

    def _generate(self, inputs: dict[str, Tensor], num: int, **options: Any) -> Any:
        """A greedy answer of exactly `num` tokens to each prompt."""
        return self.model.generate(
            **inputs,
            max_new_tokens=num,
            min_new_tokens=num,
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )

    def _answer(self, inputs: dict[str, Tensor], num: int) -> Answer:
        result = self._generate(inputs, num, output_logits=True)
        tokens = result.sequences[:, inputs["input_ids"].shape[1] :]
        return Answer(tokens=tokens, logits=result.logits[0].float())

    def _count(self, tokens: Sequence[float], densities: Mapping[int, float] | None = None) -> Work:
        return count_work(self.model.config, self.task.grid, tokens, densities)

    def _kept(self, row: Row, work: Work, whole: Work) -> Kept:
        assert self.base is not None
        assert self.base.cache_bytes is not None
        assert row.cache_bytes is not None
        video = self.task.grid.num_video
        text = self.prompt_tokens - video
        shares = [(tokens - text) / video for tokens in row.tokens_per_layer]
        return Kept(
            entering=shares[0],
            layers=sum(shares) / len(shares),
            operations=work.llm / whole.llm,
            cache=row.cache_bytes / self.base.cache_bytes,
        )

    def _agreement(self, answer: Answer) -> Agreement:
        assert self.reference is not None
        a, b = (x.logits.double().log_softmax(-1) for x in (self.reference, answer))
        same = (self.reference.tokens == answer.tokens)[0]
        return Agreement(
            # Rounding may push the sum a little below zero.
            kl=max(float((a.exp() * (a - b)).sum()), 0.0),
            first=bool(same[0]),
            match=float(same.int().cumprod(0).sum()) / len(same),
        )

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _parts(batch: int) -> list[int]:
    """Equal parts of a batch, each at most half of the one before."""
    found = [batch]
    while found[-1] > 1:
        found.append(max(n for n in range(1, found[-1] // 2 + 1) if batch % n == 0))
    return found


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache of transformers holds.

    Layers that pack them say so themselves (`nbytes`); of all others each storage counts once.
    """
    storages: dict[int, int] = {}
    packed = 0
    for layer in cache.layers:
        if hasattr(layer, "nbytes"):
            packed += layer.nbytes()
            continue
        for tensor in vars(layer).values():
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return packed + sum(storages.values())


def by_layer(calls: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Mean density of the sparse calls of each layer, from `Report.densities`."""
    seen: dict[int, list[float]] = {}
    for call in calls:
        seen.setdefault(call["layer"], []).extend(call["heads"])
    return {layer: sum(shares) / len(shares) for layer, shares in seen.items()}


def _keeping(row: Row) -> str:
    assert row.kept is not None
    shares = f"{row.kept.entering:.1%} of the video tokens ({row.kept.layers:.1%} over the layers)"
    attending = "" if row.density is None else f" and attends at density {row.density:.3f}"
    return f"keeps {shares}{attending}"


def middle(splits: Sequence[Split]) -> dict[str, float]:
    """Medians of each part."""
    names = [f.name for f in dataclasses.fields(Split)]
    return {name: median([getattr(split, name) for split in splits]) for name in names}


def reason(error: Exception) -> str:
    """One line that says what stopped a case."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
