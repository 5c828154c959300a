"""Text files of other programs."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def read_text(path: Path) -> str:
    """Text in UTF-8, or in UTF-16 with its mark, as Excel and Windows write it; a ``ValueError`` for other encodings."""
    content = path.read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        msg = f"{str(path)!r} is no text in UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8."
        raise ValueError(msg) from error
