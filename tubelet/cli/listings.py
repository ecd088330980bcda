"""Listings: methods, models, doctor."""

from rich.markup import escape
from rich.table import Table

from tubelet.cli.app import Json, app, console, print_json


@app.command()
def methods(as_json: Json = False) -> None:
    """List the recipes with their papers and fields."""
    from tubelet.bench.matrix import methods as rows

    if as_json:
        return print_json(rows())
    table = Table(
        "recipe", "what it does", "paper", "fields", title="Recipes", title_justify="left"
    )
    for row in rows():
        fields = ", ".join(f"{f['name']}={f['default']!r}" for f in row["fields"])
        table.add_row(row["name"], row["summary"], row["paper"] or "-", escape(fields))
    console.print(table)


@app.command()
def models(as_json: Json = False) -> None:
    """Show which recipe runs on which model, and why not where it does not."""
    from tubelet.bench.matrix import support

    rows = support()
    if as_json:
        return print_json(rows)
    table = Table("model", "presets", *rows[0]["recipes"], title="Support", title_justify="left")
    for row in rows:
        marks = ["yes" if reason is None else "no" for reason in row["recipes"].values()]
        table.add_row(row["model"], ", ".join(row["presets"]) or "-", *marks)
    console.print(table)
    for row in rows:
        for name, reason in row["recipes"].items():
            if reason is not None:
                console.print(f"{row['model']}: {name} {reason}", markup=False, soft_wrap=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what works on this machine, what is missing and how to get it."""
    from tubelet.bench.doctor import examine, to_dict

    findings = examine()
    if as_json:
        return print_json(to_dict(findings))
    table = Table("what", "found", "advice", title="Doctor", title_justify="left")
    for finding in findings:
        mark = "" if finding.fine else "[yellow]"
        table.add_row(finding.what, mark + escape(finding.found), escape(finding.advice))
    console.print(table)
