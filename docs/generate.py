"""Write the generated parts of README.md and docs/*.md from the code and the results.

python docs/generate.py            write them
python docs/generate.py --check    exit 1 if they are out of date
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tubelet.bench.answers.result import read_answers
from tubelet.bench.answers.tables import markdown as answers_tables
from tubelet.bench.attention.result import read_runs as read_attention
from tubelet.bench.attention.tables import forwards, layers
from tubelet.bench.attention.tables import markdown as attention_tables
from tubelet.bench.fidelity.generation_curve_tables import curves_markdown
from tubelet.bench.fidelity.generation_result import read_generation
from tubelet.bench.fidelity.generation_tables import generation_table
from tubelet.bench.fidelity.result import read_runs
from tubelet.bench.fidelity.summary import average_standings, core_tasks
from tubelet.bench.fidelity.tables import docs_table, percent
from tubelet.bench.llm.result import read_runs as read_llm
from tubelet.bench.llm.table import markdown as llm_tables
from tubelet.bench.matrix import methods, support
from tubelet.nn.weights import load_weights, read_card, shipped
from tubelet.train.questions import KINDS

ROOT = Path(__file__).resolve().parents[1]
TARGETS = tuple(
    ROOT / name
    for name in (
        "README.md",
        "docs/methods.md",
        "docs/figures.md",
        "docs/fidelity.md",
        "docs/models.md",
        "docs/sparse-attention.md",
        "docs/attention-figures.md",
        "docs/video-llms.md",
    )
)
RESULTS = ROOT / "bench" / "results"
HEADLINE = "videomae-base-cpu"


def methods_table() -> str:
    """Name, paper and first sentence of each recipe."""
    lines = ["| recipe | paper | what it does |", "|---|---|---|"]
    for row in methods():
        paper = f"[{row['paper']}]({row['url']})" if row["url"] else row["paper"]
        lines.append(f"| `{row['name']}` | {paper} | {row['summary']} |")
    return "\n".join(lines)


def support_table() -> str:
    """Recipes against models."""
    rows = support()
    lines = ["| recipe | " + " | ".join(row["model"] for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for name in rows[0]["recipes"]:
        marks = ["yes" if row["recipes"][name] is None else "-" for row in rows]
        lines.append(f"| {name} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def support_summary() -> str:
    """How many recipes of each stage a model takes."""
    stages = {row["name"]: row["stage"] for row in methods()}
    names = list(dict.fromkeys(stages.values()))
    lines = ["| model | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for row in support():
        cells = []
        for stage in names:
            those = [name for name in stages if stages[name] == stage]
            taken = sum(row["recipes"][name] is None for name in those)
            cells.append(f"{taken} of {len(those)}" if taken else "-")
        lines.append(f"| {row['model']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def refusals() -> str:
    """Why recipes do not run on models, each set of recipes with its reason and models once."""
    seen: dict[tuple[str, str], list[str]] = {}
    for row in support():
        for name, reason in row["recipes"].items():
            if reason is not None:
                seen.setdefault((row["model"], reason), []).append(name)
    grouped: dict[tuple[str, str], list[str]] = {}
    for (model, reason), names in seen.items():
        grouped.setdefault((", ".join(names), reason), []).append(model)
    return "\n".join(
        f"- {names} {'needs' if ',' not in names else 'need'} {reason.removeprefix('needs ')} "
        f"({'; '.join(models)})"
        for (names, reason), models in grouped.items()
    )


def details() -> str:
    """Fields of every recipe, with defaults and ranges."""
    parts = []
    for row in methods():
        identity = ", ".join(f"{k}={v!r}" for k, v in row["identity"].items())
        head = f"### {row['name']}\n\n{row['summary']}\n\nEquals the dense model at `{identity}`. "
        head += f"Verified against: {row['verified']}.\n"
        table = ["| field | default | range | meaning |", "|---|---|---|---|"]
        for field in row["fields"]:
            bounds = " and ".join(f"{sign} {bound}" for sign, bound in field["bounds"].items())
            shown = _short(field["default"])
            table.append(f"| `{field['name']}` | `{shown}` | {bounds or '-'} | {field['doc']} |")
        parts.append(head + "\n" + "\n".join(table))
    return "\n\n".join(parts)


def figures(names: list[str]) -> str:
    """Tables of result files, each with where it was measured."""
    return "\n\n".join(_figure(json.loads((RESULTS / f"{n}.json").read_text())) for n in names)


def _figure(data: dict[str, Any]) -> str:
    where = data["environment"]
    versions = where["versions"]
    head = f"**{data['model']}**, {data['input']}, {data['dtype']}, {where['hardware']}. "
    head += f"Medians of {data['repeats']} interleaved runs, random weights; torch "
    head += f"{versions['torch']}, transformers {versions['transformers']}, commit "
    head += f"`{where['commit'][:10]}`."
    columns = ["recipe", "tokens", "latency", "speed-up", "ceiling", "of ceiling", "overhead"]
    lines = [head, "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    full = data["rows"][0]["mean_tokens"]
    for row in data["rows"]:
        cells = [
            f"`{row['name']}`" if row["name"] != "dense" else "dense",
            f"{row['mean_tokens'] / full:.0%}",
            f"{row['latency'] * 1e3:.4g} ms",
            f"{row['speedup']:.2f}x",
            "-" if row["ceiling"] is None else f"{row['ceiling']:.2f}x",
            "-" if row["of_ceiling"] is None else f"{row['of_ceiling']:.0%}",
            "-" if row["overhead"] is None else f"{row['overhead']:.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fidelity() -> str:
    """Rankings, controls and advice of the committed fidelity run."""
    # Its own headings lie below the page's.
    return docs_table(read_runs(RESULTS / "fidelity" / "h200.json")).replace("#### ", "### ")


def fidelity_tasks(keep: float = 0.5) -> str:
    """What every recipe set to half of the tokens does on each task, on still texture."""
    (run,) = read_runs(RESULTS / "fidelity" / "h200.json")
    tasks = core_tasks(run, "static")
    lines = [f"| set to {keep:.0%} | {' | '.join(tasks)} |", "|---|" + "---:|" * len(tasks)]
    for name, line in run.variants.items():
        entries = [run.cell(task, "static").entries.get(name) for task in tasks]
        wanted = line.keep == keep or line.kind in ("dense", "small")
        if wanted and None not in entries:
            scores = [f"{float(e.scores.mean()):.1%}".replace("%", "") for e in entries]
            lines.append(f"| {name} | {' | '.join(scores)} |")
    return "\n".join(lines)


def fidelity_seeds() -> str:
    """Trained recipes over three training seeds, on the cells that all three were run on."""
    runs = read_runs(RESULTS / "fidelity" / "h200-seeds.json")
    cells = [", ".join(core_tasks(runs[0], name)) for name in runs[0].backgrounds]
    lines = [
        "| recipe | tokens | " + " | ".join(runs[0].backgrounds) + " |",
        "|---|---:|---:|---:|---:|",
    ]
    for share in (0.5, 0.25):
        rows = [r for r in average_standings(runs, share) if r.regime == "trained"]
        for family in dict.fromkeys(row.family for row in rows):
            found = {r.background: percent(r.difference, True) for r in rows if r.family == family}
            shown = " | ".join(found.get(name, "-") for name in runs[0].backgrounds)
            lines.append(f"| {family} | {share:.0%} | {shown} |")
    lines.append("| tasks | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def generation() -> str:
    """The generator against its dense run."""
    return generation_table(read_generation(RESULTS / "generation" / "h200.json"))


def attention_quality() -> str:
    """Quality over density of every policy, where it was measured."""
    path = RESULTS / "generation" / "curves-h200.json"
    if not path.exists():
        return (
            "Not measured yet. `tubelet bench generation --curves all --device cuda` draws the "
            "curves; on a CPU `--quick` shows what they look like."
        )
    return curves_markdown(read_generation(path))


def attention_layers() -> str:
    """Whole layers on a GPU, as measured."""
    return layers(read_attention(RESULTS / "attention" / "h200.json"))


def attention_h200() -> str:
    """All kernels and layers on a GPU, as measured."""
    return attention_tables(read_attention(RESULTS / "attention" / "h200.json")).strip()


def forward_passes() -> str:
    """Whole transformers on a GPU, predicted and measured."""
    return forwards([json.loads(p.read_text()) for p in sorted((RESULTS / "forward").glob("*"))])


def attention_cpu() -> str:
    """Kernels on the CPU, as measured."""
    return attention_tables(read_attention(RESULTS / "attention" / "cpu.json")).strip()


def prefill_layers() -> str:
    """Attention of long prompts on a GPU, dense and sparse, as measured."""
    paths = sorted((RESULTS / "attention").glob("prefill-*.json"))
    if not paths:
        return (
            "Not measured yet on a GPU. What the commands above write goes to "
            "`bench/results/attention/prefill-*.json`."
        )
    return attention_tables([run for path in paths for run in read_attention(path)]).strip()


def language_models() -> str:
    """Video language models on a GPU, as measured."""
    paths = sorted((RESULTS / "llm").glob("*.json"))
    if not paths:
        return (
            "Not measured yet on a GPU. `tubelet bench llm --device cuda` measures; what it writes "
            "goes to `bench/results/llm/`."
        )
    return llm_tables([run for path in paths for run in read_llm(path)]).strip()


def answers() -> str:
    """What recipes for video prompts cost in right answers, as measured."""
    paths = sorted((RESULTS / "answers").glob("*.json"))
    if not paths:
        return (
            "Not measured yet. `tubelet bench answers --device cuda` measures; what it writes goes "
            "to `bench/results/answers/`."
        )
    return "\n\n".join(answers_tables(read_answers(path)).strip() for path in paths)


def cards() -> str:
    """One row per shipped weights file."""
    lines = [
        "| weights | what | parameters | steps | GPU minutes | seed | command of the last stage |"
    ]
    lines.append("|---|---|---:|---:|---:|---:|---|")
    for name in shipped():
        card = read_card(name)
        stages = list(_stages(card.record))
        minutes = sum(s["training_minutes"] * s["processes"] for s in stages)
        steps = " + ".join(str(s["steps"]) for s in reversed(stages))
        size = sum(t.numel() for t in load_weights(name).state_dict().values()) / 1e6
        lines.append(
            f"| `{name}` | {card.summary} | {size:.1f} M | {steps} | {minutes:.1f} | "
            f"{card.record['seed']} | `{_command(card.record)}` |"
        )
    return "\n".join(lines)


def llm_scores() -> str:
    """What the shipped video language model scored after its training, per kind of question."""
    scores = read_card("tubelet-llm").record["scores"]
    ways = ("kept-0.25", "shuffled", "wrong-clip", "chance")
    lines = ["| question | all tokens | a random quarter | shuffled | wrong clip | a guess |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name in (name for name in scores if "/" not in name):
        shares = (scores[name], *(scores[f"{name}/{way}"] for way in ways))
        cells = " | ".join(f"{share:.0%}" for share in shares)
        lines.append(f"| {KINDS[name].title} | {cells} |")
    return "\n".join(lines)


def _stages(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The last stage of a training, then those before it."""
    yield record
    if "before" in record:
        yield from _stages(record["before"])


def _command(record: dict[str, Any]) -> str:
    return re.sub(r" --out \S+", "", record["command"])


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(_short(v) for v in value) + ")"
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


SECTIONS = {
    "methods": methods_table,
    "support": support_table,
    "support-summary": support_summary,
    "refusals": refusals,
    "details": details,
    "headline": lambda: figures([HEADLINE]),
    "fidelity": fidelity,
    "fidelity-tasks": fidelity_tasks,
    "fidelity-seeds": fidelity_seeds,
    "generation": generation,
    "attention-layers": attention_layers,
    "attention-h200": attention_h200,
    "attention-cpu": attention_cpu,
    "forward": forward_passes,
    "attention-quality": attention_quality,
    "cards": cards,
    "llm-card": llm_scores,
    "llm": language_models,
    "answers": answers,
    "prefill": prefill_layers,
    "figures": lambda: figures(sorted(path.stem for path in RESULTS.glob("*.json"))),
}


def fill(text: str) -> str:
    """`text` with every `<!-- generated: NAME -->` section rewritten."""

    def section(match: re.Match[str]) -> str:
        return f"{match[1]}\n{SECTIONS[match[2]]()}\n{match[3]}"

    pattern = r"(<!-- generated: ([\w-]+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, section, text, flags=re.S)


def main() -> None:
    """Write or check."""
    stale = [path for path in TARGETS if fill(path.read_text()) != path.read_text()]
    if "--check" in sys.argv[1:]:
        sys.exit(f"out of date: {', '.join(p.name for p in stale)}; run make docs" if stale else 0)
    for path in stale:
        path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
