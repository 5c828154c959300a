"""Image files that lack a part of themselves."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from spatial_impute._image.reading import open_image

TISSUE = np.full((128, 128, 3), (180, 100, 170), np.uint8)


def write_color_by_color(folder, *, without: str) -> None:
    """OME-TIFF of three files, one for each color."""
    ids = {color: f"urn:uuid:00000000-0000-0000-0000-00000000000{i}" for i, color in enumerate(("r", "g", "b"))}
    places = "".join(
        f'<TiffData IFD="0" FirstC="{i}" PlaneCount="1"><UUID FileName="{color}.ome.tif">{uuid}</UUID></TiffData>'
        for i, (color, uuid) in enumerate(ids.items())
    )
    pixels = (
        '<Pixels ID="P:0" DimensionOrder="XYZCT" Type="uint8" SizeX="128" SizeY="128" SizeC="3" SizeZ="1" SizeT="1">'
    )
    for i, (color, uuid) in enumerate(ids.items()):
        if color != without:
            xml = f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}">'
            xml += f'<Image ID="I:0">{pixels}{places}</Pixels></Image></OME>'
            tifffile.imwrite(
                folder / f"{color}.ome.tif",
                TISSUE[..., i],
                photometric="minisblack",
                description=xml.encode(),
                metadata=None,
            )


def test_an_image_of_several_files_needs_all_of_them(tmp_path):
    """Else the missing color would be black."""
    write_color_by_color(tmp_path, without="")
    assert (np.asarray(open_image(tmp_path / "r.ome.tif").levels[0]) == np.moveaxis(TISSUE, -1, 0)).all()
    (tmp_path / "g.ome.tif").unlink()
    with pytest.raises(ValueError, match=r"one of several files of an OME-TIFF, and others of them are missing"):
        open_image(tmp_path / "r.ome.tif")


@pytest.mark.parametrize("compression", [None, "jpeg"])
def test_tiles_that_were_not_scanned_are_glass(tmp_path, compression):
    """Scanners leave out tiles without tissue; black would be the darkest stain."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, TISSUE, photometric="rgb", tile=(64, 64), compression=compression, metadata=None)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = tiff.pages[0].tags[name]
            tag.overwrite([0, *tag.value[1:]])
    pixels = np.asarray(open_image(path).levels[0])
    assert (pixels[:, :64, :64] == 255).all()
    np.testing.assert_allclose(pixels[:, 64:, 64:], np.moveaxis(TISSUE[64:, 64:], -1, 0), atol=3)


def test_a_tile_that_cannot_be_decoded_names_its_file(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, TISSUE, photometric="rgb", tile=(64, 64), compression="jpeg", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        offset, n = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    content = bytearray(path.read_bytes())
    content[offset : offset + n] = bytes(n)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tif' is damaged: .*Copy or export it again"):
        np.asarray(open_image(path).levels[0])


def test_planes_that_may_be_colors_are_reported(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(TISSUE, -1, 0), photometric="minisblack")
    with pytest.raises(ValueError, match=r"If they are red, green and blue, .*planarconfig='separate'"):
        open_image(tmp_path / "a.tif")
