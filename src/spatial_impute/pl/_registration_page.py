"""Page to check a registration in a browser: pictures of each section, and decisions saved as JSON."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from spatial_impute._io.files import file_to_write, written_whole
from spatial_impute._stack import load_record, registration_problems, registration_state, require_registration, warn
from spatial_impute._validation import require_positive
from spatial_impute.pl._figure import nice_length, sections_in_z
from spatial_impute.pl._overlay import compared_sections, on_reference, overlay, tissue_dice

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from spatialdata import SpatialData

_TILES = 8  # of the checkerboard along the longer side
_QUALITY = 85  # of JPEG: no blocks to be seen, a quarter of the size of PNG
_STYLE = """
body{font-family:sans-serif;max-width:84em;margin:0 auto;padding:1em 1em 5em;line-height:1.4;color:#222}
section{border:1px solid #ccc;border-left:.5em solid #999;border-radius:.3em;padding:.2em 1em 1em;margin:1.2em 0}
section.ok{border-left-color:#009E73}section.weak{border-left-color:#E69F00}section.failed{border-left-color:#D55E00}
h2{margin:.5em 0 .2em}h2 small{font-weight:normal;color:#555}p,ul{margin:.3em 0}
.pictures{display:flex;flex-wrap:wrap;gap:1.5em;margin:.8em 0}figure{margin:0;flex:1 1 24em}
figcaption{color:#555;font-size:.9em}.swipe{position:relative}img{display:block;width:100%;border:1px solid #ddd}
.swipe img+img{position:absolute;top:0;left:0;clip-path:inset(0 0 0 50%)}
.board{position:relative}.board div{position:absolute;inset:0;
background-image:linear-gradient(to right,#0004 1px,transparent 1px),linear-gradient(#0004 1px,transparent 1px);
background-size:var(--tile)}
.line{position:absolute;top:0;bottom:0;left:50%;border-left:2px solid #222;pointer-events:none}
input[type=range]{width:100%;margin:.4em 0}label{margin-right:1.5em;padding:.3em;cursor:pointer}
footer{position:fixed;bottom:0;left:0;right:0;background:#eee;border-top:1px solid #ccc;padding:.8em 1em}
footer div{max-width:84em;margin:0 auto}button{font-size:1em;padding:.3em 1em;margin-right:1em}
"""
_SCRIPT = """
"use strict";
function decisions(){
  const found={};
  document.querySelectorAll("input[type=radio]:checked").forEach(b=>{found[b.name]=b.value});
  return {registration:REGISTRATION,sections:found};
}
function count(){
  const done=Object.keys(decisions().sections).length;
  document.getElementById("count").textContent=done+" of "+document.querySelectorAll("section").length+" sections decided";
}
function swipe(range){
  const box=range.parentElement.querySelector(".swipe");
  box.querySelector("img+img").style.clipPath="inset(0 0 0 "+range.value+"%)";
  box.querySelector(".line").style.left=range.value+"%";
}
function save(){
  const link=document.createElement("a");
  link.href=URL.createObjectURL(new Blob([JSON.stringify(decisions(),null,1)],{type:"application/json"}));
  link.download="checked.json";link.click();
}
document.querySelectorAll("input[type=range]").forEach(r=>{r.addEventListener("input",()=>swipe(r));swipe(r)});
document.querySelectorAll("input[type=radio]").forEach(b=>b.addEventListener("change",count));
document.getElementById("save").addEventListener("click",save);count();
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head>
<body style="--tile:{tile}"><h1>{title}</h1>
<p>First picture: the reference is magenta, the section is green, and where both have tissue it is grey. Second picture: tiles
of {tile_um:g} µm of the reference and of the section in turn; the upper left one is of the reference. Vessels, glands and the
outline should go on from tile to tile. Reject a section if they do not.</p>
{parts}
<footer><div><button id="save">Save decisions</button><span id="count"></span></div></footer>
<script>{script}</script></body></html>
"""


def registration_page(
    sdata: SpatialData,
    path: str | Path,
    *,
    sections: str | Sequence[str] | None = None,
    resolution: float | None = None,
) -> None:
    """Write a page (HTML) to check a registration in a browser, section by section.

    Each section has a picture with a slider between before and after, a checkerboard of its image and the reference,
    its verdict with the reasons, and a choice: approve or reject. The button "Save decisions" saves ``checked.json``.
    ``si.tl.register_stack(sdata, checked="checked.json")`` then keeps the approved sections where they are, and
    registers the others again. The page is one file that needs no other file and no network.

    Parameters
    ----------
    sdata
        Registered stack.
    path
        File to write (``.html``). A file that is there is replaced.
    sections
        Sections to check; all but the reference by default.
    resolution
        Pixel size in um at which the images are read; by default 600 pixels along the longer side.

    Returns
    -------
    ``None``. Writes the file.

    Raises
    ------
    KeyError
        If the stack is not registered, or a section does not exist.
    FileNotFoundError
        If the folder of `path` does not exist.
    ValueError
        If no section is left to compare, or `path` does not end in ``.html``.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack()
    >>> si.tl.register_stack(sdata, method="rigid", show_progress_bar=False)
    >>> si.pl.registration_page(sdata, "check.html")
    """
    record = load_record(sdata)
    rows = require_registration(record)["sections"]
    path = file_to_write(path, ends=(".html",), overwrite=True)
    if resolution is not None:
        resolution = require_positive(resolution, name="resolution", unit="um per pixel")
    warn(registration_problems(sdata, record))
    wanted = compared_sections(record, sections_in_z(record, sections), rows if sections is None else None)
    canvas, reference, drawn = on_reference(sdata, record, wanted, resolution)
    tile = nice_length(max(canvas.width, canvas.height) / _TILES)
    parts = []
    for section, (before, after) in zip(wanted, drawn, strict=True):
        images = overlay(reference, before), overlay(reference, after), canvas.checkerboard(reference, after, tile)
        dice = tissue_dice(reference, before), tissue_dice(reference, after)
        parts.append(_part(section.name, rows[section.name], dice, [_jpeg(image) for image in images]))
    text = _PAGE.format(
        title=f"Registration of {len(parts)} section{'s' if len(parts) > 1 else ''} on {record.reference}",
        style=_STYLE,
        tile=f"{100 * tile / canvas.width:.3f}% {100 * tile / canvas.height:.3f}%",
        tile_um=tile,
        parts="\n".join(parts),
        script=_SCRIPT.replace("REGISTRATION", json.dumps(registration_state(record))),
    )
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def _part(name: str, row: dict[str, Any], dice: tuple[float, float], images: list[str]) -> str:
    """Pictures, verdict and choice of one section."""
    median, most = row.get("error_um"), row.get("error_p90_um")
    error = (
        "unknown" if median is None or most is None else f"{median:.0f} µm, at nine of ten points below {most:.0f} µm"
    )
    numbers = (
        f"Expected error: {error}. Overlap of the tissues (Dice): {dice[0]:.2f} before, {dice[1]:.2f} after. "
        f"Structure score: {row['score']:.2f}."
    )
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in row["reasons"])
    before, after, board = (f'<img alt="" src="data:image/jpeg;base64,{image}">' for image in images)
    choices = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"> {text}</label>'
        for value, text in (("approved", "Approve"), ("rejected", "Reject"))
    )
    return (
        f'<section class="{row["verdict"]}"><h2>{name} <small>{row["verdict"]}</small></h2><p>{numbers}</p><ul>{reasons}</ul>'
        f'<div class="pictures"><figure><div class="swipe">{before}{after}<div class="line"></div></div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="before or after">'
        "<figcaption>Left of the line: before registration. Right of it: after. Move the slider.</figcaption></figure>"
        f'<figure><div class="board">{board}<div></div></div><figcaption>After registration.</figcaption></figure></div>'
        f"{choices}</section>"
    )


def _jpeg(image: np.ndarray) -> str:
    """RGB (y, x, 3) in 0-255 as JPEG in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
    return base64.b64encode(file.getvalue()).decode()
