"""Inputs of the other functions of ``pp``, and of registration and graph."""

from __future__ import annotations

import json
from types import SimpleNamespace

import dask.array as da
import geopandas as gpd
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from shapely.geometry import box, mapping
from spatialdata.models import ShapesModel
from spatialdata.transformations import Scale, remove_transformation

import spatial_impute as si
from bad_inputs import answers, refuses
from bad_inputs._make import scan, write


class Encoder:
    """Encoder that returns what it is told to."""

    name, mpp, patch_px = "odd", 4.0, 16

    def __init__(self, give):
        self.give = give

    def __call__(self, patches):
        return self.give(len(patches))


def features(world, encoder="texture", **kwargs):
    si.pp.extract_features(world.sdata, encoder, **kwargs)
    return world.table.obsm["X_spot"]


def pool(world, spoil=lambda f: f, **kwargs):
    rng = np.random.default_rng(0)
    found = {f"s{i}": rng.normal(size=(len(world.sdata.shapes[f"s{i}_spots"]), 4)) for i in range(3)}
    spoil(found)
    si.pp.pool_features(world.sdata, found, **kwargs)
    return world.table.obsm["X_spot"]


def register(world, **kwargs):
    known = {"transformations": {"s0": np.eye(3), "s2": np.eye(3)}}
    return si.tl.register_stack(world.sdata, **(known | kwargs))


def graph(world, **kwargs):
    return si.tl.build_3d_graph(world.sdata, **kwargs)


def blank(world):
    image = world.sdata.images["s0_image"]
    world.sdata.images["s0_image"] = image.copy(data=da.full(image.shape, 240, dtype=np.uint8))


def move_spot(world):
    from shapely import Point

    spots = world.spots.copy()
    spots.loc[spots.index[3], "geometry"] = Point(-5000, 10)
    world.sdata.shapes["s1_spots"] = spots


def drop(slot, key):
    return lambda w: getattr(w.table, slot).pop(key)


def spoil(slot, key, row, value):
    def change(world):
        values = np.array(getattr(world.table, slot)[key])
        values[row] = value
        getattr(world.table, slot)[key] = values

    return change


def shuffled(world):
    """The stack table in another order of rows."""
    order = np.random.default_rng(0).permutation(world.table.n_obs)
    world.made["before"] = world.table.obsp["spatial_3d_connectivities"].copy()
    world.made["order"] = order
    world.sdata.tables["stack"] = world.table[order].copy()


def permuted_graph(world, _):
    order = world.made["order"]
    expected = world.made["before"][order][:, order]
    return abs(expected - world.table.obsp["spatial_3d_connectivities"]).max() < 1e-6


def keep(*wanted):
    """Leave only the first spots of some sections in the table."""

    def change(world):
        rows = [f"s{i}_{k}" for i, n in enumerate(wanted) for k in range(n)]
        world.sdata.tables["stack"] = world.table[rows].copy()

    return change


PP = [
    refuses(
        "pp.segment_tissue",
        "an image of glass",
        ValueError,
        "No tissue found on `sdata.images['s0_image']`",
        lambda w: si.pp.segment_tissue(w.sdata),
        change=blank,
    ),
    refuses(
        "pp.segment_tissue",
        "an unknown section",
        KeyError,
        "not found in `the stack's sections`",
        lambda w: si.pp.segment_tissue(w.sdata, sections="x"),
    ),
    refuses(
        "pp.segment_tissue",
        "a resolution of 0",
        ValueError,
        "`resolution` must be a positive number",
        lambda w: si.pp.segment_tissue(w.sdata, resolution=0),
    ),
    refuses(
        "pp.segment_tissue",
        "something else than a SpatialData object",
        TypeError,
        "Expected a SpatialData object, found AnnData",
        lambda w: si.pp.segment_tissue(w.table),
    ),
    refuses(
        "pp.segment_tissue",
        "an object that is no stack",
        KeyError,
        "Make one with `si.pp.assemble_stack({...})`",
        lambda w: si.pp.segment_tissue(w.sdata),
        change=lambda w: w.sdata.attrs.clear(),
    ),
    refuses(
        "pp.tile_spots",
        "a section that has spots",
        ValueError,
        "has spots already",
        lambda w: si.pp.tile_spots(w.sdata, sections="s0"),
    ),
    answers(
        "pp.tile_spots",
        "a section whose spots were deleted",
        "gets others",
        lambda w: _tiled_again(w),
        lambda w, n: n == w.table.n_obs,
    ),
    refuses(
        "pp.tile_spots",
        "no tissue labels",
        KeyError,
        "Run `si.pp.segment_tissue(sdata)` first.",
        lambda w: si.pp.tile_spots(si.pp.assemble_stack({"a": scan()}, mpp=1, z=[0])),
    ),
    refuses(
        "pp.tile_spots",
        "a share of tissue above 1",
        ValueError,
        "`min_tissue_fraction` must lie between 0 and 1",
        lambda w: si.pp.tile_spots(w.sdata, min_tissue_fraction=2),
    ),
    refuses(
        "pp.extract_features", "an unknown encoder", ValueError, "Unknown encoder 'nope'", lambda w: features(w, "nope")
    ),
    refuses(
        "pp.extract_features",
        "an encoder that is none",
        TypeError,
        "must be a name, a callable or an nn.Module",
        lambda w: features(w, 3),
    ),
    refuses(
        "pp.extract_features",
        "a library that is not installed",
        ImportError,
        "pip install 'spatial-impute[encoders]'",
        lambda w: features(w, "timm:x"),
        change=lambda w: w.patch.setitem(__import__("sys").modules, "timm", None),
    ),
    refuses(
        "pp.extract_features",
        "half a patch in a batch",
        ValueError,
        "`batch_size` must be a whole number",
        lambda w: features(w, batch_size=0.5),
    ),
    refuses(
        "pp.extract_features",
        "a device that is not there",
        ValueError,
        "Torch device 'cuda:99' cannot be used here",
        lambda w: features(w, "tellez-multitask", device="cuda:99"),
    ),
    refuses(
        "pp.extract_features",
        "a file where the cache should be",
        ValueError,
        "`cache_dir` must be a folder that can be written to",
        lambda w: features(w, cache_dir=write(w.tmp / "file", b"")),
    ),
    refuses(
        "pp.extract_features",
        "a spot off its image",
        ValueError,
        "1 of 34 spots of `sdata.shapes['s1_spots']` lie outside their image",
        features,
        change=move_spot,
    ),
    refuses(
        "pp.extract_features",
        "an encoder that returns NaN",
        ValueError,
        "finite",
        lambda w: features(w, Encoder(lambda n: np.full((n, 3), np.nan))),
        while_working=True,
    ),
    refuses(
        "pp.extract_features",
        "an encoder that returns too few rows",
        ValueError,
        "must return finite numbers of shape",
        lambda w: features(w, Encoder(lambda n: np.ones((n + 1, 3)))),
        while_working=True,
    ),
    refuses(
        "pp.extract_features",
        "rows of the stack table that are gone",
        ValueError,
        "Remove the same spots from `sdata.shapes`",
        features,
        change=keep(3, 3, 3),
    ),
    answers(
        "pp.extract_features",
        "a damaged file in the cache",
        "is computed again, with a warning",
        lambda w: _damaged_cache(w),
        lambda w, same: same,
    ),
    refuses(
        "pp.pool_features",
        "no features for a section",
        KeyError,
        "Every section with spots needs features",
        lambda w: pool(w, lambda f: f.pop("s2")),
    ),
    refuses(
        "pp.pool_features",
        "a row too few",
        ValueError,
        "a row per spot, found",
        lambda w: pool(w, lambda f: f.update(s1=f["s1"][1:])),
    ),
    refuses(
        "pp.pool_features",
        "NaN in a row",
        ValueError,
        "the first in row 4",
        lambda w: pool(w, lambda f: f["s1"].__setitem__((4, 0), np.nan)),
    ),
    refuses(
        "pp.pool_features",
        "features of two widths",
        ValueError,
        "equally many features",
        lambda w: pool(w, lambda f: f.update(s1=f["s1"][:, :2])),
    ),
    refuses(
        "pp.pool_features",
        "a list without names of sections",
        TypeError,
        "must name the section of each entry",
        lambda w: si.pp.pool_features(w.sdata, [np.ones((34, 4))] * 3),
    ),
    refuses(
        "pp.pool_features",
        "positions of tiles in um, or in pixels of a larger image",
        ValueError,
        "tiles of features['s1'] lie outside `sdata.images['s1_image']`",
        lambda w: pool(w, lambda f: f.update(s1=_tiles(4.0))),
    ),
    refuses(
        "pp.pool_features",
        "positions of tiles in pixels of a smaller image",
        ValueError,
        "spots have no tile of features['s1'] near them. The positions must be x and y in pixels",
        lambda w: pool(w, lambda f: f.update(s1=_tiles(0.25))),
    ),
    answers(
        "pp.pool_features",
        "a data frame with its rows in another order",
        "is joined by the names of the spots",
        lambda w: pool(w, lambda f: f.update(s1=_frame(w, f["s1"])[::-1])),
        lambda w, found: np.array_equal(found, pool(w)),
    ),
    refuses(
        "pp.pool_features",
        "a data frame of other spots",
        ValueError,
        "Its index must name the spots",
        lambda w: pool(w, lambda f: f.update(s1=_frame(w, f["s1"]).add_prefix("x", axis=0))),
    ),
]


def _tiles(scale: float) -> AnnData:
    """Tiles of 16 px over the image of 350 px, at positions that are multiplied by `scale`."""
    xy = np.stack(np.meshgrid(np.arange(8, 350, 16), np.arange(8, 350, 16)), axis=-1).reshape(-1, 2)
    return AnnData(np.random.default_rng(0).normal(size=(len(xy), 4)), obsm={"spatial": xy * scale})


def _frame(world, values) -> pd.DataFrame:
    return pd.DataFrame(values, index=world.spots.index)


def _tiled_again(world) -> int:
    si.pp.segment_tissue(world.sdata, sections="s0")
    del world.sdata.shapes["s0_spots"]
    si.pp.tile_spots(world.sdata, spot_diameter=100, spacing=200)
    return sum(len(world.sdata.shapes[f"s{i}_spots"]) for i in range(3))


def _damaged_cache(world) -> bool:
    from bad_inputs._make import write as overwrite

    folder = world.tmp / "cache"
    first = features(world, Fixed(), cache_dir=folder).copy()
    for path in folder.glob("*.npz"):
        overwrite(path, path.read_bytes()[:200])
    del world.table.uns["features"]
    return np.array_equal(first, features(world, Fixed(), cache_dir=folder))


class Fixed(Encoder):
    """Encoder whose results may be kept."""

    identity = "fixed-1"

    def __init__(self):
        super().__init__(lambda n: np.ones((n, 2)))


REGISTRATION = [
    refuses(
        "tl.register_stack",
        "an unknown reference",
        KeyError,
        "not found in `the stack's sections`",
        lambda w: register(w, reference="x"),
    ),
    refuses(
        "tl.register_stack",
        "an unknown method",
        ValueError,
        "`method` must be one of",
        lambda w: register(w, method="warp"),
    ),
    refuses(
        "tl.register_stack",
        "a section without tissue",
        ValueError,
        "Section 's0' (`sdata.images['s0_image']`)",
        lambda w: register(w, transformations=None),
        change=blank,
    ),
    refuses(
        "tl.register_stack",
        "a matrix that cannot be inverted",
        ValueError,
        "`transformations['s0']`: Expected an invertible",
        lambda w: register(w, transformations={"s0": np.zeros((3, 3))}),
    ),
    refuses(
        "tl.register_stack",
        "a matrix with NaN",
        ValueError,
        "Expected an invertible",
        lambda w: register(w, transformations={"s0": np.full((3, 3), np.nan)}),
    ),
    refuses(
        "tl.register_stack",
        "one landmark",
        ValueError,
        "the same n >= 2",
        lambda w: register(w, transformations={"s0": ([[0, 0]], [[0, 0]])}),
    ),
    refuses(
        "tl.register_stack",
        "landmarks on one line",
        ValueError,
        "lie on one line",
        lambda w: register(w, transformations={"s0": ([[0, 0], [1, 1], [2, 2]],) * 2}),
    ),
    refuses(
        "tl.register_stack",
        "a place for the reference",
        ValueError,
        "must not name the reference",
        lambda w: register(w, transformations={"s1": np.eye(3)}),
    ),
    refuses(
        "tl.register_stack",
        "a skipped section with spots and no place",
        ValueError,
        "is skipped but has spots",
        lambda w: register(w, transformations=None, skip="s0"),
    ),
    refuses(
        "tl.register_stack",
        "a frame named as a section",
        ValueError,
        "would write over",
        lambda w: register(w, target_coordinate_system="s0"),
    ),
    refuses(
        "tl.register_stack",
        "an unknown parameter",
        TypeError,
        "Unknown fields ['nope'] for RegistrationParams",
        lambda w: register(w, registration_params={"nope": 1}),
    ),
    refuses(
        "tl.register_stack",
        "a negative seed",
        ValueError,
        "`seed` must be a whole number of at least 0",
        lambda w: register(w, seed=-1),
    ),
    refuses(
        "tl.register_stack",
        "a tissue that does not exist",
        KeyError,
        "not found in `sdata.labels and sdata.shapes`",
        lambda w: register(w, tissue_key={"s0": "nope"}),
    ),
    refuses(
        "tl.register_stack",
        "an unknown order",
        ValueError,
        "`order` must be one of",
        lambda w: register(w, order="up"),
    ),
    refuses(
        "tl.register_stack",
        "decisions that are no decisions",
        ValueError,
        "found other content",
        lambda w: register(w, checked=write(w.tmp / "checked.json", b'{"sections": {"s0": 1}}')),
    ),
    refuses(
        "tl.register_stack",
        "an image without its transformation",
        KeyError,
        "not found in `coordinate systems of sdata.images['s0_image']`",
        lambda w: register(w),
        change=lambda w: remove_transformation(w.sdata.images["s0_image"], "s0"),
    ),
    refuses(
        "tl.warp_element",
        "an unknown element",
        KeyError,
        "not found in `the points, shapes, images and labels of sdata`",
        lambda w: si.tl.warp_element(w.sdata, "x"),
    ),
    refuses(
        "tl.warp_element",
        "the name of another element for the result",
        ValueError,
        "would write over `sdata.shapes['s1_spots']`",
        lambda w: si.tl.warp_element(w.sdata, "s0_spots", key_added="s1_spots"),
    ),
    refuses(
        "tl.warp_element",
        "a stack that is not registered",
        KeyError,
        "si.tl.register_stack",
        lambda w: si.tl.warp_element(w.sdata, "s0_spots"),
        change=lambda w: w.sdata.attrs["spatial_impute"]["stack"].update(registration=None),
    ),
    refuses(
        "tl.read_transformation",
        "a file that is not there",
        FileNotFoundError,
        "must be a file with a transformation",
        lambda w: si.tl.read_transformation(w.tmp / "none.mat"),
    ),
    refuses(
        "tl.read_transformation",
        "a file of four numbers as a matrix",
        ValueError,
        "six or nine numbers of a matrix",
        lambda w: si.tl.read_transformation(write(w.tmp / "m.txt", b"1 2 3 4")),
    ),
    refuses(
        "tl.read_transformation",
        "a unit of length of zero",
        ValueError,
        "section_unit",
        lambda w: si.tl.read_transformation("m.txt", section_unit=0, reference_unit=1),
    ),
    refuses(
        "tl.read_transformation",
        "one unit of length without the other",
        ValueError,
        "Expected both `section_unit` and `reference_unit`",
        lambda w: si.tl.read_transformation("m.txt", section_unit=0.5),
    ),
    refuses(
        "tl.read_transformation",
        "six numbers of a matrix in one line",
        ValueError,
        "may stand row by row or column by column",
        lambda w: si.tl.read_transformation(write(w.tmp / "m.txt", b"1 0 20 0 1 10")),
    ),
    refuses(
        "tl.read_transformation",
        "a matrix as a csv file",
        ValueError,
        "Save a matrix as `.txt`",
        lambda w: si.tl.read_transformation(write(w.tmp / "m.csv", b"1,0,20,0,1,10")),
    ),
    refuses(
        "tl.write_transformation",
        "an unknown section",
        KeyError,
        "not found in `the registered sections`",
        lambda w: si.tl.write_transformation(w.sdata, "x", w.tmp / "x.mat"),
    ),
    refuses(
        "tl.write_transformation",
        "a file of an unknown kind",
        ValueError,
        "`path` must end in .mat",
        lambda w: si.tl.write_transformation(w.sdata, "s0", w.tmp / "s0.xlsx"),
    ),
    refuses(
        "tl.write_transformation",
        "a file that is there",
        FileExistsError,
        "pass `overwrite=True` to replace it",
        lambda w: si.tl.write_transformation(w.sdata, "s0", write(w.tmp / "s0.mat", b"of ANTs")),
    ),
    refuses(
        "tl.transfer_shapes",
        "an unknown element",
        KeyError,
        "not found in `sdata.shapes`",
        lambda w: si.tl.transfer_shapes(w.sdata, "x"),
    ),
    refuses(
        "tl.transfer_shapes",
        "one name for the shapes of all sections",
        ValueError,
        "must contain the word {section}",
        lambda w: si.tl.transfer_shapes(w.sdata, "s0_spots", key_added="x"),
    ),
    refuses(
        "tl.transfer_shapes",
        "a stack that is not registered",
        KeyError,
        "si.tl.register_stack",
        lambda w: si.tl.transfer_shapes(w.sdata, "s0_spots"),
        change=lambda w: w.sdata.attrs["spatial_impute"]["stack"].update(registration=None),
    ),
    refuses(
        "tl.points_3d",
        "an unknown gene or column",
        KeyError,
        "not found in `the genes and the columns of obs of the stack table`",
        lambda w: si.tl.points_3d(w.sdata, "x"),
    ),
    refuses(
        "tl.transfer_shapes",
        "the section of the shapes as the only one to carry them to",
        ValueError,
        "there is no other section to carry it to",
        lambda w: si.tl.transfer_shapes(w.sdata, "s0_spots", sections="s0"),
    ),
    refuses(
        "tl.points_3d",
        "the name of another element for the result",
        ValueError,
        "would write over `sdata.shapes['s0_spots']`",
        lambda w: si.tl.points_3d(w.sdata, key_added="s0_spots"),
    ),
    refuses(
        "tl.write_ome_tiff",
        "an unknown element",
        KeyError,
        "not found in `the images and labels of sdata`",
        lambda w: si.tl.write_ome_tiff(w.sdata, "x", w.tmp / "x.ome.tif"),
    ),
    refuses(
        "tl.write_ome_tiff",
        "a file of another kind",
        ValueError,
        "must end in .ome.tif",
        lambda w: si.tl.write_ome_tiff(w.sdata, "s0_image", w.tmp / "x.png"),
    ),
    refuses(
        "tl.write_ome_tiff",
        "an unknown compression",
        ValueError,
        "`compression` must be one of",
        lambda w: si.tl.write_ome_tiff(w.sdata, "s0_image", w.tmp / "x.ome.tif", compression="zip"),
    ),
    refuses(
        "tl.write_ome_tiff",
        "a pixel size of zero",
        ValueError,
        "pixel_size",
        lambda w: si.tl.write_ome_tiff(w.sdata, "s0_image", w.tmp / "x.ome.tif", pixel_size=0),
    ),
    refuses(
        "tl.write_ome_tiff",
        "a file that is there",
        FileExistsError,
        "pass `overwrite=True` to replace it",
        lambda w: si.tl.write_ome_tiff(w.sdata, "s0_image", write(w.tmp / "s0.ome.tif", b"the scan")),
    ),
    refuses(
        "tl.write_geojson",
        "a file that is there",
        FileExistsError,
        "pass `overwrite=True` to replace it",
        lambda w: si.tl.write_geojson(w.sdata, "s0_spots", write(w.tmp / "s0.geojson", b"{}")),
    ),
    refuses(
        "tl.write_geojson",
        "an unknown element",
        KeyError,
        "not found in `sdata.shapes`",
        lambda w: si.tl.write_geojson(w.sdata, "x", w.tmp / "x.geojson"),
    ),
    refuses(
        "tl.write_geojson",
        "a file of another kind",
        ValueError,
        "must end in .geojson or .json",
        lambda w: si.tl.write_geojson(w.sdata, "s0_spots", w.tmp / "x.csv"),
    ),
    refuses(
        "tl.read_placement",
        "something else than a viewer",
        TypeError,
        "must be the viewer that `si.pl.place_by_hand` returned",
        lambda w: si.tl.read_placement(None, "s0"),
    ),
    refuses(
        "tl.read_placement",
        "a viewer without the section",
        KeyError,
        "not found in `the layers of the viewer`",
        lambda w: si.tl.read_placement(SimpleNamespace(layers=[]), "s0"),
    ),
    refuses(
        "metrics.registration_quality",
        "a stack that is not registered",
        KeyError,
        "Run `si.tl.register_stack(sdata)` first.",
        lambda w: si.metrics.registration_quality(w.sdata),
        change=lambda w: w.sdata.attrs["spatial_impute"]["stack"].update(registration=None),
    ),
]

GRAPH = [
    refuses(
        "tl.build_3d_graph",
        "a stack that is not registered",
        KeyError,
        "Run `si.tl.register_stack(sdata)` first.",
        graph,
        change=drop("obsm", "spatial_3d"),
    ),
    refuses(
        "tl.build_3d_graph",
        "NaN coordinates",
        ValueError,
        "the first in row 5 ('s0_5')",
        graph,
        change=spoil("obsm", "spatial_3d", 5, np.nan),
    ),
    refuses(
        "tl.build_3d_graph",
        "a row whose circle is gone",
        ValueError,
        "1 rows of the stack table have no circle in `sdata.shapes`, the first is 's1_3'",
        graph,
        change=lambda w: w.sdata.shapes.__setitem__("s1_spots", w.spots.drop(index="3")),
    ),
    answers(
        "tl.build_3d_graph",
        "the sections that `filter_by_coordinate_system` left",
        "are the stack",
        lambda w: graph(w),
        lambda w, _: set(w.table.obs["section"]) == {"s0", "s1"},
        change=lambda w: setattr(w, "sdata", w.sdata.filter_by_coordinate_system(["s0", "s1"])),
    ),
    refuses(
        "tl.build_3d_graph",
        "features that are not there",
        KeyError,
        "Run `si.pp.extract_features(sdata)` first",
        lambda w: graph(w, use_rep="x"),
    ),
    refuses(
        "tl.build_3d_graph",
        "NaN features",
        ValueError,
        "the first in row 7 ('s0_7')",
        graph,
        change=spoil("obsm", "X_spot", 7, np.nan),
    ),
    refuses(
        "tl.build_3d_graph",
        "two and a half neighbors",
        ValueError,
        "`n_neighs` must be a whole number",
        lambda w: graph(w, n_neighs=2.5),
    ),
    refuses(
        "tl.build_3d_graph",
        "a cosine of 1",
        ValueError,
        "`similarity_threshold` is a cosine",
        lambda w: graph(w, similarity_threshold=1.0),
    ),
    refuses(
        "tl.build_3d_graph",
        "a slash in `key_added`",
        ValueError,
        "`key_added` must be a name without '/'",
        lambda w: graph(w, key_added="a/b"),
    ),
    refuses(
        "tl.build_3d_graph",
        "sections as plain strings",
        ValueError,
        "must be categorical, in the order of the stack",
        graph,
        change=lambda w: w.table.obs.__setitem__("section", w.table.obs["section"].astype(str)),
    ),
    refuses(
        "tl.build_3d_graph",
        "two rows of one name",
        ValueError,
        "`sdata.tables['stack'].obs_names` must be unique, but 's0_0'",
        graph,
        change=lambda w: setattr(w.table, "obs_names", ["s0_0", *w.table.obs_names[:-1]]),
    ),
    refuses(
        "tl.build_3d_graph",
        "one spot per section",
        ValueError,
        "No section has more than one spot",
        graph,
        change=keep(1, 1, 1),
    ),
    answers(
        "tl.build_3d_graph",
        "sections of one and two spots among others",
        "are linked",
        graph,
        lambda w, _: w.table.obsp["spatial_3d_connectivities"].nnz > 0,
        change=keep(1, 20, 2),
    ),
    answers(
        "tl.build_3d_graph",
        "sections that do not overlap",
        "get no spatial edges between them",
        lambda w: graph(w, use_rep=None),
        lambda w, _: w.table.obsp["spatial_3d_overlap"].nnz == 0,
        change=lambda w: w.table.obsm.__setitem__(
            "spatial_3d", w.table.obsm["spatial_3d"] + 1e5 * w.table.obs["section"].cat.codes.to_numpy()[:, None]
        ),
    ),
    answers(
        "tl.build_3d_graph", "rows in another order", "give the same graph", graph, permuted_graph, change=shuffled
    ),
    answers(
        "tl.build_3d_graph",
        "constant features",
        "give a graph of distances",
        graph,
        lambda w, _: w.table.obsp["spatial_3d_similarity"].nnz == 0,
        change=lambda w: w.table.obsm.__setitem__("X_spot", np.ones((w.table.n_obs, 3))),
    ),
]


def cells(world, value, section="s1"):
    return si.pp.add_cells(world.sdata, section, value)


def squares(*places):
    return gpd.GeoDataFrame(geometry=[box(x, y, x + 4, y + 4) for x, y in places])


def _geojson(world, **more):
    features = [{"type": "Feature", "geometry": mapping(box(x, x, x + 9, x + 9)), **more} for x in (10, 30)]
    return write(world.tmp / "cells.geojson", json.dumps(features).encode())


CELLS = [
    refuses("pp.add_cells", "an unknown section", KeyError, "'s9' not found in", lambda w: cells(w, None, "s9")),
    refuses(
        "pp.add_cells",
        "outlines in other pixels than those of the image",
        ValueError,
        "They must be in pixels of its full resolution",
        lambda w: cells(w, squares((10, 10), (9e4, 9e4), (9e4, 8e4))),
    ),
    refuses(
        "pp.add_cells",
        "labels of another size than the image",
        ValueError,
        "Labels must have the size of the full-resolution image",
        lambda w: cells(w, np.ones((5, 5), int)),
    ),
    refuses(
        "pp.add_cells",
        "points instead of outlines",
        ValueError,
        "objects in `cells` are no polygon with an area, by type {'Point': 1}",
        lambda w: cells(w, gpd.GeoDataFrame(geometry=gpd.points_from_xy([5.0], [5.0]))),
    ),
    refuses(
        "pp.add_cells",
        "a file that is no GeoJSON",
        ValueError,
        "is no GeoJSON file with features",
        lambda w: cells(w, write(w.tmp / "cells.geojson", b"x,y")),
    ),
    answers(
        "pp.add_cells",
        "a file of QuPath whose objects all have one id",
        "gets numbers as ids, with a warning",
        lambda w: cells(w, _geojson(w, id="PathDetectionObject")),
        lambda w, _: list(w.sdata.shapes["s1_cells"].index) == ["0", "1"],
    ),
    refuses(
        "pp.add_cells",
        "a file with a list of classes",
        ValueError,
        "is no GeoJSON file with features",
        lambda w: cells(w, _geojson(w, properties={"classification": ["Tumor"]})),
    ),
    refuses("pp.add_cells", "no outline", ValueError, "`cells` holds no object", lambda w: cells(w, [])),
    refuses("pp.add_cells", "an image", TypeError, "whole numbers (y, x)", lambda w: cells(w, np.ones((5, 5, 3)))),
    refuses(
        "pp.add_cells", "a mask", TypeError, "skimage.measure.label(mask)", lambda w: cells(w, np.ones((5, 5), bool))
    ),
    refuses(
        "pp.add_cells",
        "labels with a background of -1",
        ValueError,
        "Labels must be 0 where there is no cell",
        lambda w: cells(w, np.full(w.sdata.images["s1_image"].shape[1:], -1)),
    ),
    refuses(
        "pp.add_cells",
        "shapes of another coordinate system",
        ValueError,
        "is placed in the coordinate systems ['slide'], expected 's1'",
        lambda w: cells(w, ShapesModel.parse(squares((10, 10)), transformations={"slide": Scale([2, 2], ("x", "y"))})),
    ),
]
CASES = [*PP, *CELLS, *REGISTRATION, *GRAPH]
_ = pd, sparse
