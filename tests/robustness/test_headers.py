"""Headers of files at random: the image is right and lies right, or the file is refused by name.

``FUZZ_EXAMPLES=2000 pytest tests/robustness/test_headers.py`` tries 2,000 of each.
"""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_impute._geometry import scaling
from spatial_impute._image.levels import image_levels, stored_pixels, to_rgb
from spatial_impute._image.reading import open_image
from spatial_impute._stack.elements import image_element
from spatial_impute.pp._spots import read_positions

EXAMPLES = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "200")))
UM = {1: None, 2: 25_400.0, 3: 10_000.0}  # ResolutionUnit
GREY, BILEVEL, RGB, PALETTE, MASK, CMYK, YCBCR, LAB, LOGL = 1, 0, 2, 3, 4, 5, 6, 8, 32844


def write_tiff(path: Path, planes: np.ndarray, bits: int, tags: dict[int, tuple[int, list]], *, planar: int) -> None:
    """Uncompressed TIFF of samples (y, x, s), with these tags beside those of the layout: type (3, 4 or 5) and values."""
    height, width, n = planes.shape
    parts = [planes] if planar == 1 else [planes[..., i : i + 1] for i in range(n)]
    strips = []
    for part in parts:
        rows = part.reshape(height, -1)
        if bits % 8:
            shifts = np.arange(bits - 1, -1, -1)
            rows = np.packbits(((rows[..., None] >> shifts) & 1).astype(np.uint8).reshape(height, -1), axis=1)
        strips.append(rows.astype(f"<u{max(bits, 8) // 8}" if bits % 8 == 0 else np.uint8).tobytes())
    offsets = np.cumsum([8, *map(len, strips)])
    tags = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * n),
        259: (3, [1]),
        273: (4, [int(o) for o in offsets[:-1]]),
        277: (3, [n]),
        278: (4, [height]),
        279: (4, [len(s) for s in strips]),
        284: (3, [planar]),
        **tags,
    }
    at = int(offsets[-1])
    beyond = at + 2 + 12 * len(tags) + 4
    entries, extra = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        letter = {3: "H", 4: "I", 5: "II"}[kind]
        flat = [int(v) for value in values for v in (value if kind == 5 else (value,))]
        data = struct.pack(f"<{len(flat)}{letter[0]}", *flat)
        if len(data) > 4:
            data, extra = struct.pack("<I", beyond + len(extra)), extra + data
        entries += struct.pack("<HHI", tag, kind, len(values)) + data.ljust(4, b"\0")
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", at) + b"".join(strips) + directory + extra)


def encoded(rgb: np.ndarray, photometric: int, bits: int) -> tuple[np.ndarray, np.ndarray, dict]:
    """Samples (y, x, s) of a picture in 0-1, the picture that they hold in 0-255, and tags."""
    top = 2**bits - 1
    if photometric in (GREY, BILEVEL):
        grey = np.rint(rgb[..., :1] * top)
        return (grey if photometric else top - grey).astype(int), np.repeat(grey / top * 255, 3, axis=2), {}
    if photometric == PALETTE:
        rng = np.random.default_rng(0)
        colors = rng.integers(0, 256, (top + 1, 3))
        index = np.rint(rgb[..., :1] * top).astype(int)
        return index, colors[index[..., 0]].astype(float), {320: (3, (colors * 257).T.ravel().tolist())}
    if photometric == CMYK:
        ink = np.concatenate([1 - rgb, np.zeros_like(rgb[..., :1])], axis=2)
        return np.rint(ink * top).astype(int), np.rint(rgb * top) / top * 255, {}
    if photometric == YCBCR:
        r, g, b = np.moveaxis(rgb * 255, -1, 0)
        y = 0.299 * r + 0.587 * g + 0.114 * b
        ycc = np.stack([y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402], axis=-1)
        return np.rint(ycc.clip(0, 255) * (top / 255)).astype(int), rgb * 255, {530: (3, [1, 1])}
    if photometric == LAB:
        from skimage.color import rgb2lab

        lab = rgb2lab(rgb)
        step = (top + 1) // 256
        ab = np.rint(lab[..., 1:] * step).astype(int) % (top + 1)
        return np.concatenate([np.rint(lab[..., :1] * top / 100).astype(int), ab], axis=2), rgb * 255, {}
    return np.rint(rgb * top).astype(int), np.rint(rgb * top) / top * 255, {}


def stored(picture: np.ndarray, orientation: int) -> np.ndarray:
    """The array that a viewer turns into `picture` (y, x, s), by the table of the TIFF standard."""
    flips = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}[orientation]
    turned = np.flip(picture, flips)
    return turned.transpose(1, 0, 2) if orientation >= 5 else turned


@EXAMPLES
@given(
    photometric=st.sampled_from([GREY, BILEVEL, RGB, PALETTE, MASK, CMYK, YCBCR, LAB, LOGL]),
    bits=st.sampled_from([1, 2, 4, 8, 16]),
    planar=st.sampled_from([1, 2]),
    alpha=st.sampled_from([None, 0, 1, 2]),
    orientation=st.sampled_from([None, 1, 2, 3, 4, 5, 6, 7, 8]),
    unit=st.sampled_from([None, 1, 2, 3]),
    mpp=st.sampled_from([0.25, 0.5, 1.0, 2.0, 8.0, 21.1667, 42.3333, 84.6667, 352.78]),
    seed=st.integers(0, 99),
)
def test_header_of_tiff(photometric, bits, planar, alpha, orientation, unit, mpp, seed):
    rng = np.random.default_rng(seed)
    picture = rng.uniform(0.1, 1.0, (5, 7, 3))
    picture[0, :3] = 1.0  # glass: full brightness is there
    samples, expected, tags = encoded(picture, photometric, bits)
    if alpha is not None:
        top = 2**bits - 1
        share = np.rint(rng.uniform(0, 1, (5, 7, 1)) * top) / top
        if alpha == 1:
            if photometric != RGB or bits < 8:
                return  # few programs multiply other colors by alpha
            samples = np.rint(samples * share).astype(int)
        samples = np.concatenate([samples, np.rint(share * top).astype(int)], axis=2)
        if alpha:
            expected = expected * share + 255 * (1 - share)
        tags[338] = (3, [alpha])
    tags[262] = (3, [photometric])
    turn = orientation or 1
    if orientation is not None:
        tags[274] = (3, [orientation])
    if unit is not None:
        tags |= {
            296: (3, [unit]),
            282: (5, [(round((UM[unit] or 1) / mpp * 1000), 1000)]),
            283: (5, [(round((UM[unit] or 1) / mpp * 500), 1000)]),
        }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tif"
        write_tiff(path, stored(samples, turn), bits, tags, planar=planar if samples.shape[2] > 1 else 1)
        try:
            opened = open_image(path)
            (level,) = image_levels(image_element(opened.levels, "s", 1.0), scaling(1.0))
            found = to_rgb(stored_pixels(level, 0, 5, 0, 7), level)
        except ValueError as error:
            refused = str(error)
        else:
            refused = None
    if refused is not None:
        assert "a.tif" in refused
        assert photometric in (MASK, LOGL) or bits < 8 or planar == 2, refused
        return
    assert found.shape == (5, 7, 3)
    tolerance = {YCBCR: 3.0, LAB: 12.0}.get(photometric, 1.0) + (1.0 if alpha else 0.0)
    np.testing.assert_allclose(found, expected, atol=tolerance)
    across, along = (1, 2) if turn < 5 else (2, 1)
    if unit in (2, 3) and mpp <= 1.0:  # no printer or screen has such dots
        assert opened.pixel_size == pytest.approx((across * mpp, along * mpp), rel=1e-3)
    elif opened.pixel_size is not None:
        assert unit == 3
        assert mpp in (2.0, 8.0)


COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


@EXAMPLES
@given(
    order=st.permutations(COLUMNS),
    kind=st.sampled_from(
        ["csv", "csv with byte-order mark", "csv with index", "quoted csv", "parquet", "parquet with index"]
    ),
    left_out=st.sampled_from([None, *COLUMNS]),
    flags=st.sampled_from([int, bool, float]),
    header=st.booleans(),
)
def test_columns_of_positions(order, kind, left_out, flags, header):
    rng = np.random.default_rng(0)
    true = pd.DataFrame({c: rng.integers(0, 1000, 6) for c in COLUMNS})
    true["barcode"] = [f"ACGT{i}-1" for i in range(6)]
    true["in_tissue"] = pd.Series([1, 0, 1, 1, 0, 1]).astype(flags)
    table = true[[c for c in order if c != left_out]]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spatial").mkdir()
        path = Path(folder) / "spatial" / ("tissue_positions.parquet" if "parquet" in kind else "tissue_positions.csv")
        if "parquet" in kind:
            indexed = kind.endswith("index") and left_out != "barcode"
            (table.set_index("barcode") if indexed else table).to_parquet(path)
        else:
            encoding = "utf-8-sig" if "mark" in kind else "utf-8"
            table.to_csv(
                path, index="index" in kind, header=header, encoding=encoding, quoting=1 if "quoted" in kind else 0
            )
        try:
            found = read_positions(Path(folder))
        except ValueError as error:
            refused = str(error)
        else:
            refused = None
    if refused is not None:
        assert path.name in refused
        assert left_out is not None or (not header and "parquet" not in kind)
        return
    assert left_out is None
    if not header and "parquet" not in kind and list(order) != COLUMNS:
        return  # numbers in another order: the lattice shows it, see test_read_spaceranger.py
    for column in COLUMNS[1:]:
        np.testing.assert_array_equal(found[column].to_numpy(float), true[column].to_numpy(float))
    assert list(found.index) == list(true["barcode"])
