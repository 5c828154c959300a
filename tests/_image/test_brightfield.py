"""What a file says about its pixels: color spaces, alpha, bits, names of channels, orientation, pixel size, format."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from spatial_impute._geometry import scaling
from spatial_impute._image.brightfield import rgb_order
from spatial_impute._image.levels import image_levels, stored_pixels, to_rgb, um_per_unit
from spatial_impute._image.reading import open_image, open_slide
from spatial_impute._stack.elements import image_element

GLASS, TISSUE = (240, 240, 240), (180, 100, 170)


def slide(dtype=np.uint8) -> np.ndarray:
    """Glass, with tissue in the left upper part: no turn or mirror leaves it as it is."""
    rgb = np.full((40, 60, 3), GLASS, float)
    rgb[4:20, 6:40] = TISSUE
    return (rgb * (np.iinfo(dtype).max / 255)).round().astype(dtype)


def seen(path) -> np.ndarray:
    """Pixels (y, x, 3) in 0-255, as all functions of the package read them."""
    (level, *_) = image_levels(image_element(open_image(path).levels, "s", 1.0), scaling(1.0))
    return to_rgb(stored_pixels(level, 0, level.shape[0], 0, level.shape[1]), level)


def ycbcr(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(rgb).convert("YCbCr"))


def write_jpeg2000(path):
    """As Aperio writes it (compression 33003): Y, Cb, Cr in a bare codestream, whatever the photometric tag says."""
    data = imagecodecs.jpeg2k_encode(ycbcr(slide()), level=0, codecformat="j2k", mct=False)
    tifffile.imwrite(
        path, iter([data]), shape=(40, 60, 3), dtype=np.uint8, photometric="rgb", compression=33003, rowsperstrip=40
    )


def write_planar_ycbcr(path):
    tifffile.imwrite(path, np.moveaxis(ycbcr(slide()), -1, 0), photometric="ycbcr", planarconfig="separate")


def write_icclab(path):
    from skimage.color import rgb2lab

    lab = rgb2lab(slide())
    stored = np.dstack([lab[..., 0] * 2.55, lab[..., 1:] + 128]).round().astype(np.uint8)
    tifffile.imwrite(path, stored, photometric=9)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: tifffile.imwrite(p, slide(), photometric="rgb", compression="jpeg", compressionargs={"level": 95}),
        lambda p: Image.fromarray(slide()).save(p, compression="jpeg"),
        lambda p: tifffile.imwrite(p, ycbcr(slide()), photometric="ycbcr", compression="zlib"),
        lambda p: Image.fromarray(slide()).convert("CMYK").save(p, compression="tiff_lzw"),
        lambda p: tifffile.imwrite(p, slide(np.uint16), photometric="rgb", predictor=True, compression="zlib"),
        lambda p: Image.fromarray(slide()).quantize(256).save(p),
        write_jpeg2000,
        write_planar_ycbcr,
        write_icclab,
    ],
    ids=[
        "jpeg",
        "jpeg of PIL",
        "deflated YCbCr",
        "LZW CMYK",
        "16 bits",
        "palette",
        "JPEG 2000",
        "planar YCbCr",
        "ICCLab",
    ],
)
def test_colors_are_those_that_the_tags_say(tmp_path, write):
    write(tmp_path / "a.tif")
    found = seen(tmp_path / "a.tif")
    np.testing.assert_allclose(found[30, 50], GLASS, atol=8)
    np.testing.assert_allclose(found[12, 20], TISSUE, atol=8)


@pytest.mark.parametrize("photometric", ["cfa", "logluv", "depth_map", "mask"])
def test_other_color_spaces_are_refused_with_the_command_that_converts(tmp_path, photometric):
    tifffile.imwrite(tmp_path / "a.tif", slide()[..., 0], photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+") as tiff:
        tiff.pages[0].tags[262].overwrite(int(tifffile.PHOTOMETRIC[photometric.upper()]))
    with pytest.raises(ValueError, match=r"a\.tif' stores its colors as .* no common rule.*magick a\.tif"):
        open_image(tmp_path / "a.tif")


def test_grey_with_two_more_samples_is_not_taken_for_rgb(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", slide(), photometric="minisblack", planarconfig="contig")
    with pytest.raises(ValueError, match=r"holds 3 samples per pixel, and says that they are grey.*photometric='rgb'"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "colour key"])
def test_transparent_glass_of_png_is_white(tmp_path, mode):
    rgb = slide()
    alpha = np.where((rgb == TISSUE).all(axis=2), 255, 0).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([np.where(alpha[..., None], rgb, 0), alpha]).astype(np.uint8))
    if mode == "colour key":
        Image.fromarray(np.where(alpha[..., None], rgb, 7).astype(np.uint8)).save(
            tmp_path / "a.png", transparency=(7, 7, 7)
        )
    else:
        (rgba.quantize(8) if mode == "P" else rgba.convert(mode)).save(tmp_path / "a.png")
    found = seen(tmp_path / "a.png")
    np.testing.assert_array_equal(found[30, 50], 255)
    grey = np.full(3, Image.fromarray(rgb).convert("L").getpixel((20, 12)))
    np.testing.assert_allclose(found[12, 20], grey if mode == "LA" else TISSUE, atol=3)


@pytest.mark.parametrize("kind", ["png", "straight", "premultiplied", "unspecified"])
def test_half_transparent_pixels_lie_on_white_glass(tmp_path, kind):
    rgba = np.full((8, 9, 4), (100, 60, 200, 102), np.uint8)
    expected = 255 + (np.array([100, 60, 200]) - 255) * 0.4
    path = tmp_path / ("a.png" if kind == "png" else "a.tif")
    if kind == "png":
        Image.fromarray(rgba).save(path)
    else:
        if kind == "premultiplied":
            rgba[..., :3] = rgba[..., :3] * 0.4
        extra = {"straight": "unassalpha", "premultiplied": "assocalpha", "unspecified": "unspecified"}[kind]
        tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=[extra])
    # What is no alpha by the standard is left out.
    np.testing.assert_allclose(seen(path)[3, 3], (100, 60, 200) if kind == "unspecified" else expected, atol=1.5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_images_are_upright(tmp_path, suffix, orientation):
    """Compared with `PIL.ImageOps.exif_transpose`, which follows the standard."""
    from PIL import ImageOps

    path = tmp_path / f"a.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, slide(), photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
    else:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(slide()).save(path, exif=exif, quality=95)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_allclose(seen(path), expected, atol=0 if suffix == "png" else 12)


def test_oblong_pixels_turn_with_the_image(tmp_path):
    tags = {"resolution": (1e4 / 0.5, 1e4 / 0.6), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "a.tif", slide(), photometric="rgb", extratags=[(274, 3, 1, 6, True)], **tags)
    assert open_image(tmp_path / "a.tif").pixel_size == pytest.approx((0.6, 0.5))


@pytest.mark.parametrize("bits", [9, 12, 14])
def test_significant_bits_of_ome_are_the_white(tmp_path, bits):
    """A dark scan: without the tag, its own brightest pixel would decide."""
    image = (slide().astype(int) * (2**bits - 1) // 255 // 3).astype(np.uint16)
    metadata = {"axes": "YXS", "SignificantBits": bits, "PhysicalSizeX": 0.5}
    tifffile.imwrite(tmp_path / "a.ome.tif", image, photometric="rgb", metadata=metadata)
    np.testing.assert_allclose(seen(tmp_path / "a.ome.tif")[12, 20], np.array(TISSUE) / 3, atol=1)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (None, [0, 1, 2]),
        (["r", "g", "b"], [0, 1, 2]),
        (["Blue", "Green", "Red"], [2, 1, 0]),
        (["0", "1", "2"], [0, 1, 2]),
        (["Channel:0:0", "Channel:0:1", "Channel:0:2"], [0, 1, 2]),
        (["", "", ""], [0, 1, 2]),
        (["a", "r", "g", "b"], [1, 2, 3, 0]),
        (["H&E"], [0]),
    ],
)
def test_order_of_channels(names, order):
    assert rgb_order(names, len(order)) == order


@pytest.mark.parametrize(
    "names",
    [["DAPI", "FITC", "Cy5"], ["r", "g", "DAPI"], ["DAPI"], ["Hoechst 33342"], ["r", "r", "b"], ["r", "g", "b", "nir"]],
)
def test_dyes_are_no_colors(names):
    with pytest.raises(ValueError, match="look like fluorescence"):
        rgb_order(names, len(names))


def test_channels_of_ome_tiff_are_read_by_name(tmp_path):
    planes = np.moveaxis(slide(), -1, 0)
    for names, right in ((["B", "G", "R"], True), (["DAPI", "FITC", "Cy5"], False)):
        stored = planes[::-1] if right else planes
        metadata = {"axes": "CYX", "Channel": {"Name": names}}
        tifffile.imwrite(tmp_path / "a.ome.tif", stored, photometric="minisblack", metadata=metadata)
        if right:
            np.testing.assert_array_equal(seen(tmp_path / "a.ome.tif")[12, 20], TISSUE)
        else:
            with pytest.raises(ValueError, match="fluorescence"):
                open_image(tmp_path / "a.ome.tif")


def test_composites_of_imagej_are_no_rgb(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(slide(), -1, 0), imagej=True, metadata={"axes": "CYX"})
    with pytest.raises(ValueError, match=r"ImageJ channel 0.*fluorescence"):
        open_image(tmp_path / "a.tif")


def ome_zarr(path, *, labels=None, axes=None, whole=None, units=("micrometer", "micrometer")):
    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.create_array("0", data=np.ascontiguousarray(np.moveaxis(slide(), -1, 0)))
    space = [{"name": n, "type": "space", "unit": u} for n, u in zip("yx", units, strict=True)]
    scale = {"coordinateTransformations": [{"type": "scale", "scale": [1, 0.5, 0.5]}]}
    multiscale = {"axes": axes or [{"name": "c", "type": "channel"}, *space], "datasets": [{"path": "0", **scale}]}
    if whole is not None:
        multiscale["coordinateTransformations"] = [{"type": "scale", "scale": [1, *whole]}]
    group.attrs["multiscales"] = [multiscale]
    if labels is not None:
        group.attrs["omero"] = {"channels": [{"label": label} for label in labels]}
    return path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"whole": (2.0, 3.0)}, (1.5, 1.0)),
        ({"units": ("nanometer", "nanometer"), "whole": (1000.0, 1000.0)}, (0.5, 0.5)),
        ({"units": ("micrometer", "nanometer"), "whole": (1.0, 1000.0)}, (0.5, 0.5)),
        ({"units": ("pixel", "micrometer")}, None),
    ],
)
def test_pixel_size_of_ome_zarr(tmp_path, given, expected):
    found = open_image(ome_zarr(tmp_path / "a.zarr", **given)).pixel_size
    assert found == (None if expected is None else pytest.approx(expected))


def test_channels_of_ome_zarr_are_read_by_name(tmp_path):
    assert seen(ome_zarr(tmp_path / "b.zarr", labels=["blue", "green", "red"]))[12, 20].tolist() == list(TISSUE[::-1])
    with pytest.raises(ValueError, match="fluorescence"):
        open_image(ome_zarr(tmp_path / "c.zarr", labels=["DAPI", "CD45", "Ki67"]))


@pytest.mark.parametrize(
    ("unit", "um"),
    [
        ("µm", 1),
        ("μm", 1),
        ("micron", 1),
        ("Å", 1e-4),
        ("nm", 1e-3),
        ("Mm", None),
        ("inch", 25400),
        ("pixel", None),
        ("m", 1e6),
        (None, None),
    ],
)
def test_units(unit, um):
    assert um_per_unit(unit) == um


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"resolution": (1e4 / 8, 1e4 / 8), "resolutionunit": "CENTIMETER"}, 8.0),  # an overview
        ({"resolution": (118.11, 118.11), "resolutionunit": "CENTIMETER"}, None),  # 300 dpi
        ({"resolution": (472, 472), "resolutionunit": "CENTIMETER"}, None),  # 1200 dpi, rounded
        ({"resolution": (1890, 1890), "resolutionunit": "CENTIMETER"}, None),  # 4800 dpi
        ({"resolution": (9600, 9600), "resolutionunit": "INCH"}, None),
        ({"resolution": (50_800, 50_800), "resolutionunit": "INCH"}, 0.5),
        ({"resolution": (2000, 2000), "resolutionunit": 4}, 0.5),  # per mm
        ({"resolution": (2, 2), "resolutionunit": "NONE"}, None),
        ({"resolution": (0, 0), "resolutionunit": "CENTIMETER"}, None),
        ({"resolution": (2, 2), "imagej": True, "metadata": {"unit": "um"}}, 0.5),
        ({"resolution": (2000, 2000), "imagej": True, "metadata": {"unit": "mm"}}, 0.5),
        ({"resolution": (600, 600), "imagej": True, "metadata": {"unit": "inch"}}, None),
        ({"resolution": (1, 1), "imagej": True, "metadata": {"unit": "pixel"}}, None),
        ({"description": "Aperio Image Library|AppMag = 20|MPP = 0,4990"}, 0.499),
    ],
)
def test_pixel_size_of_tiff_tags(tmp_path, tags, expected):
    options = {} if "imagej" in tags else {"photometric": "rgb"}
    tifffile.imwrite(tmp_path / "a.tif", slide(), **options, **tags)
    assert open_image(tmp_path / "a.tif").mpp == (None if expected is None else pytest.approx(expected, rel=1e-3))


def test_a_resolution_that_makes_the_image_larger_than_a_slide_is_none(tmp_path):
    image = np.zeros((16, 9000, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", resolution=(500, 500), resolutionunit="CENTIMETER")
    assert open_image(tmp_path / "a.tif").mpp is None


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5}, (0.5, 0.5)),
        ({"PhysicalSizeX": 0.5, "PhysicalSizeY": 600, "PhysicalSizeYUnit": "nm"}, (0.5, 0.6)),
        ({"PhysicalSizeY": 0.25}, (0.25, 0.25)),
        (
            {"PhysicalSizeX": 5000, "PhysicalSizeXUnit": "Å", "PhysicalSizeY": 5000, "PhysicalSizeYUnit": "Å"},
            (0.5, 0.5),
        ),
        ({"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "mm"}, None),
    ],
)
def test_pixel_size_of_ome_xml(tmp_path, sizes, expected):
    tifffile.imwrite(tmp_path / "a.ome.tif", slide(), photometric="rgb", metadata={"axes": "YXS", **sizes})
    found = open_image(tmp_path / "a.ome.tif").pixel_size
    assert found == (None if expected is None else pytest.approx(expected))


def test_pixel_size_of_philips(tmp_path):
    text = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport"><Attribute Name="DICOM_PIXEL_SPACING" '
        'Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">"0.00025" "0.0005"</Attribute></DataObject>'
    )
    tifffile.imwrite(
        tmp_path / "a.tiff",
        np.zeros((256, 256, 3), np.uint8),
        photometric="rgb",
        tile=(256, 256),
        description=text,
        software="Philips DP v1.0",
        metadata=None,
    )
    assert open_image(tmp_path / "a.tiff").pixel_size == pytest.approx((0.5, 0.25))


@pytest.mark.parametrize("suffix", [".lif", ".nd2", ".isyntax", ".mrxs", ".vsi", ".bmp", ".jp2"])
def test_formats_that_are_not_read_say_how_to_convert(tmp_path, suffix):
    """Also where the file begins as an overview in a format that is read."""
    Image.fromarray(slide()).save(tmp_path / "x.jpg")
    path = (tmp_path / "x.jpg").rename(tmp_path / f"x{suffix}") if suffix == ".mrxs" else tmp_path / f"x{suffix}"
    if suffix != ".mrxs":
        path.write_bytes(b"\0\1\2\3")
    with pytest.raises(ValueError, match=rf"x\{suffix}.*QuPath.*bfconvert .* x\{suffix} x\.ome\.tif"):
        open_image(path)


@pytest.mark.parametrize("suffix", ["qptiff", "scn", "tf8", "gtif", "png"])
def test_first_bytes_tell_the_format(tmp_path, suffix):
    tifffile.imwrite(tmp_path / "x.tif", slide(), photometric="rgb")
    (tmp_path / "x.tif").rename(tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(seen(tmp_path / f"x.{suffix}")[12, 20], TISSUE)


@pytest.mark.parametrize(
    ("axes", "shape", "says"),
    [
        ("ZYXS", (3, 40, 60, 3), "3 focal planes"),
        ("TYXS", (2, 40, 60, 3), "2 points in time"),
        ("ZCYX", (4, 3, 40, 60), "4 focal planes"),
    ],
)
def test_stacks_of_planes_say_how_to_take_one(tmp_path, axes, shape, says):
    photometric = "rgb" if axes.endswith("S") else "minisblack"
    tifffile.imwrite(
        tmp_path / "a.ome.tif", np.zeros(shape, np.uint8), photometric=photometric, metadata={"axes": axes}
    )
    with pytest.raises(ValueError, match=rf"holds {says}.*Save one plane of it.*bfconvert -z"):
        open_image(tmp_path / "a.ome.tif")


def test_a_plate_says_that_it_has_several_images(tmp_path):
    zarr.open_group(tmp_path / "p.zarr", mode="w").attrs["ome"] = {"plate": {}}
    with pytest.raises(ValueError, match="It is a plate with several images"):
        open_image(tmp_path / "p.zarr")


def test_a_file_is_found_after_the_working_directory_changed(tmp_path, monkeypatch):
    Image.fromarray(slide()).save(tmp_path / "a.png")
    ome_zarr(tmp_path / "a.zarr")
    monkeypatch.chdir(tmp_path)
    levels = [open_image(name).levels[0] for name in ("a.png", "a.zarr")]
    monkeypatch.chdir("/")
    for level in levels:
        assert level[:, 12, 20].compute().tolist() == list(TISSUE)


class Slide:
    """What `wsidata.open_wsi` returns: a reader, and the sizes of its levels."""

    class properties:
        n_level, level_shape, level_downsample, mpp = 2, [[40, 60], [20, 30]], [1.0, 2.0], 0.5

    class reader:
        @staticmethod
        def get_region(x, y, width, height, level=0):
            step = 2**level
            return slide()[y : y + height * step : step, x : x + width * step : step]


def test_slides_of_wsidata_are_read_by_their_reader(monkeypatch):
    from spatial_impute._image import reading

    monkeypatch.setattr(reading, "_CHUNK", 16)
    opened = open_slide(Slide())
    assert opened.mpp == 0.5
    np.testing.assert_array_equal(opened.levels[0].compute(), np.moveaxis(slide(), -1, 0))
    np.testing.assert_array_equal(opened.levels[1].compute(), np.moveaxis(slide()[::2, ::2], -1, 0))
