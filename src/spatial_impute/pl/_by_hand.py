"""Registration by a person: a page to approve or reject sections, and a window of napari to place one by hand."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from spatial_impute._geometry import apply_affine, exchanged_axes
from spatial_impute._io.files import file_to_write, written_whole
from spatial_impute._keys import Keys
from spatial_impute._stack.elements import registration_state, require_registration, section_levels
from spatial_impute._stack.record import load_record
from spatial_impute._stack.state import registration_problems, warn
from spatial_impute._validation import require_key, require_positive
from spatial_impute.pl._figure import nice_length
from spatial_impute.pl._overlay import compared_sections, on_reference, overlay, read_picture, tissue_dice

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from spatialdata import SpatialData

    from spatial_impute._stack.record import StackRecord

_TILES = 8  # of the checkerboard along the longer side
_QUALITY = 85  # of JPEG: no visible blocks, a quarter of the size of PNG
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
_PIXELS = 1500  # along the longer side of an image
_SHARE = 0.01  # of the longer side: size of a landmark
_COLORS = ("blue", "orange")  # landmarks of the reference and of the section, visible on H&E
_SEEN = 0.6  # opacity of the section, so that the reference shows below


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
        File to write (``.html``). An existing file is replaced.
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
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> si.tl.register_stack(sdata, show_progress_bar=False)
    >>> si.pl.registration_page(sdata, "check.html")
    """
    record = load_record(sdata)
    rows = require_registration(record)["sections"]
    path = file_to_write(path, ends=(".html",), overwrite=True)
    if resolution is not None:
        resolution = require_positive(resolution, name="resolution", unit="um per pixel")
    warn(registration_problems(sdata, record))
    wanted = compared_sections(record, sections, rows)
    canvas, reference, drawn = on_reference(sdata, record, wanted, resolution)
    tile = nice_length(max(canvas.width, canvas.height) / _TILES)
    parts = []
    for section, (before, after) in zip(wanted, drawn, strict=True):
        images = overlay(reference, before), overlay(reference, after), canvas.checkerboard(reference, after, tile)
        dice = tissue_dice(reference, before), tissue_dice(reference, after)
        parts.append(_section_html(section.name, rows[section.name], dice, [_jpeg(image) for image in images]))
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


def _section_html(name: str, row: dict[str, Any], dice: tuple[float, float], images: list[str]) -> str:
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
    file = io.BytesIO()
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
    return base64.b64encode(file.getvalue()).decode()


def place_by_hand(sdata: SpatialData, section: str, *, resolution: float | None = None, viewer: Any = None) -> Any:
    """Open napari with a section over the reference, to drag it to its place or to click landmarks.

    Drag: choose the layer of the section, then the mode "transform" (key 2); the corners scale it, the handle above
    turns it. Landmarks: click the same places in the layers "... landmarks" of the section and of the reference, in the
    same order. Landmarks of the section move with its image. :func:`spatial_impute.tl.read_placement` reads either.

    Parameters
    ----------
    sdata
        Stack. If it is registered, the section begins at its present place, without the deformation; else in the middle
        of the reference.
    section
        Section to place.
    resolution
        Pixel size in um at which the images are read; by default 1500 pixels along the longer side.
    viewer
        Viewer to add the layers to; a new one by default. It must not have layers of these names: one viewer for each
        section.

    Returns
    -------
    The viewer, with the layers ``"{reference}"``, ``"{section}"``, ``"{reference} landmarks"`` and ``"{section}
    landmarks"``, in um of the reference. Nothing is written to `sdata`.

    Raises
    ------
    ImportError
        If napari is not installed.
    KeyError
        If the section does not exist.
    ValueError
        If `section` is the reference, or `viewer` has a layer of the same name.

    Examples
    --------
    >>> import spatial_impute as si
    >>> sdata = si.datasets.synthetic_stack(extent=1400.0)
    >>> viewer = si.pl.place_by_hand(sdata, "s0")  # doctest: +SKIP
    >>> si.tl.register_stack(sdata, initial={"s0": si.tl.read_placement(viewer, "s0")})  # doctest: +SKIP
    """
    record = load_record(sdata)
    require_key(section, record.names, where="the stack's sections")
    if section == record.reference:
        msg = f"`section` must not be the reference {section!r}, which does not move."
        raise ValueError(msg)
    if resolution is not None:
        resolution = require_positive(resolution, name="resolution", unit="um per pixel")
    names = (record.reference, section)
    present = set() if viewer is None else {layer.name for layer in viewer.layers}
    if taken := sorted(present & {*names, *map(Keys.landmarks, names)}):  # napari would give the new ones other names
        msg = f"The viewer has layers {taken} already. Open another viewer for this section, or remove them first."
        raise ValueError(msg)
    try:
        import napari
    except ImportError as error:
        msg = "Placing by hand needs napari: `pip install 'napari[all]'`."
        raise ImportError(msg) from error
    pictures = {}
    for name in names:
        rgb, to_um = read_picture(section_levels(sdata, record[name]), resolution, _PIXELS)
        pictures[name] = np.clip(rgb, 0, 255).astype(np.uint8), to_um
    start = _start_matrix(record, section, pictures)
    viewer = napari.Viewer() if viewer is None else viewer
    layers = []
    for name, place, opacity in ((record.reference, np.eye(3), 1.0), (section, start, _SEEN)):
        rgb, to_um = pictures[name]
        common = {"affine": exchanged_axes(place), "units": ("um", "um")}
        shown = {"rgb": True, "opacity": opacity, "metadata": {"reference": record.reference}}
        layers.append(viewer.add_image(rgb, name=name, **common, **shown, **_pixels_to_um(to_um)))
    for image, color in zip(layers, _COLORS, strict=True):
        common = {"affine": image.affine.affine_matrix, "units": ("um", "um")}
        size = _SHARE * max(image.data.shape) * float(np.prod(image.scale)) ** 0.5
        points = viewer.add_points(
            np.empty((0, 2)), name=Keys.landmarks(image.name), size=size, face_color=color, ndim=2, **common
        )
        viewer.layers.link_layers([image, points], ["affine"])
    viewer.scale_bar.visible = True
    viewer.reset_view()
    viewer.layers.selection.active = viewer.layers[section]
    return viewer


def _pixels_to_um(to_um: np.ndarray) -> dict[str, Any]:
    """Map from pixels to um as napari takes it; its pixels are counted from their centers."""
    from napari.utils.transforms import Affine

    centers = to_um @ np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1.0]])
    found = Affine(affine_matrix=exchanged_axes(centers), ndim=2)
    return {"scale": found.scale, "rotate": found.rotate, "shear": found.shear[:1], "translate": found.translate}


def _start_matrix(record: StackRecord, section: str, pictures: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Present place of the section; without one, its middle on that of the reference."""
    rows = (record.registration or {"sections": {}})["sections"]
    if section in rows:
        return np.asarray(rows[section]["matrix"], float)
    middle = {
        name: apply_affine(np.array([[rgb.shape[1] / 2, rgb.shape[0] / 2]]), to_um)[0]
        for name, (rgb, to_um) in pictures.items()
    }
    matrix = np.eye(3)
    matrix[:2, 2] = middle[record.reference] - middle[section]
    return matrix
