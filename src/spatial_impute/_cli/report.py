"""The report of a run, in markdown and as one HTML file: verdicts, genes, maps, and how they were made."""

from __future__ import annotations

import base64
import html
import json
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spatial_impute._keys import Keys
from spatial_impute._stack.record import load_record

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from spatialdata import SpatialData

_STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em;line-height:1.45;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.25em .7em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}figure{margin:1.5em 0}"
    ".verdicts{list-style:none;padding:0}"
    ".verdicts li{border-left:.4em solid;padding:.3em .8em;margin:.5em 0;background:#f7f7f7}"
    "pre{background:#f5f5f5;padding:1em;overflow:auto}"
)
GOOD, CARE, BAD = "Good", "Take care", "Do not use"
_COLORS = {GOOD: "#009E73", CARE: "#E69F00", BAD: "#D55E00"}  # Okabe and Ito
_SCORES = {
    "pearson_gene": "r per gene",
    "low": "low",
    "high": "high",
    "pearson_gene_positive": "share r > 0",
    "skill": "skill",
    "mse": "MSE",
    "pearson_spot": "r per spot",
}
_QUALITY = {
    "dice_before": "Dice before",
    "dice_after": "Dice after",
    "correlation_after": "r after",
    "error_um": "expected error, um",
    "score": "score",
    "verdict": "verdict",
}
_N_GENES = 15  # in the table of genes, and named in a sentence
_PARTS = ("base", "network alone", "without network")  # of the model: rows of its table that are no simple methods
_WORDS = [
    "**Section**: one slice of the block. **Spot**: a round piece of a section, for which expression is given.",
    "**Imputed**: estimated, not measured. Framed sections in the maps were measured.",
    "**r**: agreement of estimate and measurement over the spots, from 0 (none) to 1 (exact). Its square is the share "
    "of the differences between spots that is explained.",
    "**Support**: how well a spot is linked to measured spots, from 0 to 1. It is the same for all genes.",
    "**Simple method**: for example, the value of the nearest measured spot. A model is useful if it does better.",
]


@dataclass
class Results:
    """Results of a run."""

    sdata: SpatialData
    scores: pd.DataFrame | None
    """Table of :func:`~spatial_impute.tl.cross_validate`."""
    registration: pd.DataFrame
    layer: str
    """Layer with the result."""
    config: dict[str, Any]
    figures: dict[str, str]
    """File names and captions."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """One finding, and how to take it."""

    level: str
    text: str


Block = tuple[str, Any]
"""Kind (``"h1"``, ``"h2"``, ``"p"``, ``"list"``, ``"verdicts"``, ``"table"``, ``"figure"``, ``"code"``) and content."""


def write_report(results: Results, output: Path) -> Path:
    """Write ``report.md``, ``report.html`` and ``run.json``; returns the path of the HTML."""
    blocks = report_blocks(results)
    (output / "report.md").write_text(to_markdown(blocks))
    (output / "report.html").write_text(to_html(blocks, output / "figures"))
    record = {"config": results.config, "seconds": round(results.seconds, 1), "version": version("spatial-impute")}
    (output / "run.json").write_text(json.dumps(record, indent=1, default=str))
    return output / "report.html"


def report_blocks(results: Results) -> list[Block]:
    """Content of the report: verdicts, genes, maps, the meaning of words, and then how the result was made."""
    table = results.sdata.tables[Keys.STACK_TABLE]
    units = table.uns.get(Keys.NORMALIZATION, {}).get("units", "unknown units")
    figures: dict[str, Block] = {name: ("figure", (name, text)) for name, text in results.figures.items()}
    sections = load_record(results.sdata).sections
    measured = [s.name for s in sections if table.obs[Keys.MEASURED][table.obs[Keys.SECTION] == s.name].any()]
    summary = (
        f"{len(sections)} sections of one block of tissue, {table.n_obs} spots, {table.n_vars} genes. Measured: "
        f"{', '.join(measured)}. The expression on all other spots is estimated from the measured spots and from the "
        "images."
    )
    made = (
        f"Units: {units}. Result: layer `{results.layer}` of `stack.zarr` and `imputed.h5ad`. "
        f"spatial_impute {version('spatial-impute')}, {results.seconds:.0f} s."
    )
    parts: list[Block | None] = [
        ("h1", "Imputed expression on a stack of sections"),
        ("p", summary),
        ("h2", "In short"),
        ("verdicts", verdicts(results.sdata, results.layer, results.scores)),
        *_gene_blocks(table, figures.pop("genes.png", None)),
        ("h2", "Maps"),
        figures.pop("imputed.png", None),
        figures.pop("volume.png", None),
        ("h2", "What the words mean"),
        ("list", _WORDS),
        ("h2", "How it was made"),
        ("p", made),
        ("table", sections_table(results.sdata)),
        figures.pop("stack.png", None),
        ("h2", "Registration"),
        ("table", _columns(results.registration.reset_index(), _QUALITY, 2)),
        figures.pop("registration.png", None),
        *_score_blocks(results.scores),
        figures.pop("scores.png", None),
        *([("h2", "Graph and training")] if figures else []),
        *figures.values(),
        ("h2", "Settings"),
        ("code", json.dumps(results.config, indent=1, default=str)),
    ]
    return [part for part in parts if part is not None]


def _gene_blocks(table: AnnData, overview: Block | None) -> list[Block | None]:
    """Blocks on the genes to believe."""
    if Keys.PREDICTABILITY not in table.var:
        return []
    found = table.var.sort_values(Keys.PREDICTABILITY, ascending=False)
    r = found[Keys.PREDICTABILITY]
    believed = found.get(Keys.PREDICTABLE, r > 0)
    frame = pd.DataFrame(
        {
            "gene": found.index,
            "r on hidden spots": r.to_numpy(),
            "differences explained, %": [f"{100 * max(x, 0.0) ** 2:.0f}" if np.isfinite(x) else "" for x in r],
            "believe the map": np.where(believed, "yes", "no"),
        }
    )
    text = (
        "Some measured spots were hidden, predicted, and compared with their measurement. The table has the genes that "
        f"were predicted best; `genes.csv` has all {len(found)}. A measurement has noise, so even a perfect map does "
        "not reach r = 1."
    )
    return [("h2", "Which genes to believe"), ("p", text), ("table", frame.head(_N_GENES)), overview]


def _score_blocks(scores: pd.DataFrame | None) -> list[Block]:
    if scores is None:
        return []
    intervals = " `low` and `high` are the 95 % interval of the mean over genes." if "low" in scores else ""
    text = (
        "All methods are scored on the same measured spots, which none of them was fitted on. Read `r per gene`: the "
        f"correlation across spots, mean over genes.{intervals} `r per spot` is high for any method. The mean profile "
        "may fall below 0: it is computed without the held-out block, so it is low where the block is high."
    )
    table = _columns(scores.reset_index(), _SCORES, 1)
    return [("h2", "Baselines and model on held-out spots"), ("p", text), ("table", table)]


def sections_table(sdata: SpatialData) -> pd.DataFrame:
    """Height, pixel size, spots, measured spots and median support of every section."""
    table = sdata.tables[Keys.STACK_TABLE]
    rows = []
    for section in load_record(sdata).sections:
        obs = table.obs[table.obs[Keys.SECTION] == section.name]
        row = {
            "section": section.name,
            "z, um": section.z,
            "um per pixel": f"{section.mpp:.4g} ({section.mpp_source})",
            "spots": len(obs),
            "measured": int(obs[Keys.MEASURED].sum()),
        }
        if Keys.SUPPORT in obs:
            row["support, median"] = float(obs[Keys.SUPPORT].median())
        rows.append(row)
    return pd.DataFrame(rows)


def verdicts(sdata: SpatialData, layer: str, scores: pd.DataFrame | None) -> list[Verdict]:
    """Findings of a run on positions, genes, method and reach, and the limits of its tests."""
    table = sdata.tables[Keys.STACK_TABLE]
    found = [*_of_positions(sdata), *_of_method(scores)]
    if Keys.PREDICTABLE in table.var and layer == Keys.ASIGN:
        found.append(_of_genes(table))
    if Keys.SUPPORT in table.obs:
        found += _of_support(table)
    if scores is not None:
        text = (
            "All tests used spots of measured sections. No test shows how good the maps of the other sections are. "
            "Expect them to be worse."
        )
        found.append(Verdict(CARE, text))
    return [
        *found,
        Verdict(
            CARE,
            "Imputed values are estimates, not measurements. They are smoother, and neighboring spots are not "
            "independent. So do not test them for differential expression as if they were measured.",
        ),
    ]


def _of_positions(sdata: SpatialData) -> list[Verdict]:
    """Verdict on the places of the sections."""
    registration = load_record(sdata).registration or {}
    verdict_of = {name: row.get("verdict", "ok") for name, row in registration.get("sections", {}).items()}
    found = []
    if weak := [name for name, verdict in verdict_of.items() if verdict == "weak"]:
        text = (
            f"The position of {_sections(weak)} is uncertain. Compare the map with the image before you read single "
            "spots."
        )
        found.append(Verdict(CARE, text))
    if failed := [name for name, verdict in verdict_of.items() if verdict not in ("ok", "weak")]:
        found.append(Verdict(BAD, f"The position of {_sections(failed)} was not found. Do not use the maps there."))
    if skipped := list(registration.get("skipped", [])):
        found.append(Verdict(BAD, f"{_sections(skipped).capitalize()} has no place in the stack, and no map."))
    if verdict_of and not found:
        found.append(Verdict(GOOD, f"All {len(verdict_of)} sections fit on each other."))
    return found


def _of_method(scores: pd.DataFrame | None) -> list[Verdict]:
    """Verdict on the model beside the best simple method."""
    if scores is None:
        text = "Nothing was held out (`cross_validate: false`), so this run does not show how good its result is."
        return [Verdict(CARE, text)]
    if Keys.ASIGN not in scores.index or len(scores) < 2:
        return []
    r = scores["pearson_gene"]
    best = r.drop([Keys.ASIGN, *_PARTS], errors="ignore").idxmax()
    margin = r[Keys.ASIGN] - r[best]
    # Tables of `cross_validate` have the interval in the row of the model, those of a model in that of the method.
    row, columns = (
        (best, ["gain_low", "gain_high"]) if "gain_low" in scores else (Keys.ASIGN, ["vs_best_low", "vs_best_high"])
    )
    low, high = scores.loc[row].reindex(columns)
    interval = "" if pd.isna(low) else f", 95 % interval {low:+.3f} to {high:+.3f}"
    if (margin if pd.isna(low) else low) > 0:
        text = f"On hidden spots, the model is better than the best simple method, {best} (r {margin:+.3f}{interval})."
        return [Verdict(GOOD, text)]
    text = (
        f"This run does not show that the model is better than the simple method {best} (r {margin:+.3f}{interval}). "
        f"Its maps are about as good as those of {best}."
    )
    return [Verdict(CARE, text)]


def _of_genes(table: AnnData) -> Verdict:
    """Verdict on the number of genes that can be believed."""
    believed = table.var[Keys.PREDICTABLE].to_numpy(dtype=bool)
    if believed.all():
        return Verdict(GOOD, f"All {len(believed)} genes are predicted better than by chance.")
    poor = list(table.var_names[~believed])
    text = (
        f"{believed.sum()} of {len(believed)} genes are predicted better than by chance. Do not read the maps of the "
        f"others: {_named(poor)}."
    )
    return Verdict(CARE if believed.any() else BAD, text)


def _of_support(table: AnnData) -> list[Verdict]:
    """Verdict on the links of the spots to measured ones."""
    imputed = ~table.obs[Keys.MEASURED].to_numpy(dtype=bool)
    without = imputed & (table.obs[Keys.SUPPORT].to_numpy(dtype=float) <= 0)
    if not without.any():
        return [Verdict(GOOD, "Every spot has measured spots nearby, in its own section or in another one.")]
    where = table.obs[Keys.SECTION][without].value_counts()
    listed = ", ".join(f"{name} {n}" for name, n in where[where > 0].items())
    text = (
        f"{int(without.sum())} spots have no measured spot nearby. Their values come from the image alone (support 0): "
        f"{listed}."
    )
    return [Verdict(CARE, text)]


def _sections(names: list[str]) -> str:
    return f"section{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _named(names: list[str]) -> str:
    """Some of the names in a sentence, whatever signs they hold."""
    more = f" and {len(names) - _N_GENES} more" if len(names) > _N_GENES else ""
    shown = (f"`{' '.join(name.replace('`', chr(39)).split())}`" for name in names[:_N_GENES])
    return f"{', '.join(shown)}{more}"


def _columns(frame: pd.DataFrame, names: dict[str, str], n_index: int) -> pd.DataFrame:
    kept = [*frame.columns[:n_index], *(name for name in names if name in frame)]
    return frame[kept].rename(columns=names)


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """Text of a cell without the signs that Markdown reads as markup."""
    return re.sub(r"([|`$<\\])", r"\\\1", " ".join(text.split()))


def to_markdown(blocks: list[Block]) -> str:
    """Report as markdown; figures are linked.

    Examples
    --------
    >>> print(to_markdown([("h1", "T"), ("list", ["a", "b"]), ("figure", ("f.png", "F"))]))
    # T
    <BLANKLINE>
    - a
    - b
    <BLANKLINE>
    ![F](figures/f.png)
    <BLANKLINE>
    """
    parts = []
    for kind, content in blocks:
        if kind in ("h1", "h2"):
            parts.append(f"{'#' * int(kind[1])} {content}")
        elif kind in ("list", "verdicts"):
            items = content if kind == "list" else [f"**{verdict.level}.** {verdict.text}" for verdict in content]
            parts.append("\n".join(f"- {item}" for item in items))
        elif kind == "table":
            rows = [list(content.columns), ["---"] * content.shape[1], *content.to_numpy(dtype=object).tolist()]
            parts.append("\n".join(f"| {' | '.join(_plain(_cell(value)) for value in row)} |" for row in rows))
        elif kind == "figure":
            parts.append(f"![{content[1]}](figures/{content[0]})")
        elif kind == "code":
            parts.append(f"```json\n{content}\n```")
        else:
            parts.append(content)
    return "\n\n".join(parts) + "\n"


def to_html(blocks: list[Block], figures: Path) -> str:
    """Report as one HTML file with its figures inside."""
    parts = []
    for kind, content in blocks:
        if kind == "list":
            parts.append(f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in content)}</ul>")
        elif kind == "verdicts":
            items = "".join(
                f'<li style="border-color:{_COLORS[v.level]}"><b>{v.level}.</b> {_inline(v.text)}</li>' for v in content
            )
            parts.append(f'<ul class="verdicts">{items}</ul>')
        elif kind == "table":
            head = "".join(f"<th>{html.escape(str(name))}</th>" for name in content.columns)
            rows = [
                f"<tr>{''.join(f'<td>{html.escape(_cell(value))}</td>' for value in row)}</tr>"
                for row in content.to_numpy(dtype=object).tolist()
            ]
            parts.append(f"<table><tr>{head}</tr>{''.join(rows)}</table>")
        elif kind == "figure":
            name, text = content
            data = base64.b64encode((figures / name).read_bytes()).decode()
            image = f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{image}<figcaption>{html.escape(text)}</figcaption></figure>")
        elif kind == "code":
            parts.append(f"<pre>{html.escape(content)}</pre>")
        else:
            parts.append(f"<{kind}>{_inline(content)}</{kind}>")
    title = next((content for kind, content in blocks if kind == "h1"), "Report")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n{chr(10).join(parts)}\n</body></html>\n"
    )


def _inline(text: str) -> str:
    """Escape, and set text between backticks as code and text between double stars in bold."""
    pieces = html.escape(text).split("`")
    bold = [re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", piece) for piece in pieces]
    return "".join(f"<code>{piece}</code>" if i % 2 else bold[i] for i, piece in enumerate(pieces))
