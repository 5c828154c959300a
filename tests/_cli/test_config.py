"""The file of a run: what is wrong in it is said by key, before anything runs."""

from __future__ import annotations

import copy

import pytest

import spatial_impute as si
from spatial_impute.__main__ import main
from spatial_impute._cli.config import EXAMPLE, ConfigError, all_methods, check_config, read_config

GOOD = {
    "sections": {"s0": {"image": "s0.tif", "mpp": 0.5}, "s1": {"spaceranger": "outs"}},
    "section_spacing": 10,
    "output": "results",
}


SMALL = {"image": "s0.tif", "mpp": 0.5, "counts": "s1.h5ad", "spot_diameter": 0.5}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "s0.tif").touch()
    (tmp_path / "s2.tif").touch()
    (tmp_path / "s1.h5ad").touch()
    (tmp_path / "outs").mkdir()
    return tmp_path


def changed(path: str, value):
    """GOOD with one value set, or removed for None."""
    found = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = found
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return found


def test_good_config_has_defaults_and_absolute_paths(folder):
    config = check_config(GOOD, folder=folder)
    assert list(config.sections) == ["s0", "s1"]
    assert config.sections["s0"].path == folder / "s0.tif"
    assert config.output == folder / "results"
    assert (config.genes, config.encoder, config.registration, config.seed) == (250, "texture", "affine", 0)
    assert config.methods == all_methods()
    assert {"mean", "cokriging", "asign"} <= set(config.methods)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("output", None, "The key `output` is missing"),
        ("sections", None, "The key `sections` is missing"),
        ("sections", {"s0": {"image": "s0.tif"}}, "`sections` must be two or more sections by name, .*, found dict"),
        ("outptu", "x", "Unknown key `outptu`; did you mean `output`"),
        ("sections.s0.imge", "x", "Unknown key `sections.s0.imge`; did you mean `sections.s0.image`"),
        ("sections.s0.image", "nope.tif", "`sections.s0.image`: There is nothing at .*nope.tif"),
        ("sections.s0.image", 3, "`sections.s0.image` must be a path, found int 3"),
        ("output", "a\0b", "`output` must be a path, found str"),
        ("sections.s0.mpp", "0.5", "`sections.s0.mpp` must be a positive number, found str"),
        ("sections.s0.mpp", -1, "`sections.s0.mpp` must be a positive number"),
        ("sections.s0.spaceranger", "outs", "`sections.s0` needs exactly one of"),
        ("sections.s0.bin_size", 8, "`sections.s0` with `image` does not take `bin_size`"),
        ("sections.s1", {"image": "./s0.tif"}, "`sections.s1.image` and `sections.s0.image` are the same file"),
        ("sections", {key: {"spatialdata": "outs"} for key in "ab"}, "`sections.b.spatialdata` and .* are the same"),
        ("sections.s0.counts", "s1.h5ad", "`sections.s0` needs `counts` and `spot_diameter` .* together"),
        ("sections.s0", SMALL, "`sections.s0.spot_diameter` must be the size of spots in um, 1 to 1000, found 0.5"),
        ("sections.s0.z", 0, "`section_spacing` or `z` of every section, found both"),
        ("section_spacing", None, "The heights are missing: .* `sections.s0.z`"),
        ("section_spacing", 0, "`section_spacing` must be a positive number"),
        ("sections.s1", {"image": "s1.h5ad"}, "none of them is measured"),
        ("reference", "s7", "`reference` must be one of"),
        ("genes", [], "`genes` must be .* or a list of names .*, found list"),
        ("genes", 0, "`genes` must be a positive whole number or .*, found int 0"),
        ("registration", "rigidd", "`registration` must be one of"),
        ("methods", ["asign", "magic"], "`methods` must be one of .*'magic'"),
        ("cross_validate", "yes", "`cross_validate` must be true or false"),
        ("asign", {"n_stepz": 3}, "`asign`: Unknown fields"),
        ("sections", {True: "s0.tif", "s1": {"spaceranger": "outs"}}, "`sections` has a section named True.*quotes"),
        ("sections.s0.mpp", True, "`sections.s0.mpp` must be a positive number, found bool True"),
        ("seed", -1, "`seed` must be a whole number"),
    ],
)
def test_errors_name_the_key(folder, path, value, message):
    with pytest.raises(ConfigError, match=message):
        check_config(changed(path, value), folder=folder)


@pytest.mark.parametrize("found", [None, [], "x", 3])
def test_file_must_hold_keys(found, tmp_path):
    with pytest.raises(ConfigError, match="must hold keys"):
        check_config(found, folder=tmp_path)


def test_example_is_a_valid_run(tmp_path):
    for name in ("s0.ome.tif", "s1.tif", "s2.png", "s2.h5ad"):
        (tmp_path / name).touch()
    (tmp_path / "s1" / "outs").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text(EXAMPLE)
    config = read_config(tmp_path / "run.yaml")
    assert [section.source for section in config.sections.values()] == ["image", "spaceranger", "image"]
    assert config.methods == all_methods()  # the example shows the defaults
    assert config.genes == 250


def test_toml_says_the_same(folder):
    text = """
        section_spacing = 10
        output = "results"
        [sections.s0]
        image = "s0.tif"
        mpp = 0.5
        [sections.s1]
        spaceranger = "outs"
    """
    (folder / "run.toml").write_text(text)
    assert read_config(folder / "run.toml") == check_config(GOOD, folder=folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.yaml", "sections: [", "no valid YAML"),
        ("run.yaml", "output: !!python/object/apply:os.getcwd []", "no valid YAML"),  # nothing is ever run
        ("run.yaml", "sections:\n  a: {image: x}\n  a: {image: y}\n", "`sections.a` stands twice, .* in line 3"),
        (
            "run.yaml",
            "section_spacing: 010\n",
            "`section_spacing`, line 1: YAML reads 010 as a number in another notation",
        ),
        ("run.yaml", "sections:\n  a: {image: 01.png, mpp: 1:30}\n", "`sections.a.mpp`, line 2: YAML reads 1:30 as"),
        ("run.toml", "output = ", "no valid TOML"),
        ("run.json", "{}", "ends in .yaml, .yml or .toml"),
    ],
)
def test_unreadable_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / name)


NAMES = """
sections:
  01: {{image: s0.tif, mpp: 0.5}}
  {name}: s2.tif
  outs: {{spaceranger: outs}}
section_spacing: 10
reference: {name}
genes: [NO, 1e3, 2021-03-01, MARCH1]
plot_genes: on
output: 2021
"""


@pytest.mark.parametrize("name", ["on", "no", "1e3", "007", "2020-01-01", "0x1F", "1_000", "1.10"])
def test_names_are_text_as_they_are_written(folder, name):
    (folder / "run.yaml").write_text(NAMES.format(name=name))
    config = read_config(folder / "run.yaml")
    assert list(config.sections) == ["01", name, "outs"]
    assert config.reference == name
    assert config.genes == ["NO", "1e3", "2021-03-01", "MARCH1"]
    assert config.plot_genes == ["on"]
    assert config.output == folder / "2021"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ("aligned: s0.tif", "'aligned' is the name of the frame"),
        ("'a b': s0.tif", "Use 'a_b', for example"),
        ("A: s0.tif\n  a: s0.tif", "without regard to case"),
    ],
)
def test_names_that_a_run_would_refuse_are_refused_by_the_check(folder, sections, message):
    (folder / "run.yaml").write_text(
        f"sections:\n  {sections}\n  outs: {{spaceranger: outs}}\nsection_spacing: 1\noutput: x\n"
    )
    with pytest.raises(ConfigError, match=message):
        read_config(folder / "run.yaml")


def test_aliases_save_writing(folder):
    text = "sections:\n  a: &one {image: s0.tif, mpp: 0.5}\n  b: {<<: *one, image: s2.tif, mpp: 0.25}\n  c: {spaceranger: outs}\nsection_spacing: 1\noutput: x\n"
    (folder / "run.yaml").write_text(text)
    assert [section.mpp for section in read_config(folder / "run.yaml").sections.values()] == [0.5, 0.25, None]


BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB.encode(), "aliases of the file stand for more than"),
        (b"sections: &a [*a]\n", "contains itself"),
        (b"sections: &a {b: {c: *a}}\n", "contains itself"),
        ("# µm\nsections: {}\n".encode("latin-1"), "no text in UTF-8"),
        ("sections: {}\n".encode("utf-16"), "no text in UTF-8"),
        (b"[" * 5000, "no valid YAML"),
        (b"z: 2020-13-45\n", "no valid YAML"),
        (b"", "must hold keys"),
    ],
)
def test_files_that_hang_or_break_other_readers(tmp_path, content, message):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "run.yaml")


def test_a_byte_order_mark_is_no_key(folder):
    (folder / "run.yaml").write_text(
        "sections: {a: s0.tif, b: {spaceranger: outs}}\nsection_spacing: 1\noutput: x\n", encoding="utf-8-sig"
    )
    assert list(read_config(folder / "run.yaml").sections) == ["a", "b"]


def test_command_line_reports_errors_without_a_traceback(tmp_path, capsys):
    assert main(["run", str(tmp_path / "none.yaml")]) == 2
    assert "error: No file at" in capsys.readouterr().err


def test_command_line_prints_the_example(capsys):
    assert main(["run", "--example"]) == 0
    assert capsys.readouterr().out == EXAMPLE


def test_command_line_needs_a_file(capsys):
    with pytest.raises(SystemExit) as error:
        main(["run"])
    assert error.value.code == 2
    assert "--example" in capsys.readouterr().err


def test_info_lists_versions_devices_and_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(si.settings, "_data_dir", tmp_path)
    (tmp_path / "her2st").mkdir()
    (tmp_path / "her2st" / "a.tsv").write_bytes(bytes(2**20))
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"spatial-impute {si.__version__}" in text
    for name in ("spatialdata", "torch", "device", "plotly", str(tmp_path)):
        assert name in text
    assert "her2st       1 files, 1.0 MiB" in text
    monkeypatch.setattr(si.settings, "_data_dir", tmp_path / "none")
    main(["info"])
    assert "does not exist yet" in capsys.readouterr().out


def test_page_of_the_command_line_explains_every_key():
    from pathlib import Path

    from spatial_impute._cli.config import RunConfig, SectionConfig

    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    keys = (set(RunConfig.__dataclass_fields__) | set(SectionConfig.__dataclass_fields__)) - {"source", "path"}
    assert not [key for key in keys if f"`{key}`" not in page and f".{key}`" not in page]
    assert [source for source in ("image", "spaceranger", "spatialdata") if f"`{source}`" not in page] == []
