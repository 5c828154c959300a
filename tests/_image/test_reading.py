from __future__ import annotations

import gc
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from spatial_impute._image import reading
from spatial_impute._image.reading import open_image


def picture(height: int, width: int, *, seed: int = 0, dtype=np.uint8) -> np.ndarray:
    """Smooth (y, x, 3) image, so that JPEG keeps it and halving means something."""
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    rgb = np.stack([x, y, 0.5 * (1 - x) + 0.3 * y], axis=-1)
    return (rgb * np.iinfo(dtype).max).astype(dtype)


def write_ome_zarr(path: Path, image: np.ndarray, *, version: str, unit: str | None, scale: float) -> None:
    """OME-Zarr of version 0.4 (zarr format 2) or 0.5 (zarr format 3), two levels."""
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    axes = [{"name": "c", "type": "channel"}] + [{"name": a, "type": "space"} for a in "yx"]
    for axis in axes[1:]:
        if unit is not None:
            axis["unit"] = unit
    datasets = []
    for i, array in enumerate((np.moveaxis(image, -1, 0), np.moveaxis(image[::2, ::2], -1, 0))):
        group.create_array(str(i), data=np.ascontiguousarray(array))
        factor = scale * 2**i
        datasets.append(
            {"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": [1, factor, factor]}]}
        )
    multiscales = [{"axes": axes, "datasets": datasets, "version": version}]
    group.attrs.update({"multiscales": multiscales} if version == "0.4" else {"ome": {"multiscales": multiscales}})


@pytest.mark.parametrize("name", ["a.tif", "a.tiff", "a.TIF", "a.btf"])
def test_open_image_reads_tiff(tmp_path, name):
    image = picture(50, 70)
    tifffile.imwrite(tmp_path / name, image, photometric="rgb")
    opened = open_image(tmp_path / name)
    assert opened.mpp is None
    assert [level.shape for level in opened.levels] == [(3, 50, 70)]
    np.testing.assert_array_equal(opened.levels[0].compute(), np.moveaxis(image, -1, 0))


@pytest.mark.parametrize(("unit", "per_um"), [("CENTIMETER", 1e4), ("INCH", 25_400.0)])
def test_open_image_reads_pixel_size_from_tiff_resolution(tmp_path, unit, per_um):
    resolution = (per_um / 0.25, per_um / 0.25)
    tifffile.imwrite(tmp_path / "a.tif", picture(20, 30), photometric="rgb", resolution=resolution, resolutionunit=unit)
    assert open_image(tmp_path / "a.tif").mpp == pytest.approx(0.25)


@pytest.mark.parametrize("dpi", [72, 96, 300])
def test_open_image_takes_no_pixel_size_from_screen_resolutions(tmp_path, dpi):
    tifffile.imwrite(
        tmp_path / "a.tif", picture(20, 30), photometric="rgb", resolution=(dpi, dpi), resolutionunit="INCH"
    )
    assert open_image(tmp_path / "a.tif").mpp is None


@pytest.mark.parametrize(
    ("size", "unit", "expected"),
    [(0.325, "µm", 0.325), (325, "nm", 0.325), (0.0005, "mm", 0.5), (3.25e-05, "cm", 0.325)],
)
def test_open_image_reads_pixel_size_from_ome_xml(tmp_path, size, unit, expected):
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeXUnit": unit, "PhysicalSizeY": size}
    tifffile.imwrite(tmp_path / "a.ome.tif", picture(20, 30), photometric="rgb", metadata=metadata)
    opened = open_image(tmp_path / "a.ome.tif")
    assert opened.mpp == pytest.approx(expected)
    assert opened.levels[0].shape == (3, 20, 30)


@pytest.mark.parametrize(("text", "expected"), [(b"0,5", 0.5), (b"abc", None), (b"", None), (b"inf", None)])
def test_pixel_sizes_in_ome_xml_that_are_no_plain_numbers(tmp_path, text, expected):
    path, size = tmp_path / "a.ome.tif", {"axes": "YXS", "PhysicalSizeX": 0.125, "PhysicalSizeY": 0.125}
    tifffile.imwrite(path, picture(20, 30), photometric="rgb", metadata=size)
    path.write_bytes(path.read_bytes().replace(b'"0.125"', (b'"' + text + b'"').ljust(7)))
    assert open_image(path).mpp == expected


def test_open_image_reads_oblong_pixels(tmp_path):
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 600, "PhysicalSizeYUnit": "nm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", picture(20, 30), photometric="rgb", metadata=metadata)
    opened = open_image(tmp_path / "a.ome.tif")
    assert opened.pixel_size == pytest.approx((0.5, 0.6))
    assert opened.mpp == pytest.approx(np.sqrt(0.3))
    resolution = (1e4 / 0.5, 1e4 / 0.6)
    tifffile.imwrite(
        tmp_path / "b.tif", picture(20, 30), photometric="rgb", resolution=resolution, resolutionunit="CENTIMETER"
    )
    assert open_image(tmp_path / "b.tif").pixel_size == pytest.approx((0.5, 0.6))


def test_open_image_takes_the_pixel_size_of_the_image_it_opens(tmp_path):
    """An overview that comes first has a pixel size of its own."""
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as writer:
        for size, mpp in ((16, 20.0), (64, 0.25)):
            writer.write(picture(size, size + 2), photometric="rgb", metadata={"axes": "YXS", "PhysicalSizeX": mpp})
    opened = open_image(tmp_path / "a.ome.tif")
    assert opened.levels[0].shape == (3, 64, 66)
    assert opened.mpp == 0.25


def test_tiff_is_closed_when_nothing_uses_it(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", picture(50, 70), photometric="rgb")

    def open_files() -> int:
        return sum(Path(link).resolve() == tmp_path / "a.tif" for link in Path("/proc/self/fd").iterdir())

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs a list of open files")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        level = open_image(tmp_path / "a.tif").levels[0]
        level[:, :9, :9].compute()
        assert open_files() == 1
        del level
        gc.collect()
    assert open_files() == 0


def test_tiff_can_be_read_in_another_process(tmp_path):
    image = picture(50, 70)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb")
    level = open_image(tmp_path / "a.tif").levels[0]
    level.compute()
    copy = pickle.loads(pickle.dumps(level))
    np.testing.assert_array_equal(copy.compute(), np.moveaxis(image, -1, 0))


def test_the_same_tiff_is_recognised_and_a_changed_one_is_not(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(50, 70), photometric="rgb")
    name = open_image(path).levels[0].name
    assert open_image(path).levels[0].name == name
    tifffile.imwrite(path, picture(50, 70)[::-1], photometric="rgb")
    assert open_image(path).levels[0].name != name


def test_tiff_of_small_tiles_makes_few_tasks(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((600, 2200, 3), np.uint8), photometric="rgb", tile=(16, 16))
    level = open_image(tmp_path / "a.tif").levels[0]
    assert level.npartitions == 3
    assert len(level.dask) < 20


@pytest.mark.parametrize("unit", ["pixel", "reference frame"])
def test_open_image_takes_no_pixel_size_in_units_without_a_length(tmp_path, unit):
    metadata = {"axes": "YXS", "PhysicalSizeX": 1.0, "PhysicalSizeXUnit": unit, "PhysicalSizeY": 1.0}
    tifffile.imwrite(tmp_path / "a.ome.tif", picture(20, 30), photometric="rgb", metadata=metadata)
    assert open_image(tmp_path / "a.ome.tif").mpp is None


def test_open_image_reads_the_levels_of_a_pyramidal_ome_tiff(tmp_path):
    image = picture(256, 320)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as writer:
        options = {"photometric": "rgb", "tile": (64, 64)}
        metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}
        writer.write(image, subifds=2, metadata=metadata, **options)
        writer.write(image[::2, ::2], subfiletype=1, **options)
        writer.write(image[::4, ::4], subfiletype=1, **options)
    opened = open_image(tmp_path / "a.ome.tif")
    assert [level.shape for level in opened.levels] == [(3, 256, 320), (3, 128, 160), (3, 64, 80)]
    np.testing.assert_array_equal(opened.levels[2].compute(), np.moveaxis(image[::4, ::4], -1, 0))


def test_open_image_brings_planar_and_grey_tiff_to_channels_first(tmp_path):
    image = np.moveaxis(picture(20, 30), -1, 0)
    tifffile.imwrite(tmp_path / "planar.tif", image, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(open_image(tmp_path / "planar.tif").levels[0].compute(), image)
    tifffile.imwrite(tmp_path / "grey.tif", image[0], photometric="minisblack")
    np.testing.assert_array_equal(open_image(tmp_path / "grey.tif").levels[0].compute(), image[:1])


def test_open_image_keeps_16_bit_tiff(tmp_path):
    image = picture(20, 30, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb")
    level = open_image(tmp_path / "a.tif").levels[0]
    assert level.dtype == np.uint16
    np.testing.assert_array_equal(level.compute(), np.moveaxis(image, -1, 0))


def test_open_image_refuses_a_tiff_with_depth(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.ome.tif", np.zeros((4, 20, 30), np.uint8), metadata={"axes": "ZYX"}, photometric="minisblack"
    )
    with pytest.raises(ValueError, match=r"2D color image, found axes ZYX of shape \(4, 20, 30\)"):
        open_image(tmp_path / "a.ome.tif")


def test_open_image_takes_the_largest_series_of_a_tiff(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(picture(16, 16), photometric="rgb", metadata=None)
        writer.write(picture(64, 48), photometric="rgb", metadata=None)
    assert open_image(tmp_path / "a.tif").levels[0].shape == (3, 64, 48)


def test_open_image_reads_png(tmp_path):
    image = picture(50, 70)
    Image.fromarray(image).save(tmp_path / "a.png")
    opened = open_image(tmp_path / "a.png")
    assert opened.mpp is None
    np.testing.assert_array_equal(opened.levels[0].compute(), np.moveaxis(image, -1, 0))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "I;16"])
def test_open_image_png_of_any_mode_has_the_shape_it_announces(tmp_path, mode):
    image = Image.fromarray(picture(40, 60))
    if mode == "I;16":
        image = Image.fromarray(picture(40, 60, dtype=np.uint16)[..., 0])
        assert image.mode == "I;16"
    else:
        image = image.convert(mode)
    image.save(tmp_path / "a.png")
    level = open_image(tmp_path / "a.png").levels[0]
    pixels = level.compute()
    assert pixels.shape == level.shape
    assert pixels.dtype == level.dtype
    assert pixels.shape[1:] == (40, 60)
    # All of them get brighter to the right, as the picture does (palettes and dithering only on the whole).
    brightness = pixels[0].astype(float).mean(axis=0)
    assert brightness[-10:].mean() > brightness[:10].mean() + 0.2 * np.ptp(pixels)
    assert np.ptp(pixels) > 0.5 * np.iinfo(pixels.dtype).max


def test_png_of_16_bits_keeps_them(tmp_path):
    """Cameras use 12 of them: without the lower 8 bits, such an image is black."""
    colors = picture(40, 60, dtype=np.uint16) // 16
    alpha = np.full((40, 60, 1), 4095, np.uint16)
    for image in (colors, np.dstack([colors, alpha]), np.dstack([colors[..., :1], alpha])):
        (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(image))
        level = open_image(tmp_path / "a.png").levels[0]
        expected = image[..., [0, 0, 0, 1]] if image.shape[2] == 2 else image
        assert level.dtype == np.uint16
        np.testing.assert_array_equal(level.compute(), np.moveaxis(expected, -1, 0), strict=True)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a\.png' is damaged"):
        open_image(tmp_path / "a.png").levels[0].compute()


def test_grey_png_of_16_bits_with_a_transparent_value(tmp_path):
    """PIL makes all of it white."""
    image = picture(40, 60, dtype=np.uint16)[..., 0]
    Image.fromarray(image).save(tmp_path / "a.png", transparency=int(image[0, 0]))
    pixels = open_image(tmp_path / "a.png").levels[0].compute()
    np.testing.assert_array_equal(pixels[:3], np.broadcast_to(image, (3, 40, 60)))
    np.testing.assert_array_equal(pixels[3] == 0, image == image[0, 0])


@pytest.mark.parametrize("size", [(1024, 1100), (1031, 1277)])
def test_open_image_reads_jpeg_with_levels(tmp_path, size):
    image = picture(*size)
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=95)
    levels = open_image(tmp_path / "a.jpg").levels
    assert len(levels) == 4
    for i, level in enumerate(levels):
        pixels = level.compute()
        assert pixels.shape == level.shape == (3, *(-(-n // 2**i) for n in size))
        middle = pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2].astype(int)
        np.testing.assert_allclose(middle, image[size[0] // 2, size[1] // 2].astype(int), atol=4)


def test_open_image_reads_small_and_grey_jpeg(tmp_path):
    image = picture(40, 60)
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.jpeg", quality=95)
    (level,) = open_image(tmp_path / "grey.jpeg").levels
    assert level.shape == (1, 40, 60)
    np.testing.assert_allclose(level.compute()[0].astype(int), image[..., 0].astype(int), atol=4)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}])
@pytest.mark.parametrize("grey", [False, True])
def test_jpeg_has_the_pixels_of_pillow(tmp_path, options, grey):
    image = Image.fromarray(picture(300, 410))
    (image.convert("L") if grey else image).save(tmp_path / "a.jpg", **options)
    pixels = open_image(tmp_path / "a.jpg").levels[0].compute()
    np.testing.assert_array_equal(pixels, np.atleast_3d(np.asarray(Image.open(tmp_path / "a.jpg"))).transpose(2, 0, 1))


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_jpeg_that_was_cut_off_is_damaged(tmp_path, share):
    Image.fromarray(picture(300, 410)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="is damaged"):
        open_image(tmp_path / "a.jpg").levels[0].compute()


def test_open_image_reads_cmyk_jpeg_as_rgb(tmp_path):
    Image.fromarray(picture(1040, 1050)).convert("CMYK").save(tmp_path / "a.jpg")
    for level in open_image(tmp_path / "a.jpg").levels:
        assert level.compute().shape == level.shape


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(
    ("unit", "scale", "expected"), [("micrometer", 0.5, 0.5), ("nanometer", 500.0, 0.5), ("millimeter", 0.002, 2.0)]
)
def test_open_image_reads_ome_zarr(tmp_path, version, unit, scale, expected):
    image = picture(40, 60)
    write_ome_zarr(tmp_path / "a.zarr", image, version=version, unit=unit, scale=scale)
    opened = open_image(tmp_path / "a.zarr")
    assert opened.mpp == pytest.approx(expected)
    assert [level.shape for level in opened.levels] == [(3, 40, 60), (3, 20, 30)]
    np.testing.assert_array_equal(opened.levels[0].compute(), np.moveaxis(image, -1, 0))


def test_open_image_takes_no_pixel_size_from_ome_zarr_without_unit(tmp_path):
    write_ome_zarr(tmp_path / "a.zarr", picture(8, 8), version="0.4", unit=None, scale=1.0)
    assert open_image(tmp_path / "a.zarr").mpp is None


def test_open_image_refuses_a_zarr_without_image(tmp_path):
    zarr.open_group(tmp_path / "a.zarr", mode="w")
    with pytest.raises(ValueError, match="no OME-Zarr image"):
        open_image(tmp_path / "a.zarr")


def test_open_image_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.tif"):
        open_image(tmp_path / "gone.tif")


def test_open_image_lists_the_formats_it_reads(tmp_path):
    (tmp_path / "a.bmp").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected one of .*'\.svs'.*found '\.bmp'"):
        open_image(tmp_path / "a.bmp")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_open_image_decodes_nothing(tmp_path, suffix):
    """The pixels are damaged: a file that opens all the same was not decoded, and one that is read says so."""
    path = tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (1100, 1100, 3), dtype=np.uint8)
    if suffix == ".tif":
        tifffile.imwrite(path, noise, photometric="rgb", compression="zlib", tile=(256, 256))
        with tifffile.TiffFile(path) as tiff:
            start, length = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
        content = bytearray(path.read_bytes())
        content[start : start + length] = b"\xab" * length
        path.write_bytes(content)
    else:
        Image.fromarray(noise).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    level = open_image(path).levels[0]
    assert level.shape == (3, 1100, 1100)
    with pytest.raises(Exception, match=r"(?i)trunc|decod|zlib|deflate|incorrect|invalid|broken|corrupt"):
        level[:, :100, :100].compute()


def test_open_image_leaves_the_pixel_limit_of_pil(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    Image.fromarray(picture(30, 30)).save(tmp_path / "a.png")
    open_image(tmp_path / "a.png").levels[0].compute()
    assert before == Image.MAX_IMAGE_PIXELS


def test_open_image_says_what_to_do_with_images_too_large_for_pil(tmp_path, monkeypatch):
    Image.fromarray(picture(100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"too large to decode in one piece.*tiled TIFF"):
        open_image(tmp_path / "a.png")


def test_large_plain_images_warn_of_nothing_in_any_thread(tmp_path, monkeypatch):
    """PIL warns above a limit and refuses above twice that; filters of warnings are no way out among threads."""
    Image.fromarray(picture(50, 60)).save(tmp_path / "a.png")
    Image.fromarray(picture(50, 60)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)

    def size(name: str) -> tuple[int, int]:
        with reading._pil_open(tmp_path / name) as file:
            return file.size

    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("error")
        filters = list(warnings.filters)
        found = list(pool.map(size, ["a.png", "a.jpg"] * 20))
        assert warnings.filters == filters
    assert found == [(60, 50)] * 40


def test_open_image_goes_by_content_not_by_name(tmp_path):
    Image.fromarray(picture(50, 60)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "b.jpg")
    assert open_image(tmp_path / "b.jpg").levels[0].compute().shape == (3, 50, 60)
    Image.fromarray(picture(50, 60)).save(tmp_path / "c.bmp")
    (tmp_path / "c.bmp").rename(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"c\.png is neither PNG nor JPEG: it starts with b'BM"):
        open_image(tmp_path / "c.png")


def test_open_image_bounds_the_chunks(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 9000, 3), np.uint8), photometric="rgb", rowsperstrip=1)
    level = open_image(tmp_path / "a.tif").levels[0]
    assert level.npartitions < 10
    assert level.chunksize[0] == 3


@pytest.mark.parametrize(
    ("name", "shape", "mpp"),
    [("CMU-1-Small-Region.svs", (3, 2967, 2220), 0.499), ("kidney-48-5.tif", (3, 901, 1493), None)],
)
def test_open_image_reads_real_slides(data_dir, name, shape, mpp):
    path = data_dir / "wsi" / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    opened = open_image(path)
    assert opened.mpp == mpp
    assert opened.levels[0].shape == shape
    corner = opened.levels[0][:, :64, :64].compute()
    assert corner.dtype == np.uint8
    assert corner.std() > 0


def test_open_image_reads_nothing_of_plain_images_but_their_header(tmp_path, monkeypatch):
    Image.fromarray(picture(1100, 1100)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(reading, "_decode_plain", lambda *_: pytest.fail("decoded"))
    assert open_image(tmp_path / "a.jpg").levels[3].shape == (3, 138, 138)


@pytest.mark.parametrize("name", ["scan?.tif", "scan*.tif", "scan [1].tif", "Schnitt ü.tif"])
def test_names_of_files_are_no_patterns(tmp_path, name):
    tifffile.imwrite(tmp_path / "scan1.tif", picture(40, 50, dtype=np.uint8)[::-1], photometric="rgb")
    tifffile.imwrite(tmp_path / name, picture(40, 50), photometric="rgb")
    found = open_image(tmp_path / name).levels[0].compute()
    np.testing.assert_array_equal(np.moveaxis(found, 0, -1), picture(40, 50))


def test_a_tilde_is_the_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(picture(40, 50)).save(tmp_path / "a.png")
    assert open_image("~/a.png").levels[0].shape == (3, 40, 50)


APERIO = "Aperio Image Library v11\r\n50x40 |AppMag = 20|MPP = {}"
PER_UM = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}  # 0.25 um


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"description": APERIO.format(0.25), **PER_UM}, 0.25),
        ({"description": APERIO.format(0.2521), **PER_UM}, 0.2521),
        ({"description": APERIO.format("2.5E-1")}, 0.25),
        ({"description": APERIO.format(0.5), **PER_UM}, None),
        ({"description": APERIO.format("0.5|x = 1|MPP = 0.25")}, None),
        ({"description": APERIO.format(0.5), "resolution": (72, 72), "resolutionunit": "INCH"}, 0.5),
        ({"description": APERIO.format(0), **PER_UM}, 0.25),
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}, **PER_UM}, None),
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}, **PER_UM}, 0.25),
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5}, **PER_UM}, None),
    ],
)
def test_a_tiff_whose_sizes_contradict_each_other_has_none(tmp_path, caplog, monkeypatch, options, expected):
    monkeypatch.setattr(reading.logger, "propagate", True)
    tifffile.imwrite(tmp_path / "a.tif", picture(40, 50), photometric="rgb", **{"metadata": None, **options})
    opened = open_image(tmp_path / "a.tif")
    assert opened.mpp == (expected if expected is None else pytest.approx(expected))
    assert ("a.tif contradicts itself" in caplog.text) == (expected is None)


def test_two_images_of_the_largest_size_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for k in range(2):  # of different descriptions, which are series of their own
            writer.write(picture(40, 50), photometric="rgb", description=f"image {k}", compression=[None, "zlib"][k])
    with pytest.raises(ValueError, match=r"'a\.tif' holds 2 images"):
        open_image(tmp_path / "a.tif")


def test_resolutions_of_an_ome_zarr_in_another_order_are_refused(tmp_path):
    write_ome_zarr(tmp_path / "a.zarr", picture(40, 60), version="0.4", unit="micrometer", scale=0.5)
    group = zarr.open_group(tmp_path / "a.zarr", mode="r+")
    multiscales = group.attrs["multiscales"]
    multiscales[0]["datasets"].reverse()
    group.attrs["multiscales"] = multiscales
    with pytest.raises(ValueError, match=r"'a\.zarr' lists its resolutions .*expected the finest one first"):
        open_image(tmp_path / "a.zarr")


@pytest.mark.parametrize("kind", ["OME-TIFF", "OME-Zarr"])
@pytest.mark.parametrize(("names", "obeyed"), [(["C0", "C1", "C2"], True), (["red", "green", "blue"], False)])
def test_channels_without_names_are_those_of_their_colors(tmp_path, kind, names, obeyed):
    """Stored as blue, green, red; names say more than colors."""
    path, image = tmp_path / ("a.ome.tif" if kind == "OME-TIFF" else "a.zarr"), picture(40, 60)
    if kind == "OME-TIFF":
        colors = [0x0000FFFF, 0x00FF00FF, 0xFF0000FF - 2**32]
        metadata = {"axes": "CYX", "Channel": {"Name": names, "Color": colors}}
        tifffile.imwrite(path, np.moveaxis(image, -1, 0)[::-1], photometric="minisblack", metadata=metadata)
    else:
        write_ome_zarr(path, image[..., ::-1], version="0.4", unit=None, scale=1)
        channels = [{"label": n, "color": c} for n, c in zip(names, ["0000FF", "00ff00", "FF0000"], strict=True)]
        zarr.open_group(path, mode="r+").attrs["omero"] = {"channels": channels}
    found = np.moveaxis(open_image(path).levels[0].compute(), 0, -1)
    np.testing.assert_array_equal(found if obeyed else found[..., ::-1], image)


def edit_ome_zarr(path, **changes):
    """Change entries of the first multiscale of an OME-Zarr of version 0.4, and further attributes."""
    group = zarr.open_group(path, mode="r+")
    attrs = dict(group.attrs)
    first = attrs["multiscales"][0]
    for key, value in changes.pop("first", {}).items():
        first[key] = value
    group.attrs.update({**attrs, **changes})


@pytest.mark.parametrize("scale", [{"scale": [0.5, 0.5]}, {"scale": [1, None, 0.5]}, {"path": "x"}])
def test_an_ome_zarr_with_a_damaged_scale_has_no_pixel_size(tmp_path, scale):
    write_ome_zarr(tmp_path / "a.zarr", picture(40, 60), version="0.4", unit="micrometer", scale=0.5)
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", **scale}]}]
    edit_ome_zarr(tmp_path / "a.zarr", first={"datasets": datasets})
    opened = open_image(tmp_path / "a.zarr")
    assert opened.mpp is None
    assert opened.levels[0].shape == (3, 40, 60)


def test_an_ome_zarr_without_axes_has_those_of_the_first_versions(tmp_path):
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    image = np.moveaxis(picture(40, 60), -1, 0)
    group.create_array("0", data=image[None, :, None])
    group.attrs["multiscales"] = [{"version": "0.1", "datasets": [{"path": "0"}]}]
    np.testing.assert_array_equal(open_image(tmp_path / "a.zarr").levels[0].compute(), image)


def test_labels_of_an_ome_zarr_are_no_image(tmp_path):
    write_ome_zarr(tmp_path / "a.zarr", picture(40, 60), version="0.4", unit="micrometer", scale=0.5)
    edit_ome_zarr(tmp_path / "a.zarr", **{"image-label": {}})
    with pytest.raises(ValueError, match=r"a\.zarr' holds labels of segmented objects"):
        open_image(tmp_path / "a.zarr")
