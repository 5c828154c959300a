"""Published files: downloaded once, over https, and used only with the published sha256."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spatial_impute._settings import settings

if TYPE_CHECKING:
    from collections.abc import Mapping


def fetch(name: str, *, folder: Path, sha256: Mapping[str, str], urls: Mapping[str, str]) -> Path:
    """Path of a file below `folder`; downloaded if it is missing, or if its bytes differ from the published ones.

    `sha256` and `urls` hold hash and address of each file. Raises a ``ConnectionError`` without a connection, and a
    ``ValueError`` (from pooch) if the downloaded bytes have another hash; that file is not kept.
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
            f"{urls[name]} could not be downloaded: {error}. Check the connection, or put the file (sha256 "
            f"{sha256[name]}) at {str(folder / name)!r}."
        )
        raise ConnectionError(msg) from error
