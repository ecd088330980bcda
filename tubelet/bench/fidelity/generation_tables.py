"""The generation result as Markdown and as a page."""

from pathlib import Path

from tubelet.bench.fidelity.generation_curve_tables import curves_markdown, curves_page
from tubelet.bench.fidelity.generation_result import FIGURES, Generation, Outcome
from tubelet.bench.fidelity.page import render_template
from tubelet.bench.fidelity.svg import Chart, Series, draw
from tubelet.core.files import write_whole

COLUMNS = (
    "way", "label", "calls", "s per clip", "PSNR", "worst 5 %", "SSIM", "worst 5 %",
    "latent error", "flicker", "motion", "sharpness", "attributes", "to dense",
)  # fmt: skip


DENSITY = "density"
"""A last column, where any way was sparse."""


def columns(found: Generation) -> tuple[str, ...]:
    """Headers of the table."""
    return (*COLUMNS, DENSITY) if _any_sparse(found) else COLUMNS


def rows(found: Generation) -> list[list[str]]:
    """Texts of every way, in the order of `columns`."""
    sparse = _any_sparse(found)
    return [
        [*cells(outcome), *([_density(outcome)] if sparse else [])] for outcome in found.outcomes
    ]


def write_generation(out: Path, found: Generation) -> None:
    """The three files of a result."""
    out.mkdir(parents=True, exist_ok=True)
    found.to_json(out / "generation.json")
    write_whole(out / "generation.html", page(found))
    parts = [markdown(found), generation_table(found)]
    write_whole(out / "generation.md", "\n\n".join(dict.fromkeys(parts)) + "\n")


def markdown(found: Generation) -> str:
    """What a reader wants first: the curves where there are any, else every way."""
    return curves_markdown(found) if found.dense_steps is not None else generation_table(found)


def generation_table(found: Generation) -> str:
    """Every way against the dense run, as Markdown."""
    lines = [heading(found), "", "| " + " | ".join(columns(found)) + " |"]
    lines.append("|---|---" + "|---:" * (len(columns(found)) - 2) + "|")
    lines += ["| " + " | ".join(texts) + " |" for texts in rows(found)]
    lines += [""] + [f"- {note}" for note in found.notes]
    return "\n".join(lines).rstrip()


def heading(found: Generation) -> str:
    """What was drawn, in one paragraph."""
    frames, height, width = found.clip
    return (
        f"{found.model}, {found.pairs} pairs of {frames} frames of {height}x{width} from the same "
        f"noise, guidance {found.guidance:g}, {found.precision}, {found.environment['hardware']}. "
        "Medians over pairs with bootstrap intervals at 95 %; attributes are means."
    )


def cells(outcome: Outcome) -> list[str]:
    """Texts of one row, in the order of `COLUMNS`."""

    def shown(figure: str, digits: str, worst: bool = False) -> str:
        found = outcome.bad_end(figure) if worst else outcome.middle(figure)
        # The z turns -0.000 into 0.000.
        low, high = f"{found.low:{digits}}", f"{found.high:{digits}}"
        return f"{found.value:{digits}}" + ("" if low == high else f" ({low} to {high})")

    return [
        outcome.name,
        outcome.label,
        str(outcome.calls),
        f"{outcome.seconds:.2f}",
        shown("psnr", "z.1f"),
        shown("psnr", "z.1f", worst=True),
        shown("ssim", "z.3f"),
        shown("ssim", "z.3f", worst=True),
        shown("latent_error", ".1e"),
        shown("flicker", "z.4f"),
        shown("motion_ratio", "z.2f"),
        shown("sharpness_ratio", "z.2f"),
        shown("attributes", "z.2f"),
        shown("attributes_to_dense", "z.2f"),
    ]


def page(found: Generation) -> str:
    """One self-contained HTML page."""
    return render_template(
        "generation.html.jinja",
        found=found,
        heading=heading(found),
        columns=columns(found),
        rows=rows(found),
        chart=None if found.dense_steps is not None else draw(_chart(found)),
        curves=None if found.dense_steps is None else curves_page(found),
        meanings=FIGURES,
    )


def _any_sparse(found: Generation) -> bool:
    return any(outcome.density is not None for outcome in found.outcomes)


def _density(outcome: Outcome) -> str:
    return "-" if outcome.density is None else f"{outcome.density:.1%}"


def _chart(found: Generation) -> Chart:
    """Structural similarity over cost."""
    reference = found.outcomes[0]
    series = []
    for style, outcome in enumerate(found.outcomes[1:]):
        ssim = outcome.middle("ssim")
        at = (outcome.calls / reference.calls, ssim.value, ssim.low, ssim.high)
        series.append(Series(name=outcome.name, style=style, points=[at], line="none"))
    return Chart(
        title="similarity to the dense run against model calls",
        x_label="model calls, share of dense (fewer →)",
        y_label="SSIM to the dense run",
        series=series,
        percent=True,
    )
