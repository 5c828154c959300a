"""Inputs of the plots: what all of them check."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd

import spatial_impute as si
from bad_inputs import refuses
from bad_inputs.preparing import drop, spoil

CASES = [
    refuses(
        "pl.stack",
        "an object that is no stack",
        KeyError,
        "Make one with `si.pp.assemble_stack({...})`",
        lambda w: si.pl.stack(w.sdata),
        change=lambda w: w.sdata.attrs.clear(),
    ),
    refuses(
        "pl.registration",
        "a stack that is not registered",
        KeyError,
        "si.tl.register_stack",
        lambda w: si.pl.registration(w.sdata),
        change=lambda w: w.sdata.attrs["spatial_impute"]["stack"].update(registration=None),
    ),
    refuses(
        "pl.place_by_hand",
        "an unknown section",
        KeyError,
        "not found in `the stack's sections`",
        lambda w: si.pl.place_by_hand(w.sdata, "x"),
    ),
    refuses(
        "pl.place_by_hand",
        "the reference",
        ValueError,
        "must not be the reference",
        lambda w: si.pl.place_by_hand(w.sdata, w.sdata.attrs["spatial_impute"]["stack"]["reference"]),
    ),
    refuses(
        "pl.place_by_hand",
        "a viewer with the layers of another section",
        ValueError,
        "Open another viewer for this section",
        lambda w: si.pl.place_by_hand(w.sdata, "s0", viewer=SimpleNamespace(layers=[SimpleNamespace(name="s0")])),
    ),
    refuses(
        "pl.registration_page",
        "a stack that is not registered",
        KeyError,
        "Run `si.tl.register_stack(sdata)` first.",
        lambda w: si.pl.registration_page(w.sdata, w.tmp / "check.html"),
        change=lambda w: w.sdata.attrs["spatial_impute"]["stack"].update(registration=None),
    ),
    refuses(
        "pl.registration_page",
        "a file of another kind",
        ValueError,
        "`path` must end in .html",
        lambda w: si.pl.registration_page(w.sdata, w.tmp / "check.pdf"),
    ),
    refuses(
        "pl.imputed",
        "a stack that is not registered",
        KeyError,
        "Run `si.tl.register_stack(sdata)` first.",
        lambda w: si.pl.imputed(w.sdata, w.table.var_names[:1], layer="measured"),
        change=drop("obsm", "spatial_3d"),
    ),
    refuses(
        "pl.imputed",
        "NaN coordinates",
        ValueError,
        "the first in row 5 ('s0_5')",
        lambda w: si.pl.imputed(w.sdata, w.table.var_names[:1], layer="measured"),
        change=spoil("obsm", "spatial_3d", 5, np.nan),
    ),
    refuses(
        "pl.metrics",
        "scores without the stack",
        TypeError,
        "The stack comes first: `si.pl.metrics(sdata, scores)`",
        lambda w: si.pl.metrics(pd.DataFrame({"pearson_gene": [0.1]}, index=["asign"])),
    ),
    refuses(
        "pl.dense",
        "a map that is not there",
        KeyError,
        "not found in `sdata.images`",
        lambda w: si.pl.dense(w.sdata, "nope", w.pixnet.var_names[0]),
    ),
]
