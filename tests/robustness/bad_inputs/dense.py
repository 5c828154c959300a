"""Inputs of PixNet, of stored models, and of the data sets."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from spatialdata.transformations import Scale, remove_transformation, set_transformation

import spatial_impute as si
from bad_inputs import answers, refuses
from bad_inputs._make import write
from spatial_impute.datasets import _her2st

QUICK = {"n_steps": 1, "width": 8, "n_base": 8, "resolution": 8.0, "crop": 128, "margin": 8, "n_cached_crops": 4}


def fit(world, **kwargs):
    arguments = {"image_key": "s1_image", "shapes_key": "s1_spots", "encoder": _blur(), "model_params": QUICK} | kwargs
    return si.tl.fit_pixnet(world.sdata, arguments.pop("image_key"), arguments.pop("shapes_key"), **arguments)


def _blur():
    import torch

    class Blur(torch.nn.Module):
        def forward(self, x):
            return [torch.nn.functional.avg_pool2d(x, k) for k in (2, 4)]

    return Blur()


def dense(world, **kwargs):
    return si.tl.predict_dense(world.sdata, "s0_image", world.pixnet, **kwargs)


def regions(world, **kwargs):
    return si.tl.predict_regions(world.sdata, "s0_spots", world.pixnet, **kwargs)


def spots(**columns):
    """Circles with other values in the third row."""

    def change(world):
        found = world.sdata.shapes[
            "s0_spots"
        ]  # in place: SpatialData looks at what it is given, not at what becomes of it
        for name, value in columns.items():
            found.loc[found.index[2], name] = value

    return change


def _repeat_id(world):
    found = world.sdata.shapes["s0_spots"]
    found.index = pd.Index(["0", "0", *found.index[2:]])


def _no_stack(world):
    world.sdata.attrs.clear()
    remove_transformation(world.sdata.images["s0_image"], "aligned")
    remove_transformation(world.sdata.shapes["s0_spots"], "aligned")


def _stretched(world):
    set_transformation(world.sdata.shapes["s0_spots"], Scale([4.0, 9.0], axes=("x", "y")), "s0")


def _far(world):
    set_transformation(world.sdata.shapes["s1_spots"], Scale([1e4, 1e4], axes=("x", "y")), "s1")


def _scaled(factor):
    return lambda world: set_transformation(
        world.sdata.shapes["s1_spots"], Scale([factor, factor], axes=("x", "y")), "s1"
    )


def _store(world):
    path = world.tmp / "store.zarr"
    small = world.sdata.subset(["s0_image"])
    small.attrs = world.sdata.attrs
    small.write(path)
    return path


def _counts(change):
    """The counts of the measured section with something wrong."""

    def spoil(world):
        counts = world.sdata.tables["s1_counts"]
        del world.sdata.tables["s1_counts"]
        changed = change(counts.copy())
        world.sdata.tables["s1_counts"] = changed

    return spoil


def _without_x(counts):
    counts.layers["log"] = counts.X
    counts.X = None
    return counts


def _only_seen(counts):
    counts.X = counts.X > 0
    return counts


def _one_gene_twice(counts):
    counts.var_names = [counts.var_names[0], *counts.var_names[:-1]]
    return counts


def _one_spot_twice(counts):
    ids = counts.obs[counts.uns["spatialdata_attrs"]["instance_key"]]
    counts.obs[ids.name] = [ids.iloc[1], *ids.iloc[1:]]
    return counts


def _second_table(world):
    world.sdata.tables["again"] = world.sdata.tables["s1_counts"].copy()
    del world.sdata.tables["stack"]


PIXNET = [
    refuses(
        "tl.fit_pixnet",
        "a table without `X`",
        ValueError,
        "name the layer that holds expression with `layer=`, one of ['log']",
        lambda w: fit(w, table_key="s1_counts"),
        change=_counts(_without_x),
    ),
    refuses(
        "tl.fit_pixnet",
        "two rows for one region",
        ValueError,
        "annotate the shape",
        lambda w: fit(w, table_key="s1_counts", aggregate="sum", model_params=QUICK | {"loss": "poisson"}),
        change=_counts(_one_spot_twice),
    ),
    refuses(
        "tl.fit_pixnet",
        "two genes of one name",
        ValueError,
        "var_names` must be unique",
        lambda w: fit(w, table_key="s1_counts", aggregate="sum", model_params=QUICK | {"loss": "poisson"}),
        change=_counts(_one_gene_twice),
    ),
    refuses(
        "tl.fit_pixnet",
        "regions with several tables",
        ValueError,
        "has several tables ['again', 's1_counts']",
        fit,
        change=_second_table,
    ),
    refuses(
        "tl.fit_pixnet", "an unknown image", KeyError, "not found in `sdata.images`", lambda w: fit(w, image_key="x")
    ),
    refuses(
        "tl.fit_pixnet",
        "regions that were not measured",
        ValueError,
        "None of the 34 shapes of `sdata.shapes['s0_spots']` was measured",
        lambda w: fit(w, image_key="s0_image", shapes_key="s0_spots"),
    ),
    refuses(
        "tl.fit_pixnet",
        "a table of True and False",
        ValueError,
        "say if a gene was seen and not how often",
        lambda w: fit(w, table_key="s1_counts"),
        change=_counts(_only_seen),
    ),
    refuses("tl.fit_pixnet", "raw counts", ValueError, "holds raw counts", lambda w: fit(w, table_key="s1_counts")),
    refuses(
        "tl.fit_pixnet",
        "log values for a loss on counts",
        ValueError,
        "need raw counts",
        lambda w: fit(w, aggregate="sum", model_params=QUICK | {"loss": "poisson"}),
    ),
    refuses(
        "tl.fit_pixnet", "a gene that is not there", KeyError, "'nope' not found", lambda w: fit(w, genes=["nope"])
    ),
    refuses("tl.fit_pixnet", "an empty list of genes", ValueError, "`genes` is empty", lambda w: fit(w, genes=[])),
    refuses(
        "tl.fit_pixnet",
        "unequal numbers of images and regions",
        ValueError,
        "has 2 entries where another argument has 3",
        lambda w: fit(w, image_key=["s1_image"] * 2, shapes_key=["s1_spots"] * 3),
    ),
    refuses(
        "tl.fit_pixnet",
        "regions off the image",
        ValueError,
        "No measured region lies wholly on the image 's1_image'",
        fit,
        change=_far,
    ),
    refuses(
        "tl.fit_pixnet",
        "regions that lie off the image for the most part",
        ValueError,
        "measured regions lie wholly on the image 's1_image'",
        fit,
        change=_scaled(9.0),
    ),
    refuses(
        "tl.fit_pixnet",
        "regions smaller than a pixel",
        ValueError,
        "measured regions on the image 's1_image' are smaller than a pixel",
        fit,
        change=_scaled(1e-3),
    ),
    refuses(
        "tl.fit_pixnet",
        "a tile of no size",
        ValueError,
        "`tile_size` must be a whole number",
        lambda w: fit(w, tile_size=0),
    ),
    refuses(
        "tl.fit_pixnet",
        "a checkpoint of another training",
        ValueError,
        "belongs to another training",
        lambda w: fit(w, checkpoint=w.tmp / "c", seed=1),
        change=lambda w: fit(w, checkpoint=w.tmp / "c"),
        while_working=True,
    ),
    refuses(
        "tl.fit_pixnet",
        "a damaged checkpoint",
        ValueError,
        "is damaged",
        lambda w: fit(w, checkpoint=w.tmp / "c"),
        change=lambda w: _damaged_checkpoint(w),
        while_working=True,
    ),
    refuses(
        "tl.predict_dense",
        "an unknown image",
        KeyError,
        "not found in `sdata.images`",
        lambda w: si.tl.predict_dense(w.sdata, "x", w.pixnet),
    ),
    refuses(
        "tl.predict_dense",
        "a model of another class",
        TypeError,
        "`model` must be of class PixNetModel, found AsignModel",
        lambda w: si.tl.predict_dense(w.sdata, "s0_image", w.asign),
    ),
    refuses(
        "tl.predict_dense",
        "a gene the model lacks",
        KeyError,
        "not found in `model.var_names`",
        lambda w: dense(w, genes=["nope"]),
    ),
    refuses(
        "tl.predict_dense",
        "the image itself as target",
        ValueError,
        "would write over `sdata.images['s0_image']`",
        lambda w: dense(w, key_added="s0_image"),
    ),
    refuses(
        "tl.predict_dense",
        "a name that readers of a store drop (`.map`)",
        ValueError,
        "and not begin with '.'",
        lambda w: dense(w, key_added=".map"),
    ),
    refuses(
        "tl.predict_dense",
        "an integer type",
        ValueError,
        "`output_dtype` must be one of",
        lambda w: dense(w, output_dtype="int8"),
    ),
    refuses(
        "tl.predict_dense",
        "a store that is none",
        FileNotFoundError,
        "write the object first",
        lambda w: dense(w, store=w.tmp),
    ),
    refuses(
        "tl.predict_dense",
        "pixels of less than a nanometre",
        ValueError,
        "less than light can show. Check `mpp`",
        lambda w: dense(w, mpp=1e-66),
    ),
    refuses(
        "tl.predict_dense",
        "an object without units",
        ValueError,
        "The unit of coordinate system 's0' is unknown",
        dense,
        change=_no_stack,
    ),
    answers(
        "tl.predict_dense",
        "one gene given as a string, or twice",
        "is one gene",
        lambda w: dense(w, genes=[w.pixnet.var_names[0]] * 2, inplace=False),
        lambda w, e: e.sizes["c"] == 1,
    ),
    answers(
        "tl.predict_dense",
        "a tile larger than the image",
        "is cut",
        lambda w: dense(w, tile_size=9999, inplace=False),
        lambda w, e: np.isfinite(e.to_numpy()).any(),
    ),
    refuses(
        "tl.predict_regions",
        "NaN coordinates or radii",
        ValueError,
        "the first in row 2 ('2')",
        regions,
        change=spots(radius=np.nan),
    ),
    refuses(
        "tl.predict_regions",
        "a radius of 0",
        ValueError,
        "the first that is not: '2'",
        regions,
        change=spots(radius=0.0),
    ),
    refuses(
        "tl.predict_regions",
        "two shapes of one id",
        ValueError,
        "must be unique, but '0' occurs more than once",
        regions,
        change=_repeat_id,
    ),
    refuses(
        "tl.predict_regions",
        "circles that would become ellipses",
        ValueError,
        "stretches one axis 2.25 times",
        regions,
        change=_stretched,
    ),
    refuses(
        "tl.predict_regions",
        "the stack table as target",
        ValueError,
        "would write over `sdata.tables['stack']`",
        lambda w: regions(w, key_added="stack"),
    ),
    refuses(
        "tl.predict_regions",
        "a store that exists",
        FileExistsError,
        "Pass another `store`, or remove it first",
        lambda w: regions(w, store=w.tmp),
    ),
    answers(
        "tl.predict_regions",
        "shapes off the image",
        "are NaN, with `n_pixels` 0",
        lambda w: regions(w, inplace=False),
        lambda w, t: np.isnan(t.X).all() and (t.obs["n_pixels"] == 0).all(),
        change=lambda w: set_transformation(w.sdata.shapes["s0_spots"], Scale([1e4, 1e4], axes=("x", "y")), "s0"),
    ),
    refuses(
        "tl.genes_from_features",
        "a map of genes, not of features",
        ValueError,
        "Run `si.tl.predict_dense(..., features=True)`",
        lambda w: si.tl.genes_from_features(w.sdata, "s0_image", w.pixnet),
    ),
]


def _damaged_checkpoint(world):
    fit(world, checkpoint=world.tmp / "c")
    path = next((world.tmp / "c").glob("*.safetensors"))
    write(path, path.read_bytes()[:100])


def saved(world, spoil):
    path = world.tmp / "model"
    world.asign.save(path)
    spoil(path)
    return path


def exchange_genes(path):
    """Exchange the names of the first two genes in config.json."""
    config = json.loads((path / "config.json").read_text())
    config["var_names"][:2] = config["var_names"][1::-1]
    (path / "config.json").write_text(json.dumps(config))


def edit(**entries):
    """Change entries of config.json; None takes one away."""

    def change(path):
        config = json.loads((path / "config.json").read_text())
        for key, value in entries.items():
            config.pop(key) if value is None else config.update({key: value})
        (path / "config.json").write_text(json.dumps(config))

    return change


def load(spoil):
    return lambda w: si.models.AsignModel.load(saved(w, spoil))


MODELS = [
    refuses(
        "models.AsignModel.load",
        "a folder that is no model",
        FileNotFoundError,
        "No config.json in",
        lambda w: si.models.AsignModel.load(w.tmp),
    ),
    refuses(
        "models.AsignModel.load",
        "a model of another class",
        ValueError,
        "holds class 'AsignModel'",
        lambda w: si.models.PixNetModel.load(saved(w, lambda p: None)),
    ),
    refuses(
        "models.AsignModel.load",
        "a damaged config.json",
        ValueError,
        "is not valid JSON",
        load(lambda p: write(p / "config.json", b"{")),
    ),
    refuses(
        "models.AsignModel.load",
        "a config.json without an entry",
        ValueError,
        "lacks 'experts'",
        load(edit(experts=None)),
    ),
    refuses(
        "models.AsignModel.load",
        "two genes that exchanged their names in config.json",
        ValueError,
        "was changed after the model was saved",
        load(exchange_genes),
    ),
    refuses(
        "models.AsignModel.load",
        "unknown settings",
        ValueError,
        "do not fit their configuration",
        load(edit(params={"nope": 1})),
    ),
    refuses(
        "models.AsignModel.load",
        "truncated weights",
        ValueError,
        "is damaged",
        load(lambda p: write(p / "model.safetensors", (p / "model.safetensors").read_bytes()[:50])),
    ),
    refuses(
        "models.AsignModel.load",
        "weights of another size",
        ValueError,
        "do not fit their configuration",
        load(edit(n_features=99)),
    ),
    refuses(
        "models.AsignModel.save",
        "a folder that exists",
        FileExistsError,
        "pass `overwrite=True`",
        lambda w: w.asign.save(w.tmp),
    ),
]


def _offline(world):
    def refuse(*args, **kwargs):
        from requests.exceptions import ConnectionError as NoConnection

        msg = "no network"
        raise NoConnection(msg)

    world.patch.setattr("requests.get", refuse)
    world.patch.setattr("time.sleep", lambda seconds: None)  # between two attempts
    world.patch.setattr(si.settings, "_data_dir", world.tmp)


DATASETS = [
    refuses(
        "datasets.her2st",
        "something else than a folder of images",
        TypeError,
        "`images` must be True, False or the path of a folder",
        lambda w: si.datasets.her2st("C", images=None),
    ),
    refuses(
        "datasets.her2st",
        "an unknown patient",
        ValueError,
        "`patient` must be one of",
        lambda w: si.datasets.her2st("Z"),
    ),
    refuses(
        "datasets.her2st",
        "nothing measured",
        ValueError,
        "`measured` is empty",
        lambda w: si.datasets.her2st(measured=[]),
    ),
    refuses(
        "datasets.her2st",
        "an unknown section",
        KeyError,
        "not found in `sections of patient 'C'`",
        lambda w: si.datasets.her2st(measured=["C1"]),
    ),
    refuses(
        "datasets.her2st",
        "no network",
        ConnectionError,
        "Check the connection",
        lambda w: si.datasets.her2st(),
        change=_offline,
    ),
    refuses(
        "datasets.olfactory_bulb",
        "nothing measured",
        ValueError,
        "`measured` is empty",
        lambda w: si.datasets.olfactory_bulb(measured=[]),
    ),
    refuses(
        "datasets.olfactory_bulb",
        "an unknown section",
        KeyError,
        "not found in `sections of the olfactory bulb`",
        lambda w: si.datasets.olfactory_bulb(measured=["MOB5"]),
    ),
    refuses(
        "datasets.olfactory_bulb",
        "a folder without the files, and no network",
        ConnectionError,
        "or put the file (sha256",
        lambda w: si.datasets.olfactory_bulb(),
        change=_offline,
    ),
    refuses(
        "datasets.synthetic_stack",
        "no section",
        ValueError,
        "Need `n_sections` >= 1",
        lambda w: si.datasets.synthetic_stack(0),
    ),
    refuses(
        "datasets.synthetic_stack",
        "a pixel size of 0",
        ValueError,
        "`mpp` must be a positive number",
        lambda w: si.datasets.synthetic_stack(mpp=0),
    ),
]

CASES = [*PIXNET, *MODELS, *DATASETS]
_ = _her2st, _store
