"""Inputs of ``pp.assemble_stack``: names, heights, pixel sizes, arrays, files, objects of other readers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import tifffile
import torch
import xarray as xr
import zarr
from anndata import AnnData
from PIL import Image
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Image3DModel
from spatialdata.transformations import Affine

import spatial_impute as si
from bad_inputs import answers, refuses
from bad_inputs._make import CENTERS, scan, visium, write

FUNCTION = "pp.assemble_stack"


def one(value, **kwargs):
    """Stack of one section."""
    return si.pp.assemble_stack({"s": value}, **({"mpp": 1.0, "z": [0.0]} | kwargs))


def refused(given, error, says, call):
    return refuses(FUNCTION, given, error, says, call)


def answered(given, says, call, check):
    return answers(FUNCTION, given, says, call, check)


def pixels(sdata) -> np.ndarray:
    return np.asarray(sdata.images["s_image"].data)


def measured(sdata) -> list[bool]:
    return sdata.tables["stack"].obs["measured"].tolist()


def _truncated(world, name: str):
    path = world.tmp / name
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    return write(path, path.read_bytes()[:2000])


def _contradicting(world):
    tags = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER", "metadata": None}  # 0.25 um
    tifffile.imwrite(world.tmp / "a.tif", scan(), photometric="rgb", description="Aperio |MPP = 0.5", **tags)
    return world.tmp / "a.tif"


def _twins(world):
    with tifffile.TiffWriter(world.tmp / "a.tif") as writer:
        for compression in (None, "zlib"):
            writer.write(scan(), photometric="rgb", compression=compression)
    return world.tmp / "a.tif"


def _nan_spot():
    centers = CENTERS.copy()
    centers[2] = np.nan
    return visium(centers=centers)


def _off_tissue(flags):
    found = visium()
    found.tables["table"].obs["in_tissue"] = flags
    return found


def _volume():
    found = visium()
    del found.images["he"]
    found.images["he"] = Image3DModel.parse(scan()[None], dims=("z", "y", "x", "c"))
    return found


def _zarr_array(world):
    zarr.create_array(world.tmp / "b.zarr", data=np.moveaxis(scan(), -1, 0))
    return world.tmp / "b.zarr"


def _duplicate_ids():
    found = visium()
    found.shapes["spots"].index = pd.Index(["a", "b", "b", "d"])
    return found


def _duplicate_rows():
    found = visium()
    found.tables["table"].obs["id"] = ["a", "b", "b", "d"]  # after parsing, which would refuse it
    return found


def _stretched():
    matrix = Affine(np.diag([1.0, 2.0, 1.0]), input_axes=("x", "y"), output_axes=("x", "y"))
    return visium(transformation=matrix)


def _mirrored():
    matrix = Affine([[-1, 0, 90], [0, 1, 0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
    return visium(transformation=matrix)


NAMES = [
    refused("no section", ValueError, "`sections` is empty", lambda w: si.pp.assemble_stack({}, section_spacing=5)),
    refused(
        "names that are no file names (`a/b`, `../x`, empty, not ASCII)",
        ValueError,
        "Section names are letters, digits",
        lambda w: si.pp.assemble_stack({"../x": scan()}, mpp=1, z=[0]),
    ),
    refused(
        "names that differ in case only",
        ValueError,
        "without regard to case",
        lambda w: si.pp.assemble_stack({"HE": scan(), "he": scan(seed=1)}, mpp=1, section_spacing=5),
    ),
    refused(
        "a section named `aligned`",
        ValueError,
        "rename the section",
        lambda w: si.pp.assemble_stack({"aligned": scan()}, mpp=1, z=[0]),
    ),
    refused(
        "one image for two sections",
        ValueError,
        "each section needs its own image",
        lambda w: si.pp.assemble_stack(dict.fromkeys("ab", scan()), mpp=1, section_spacing=5),
    ),
    refused("neither `z` nor `section_spacing`", ValueError, "Give the heights", lambda w: one(scan(), z=None)),
    refused("too few heights", ValueError, "one finite number per section", lambda w: one(scan(), z=[])),
    refused("a height that is no number", ValueError, "one finite number per section", lambda w: one(scan(), z=["a"])),
    refused("a height that is NaN", ValueError, "one finite number per section", lambda w: one(scan(), z=[np.nan])),
    refused(
        "heights against the order of the sections",
        ValueError,
        "`z` must rise or fall",
        lambda w: si.pp.assemble_stack({n: scan(seed=i) for i, n in enumerate("abc")}, mpp=1, z=[0, 20, 10]),
    ),
    refused(
        "two sections at one height",
        ValueError,
        "`z` must rise or fall",
        lambda w: si.pp.assemble_stack({n: scan(seed=i) for i, n in enumerate("ab")}, mpp=1, z=[5, 5]),
    ),
    refused(
        "a spacing of 0",
        ValueError,
        "`section_spacing` must be a positive number",
        lambda w: one(scan(), z=None, section_spacing=0),
    ),
    refused("no pixel size anywhere", ValueError, "Pass `mpp=`", lambda w: one(scan(), mpp=None)),
    refused(
        "a negative pixel size",
        ValueError,
        "`mpp of section 's'` must be a positive number",
        lambda w: one(scan(), mpp=-0.5),
    ),
    refused("a pixel size of NaN", ValueError, "must be a positive number", lambda w: one(scan(), mpp=np.nan)),
    refused(
        "a pixel size for a section that is not there",
        KeyError,
        "names a section that does not exist",
        lambda w: one(scan(), mpp={"t": 1.0}),
    ),
    refused("an unknown reference", KeyError, "not found in `sections`", lambda w: one(scan(), reference="t")),
]

ARRAYS = [
    refused(
        "two or more than four channels",
        ValueError,
        "1, 3 or 4 channels",
        lambda w: one(np.zeros((2, 40, 40), np.uint8)),
    ),
    refused(
        "inputs without names",
        ValueError,
        "`sections` needs a name for each input",
        lambda w: si.pp.assemble_stack([scan(), scan(seed=1)], mpp=1, section_spacing=5),
    ),
    refused(
        "a tensor of torch",
        ValueError,
        "`tensor.numpy()`",
        lambda w: one(torch.zeros(30, 40, 3)),
    ),
    refused(
        "channels that are named by dyes",
        ValueError,
        "look like fluorescence. Give the H&E image",
        lambda w: one(xr.DataArray(scan(), dims=("y", "x", "c"), coords={"c": ["DAPI", "FITC", "Cy5"]})),
    ),
    refused("a pixel size in nm or mm", ValueError, "overviews measure 0.05 to 50 um", lambda w: one(scan(), mpp=500)),
    refused("an image without pixels", ValueError, "at least one pixel", lambda w: one(np.zeros((0, 40, 3), np.uint8))),
    refused(
        "four dimensions",
        ValueError,
        "expected a SpatialData, an image path or an image array",
        lambda w: one(np.zeros((1, 3, 9, 9))),
    ),
    refused(
        "a list, or None, for an image",
        ValueError,
        "expected a SpatialData, an image path or an image array",
        lambda w: one([1, 2]),
    ),
    refused("an image of strings or objects", ValueError, "numbers of type", lambda w: one(np.full((40, 40, 3), "a"))),
    refused("complex numbers", ValueError, "numbers of type", lambda w: one(np.ones((40, 40, 3), complex))),
    answered(
        "one channel", "is taken as grey", lambda w: one(scan(80, 90)), lambda w, s: pixels(s).shape == (1, 80, 90)
    ),
    answered(
        "four channels",
        "alpha is dropped when colours are read, and what is wholly transparent is glass",
        lambda w: one(scan(80, 90, 4)),
        lambda w, s: pixels(s).shape == (4, 80, 90),
    ),
    answered(
        "odd sizes",
        "are kept to the pixel",
        lambda w: one(scan(81, 67, 3)),
        lambda w, s: pixels(s).shape == (3, 81, 67),
    ),
    answered(
        "uint16 and float images",
        "keep their type; white is that of the bits in use (8 to 16)",
        lambda w: one(scan(dtype=np.uint16)),
        lambda w, s: pixels(s).dtype == np.uint16,
    ),
]

FILES = [
    refused(
        "a format of a scanner that is not read",
        ValueError,
        "Convert it to OME-TIFF with QuPath",
        lambda w: one(write(w.tmp / "a.czi", b"ZISRAWFILE")),
    ),
    refused(
        "colors without a rule for RGB",
        ValueError,
        "for which there is no common rule; convert it to RGB",
        lambda w: one(_tiff(w, scan(80, 90), photometric=32844)),
    ),
    refused(
        "a stack of focal planes",
        ValueError,
        "holds 3 focal planes",
        lambda w: one(
            _tiff(w, np.zeros((3, 8, 9, 3), np.uint8), photometric="rgb", ome=True, metadata={"axes": "ZYXS"})
        ),
    ),
    refused(
        "a TIFF that knows a print resolution only",
        ValueError,
        "its image carries no physical size",
        lambda w: one(_tiff(w, scan(), photometric="rgb", resolution=(600, 600), resolutionunit="INCH"), mpp=None),
    ),
    answered(
        "TIFF of palettes, CMYK, YCbCr, CIELab and white-is-zero grey, of 1 to 16 bits",
        "becomes RGB or grey",
        lambda w: one(_tiff(w, 255 - scan(80, 90), photometric="miniswhite")),
        lambda w, s: np.array_equal(pixels(s)[0], 255 - _bytes(w)),
    ),
    answered(
        "an orientation in TIFF or EXIF",
        "is followed",
        lambda w: one(_tiff(w, scan(80, 90), photometric="minisblack", extratags=[(274, 3, 1, 3, True)])),
        lambda w, s: np.array_equal(pixels(s)[0], _bytes(w)[::-1, ::-1]),
    ),
    refused(
        "an AnnData, or the path of an h5ad, without image and lattice",
        ValueError,
        "`spatialdata_io.from_legacy_anndata(adata)` makes one",
        lambda w: one(AnnData(np.ones((3, 2), np.float32))),
    ),
    refused("a path that does not exist", FileNotFoundError, "No image at", lambda w: one(w.tmp / "none.tif")),
    refused("a format that is not read", ValueError, "expected one of", lambda w: one(write(w.tmp / "a.bmp", b"BM"))),
    refused(
        "a text file named .tif",
        ValueError,
        "cannot be read as an image",
        lambda w: one(write(w.tmp / "a.tif", b"not an image")),
    ),
    refused(
        "an empty file named .png",
        ValueError,
        "a.png is neither PNG nor JPEG",
        lambda w: one(write(w.tmp / "a.png", b"")),
    ),
    refused("a truncated TIFF", ValueError, "a.tif' is truncated", lambda w: one(_truncated(w, "a.tif"))),
    refused(
        "a TIFF whose text and resolution tags give different pixel sizes",
        ValueError,
        "Pixel size of section 's' is unknown",
        lambda w: one(_contradicting(w), mpp=None),
    ),
    refused("a TIFF of two images of one size", ValueError, "a.tif' holds 2 images", lambda w: one(_twins(w))),
    refused(
        "an array with masked pixels",
        ValueError,
        "values of its array are masked",
        lambda w: one(np.ma.masked_less(scan(), 100)),
    ),
    refused(
        "a DataArray with other dimensions",
        ValueError,
        "expected the dimensions c, y and x, found ('y', 'x', 'band')",
        lambda w: one(xr.DataArray(scan(), dims=("y", "x", "band"))),
    ),
    answered(
        "a Series of pixel sizes in another order than the sections",
        "its index names the sections",
        lambda w: si.pp.assemble_stack({"a": scan(), "s": scan()[::-1]}, z=[0, 1], mpp=pd.Series({"s": 2.0, "a": 1.0})),
        lambda w, sdata: [s["mpp"] for s in sdata.attrs["spatial_impute"]["stack"]["sections"]] == [1, 2],
    ),
    refused("an OME-Zarr that is none", ValueError, "cannot be read as an image", lambda w: one(_folder(w, "a.zarr"))),
    refused("an array of zarr", ValueError, "without axes and pixel size", lambda w: one(_zarr_array(w))),
    refused(
        "a folder that is neither of Space Ranger nor zarr",
        FileNotFoundError,
        "is no folder of Space Ranger",
        lambda w: one(_folder(w, "plain")),
    ),
    refused(
        "a folder of Space Ranger with a damaged JSON",
        ValueError,
        "cannot be read as output of Space Ranger",
        lambda w: one(_spaceranger(w, "{")),
    ),
    refused(
        "a folder of Space Ranger whose positions are no table of spots",
        ValueError,
        "has 2 columns and no header, the first like 'a'; expected the 6 columns",
        lambda w: one(_spaceranger(w, "{}", "a,b\n1,2\n")),
    ),
    refused(
        "a truncated PNG (found when pixels are read)",
        ValueError,
        "a.png' is damaged",
        lambda w: si.pp.segment_tissue(one(_truncated(w, "a.png"))),
    ),
    refused(
        "`fullres_image` for a plain image",
        ValueError,
        "belongs to a folder of Space Ranger",
        lambda w: one(scan(), fullres_image={"s": "a.tif"}),
    ),
]


def _tiff(world, image, **options):
    tifffile.imwrite(world.tmp / "a.tif", image, **options)
    return world.tmp / "a.tif"


def _bytes(world) -> np.ndarray:
    return tifffile.imread(world.tmp / "a.tif")


def _spaceranger(world, factors: str, positions: str = ""):
    (world.tmp / "outs" / "spatial").mkdir(parents=True)
    (world.tmp / "outs" / "spatial" / "scalefactors_json.json").write_text(factors)
    (world.tmp / "outs" / "spatial" / "tissue_positions.csv").write_text(positions)
    return world.tmp / "outs"


def _folder(world, name: str):
    (world.tmp / name).mkdir()
    (world.tmp / name / "zarr.json").write_text("{") if name.endswith("zarr") else None
    return world.tmp / name


OBJECTS = [
    refused(
        "circles whose radius is in other units than their centers",
        ValueError,
        "Expected a radius in the units of the centers",
        lambda w: one(visium(radius=300.0)),
    ),
    refused(
        "an object without an image",
        ValueError,
        "has no image",
        lambda w: one(SpatialData(shapes={"spots": visium().shapes["spots"]})),
    ),
    refused(
        "an unknown coordinate system",
        KeyError,
        "not found in `sections['s'].coordinate_systems`",
        lambda w: one(visium(), coordinate_system="x"),
    ),
    refused(
        "an unknown table", KeyError, "not found in `sections['s'].tables`", lambda w: one(visium(), table_key="x")
    ),
    refused("a table of other spots", ValueError, "no row of its table", lambda w: one(visium(rows=["x", "y"]))),
    refused(
        "a spot without a place, with the distance of spots given",
        ValueError,
        "have no place, the first is 'c'",
        lambda w: one(_nan_spot(), mpp=None, spot_pitch=100),
    ),
    refused("NaN coordinates of a spot", ValueError, "have no place, the first is 'c'", lambda w: one(_nan_spot())),
    refused(
        "two circles of one id",
        ValueError,
        "Two spots of the stack would have the name 's_b'",
        lambda w: one(_duplicate_ids()),
    ),
    refused("two rows for one circle", ValueError, "annotate the same spot 'b'", lambda w: one(_duplicate_rows())),
    refused(
        "circles that would become ellipses", ValueError, "stretches one axis 2.00 times", lambda w: one(_stretched())
    ),
    answered(
        "a mirrored coordinate system",
        "is followed",
        lambda w: one(_mirrored()),
        lambda w, s: np.allclose(s.tables["stack"].obsm["spatial"][:, 0], 90 - CENTERS[:, 0]),
    ),
    refused(
        "a 3D image in an object",
        ValueError,
        "expected the dimensions c, y and x, found ('c', 'z', 'y', 'x')",
        lambda w: one(_volume()),
    ),
    answered(
        "spots whose `in_tissue` is 0 in the table of an object",
        "are left out with a warning",
        lambda w: one(_off_tissue([1, 0, 0, 1])),
        lambda w, s: (
            s.tables["stack"].obs["instance_id"].tolist() == ["a", "d"]
            and np.allclose(s.tables["stack"].obsm["spatial"], CENTERS[[0, 3]])
            and s.tables["s_counts"].n_obs == 2
        ),
    ),
    refused(
        "spots that all lie off the tissue",
        ValueError,
        "no spot with counts lies under tissue",
        lambda w: one(_off_tissue([0, 0, 0, 0])),
    ),
    refused(
        "`in_tissue` that is neither 0 nor 1",
        ValueError,
        "column 'in_tissue' must hold 0 or 1",
        lambda w: one(_off_tissue([1, 0.5, 0, 1])),
    ),
    answered(
        "ids that are numbers",
        "become strings, and join",
        lambda w: one(visium(ids=(1, 2, 3, 4))),
        lambda w, s: measured(s) == [True] * 4 and s.tables["stack"].obs["instance_id"].tolist() == list("1234"),
    ),
    answered(
        "rows in another order than the circles",
        "are joined by id",
        lambda w: one(visium(rows=["d", "b", "a"])),
        lambda w, s: measured(s) == [True, True, False, True],
    ),
    answered(
        "rows without a circle",
        "are left out with a warning",
        lambda w: one(visium(rows=["a", "x"])),
        lambda w, s: measured(s) == [True, False, False, False],
    ),
    answered(
        "unicode ids",
        "are kept",
        lambda w: one(visium(ids=("α", "ß", "雪", "d"))),
        lambda w, s: "s_雪" in s.tables["stack"].obs_names,
    ),
    answered("one spot", "is a section", lambda w: one(visium(ids=("a",))), lambda w, s: len(s.tables["stack"]) == 1),
]


def counts(values, genes=("g0", "g1", "g2")):
    """Stack of one section with these counts."""
    sdata = one(visium(genes=genes))
    table = sdata.tables["s_counts"]
    sdata.tables["s_counts"] = AnnData(values, obs=table.obs, var=table.var, uns=table.uns)
    return sdata


def _with(row: int, value: float) -> np.ndarray:
    values = np.arange(1.0, 13.0).reshape(4, 3)
    values[row] = value
    return values


def select(values, **kwargs):
    sdata = counts(values)
    si.pp.select_genes(sdata, **kwargs)
    return sdata.tables["stack"].layers["measured"]


def expected() -> np.ndarray:
    return select(_with(0, 3.0))


def same(values, kind) -> bool:
    return np.array_equal(values, select(kind))


GENES = [
    refuses(
        "pp.select_genes",
        "NaN or infinite counts",
        ValueError,
        "the first at spot 'c'",
        lambda w: select(_with(2, np.nan)),
    ),
    refuses("pp.select_genes", "negative counts", ValueError, "must hold raw counts", lambda w: select(_with(1, -1.0))),
    refuses("pp.select_genes", "fractions", ValueError, "must hold raw counts", lambda w: select(_with(1, 0.5))),
    refuses(
        "pp.select_genes",
        "a table of True and False",
        ValueError,
        "say if a gene was seen and not how often",
        lambda w: select(np.ones((4, 3), dtype=bool)),
    ),
    refuses(
        "pp.select_genes",
        "a spot without a count",
        ValueError,
        "without a single count, the first is 'b'",
        lambda w: select(_with(1, 0.0)),
    ),
    refuses(
        "pp.select_genes",
        "no count at all",
        ValueError,
        "without a single count, the first is 'a'",
        lambda w: select(np.zeros((4, 3))),
    ),
    refuses(
        "pp.select_genes",
        "a table of counts that is gone",
        KeyError,
        "'s1_counts' not found in `sdata.tables`",
        lambda w: si.pp.select_genes(w.sdata),
        change=lambda w: w.sdata.tables.pop("s1_counts"),
    ),
    answers(
        "pp.select_genes",
        "a spot that was taken out of the counts",
        "is no longer measured",
        lambda w: si.pp.select_genes(w.sdata),
        lambda w, _: not w.table.obs.loc["s1_0", "measured"] and w.table.obs["measured"].sum() == len(w.spots) - 1,
        change=lambda w: w.sdata.tables.__setitem__("s1_counts", w.sdata.tables["s1_counts"][1:].copy()),
    ),
    refuses(
        "pp.select_genes",
        "measured sections without a common name of a gene",
        ValueError,
        "they name them like {'a': ['g0', 'g1'], 'b': ['h', 'i']}",
        lambda w: si.pp.select_genes(
            si.pp.assemble_stack({"a": visium(), "b": visium(genes=("h", "i", "j"))}, mpp=1, section_spacing=9)
        ),
    ),
    refuses(
        "pp.select_genes",
        "a gene that was not measured",
        KeyError,
        "1 of `genes` are not measured on section 's'",
        lambda w: select(_with(0, 3.0), genes=["g0", "nope"]),
    ),
    refuses(
        "pp.select_genes",
        "an empty list of genes",
        ValueError,
        "`genes` is empty",
        lambda w: select(_with(0, 3.0), genes=[]),
    ),
    refuses(
        "pp.select_genes",
        "no or half a gene",
        ValueError,
        "`n_top_genes` must be",
        lambda w: select(_with(0, 3.0), n_top_genes=0.5),
    ),
    refuses(
        "pp.select_genes",
        "a layer that does not exist",
        KeyError,
        "not found in",
        lambda w: select(_with(0, 3.0), layer="nope"),
    ),
    refuses(
        "pp.select_genes",
        "counts said to be log values",
        ValueError,
        "holds raw counts",
        lambda w: select(_with(0, 3.0), log_normalized=True),
    ),
    refuses(
        "pp.select_genes",
        "log values of different bases, by `uns['log1p']`",
        ValueError,
        "have different bases by `uns['log1p']` of their tables: {'a': 2.0, 'b': 2.718281828459045}",
        lambda w: si.pp.select_genes(_of_bases({"base": 2}, {}), log_normalized=True),
    ),
    refuses(
        "pp.select_genes",
        "a stack without measured section",
        ValueError,
        "No measured section",
        lambda w: si.pp.select_genes(_unmeasured()),
    ),
    answers(
        "pp.select_genes",
        "one gene given as a string",
        "is one gene",
        lambda w: select(_with(0, 3.0), genes="g1"),
        lambda w, v: v.shape == (4, 1),
    ),
    answers(
        "pp.select_genes",
        "CSC, CSR, integer, float32 and dask matrices",
        "give the same values",
        lambda w: expected(),
        lambda w, v: all(same(v, k) for k in _kinds()),
    ),
    refuses(
        "pp.assemble_stack",
        "repeated gene names without ids",
        ValueError,
        "the gene name 'g0' occurs more than once",
        lambda w: one(visium(genes=("g0", "g0", "g1"))),
    ),
    refuses(
        "pp.assemble_stack",
        "genes without a name",
        ValueError,
        "1 genes of its table have no name",
        lambda w: one(visium(genes=("g0", np.nan, "g1"))),
    ),
]


def _of_bases(*marks):
    """Stack of two sections with log values; the marks that scanpy leaves."""
    found = [visium(values=np.log1p(_with(0, 3.0))) for _ in marks]
    for section, mark in zip(found, marks, strict=True):
        section.tables["table"].uns["log1p"] = mark
    return si.pp.assemble_stack(dict(zip("ab", found, strict=True)), mpp=1, section_spacing=9)


def _unmeasured():
    found = visium()
    del found.tables["table"]
    return one(found)


def _kinds():
    import dask.array as da

    values = _with(0, 3.0)
    return [
        sparse.csc_matrix(values),
        sparse.csr_matrix(values.astype(np.float32)),
        values.astype(int),
        sparse.csr_array(values),
        da.from_array(values, chunks=2),
    ]


CASES = [*NAMES, *ARRAYS, *FILES, *OBJECTS, *GENES]
