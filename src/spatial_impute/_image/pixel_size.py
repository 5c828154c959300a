"""Size of a pixel: the units of all sources, and which numbers are no physical size."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from spatial_impute._settings import logger

if TYPE_CHECKING:
    import tifffile

RANGE = (0.05, 50.0)
"""Pixels of scans and overviews, um."""

_NAMES = {
    1e-4: "angstrom angstroms Å å ångström",
    1e-6: "pm picometer picometre",
    1e-3: "nm nanometer nanometre nanometers nanometres",
    1.0: "um micron microns micrometer micrometre micrometers micrometres \\u00b5m",
    1e3: "mm millimeter millimetre millimeters millimetres",
    1e4: "cm centimeter centimetre centimeters centimetres",
    1e6: "m meter metre meters metres",
    25_400.0: "in inch inches",
}
_UM_PER_UNIT = {name: um for um, names in _NAMES.items() for name in names.split()}
_UM_PER_TAG = {2: 25_400.0, 3: 10_000.0, 4: 1e3, 5: 1.0}  # ResolutionUnit: inch, cm, and the mm and um of ImageJ
SAME = 1.05
"""Sizes that differ by less are the same: magnifications differ by a factor of 2, scanners state theirs to a few per cent."""
_PRINT = 2.0  # um; print and desktop scanners reach 12,700 dots per inch, coarser pixels may be theirs
_SLIDE = 130_000.0  # um; the largest slides of pathology measure 102 x 127 mm
_MOST_OBLONG = 3.0


def um_per_unit(unit: str | None) -> float | None:
    """Micrometres per unit of length; None for pixels, reference frames and unknown units."""
    # "Mm" and "Pm" are other units than "mm" and "pm", so abbreviations keep their case.
    name = (unit or "").strip().replace("µ", "u").replace("μ", "u")
    return _UM_PER_UNIT.get(name if len(name) < 3 else name.lower())


def tiff_pixel_size(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Um per pixel (x, y) of a page as it is stored; None if the file does not tell, or contradicts itself.

    Sources are OME-XML, the text of the scanner or ImageJ, and the resolution tags.
    """
    text = page.description or ""
    if tiff.ome_metadata:
        own = ome_pixels(tiff.ome_metadata, page)
        said = [None if own is None else _oblong(_ome_length(own, "X"), _ome_length(own, "Y"), own)]
        if said == [None]:
            return None
    else:
        numbers = (float(n.replace(",", ".")) for n in re.findall(r"\bMPP\s*=\s*([0-9.,]+(?:[eE][+-]?\d+)?)", text))
        said = [(size, size) for size in numbers if size > 0]
    if tiff.is_philips and (
        found := re.search(r'DICOM_PIXEL_SPACING"[^>]*>\s*"?([0-9.]+)"?\s+"?([0-9.]+)', text.replace("&quot;", '"'))
    ):
        y, x = (1e3 * float(value) for value in found.groups())
        said = [(x, y)]
    sizes = [size for size in (*said, _from_tags(tiff, page)) if size is not None]
    if any(max(along) > SAME * min(along) for along in zip(*sizes, strict=True)):
        logger.warning(
            "%s contradicts itself: its texts and resolution tags give pixels of %s um; they are not used",
            tiff.filename,
            " and ".join(f"{x:.4g} x {y:.4g}" for x, y in sizes),
        )
        return None
    return sizes[0] if sizes else None


def _from_tags(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> tuple[float, float] | None:
    """Size by the resolution tags, in the unit of ImageJ or of the tags; None for prints and screens."""
    unit = page.tags.get("ResolutionUnit")
    um = None if unit is None else _UM_PER_TAG.get(int(unit.value))
    if tiff.imagej_metadata and (named := str(tiff.imagej_metadata.get("unit", ""))):
        um = um_per_unit(named)
    tag_x = page.tags.get("XResolution")
    if um is None or tag_x is None:
        return None
    fractions = [tag.value for tag in (tag_x, page.tags.get("YResolution") or tag_x)]
    if not all(part > 0 for fraction in fractions for part in fraction):
        return None
    x, y = (um * denominator / numerator for numerator, denominator in fractions)
    extent = max(x * page.imagewidth, y * page.imagelength)
    return None if extent > _SLIDE or _is_print(max(x, y), um) else (x, y)


def _is_print(size: float, unit: float) -> bool:
    """True if pixels of `size` um are those of a print or a screen, and no sizes in tissue.

    Tags in inches, and other tags that come to whole hundreds of dots per inch, are set by image software.
    """
    if not RANGE[0] <= size <= RANGE[1]:
        return True
    hundreds = 25_400.0 / size / 100
    whole = abs(hundreds - round(hundreds)) < 0.002 * hundreds
    return size > _PRINT and (unit == _UM_PER_TAG[2] or (unit == _UM_PER_TAG[3] and whole))


def _ome_length(pixels: ET.Element, axis: str) -> float | None:
    value = pixels.get(f"PhysicalSize{axis}")
    # Micrometres are the default of the format; pixels and reference frames are no lengths.
    um = um_per_unit(pixels.get(f"PhysicalSize{axis}Unit", "um"))
    return None if value is None or um is None or not float(value) > 0 else float(value) * um


def _oblong(x: float | None, y: float | None, pixels: ET.Element) -> tuple[float, float] | None:
    """Sizes along x and y; one that is missing, or whose unit was left out and does not fit, is that of the other axis."""
    if x is None or y is None:
        one = x or y
        return None if one is None or (pixels.get("PhysicalSizeX") and pixels.get("PhysicalSizeY")) else (one, one)
    if 1 / _MOST_OBLONG < x / y < _MOST_OBLONG:
        return x, y
    units = [pixels.get(f"PhysicalSize{axis}Unit") for axis in "XY"]
    if (units[0] is None) != (units[1] is None):
        ratio = float(pixels.get("PhysicalSizeX", 1)) / float(pixels.get("PhysicalSizeY", 1))
        return (x, x / ratio) if units[1] is None else (y * ratio, y)
    logger.warning("OME-XML gives pixels of %g x %g um, which no scanner makes; they are not used", x, y)
    return None


def ome_pixels(xml: str, page: tifffile.TiffPage) -> ET.Element | None:
    """Element ``Pixels`` of the image with the size of this page: labels and overviews are other images of the file."""
    try:
        pixels = ET.fromstring(xml).findall(".//{*}Pixels")
    except ET.ParseError:
        return None
    size = (str(page.imagewidth), str(page.imagelength))
    return next((p for p in pixels if (p.get("SizeX"), p.get("SizeY")) == size), None)


def zarr_pixel_size(axes: dict[str, Any], multiscale: dict[str, Any]) -> tuple[float, float] | None:
    """Um per pixel (x, y) of the finest level of an OME-Zarr: its scale, times that of the whole multiscale."""
    sizes = []
    for name in "xy":
        axis = axes.get(name)
        um = um_per_unit(axis.get("unit")) if isinstance(axis, dict) else None
        holders = (multiscale["datasets"][0], multiscale)
        scales = [
            t["scale"]
            for holder in holders
            for t in holder.get("coordinateTransformations", ())
            if t.get("type") == "scale"
        ]
        if um is None or not scales:
            return None
        place = list(axes).index(name)
        for scale in scales:
            um *= float(scale[place])
        sizes.append(um)
    return (sizes[0], sizes[1]) if min(sizes) > 0 else None
