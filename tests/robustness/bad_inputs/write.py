"""Write the table of the list into the docs: ``python tests/robustness/bad_inputs/write.py``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]


def main() -> None:
    """Replace the table between the two marks of the page."""
    sys.path.insert(0, str(HERE))
    from bad_inputs import table
    from bad_inputs.cases import CASES

    page = HERE.parents[1] / "docs" / "reliability.md"
    marked = r"(?<=<!-- table of bad inputs -->\n).*?(?=<!-- end of table -->)"
    page.write_text(re.sub(marked, lambda _: table(CASES), page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
