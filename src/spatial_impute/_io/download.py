"""Files that others publish: downloaded once, over https, and never used unless their sha256 is the published one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spatial_impute._settings import settings

if TYPE_CHECKING:
    from collections.abc import Mapping


def fetch(name: str, *, folder: Path, sha256: Mapping[str, str], urls: Mapping[str, str]) -> Path:
    """Path of a file in a folder of the cache; downloaded where missing, or where its bytes are not the published ones.

    Parameters
    ----------
    name
        File, relative to the folder.
    folder
        Where files are kept.
    sha256, urls
        Hash and address of every file.

    Raises
    ------
    ConnectionError
        If the file cannot be downloaded.
    ValueError
        If the bytes that came do not have the published sha256 (from pooch; the file is not kept).
    """
    import pooch
    from requests.exceptions import RequestException

    cache = pooch.create(
        path=folder,
        base_url="",
        registry={file: f"sha256:{digest}" for file, digest in sha256.items()},
        urls=dict(urls),
        retry_if_failed=2,
    )
    try:
        return Path(cache.fetch(name, progressbar=settings.show_progress_bar))
    except RequestException as error:
        msg = (
            f"{urls[name]} could not be downloaded: {error}. Check the connection, or put the file (sha256 {sha256[name]}) "
            f"at {str(folder / name)!r}."
        )
        raise ConnectionError(msg) from error
