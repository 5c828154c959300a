"""From stored samples to a brightfield image: color space, alpha, bits in use, names of channels, orientation.

Files, arrays and elements all pass here, so that one place decides what "this is an RGB image" means.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import dask.array as da
import numpy as np
from skimage.color import lab2rgb

if TYPE_CHECKING:
    from collections.abc import Sequence

_COLORS = {"r": "r", "red": "r", "g": "g", "green": "g", "b": "b", "blue": "b", "a": "a", "alpha": "a"}
_PURE: dict[int | None, str] = {0xFF0000: "r", 0x00FF00: "g", 0x0000FF: "b"}
_UNNAMED = re.compile(r"(image|channel|chan|ch|c|s|band)?[\s_:.#-]*\d*([\s_:.-]*\d+)*", re.IGNORECASE)
_DYES = re.compile(
    r"dapi|hoechst|draq|fitc|tritc|rhodamine|texas|cy\s*-?\d|alexa|\baf\s*-?\d|opal|atto|gfp|rfp|yfp|cfp|mcherry|"
    r"tdtomato|\bpe\b|\bapc\b|sybr|syto|fluor",
    re.IGNORECASE,
)
_LUMA = (0.299, 0.587, 0.114)  # shares of red, green and blue, unless the file gives others
_FOOTROOM = (0.0, 255.0, 128.0, 255.0, 128.0, 255.0)  # black and white of Y, Cb and Cr, in 8 bits


@dataclass(frozen=True)
class Samples:
    """Properties of samples, as their source states them."""

    kind: str = "RGB"
    """One of ``"grey"``, ``"white-is-zero grey"``, ``"palette"``, ``"RGB"``, ``"YCbCr"``, ``"CIELab"``, ``"ICCLab"``, ``"CMYK"``."""
    alpha: int | None = None  # Position of the alpha channel among all samples
    premultiplied: bool = False  # True if the colors were multiplied by alpha
    bits: int | None = None  # Bits in use, if the source says it
    orientation: int = 1  # Of TIFF and EXIF: 1 is upright, 2 to 8 are turned or mirrored
    palette: np.ndarray | None = None  # (n, 3) uint8
    luma: tuple[float, ...] = _LUMA
    reference: tuple[float, ...] = _FOOTROOM

    def describe(self) -> str:
        """Sentence for a log."""
        parts = [f"pixels are {self.kind}" + (", multiplied by alpha" if self.premultiplied else "")]
        parts += [f"turned upright (orientation {self.orientation})"] if self.orientation != 1 else []
        return "; ".join(parts)

    @property
    def n_colors(self) -> int:
        """Number of samples that hold color."""
        return {"grey": 1, "white-is-zero grey": 1, "palette": 1, "CMYK": 4}.get(self.kind, 3)


def brightfield(array: da.Array, samples: Samples) -> da.Array:
    """Grey, RGB or RGB with straight alpha, upright, from samples (c, y, x); integers fill their type if `bits` says so."""
    as_it_is = samples.kind in ("grey", "RGB") and not samples.premultiplied and array.dtype != bool
    filled = samples.bits is None or array.dtype.kind != "u" or samples.bits == 8 * array.dtype.itemsize
    wanted = samples.n_colors if samples.alpha is None else 4
    if not (as_it_is and filled and array.shape[0] == wanted):
        made = _convert(np.zeros((array.shape[0], 1, 1), array.dtype), samples)
        array = da.map_blocks(
            _convert, array, samples, dtype=made.dtype, chunks=((len(made),), *array.chunks[1:]), meta=made[:, :0, :0]
        )
    return upright(array, samples.orientation)


def upright(array: da.Array, orientation: int) -> da.Array:
    """Turn and mirror (c, y, x) as the orientation of TIFF and EXIF says."""
    if orientation >= 5:
        array = array.transpose(0, 2, 1)
    if orientation in (3, 4, 7, 8):
        array = array[:, ::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, :, ::-1]
    return array


def _convert(block: np.ndarray, samples: Samples) -> np.ndarray:
    """One block of :func:`brightfield`, without the orientation."""
    if samples.kind == "palette":
        palette = cast("np.ndarray", samples.palette)
        colors = np.moveaxis(palette[np.minimum(block[0], len(palette) - 1)], -1, 0)
    else:
        colors = _to_rgb(_filled(block[: samples.n_colors], samples.bits), samples)
    if samples.alpha is None:
        return colors
    alpha = _filled(block[samples.alpha][None], samples.bits)
    if samples.kind == "palette":
        alpha = _rounded(alpha * (255 / _most(alpha.dtype)), np.uint8)
    if samples.premultiplied:
        full = _most(colors.dtype)
        share = np.where(alpha > 0, alpha, 1) / full
        colors = _rounded(np.minimum(colors / share, full), colors.dtype)
    colors = np.broadcast_to(colors, (3, *colors.shape[1:]))
    return np.concatenate([colors, alpha])


def _filled(values: np.ndarray, bits: int | None) -> np.ndarray:
    """Integers of `bits` bits, stretched to all bits of their type."""
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if bits is None or values.dtype.kind != "u" or bits >= 8 * values.dtype.itemsize:
        return values
    top = 2**bits - 1
    return _rounded(np.minimum(values, top) * (_most(values.dtype) / top), values.dtype)


def _to_rgb(colors: np.ndarray, samples: Samples) -> np.ndarray:
    """Colors of another color space as RGB; grey stays grey."""
    if samples.kind in ("grey", "RGB"):
        return colors
    full = _most(colors.dtype)
    if samples.kind == "white-is-zero grey":
        return (full - colors).astype(colors.dtype)
    if samples.kind == "CMYK":
        share = colors.astype(np.float32) / full
        return _rounded((1 - share[:3]) * (1 - share[3]) * full, colors.dtype)
    if samples.kind == "YCbCr":
        return _rounded(_from_ycbcr(colors.astype(np.float32) * (255 / full), samples) * (full / 255), colors.dtype)
    return _rounded(_from_lab(colors, signed=samples.kind == "CIELab") * full, colors.dtype)


def _from_ycbcr(values: np.ndarray, samples: Samples) -> np.ndarray:
    """RGB of Y, Cb, Cr, all in 0-255."""
    red, green, blue = samples.luma
    low, high, low_b, high_b, low_r, high_r = samples.reference
    y = (values[0] - low) * (255 / (high - low))
    cb = (values[1] - low_b) * (127 / (high_b - low_b))
    cr = (values[2] - low_r) * (127 / (high_r - low_r))
    r = y + cr * (2 - 2 * red)
    b = y + cb * (2 - 2 * blue)
    return np.stack([r, (y - red * r - blue * b) / green, b])


def _from_lab(colors: np.ndarray, *, signed: bool) -> np.ndarray:
    """RGB in 0-1 of L, a, b, which fill their type; a and b are two's complements, or have an offset of half the range."""
    step = (_most(colors.dtype) + 1) // 256  # stored values per unit of a and b
    lightness = colors[0].astype(np.float32) * (100 / _most(colors.dtype))
    if signed:
        ab = colors[1:].view(f"i{colors.dtype.itemsize}").astype(np.float32) / step
    else:
        ab = colors[1:].astype(np.float32) / step - 128
    lab = np.moveaxis(np.concatenate([lightness[None], ab]), 0, -1)
    # White is taken for the white of the screen, as color management does: paper and glass stay neutral.
    return np.moveaxis(lab2rgb(lab, channel_axis=-1), -1, 0)


def _most(dtype: Any) -> int:
    return int(np.iinfo(dtype).max) if np.dtype(dtype).kind in "iu" else 1


def _rounded(values: np.ndarray, dtype: Any) -> np.ndarray:
    return np.clip(np.rint(values), 0, _most(dtype)).astype(dtype) if np.dtype(dtype).kind in "iu" else values


def names_by_color(names: Sequence[object], colors: Sequence[int | None]) -> list[str]:
    """Names of channels; three without a name are named by their colors (0xRRGGBB) if these are red, green and blue."""
    pure = [_PURE.get(color, "") for color in colors]
    unnamed = all(_UNNAMED.fullmatch(str(name).strip()) for name in names)
    return pure if unnamed and sorted(pure) == ["b", "g", "r"] else [str(name) for name in names]


def rgb_order(names: Sequence[str] | None, n: int) -> list[int]:
    """Positions of grey, or of red, green, blue (and alpha), among `n` channels of these names.

    Channels without names are taken in that order. Raises a ``ValueError`` for other names: dyes are no colors.
    """
    if n not in (1, 3, 4):
        msg = f"An H&E image has 1, 3 or 4 channels, found {n}{f' ({list(names)})' if names else ''}. Select red, green and blue."
        raise ValueError(msg)
    names = [str(name).strip() for name in names or ()]
    if all(_UNNAMED.fullmatch(name) for name in names):
        return list(range(n))
    if n == 1 and not _DYES.search(names[0]):
        return [0]
    found = [_COLORS.get(name.lower()) for name in names]
    wanted = ["r", "g", "b", "a"][:n]
    if n > 1 and sorted(map(str, found)) == sorted(wanted):
        return [found.index(color) for color in wanted]
    msg = (
        f"A brightfield image has the channels red, green and blue, or one grey channel; found {names}, which look like "
        "fluorescence. Give the H&E image. If these are its colors, name them 'r', 'g', 'b'."
    )
    raise ValueError(msg)


def names_alpha(names: Sequence[str]) -> bool:
    """True if one of the channels is named as alpha."""
    return any(_COLORS.get(name.strip().lower()) == "a" for name in names)
