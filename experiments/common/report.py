"""Write runs as one HTML file that needs nothing else: figures and style are inside, and nothing is fetched."""

from __future__ import annotations

import base64
import math
import os
import shlex
import struct
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from urllib.parse import quote

from experiments.common.atomic import write_atomically
from experiments.common.drawing import FIGURE_DPI
from experiments.common.observations import OBSERVATIONS
from experiments.common.record import VERDICTS, Run

_TITLE = "Branch specialization, measured"
_MARKS = {"holds": ("yes", "✓"), "contradicted": ("no", "✗"), "mixed": ("mixed", "±"), "not tested": ("open", "")}
STYLE = Path(__file__).with_name("report.css")
_LONGEST_VALUE = 120
_SCREEN_DPI = 96  # of CSS pixels: figures show at their size in inches, so that their text sizes agree
_NAMES = {"all_m": "All M", "branches": "M", "lr": "Learning rate"}


def write_report(runs: Sequence[Run | Path | str], path: Path | str) -> Path:
    """Write one self-contained HTML page about some runs.

    Args:
        runs: Runs, or the folders to load them from, in the order shown.
        path: The file to write; its folder is made if missing.

    Returns:
        The file.

    Raises:
        ValueError: If there are no runs.
        FileNotFoundError: If a run's folder or one of its figures is missing.
    """
    if not runs:
        raise ValueError("write_report: runs must be at least one run, got none")
    loaded = [run if isinstance(run, Run) else Run.load(run) for run in runs]
    sections = [
        ("runs", "What was run", _runs(loaded)),
        ("observations", "The paper's eight observations", _observations(loaded)),
        ("claims", "What else the paper says", _claims(loaded)),
        ("scores", "Branches against the layers of synthetic images", _scores(loaded)),
        ("figures", "Figures", "".join(_figures(run) for run in loaded)),
        ("pages", "Interactive pages", _pages(loaded, Path(path).parent)),
        ("speed", "Speed: fused against loop", "".join(_speed(run) for run in loaded)),
        ("reproduce", "How to reproduce", _reproduce(loaded)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    body = "".join(f'<section id="{name}"><h2>{escape(title)}</h2>{html}</section>' for name, title, html in sections)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_TITLE)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>"
        f"<header><h1>{escape(_TITLE)}</h1>"
        '<p class="lead">Networks that are a sum of branches, f(x) = v<sub>1</sub>(x) + … + v<sub>M</sub>(x), trained '
        "here and compared with what Brokman &amp; Gilboa report (arXiv 2206.05810). Every number on this page was "
        f"measured in the runs listed.</p><nav>{links}</nav></header>{_tiles(loaded)}{body}"
        f'<footer class="small">Written by bsfast {escape(str(loaded[0].versions.get("bsfast")))} from '
        f"{', '.join(escape(run.folder.name) for run in loaded)}.</footer></main></body></html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())
    return path


def _tiles(runs: Iterable[Run]) -> str:
    runs = list(runs)
    verdicts = [claim["verdict"] for run in runs for claim in run.claims]
    values = [
        *((str(verdicts.count(verdict)), verdict) for verdict in VERDICTS if verdicts.count(verdict)),
        (_duration(sum(run.seconds for run in runs)), f"for {len(runs)} run{'s' if len(runs) > 1 else ''}"),
    ]
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in values
    )
    return f'<div class="tiles">{tiles}</div>'


def _observations(runs: Iterable[Run]) -> str:
    claims = [(run, claim) for run in runs for claim in run.claims if claim["observation"] is not None]
    if not claims:
        return ""
    parts = []
    for number, text in OBSERVATIONS.items():
        own = [(run, claim) for run, claim in claims if claim["observation"] == number]
        rows = "".join(_row(f"{_words(run.experiment)}, {claim['figure']}", claim) for run, claim in own)
        rows = rows or "<tr><th>none</th><td>No run here tests it.</td><td></td><td></td></tr>"
        parts.append(f'<tr class="group"><th colspan="4">{number}. {escape(text)}</th></tr>{rows}')
    return _table("".join(parts)) + (
        '<p class="note">The observations are those of section 4 of the paper in our words and numbering. '
        + " ".join(f"<b>{verdict}</b>: {meaning}." for verdict, meaning in VERDICTS.items())
        + "</p>"
    )


def _claims(runs: Iterable[Run]) -> str:
    rest = [claim for run in runs for claim in run.claims if claim["observation"] is None]
    return _table("".join(_row(claim["figure"], claim) for claim in rest)) if rest else ""


def _row(source: str, claim: dict[str, Any]) -> str:
    style, mark = _MARKS[claim["verdict"]]
    return (
        f"<tr><th>{escape(source)}</th>"
        f'<td data-label="Paper\'s claim">{escape(claim["claim"])}</td>'
        f'<td data-label="Measured">{escape(claim["measured"])}</td>'
        f'<td data-label="Verdict"><span class="mark {style}">{mark} {claim["verdict"]}</span></td></tr>'
    )


def _table(rows: str) -> str:
    return (
        '<div class="card scroll"><table class="stack"><thead><tr><th>Figure</th><th>Paper\'s claim</th>'
        f"<th>Measured</th><th>Verdict</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _runs(runs: Iterable[Run]) -> str:
    cards = []
    for run in runs:
        versions = run.versions
        threads = versions.get("threads")
        facts = [
            (
                "Machine",
                f"{versions.get('cpu')}, {threads} thread{'' if threads == 1 else 's'}, {versions.get('system')}",
            ),
            (
                "Versions",
                ", ".join(
                    f"{name} {versions[name]}" for name in ("bsfast", "torch", "numpy", "python") if versions.get(name)
                ),
            ),
            ("Seed", str(run.seed)),
            ("Started", run.started.replace("T", " ")),
            ("Took", _duration(run.seconds) + ("" if run.finished else ", interrupted: this record is not complete")),
        ]
        chosen = [(_words(key), _value(value)) for key, value in run.config.items() if key not in {"seed", "command"}]
        numbers = {key: value for key, value in run.metrics.items() if key != "page" and _is_short(value)}
        measured = [(_words(key), _value(value)) for key, value in numbers.items()]
        more = f"<details><summary>Measured numbers</summary>{_facts(measured)}</details>" if measured else ""
        cards.append(
            f'<div class="card"><h3>{escape(_words(run.experiment))}</h3>{_facts(facts)}{_facts(chosen)}{more}</div>'
        )
    return "".join(cards)


def _scores(runs: Iterable[Run]) -> str:
    """Draw the metric ``scores``: {layers, images, contestants: {name: {score: number}}}; mean and spread over runs."""
    tables = [run.metrics["scores"]["contestants"] for run in runs if "scores" in run.metrics]
    if not tables:
        return ""
    columns = list(next(iter(tables[0].values())))
    head = "".join(f'<th class="number">{escape(column)}</th>' for column in columns)
    rows = []
    for name in tables[0]:
        cells = []
        for column in columns:
            known = [value for table in tables if math.isfinite(value := float(table[name][column]))]
            spread = f" <small>±{stdev(known):.2g}</small>" if len(known) > 1 else ""
            mean = f"{fmean(known):.3g}" if known else "none"
            cells.append(f'<td class="number" data-label="{escape(column)}">{mean}{spread}</td>')
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    note = (
        f"Mean and standard deviation over {len(tables)} run{'s' if len(tables) > 1 else ''}. S1: correlation with the "
        "layers, best matching, and with those of other images. S2: a layer against the sum of its parts. S3: how few "
        "layers a part draws, how few parts draw a layer. S4: energy inside the best mask over its area. S5: response "
        "of the part that answers a layer's absence most, over the average part's. S6: cosine of active parts, "
        "effective and active number of parts."
    )
    return (
        f'<div class="card scroll"><table><thead><tr><th>Parts</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f'</table><p class="note">{escape(note)}</p></div>'
    )


def _figures(run: Run) -> str:
    cards = []
    for entry in run.figures:
        png = (run.folder / entry["file"]).read_bytes()
        content = base64.b64encode(png).decode("ascii")
        width, height = (round(pixels * _SCREEN_DPI / FIGURE_DPI) for pixels in struct.unpack(">II", png[16:24]))
        note = f'<figcaption class="note">{escape(entry["note"])}</figcaption>' if entry["note"] else ""
        title = escape(entry["title"])
        cards.append(
            f'<div class="card"><h3>{title}</h3><figure><img width="{width}" height="{height}" alt="{title}" '
            f'src="data:image/png;base64,{content}">{note}</figure></div>'
        )
    return "".join(cards)


def _pages(runs: Iterable[Run], folder: Path) -> str:
    """Link to the metric ``page``: {file in the run's folder, title}."""
    links = []
    for run in runs:
        if page := run.metrics.get("page"):
            place = quote(Path(os.path.relpath(run.folder / page["file"], folder)).as_posix())
            links.append(f'<li><a href="{place}">{escape(page["title"])}</a>: {escape(run.folder.name)}</li>')
    note = '<p class="note">Files of their own in the runs\' folders, which need nothing else either.</p>'
    return f'<div class="card"><ul>{"".join(links)}</ul>{note}</div>' if links else ""


def _speed(run: Run) -> str:
    """Draw the metric ``speed``: {what, unit, columns, repeats, rows: [{contestant, baseline, values}], note}.

    Each value is (median, lower quartile, upper quartile). Ratios are to the fastest baseline of the column.
    """
    table = run.metrics.get("speed")
    if not table:
        return ""
    unit = escape(table["unit"])
    columns = "".join(f'<th class="number">{escape(name)}</th>' for name in table["columns"])
    best = [
        min(row["values"][at][0] for row in table["rows"] if row["baseline"]) for at in range(len(table["columns"]))
    ]
    rows = []
    for row in table["rows"]:
        cells = "".join(
            f'<td class="number" data-label="{escape(name)}">{median:.4g} {unit} '
            f"<small>{low:.4g} to {high:.4g}, {fastest / median:.2f}&times;</small></td>"
            for name, (median, low, high), fastest in zip(table["columns"], row["values"], best, strict=True)
        )
        rows.append(f"<tr><th>{escape(row['contestant'])}</th>{cells}</tr>")
    note = (
        f"{table['what']}. Median, quartiles and speed relative to the fastest loop, over {table['repeats']} repeats "
        f"with the contestants taking turns. {table.get('note', '')}"
    )
    return (
        f'<div class="card scroll"><table class="stack"><thead><tr><th>Contestant</th>{columns}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table><p class="note">{escape(note.strip())}</p></div>'
    )


def _reproduce(runs: Iterable[Run]) -> str:
    commands = [command for run in runs if (command := run.config.get("command"))]
    lines = [
        "make setup && . .venv/bin/activate    # once: environment, pinned packages, native code",
        *dict.fromkeys(commands),
    ]
    if not commands:
        return ""
    rebuilt = "python -m experiments report " + " ".join(shlex.quote(run.folder.as_posix()) for run in runs)
    lines.append(f"{rebuilt}    # this page again, from the records")
    return (
        f'<div class="card"><pre>{escape(chr(10).join(lines))}</pre><p class="note">Two runs with one seed are equal '
        "on one machine unless a time budget ended the training; the number of steps taken is among the measured "
        "numbers.</p></div>"
    )


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    if not facts:
        return ""
    pairs = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f"<dl>{''.join(pairs)}</dl>"


def _words(name: str) -> str:
    text = _NAMES.get(name, name.replace("_", " "))
    return text[:1].upper() + text[1:]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items())
    return "none" if value is None else str(value)


def _is_short(value: Any) -> bool:
    return len(_value(value)) <= _LONGEST_VALUE


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
