"""The report of a run, in markdown and as one HTML file: steps, scores, warnings."""

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
from spatial_impute._stack import load_record

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from spatialdata import SpatialData

_STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em;line-height:1.45;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .7em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f5f5f5;padding:1em;overflow:auto}"
)
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
_N_NAMED = 15  # genes named in a sentence


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


Block = tuple[str, Any]
"""Kind (``"h1"``, ``"h2"``, ``"p"``, ``"list"``, ``"table"``, ``"figure"``, ``"code"``) and content."""


def write_report(results: Results, output: Path) -> Path:
    """Write ``report.md``, ``report.html`` and ``run.json``; returns the path of the HTML."""
    blocks = report_blocks(results)
    (output / "report.md").write_text(to_markdown(blocks))
    (output / "report.html").write_text(to_html(blocks, output / "figures"))
    record = {"config": results.config, "seconds": round(results.seconds, 1), "version": version("spatial-impute")}
    (output / "run.json").write_text(json.dumps(record, indent=1, default=str))
    return output / "report.html"


def report_blocks(results: Results) -> list[Block]:
    """Content of the report, in order."""
    table = results.sdata.tables[Keys.STACK_TABLE]
    units = table.uns.get(Keys.NORMALIZATION, {}).get("units", "unknown units")
    figures: dict[str, Block] = {name: ("figure", (name, text)) for name, text in results.figures.items()}
    package = f"spatial_impute {version('spatial-impute')}"
    summary = (
        f"{len(load_record(results.sdata).sections)} sections, {table.n_obs} spots, {table.n_vars} genes ({units}). "
        f"Result: layer `{results.layer}` of `stack.zarr` and `imputed.h5ad`. {package}, {results.seconds:.0f} s."
    )
    quality = _columns(results.registration.reset_index(), _QUALITY, 2)
    parts: list[Block | None] = [
        ("h1", "Imputation of a stack of sections"),
        ("p", summary),
        ("h2", "What not to trust"),
        ("list", cautions(results)),
        ("h2", "Sections"),
        ("table", sections_table(results.sdata)),
        figures.pop("stack.png", None),
        ("h2", "Registration"),
        ("table", quality),
        figures.pop("registration.png", None),
        *_score_blocks(results.scores),
        figures.pop("scores.png", None),
        ("h2", "Figures"),
        *figures.values(),
        ("h2", "Settings"),
        ("code", json.dumps(results.config, indent=1, default=str)),
    ]
    return [part for part in parts if part is not None]


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


def cautions(results: Results) -> list[str]:
    """Warnings for the reader of a result: first those of this run, then those of every run."""
    table = results.sdata.tables[Keys.STACK_TABLE]
    found = [*_about_registration(results), *_about_model(results)]
    if Keys.PREDICTABILITY in table.var and results.layer == Keys.ASIGN:
        found += _about_genes(table)
    if Keys.SUPPORT in table.obs:
        found += _about_support(table)
    return [
        *found,
        "Held-out spots lie on measured sections. Expect lower scores on the other sections: no held-out spot shows "
        "how sections differ.",
        "Imputed values are no measurements: they are smoother, and spots are not independent. Do not test for "
        "differential expression on them as if they were measured.",
    ]


def _about_registration(results: Results) -> list[str]:
    registration = load_record(results.sdata).registration or {}
    rows = registration.get("sections", {})
    weak = [f"{name} ({row['verdict']})" for name, row in rows.items() if row.get("verdict", "ok") != "ok"]
    found = [f"Sections whose registration is not certain: {', '.join(weak)}."] if weak else []
    skipped = list(registration.get("skipped", []))
    return found + ([f"Sections that were left out of the registration: {', '.join(skipped)}."] if skipped else [])


def _about_model(results: Results) -> list[str]:
    if results.scores is None:
        return ["Nothing was held out (`cross_validate: false`), so this run cannot tell how good its result is."]
    if Keys.ASIGN not in results.scores.index or len(results.scores) < 2:
        return []
    r = results.scores["pearson_gene"]
    best = r.drop(Keys.ASIGN).idxmax()
    margin = r[Keys.ASIGN] - r[best]
    if "vs_best_low" in results.scores:
        low, high = results.scores.loc[Keys.ASIGN, ["vs_best_low", "vs_best_high"]]
        if low > 0:
            return []
        return [
            f"This run does not show that ASIGN is better than {best}: the difference of their r per gene is "
            f"{margin:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}."
        ]
    return [] if margin > 0 else [f"ASIGN scores no higher than {best} (r per gene {margin:+.3f})."]


def _about_genes(table: AnnData) -> list[str]:
    r = table.var[Keys.PREDICTABILITY]
    unknown = list(r.index[r.isna()])
    poor = list(r.index[r <= 0])
    quartiles = ", ".join(f"{q:.2f}" for q in r.quantile([0.25, 0.5, 0.75]))
    found = [f"Quartiles of r over genes on held-out blocks: {quartiles}. `genes.csv` holds the value of every gene."]
    if poor:
        found.append(f"{len(poor)} of {len(r)} genes were not predictable (r <= 0): {_named(poor)}.")
    if unknown:
        found.append(f"{len(unknown)} genes have no r: {_named(unknown)}.")
    return found


def _about_support(table: AnnData) -> list[str]:
    imputed = ~table.obs[Keys.MEASURED].to_numpy(dtype=bool)
    without = imputed & (table.obs[Keys.SUPPORT].to_numpy(dtype=float) <= 0)
    if not without.any():
        return []
    where = table.obs[Keys.SECTION][without].value_counts()
    listed = ", ".join(f"{name} {n}" for name, n in where[where > 0].items())
    return [f"{int(without.sum())} spots have no path in the graph to a measured spot (support 0): {listed}."]


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _N_NAMED} more" if len(names) > _N_NAMED else ""
    shown = (
        f"`{' '.join(name.replace('`', chr(39)).split())}`" for name in names[:_N_NAMED]
    )  # whatever signs they hold
    return f"{', '.join(shown)}{more}"


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
        elif kind == "list":
            parts.append("\n".join(f"- {item}" for item in content))
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
    """Escape, and set text between backticks as code."""
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
