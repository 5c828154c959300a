"""Files of strangers run no code, write nowhere else, and fill neither memory nor disk."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import Blur
from PIL import Image

import spatial_impute as si
from spatial_impute._image.reading import open_image
from spatial_impute._io.files import fetch
from spatial_impute.datasets import _her2st, _olfactory_bulb
from spatial_impute.encoders import _networks
from spatial_impute.encoders._tokens import load_tokens

SOURCE = Path(si.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


class Exploit:
    """What runs code when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


@pytest.fixture
def trace(tmp_path):
    """File that exists if the exploit ran."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Exploit(path)))
    assert path.exists(), "the exploit works"
    path.unlink()
    yield path
    assert not path.exists()


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_source_neither_unpickles_nor_unpacks_nor_starts_programs(path):
    """Beside the test of ``test_package.py``: ways in which a file could run code or write beyond its place."""
    tree = ast.parse(path.read_text())
    forbidden = {
        "pickle",
        "cloudpickle",
        "dill",
        "joblib",
        "shelve",
        "marshal",
        "subprocess",
        "tarfile",
        "ctypes",
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not forbidden & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in forbidden
    for name, call in calls(tree):
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert name not in {
            "eval",
            "exec",
            "compile",
            "os.system",
            "os.popen",
            "shutil.unpack_archive",
            "pd.read_pickle",
        }
        assert not name.endswith((".extractall", ".extract", "import_module")) or name == "importlib.import_module"
        if name in {"np.load", "numpy.load"}:
            assert keywords.get("allow_pickle", "False") == "False"
        if name.startswith("yaml."):
            assert name in {"yaml.SafeLoader"}
            assert keywords.get("Loader", "yaml.SafeLoader") == "yaml.SafeLoader"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True"
        if name.endswith("retrieve"):
            assert keywords.get("known_hash", "None") != "None"


def test_every_download_is_https_and_has_a_hash():
    files = [_networks._TELLEZ_FILE, *_networks.WEIGHTS.values()]
    assert len(files) >= 4
    for file in files:
        assert isinstance(file, _networks.WeightFile)
        assert file.url.startswith("https://")
        assert len(bytes.fromhex(file.sha256)) == 32
    for data in (_her2st, _olfactory_bulb):
        assert data._BASE_URL.startswith("https://")
        assert all(len(bytes.fromhex(digest)) == 32 for digest in data.SHA256.values())
    # Nothing else downloads.
    users = {path.name for path in FILES if "import pooch" in path.read_text()}
    assert users == {"files.py", "_settings.py"}


def test_download_refuses_other_bytes(tmp_path, monkeypatch):
    """Truncated, or replaced on the way: not kept, and named."""
    import pooch

    def download(url, output_file, pooch):
        Path(output_file).write_bytes(b"other")

    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **kwargs: download)
    monkeypatch.setattr(pooch.core, "choose_downloader", lambda *args, **kwargs: download)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=r"(?i)sha256 hash"):
        fetch(tmp_path / "a.bin", url="https://x.example/a.bin", sha256="0" * 64)
    assert not (tmp_path / "a.bin").exists()


# Pickles


def test_weights_with_code_in_them_are_refused(trace, tmp_path):
    torch.save({"weight": torch.ones(2), "exploit": Exploit(trace)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="would run code from the file, so it is refused"):
        _networks.read_state(tmp_path / "w.pth")


def test_cached_features_with_code_in_them_are_not_read(trace, tmp_path):
    np.savez(tmp_path / "key.npz", X_spot=np.array([Exploit(trace)], dtype=object))
    assert load_tokens(tmp_path, "key", {"X_spot": 1}, 1) is None


def test_a_pickle_in_place_of_weights_is_refused(trace, asign, tmp_path):
    asign.save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(pickle.dumps(Exploit(trace)))
    with pytest.raises(ValueError, match="is damaged"):
        si.models.AsignModel.load(tmp_path / "m")


def test_a_zarr_array_of_objects_is_refused(trace, tmp_path):
    """Format 2 of zarr could hold pickled objects."""
    folder = tmp_path / "a.zarr"
    folder.mkdir()
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    image = {"version": "0.4", "axes": [{"name": "y"}, {"name": "x"}], "datasets": [{"path": "0"}]}
    (folder / ".zattrs").write_text(json.dumps({"multiscales": [image]}))
    (folder / "0").mkdir()
    array = {"zarr_format": 2, "shape": [1, 1], "chunks": [1, 1], "dtype": "|O", "compressor": None, "fill_value": None}
    array |= {"order": "C", "filters": [{"id": "pickle"}]}
    (folder / "0" / ".zarray").write_text(json.dumps(array))
    (folder / "0" / "0.0").write_bytes(pickle.dumps(Exploit(trace)))
    with pytest.raises(ValueError, match="cannot be read as an image"):
        si.pp.assemble_stack({"s": folder}, mpp=1, z=[0])


# Model directories that were edited


def edit_config(asign, path, **changes):
    asign.save(path)
    config = json.loads((path / "config.json").read_text())
    config.update({key: change(config[key]) for key, change in changes.items()})
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": lambda found: [*found[:-1], "oracle"]}, "`experts` must be known methods"),
        ({"experts": lambda found: [*found[:-1], found[0]]}, "`experts` must be known methods"),
        ({"experts": lambda found: [1, *found[1:]]}, "do not fit their configuration"),
        ({"var_names": lambda found: [1, *found[1:]]}, "`var_names` .* must be a list of gene names, all different"),
        ({"var_names": lambda found: [found[1], *found[1:]]}, "all different"),
        ({"var_names": lambda found: None}, "must be a list of gene names"),
    ],
    ids=["unknown", "repeated", "no text", "gene no text", "gene twice", "no genes"],
)
def test_edited_configuration_is_refused(asign, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        si.models.AsignModel.load(edit_config(asign, tmp_path / "m", **changes))


@pytest.mark.parametrize("model", ["asign", "pixnet"])
def test_edited_provenance_is_refused_when_a_model_is_loaded(model, tmp_path, request):
    """Before, other types came through, and impute_3d and predict_dense failed with the words of Python."""
    model = request.getfixturevalue(model)
    model.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    own = {} if type(model) is si.models.AsignModel else {"encoder": Blur()}

    def load(path):
        return type(model).load(path, **own)

    def put(place, value):
        changed = copy.deepcopy(config)
        owner = changed["config"]
        for key in place[:-1]:
            owner = owner[key]
        owner[place[-1]] = value
        (tmp_path / "m" / "config.json").write_text(json.dumps(changed))

    places = [["seed"], ["units"], ["encoder"]]
    if type(model) is si.models.AsignModel:
        seen = ["stacks", 0, "sections"]
        places += [
            ["stacks"],
            ["stacks", 0],
            seen,
            [*seen, "s1"],
            [*seen, "s1", "image"],
            ["base_layers"],
            ["features"],
        ]
    else:
        slide = ["trained_on", 0]
        places += [["resolution"], slide[:1], slide, [*slide, "image"], [*slide, "state"], [*slide, "state", "read"]]
    for place in places:
        for value in (None, [1], True):
            put(place, value)
            with pytest.raises(ValueError, match="do not fit their configuration"):
                load(tmp_path / "m")
    put(["of_the_user"], 1)
    loaded = load(tmp_path / "m")
    assert loaded.config["of_the_user"] == 1
    del loaded.config["units"]
    with pytest.raises(ValueError, match=r"config\.json in '.*' lacks 'units'"):
        loaded.config["units"]


def test_deep_json_is_refused(asign, tmp_path):
    asign.save(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not valid JSON"):
        si.models.AsignModel.load(tmp_path / "m")


def test_weights_that_are_not_finite_are_refused(asign, tmp_path):
    other = copy.copy(asign)
    other._tensors = {**asign._tensors, "centre": torch.full_like(asign._tensors["centre"], torch.nan)}
    other.save(tmp_path / "m")
    with pytest.raises(ValueError, match=r"'model\.centre' has values that are NaN"):
        si.models.AsignModel.load(tmp_path / "m")


def test_a_foreign_configuration_is_not_replaced(asign, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(FileExistsError, match="files that this package did not write"):
        asign.save(tmp_path, overwrite=True)
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    (tmp_path / "model.safetensors").write_bytes(b"weights of another tool")
    with pytest.raises(FileExistsError, match="files that this package did not write"):
        asign.save(tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights of another tool"
    (tmp_path / "model.safetensors").unlink()
    asign.save(tmp_path, overwrite=True)  # a folder with other files of the user
    assert (tmp_path / "other.json").exists()


def test_compiled_loops_work_without_a_folder_for_their_cache(monkeypatch):
    """A read-only installation and no home: numba finds no place for its cache."""
    from numba.core import caching

    from spatial_impute._settings import compiled

    for name in ("CompileResultCacheImpl", "CacheImpl", "_CacheImpl"):  # as the versions of numba name them
        if hasattr(caching, name):
            monkeypatch.setattr(getattr(caching, name), "_locator_classes", [])

    @compiled()
    def double(x):
        return 2 * x

    assert double(3) == 6


# Sizes that are announced


def huge_zarr(path: Path, shape: tuple[int, ...], chunks: tuple[int, ...]) -> Path:
    group = zarr.open_group(path, mode="w")
    group.create_array("0", shape=shape, chunks=chunks, dtype="u1")
    axes = [{"name": name} for name in "cyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
    return path


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((3, 10**9, 10**9), (3, 512, 512)), ((3, 10**6, 10**6), (3, 10**6, 10**6))],
    ids=["many", "large"],
)
def test_zarr_of_absurd_shape_is_refused_before_memory_is_taken(tmp_path, shape, chunks):
    with pytest.raises(ValueError, match=r"announces .* values in .* chunks"):
        open_image(huge_zarr(tmp_path / "a.zarr", shape, chunks))


def test_paths_within_a_zarr_cannot_lead_out_of_it(tmp_path):
    huge_zarr(tmp_path / "secret.zarr", (3, 4, 4), (3, 4, 4))
    group = zarr.open_group(huge_zarr(tmp_path / "a.zarr", (3, 4, 4), (3, 4, 4)), mode="r+")
    ome = dict(group.attrs["ome"])
    ome["multiscales"][0]["datasets"][0]["path"] = "../secret.zarr/0"
    group.attrs["ome"] = ome
    with pytest.raises(ValueError, match=r"\.\.|cannot be read as an image"):
        open_image(tmp_path / "a.zarr")


def bomb(path: Path, width: int, height: int) -> Path:
    """PNG of a few bytes that announces its size."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    return path


def test_decompression_bomb_is_refused(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match="too large to decode in one piece"):
        open_image(bomb(tmp_path / "a.png", 60_000, 60_000))
    assert Image.MAX_IMAGE_PIXELS == before is not None


def test_tiff_that_announces_more_than_it_has_is_refused(tmp_path):
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tiff:
        tags = tiff.pages[0].tags
        tags["ImageLength"].overwrite(2_000_000)
        tags["RowsPerStrip"].overwrite(2_000_000)
        tags["StripByteCounts"].overwrite(2_000_000 * 64 * 3)
    with pytest.raises(ValueError, match="is truncated: its pixels reach to byte"):
        open_image(tmp_path / "a.tif")


def test_safetensors_with_an_absurd_header_is_refused(asign, tmp_path):
    asign.save(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    content = path.read_bytes()
    huge = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for spoilt in (struct.pack("<Q", 2**62) + content[8:], struct.pack("<Q", len(huge)) + huge):
        path.write_bytes(spoilt)
        with pytest.raises(ValueError, match="is damaged"):
            si.models.AsignModel.load(tmp_path / "m")


@pytest.mark.parametrize("entry", ["n_features", "width", "n_graph_layers", "n_level_layers", "n_networks"])
def test_model_of_absurd_size_is_refused_before_memory_is_taken(asign, tmp_path, entry):
    asign.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    owner = config if entry in config else config["params"]
    owner[entry] = 2**40
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not fit their configuration"):
        si.models.AsignModel.load(tmp_path / "m")


@pytest.mark.parametrize("entry", ["width", "n_base", "finest_stride"])
def test_pixnet_of_absurd_size_is_refused_before_memory_is_taken(pixnet, tmp_path, entry):
    pixnet.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    owner = config if entry in config else config["params"]
    owner[entry] = 2**20
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    encoder = type(pixnet.network.pyramid.module)()
    # A stride coarser than all maps leaves the two coarsest, as it did when the model was made.
    says = "was changed after the model was saved" if entry == "finest_stride" else "do not fit their configuration"
    with pytest.raises(ValueError, match=says):
        si.models.PixNetModel.load(tmp_path / "m", encoder=encoder)


def test_working_images_and_lattices_have_a_budget():
    import dask.array as da

    image = da.full((3, 60_000, 60_000), 200, chunks=(3, 4096, 4096), dtype=np.uint8)
    sdata = si.pp.assemble_stack({"s": image}, mpp=0.25, z=[0])
    with pytest.raises(ValueError, match="Take a coarser `resolution`"):
        si.pp.segment_tissue(sdata, resolution=0.25)
    from spatial_impute._geometry import grid_in_box

    with pytest.raises(ValueError, match=r"does not fit in memory\. Take a wider spacing"):
        grid_in_box(0, 0, 1e5, 1e5, spacing=1.0, layout="hex")


# Places


def test_staging_folder_that_is_a_link_is_not_followed(sdata, pixnet, tmp_path):
    """What is staged is moved and removed afterwards: in somebody else's folder that would be a loss."""
    victim = tmp_path / "victim"
    (victim / "s0_image_expression").mkdir(parents=True)
    (victim / "s0_image_expression" / "thesis.txt").write_text("years of work")
    small = sdata.subset(["s0_image"])
    small.attrs = sdata.attrs
    small.write(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / ".spatial_impute_staging").symlink_to(victim)
    with pytest.raises(ValueError, match="is a link to another place"):
        si.tl.predict_dense(small, "s0_image", pixnet, store=tmp_path / "a.zarr")
    assert (victim / "s0_image_expression" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["../x", "a/../../b", "/etc/x", "..", ".", "a\\..\\b", "a\0b"])
def test_no_name_leads_out_of_a_store(sdata, pixnet, name):
    with pytest.raises(ValueError, match="must be letters, digits"):
        si.tl.predict_dense(sdata, "s0_image", pixnet, key_added=name)
    with pytest.raises(ValueError, match="Section names are letters"):
        si.pp.assemble_stack({name: np.zeros((9, 9, 3), np.uint8)}, mpp=1, z=[0])


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archives_are_not_unpacked(tmp_path, kind):
    """A tar with ``../`` in it has no way in: archives are no input."""
    import io
    import tarfile
    import zipfile

    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            member = tarfile.TarInfo("../escaped.png")
            archive.addfile(member, io.BytesIO())
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../escaped.png", b"")
    with pytest.raises(ValueError, match="expected one of"):
        si.pp.assemble_stack({"s": path}, mpp=1, z=[0])
    assert not (tmp_path.parent / "escaped.png").exists()
