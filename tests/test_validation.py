from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from spatial_impute._expression import looks_like_counts, require_log_values
from spatial_impute._registration import RegistrationParams
from spatial_impute._validation import (
    require_finite,
    require_key,
    require_one_of,
    require_positive,
    resolve_params,
    settings_class,
)
from spatial_impute.encoders._encoder import require_encoder_name
from spatial_impute.models import AsignParams, PixNetParams


@settings_class
class Params:
    size: int = 3


def test_require_key_accepts_a_present_key():
    require_key("a", ["b", "a"], where="sdata.images")


def test_require_key_lists_what_there_is_and_the_next_step():
    with pytest.raises(KeyError, match=r"'c' not found in `sdata.images`; available: \['a', 'b'\]. Run x\(\)."):
        require_key("c", ["b", "a"], where="sdata.images", then="Run x().")


def test_require_key_lists_keys_of_any_type():
    with pytest.raises(KeyError, match=r"available: \['1', 'a'\]"):
        require_key("c", ["a", 1], where="x")


def test_require_one_of_lists_options():
    require_one_of("a", {"a", "b"}, name="layout")
    with pytest.raises(ValueError, match=r"`layout` must be one of \['a', 'b'\], found 'c'"):
        require_one_of("c", {"b", "a"}, name="layout")


@pytest.mark.parametrize("value", [1, 0.5, np.float32(2), "3"])
def test_require_positive_returns_float(value):
    result = require_positive(value, name="mpp")
    assert type(result) is float
    assert result == float(value)


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf, None, "x", [1, 2]])
def test_require_positive_rejects(value):
    with pytest.raises(ValueError, match=r"`mpp` must be a positive number \(um\), found"):
        require_positive(value, name="mpp", unit="um")


def test_require_finite_names_the_first_bad_row():
    values = np.ones((4, 2))
    require_finite(values, name="xyz")
    values[2, 1] = np.nan
    values[3] = np.inf
    with pytest.raises(
        ValueError, match=r"xyz must be finite; found 3 NaN or infinite values, the first in row 2 \('c'\)"
    ):
        require_finite(values, name="xyz", row_names=list("abcd"))


def test_require_finite_takes_vectors():
    with pytest.raises(ValueError, match="the first in row 1"):
        require_finite(np.array([0.0, np.inf]), name="r")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 3], [1, 2]], True),
        (np.array([[0.0, 5.0], [np.nan, np.nan]]), True),
        ([[0.0, 1.2], [3.0, 2.0]], False),
        ([[0, 1], [1, 0]], False),  # may be binary, or log values that happen to be 0
        ([[-1, 3]], False),
        ([[np.nan, np.nan]], False),
        (np.empty((0, 3)), False),
    ],
)
def test_looks_like_counts(values, expected):
    assert looks_like_counts(values) is expected


def test_require_log_values_rejects_counts_and_names_the_remedy():
    require_log_values(np.log1p([[0.0, 3.0], [7.0, 2.0]]), where="X")
    with pytest.raises(
        ValueError, match=r"`X` must hold log-normalised .* raw counts \(integers up to 12\).*select_genes"
    ):
        require_log_values(np.array([[0, 12], [1, np.nan]]), where="X")


def test_resolve_params_from_none_instance_and_mapping():
    own = Params(size=7)
    assert resolve_params(None, Params) == Params()
    assert resolve_params(own, Params) is own
    assert resolve_params({"size": 5}, Params) == Params(size=5)


def test_resolve_params_lists_unknown_fields():
    with pytest.raises(TypeError, match=r"Unknown fields \['shape', 'width'\] for Params; available: \['size'\]"):
        resolve_params({"width": 1, "shape": 2}, Params)
    with pytest.raises(TypeError, match="Expected None, a mapping or Params, found int"):
        resolve_params(3, Params)


@pytest.mark.parametrize("cls", [AsignParams, PixNetParams, RegistrationParams])
def test_settings_take_numbers_from_files(cls):
    """YAML reads 1e-3 as text."""
    for field in dataclasses.fields(cls):
        if field.type is not float:
            continue
        value = getattr(cls(), field.name)
        assert getattr(cls(**{field.name: str(value)}), field.name) == value
        for wrong in ("much", True):
            with pytest.raises(ValueError, match=rf"`{field.name}` must be a .*number.*, found \w+ {wrong!r}"):
                cls(**{field.name: wrong})


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: require_key("S1", ["s0", "s1"], where="x"), "Did you mean 's1'?"),
        (lambda: require_key("erbb2", ["ERBB2", "MDK"], where="x"), "Did you mean 'ERBB2'?"),
        (lambda: require_one_of("SyN", ("rigid", "affine", "syn"), name="method"), "Did you mean 'syn'?"),
        (lambda: require_one_of("asing", ("asign", "mean"), name="method"), "Did you mean 'asign'?"),
        (lambda: require_encoder_name("resnet-18"), "Did you mean 'resnet18'?"),
        (lambda: require_encoder_name("MahmoodLab/UNI2-h"), "Did you mean 'timm:hf-hub:MahmoodLab/UNI2-h' or"),
    ],
)
def test_messages_name_what_was_meant(call, hint):
    with pytest.raises((KeyError, ValueError)) as error:
        call()
    assert hint in str(error.value)


def test_messages_guess_nothing_where_nothing_is_close():
    with pytest.raises(KeyError) as error:
        require_key("liver", ["s0", "s1"], where="x")
    assert "Did you mean" not in str(error.value)
