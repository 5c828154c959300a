"""Write the lists of the tests into the docs: ``python tests/robustness/bad_inputs/write.py``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]


def main() -> None:
    """Replace the tables between the marks of the page."""
    sys.path.insert(0, str(HERE))
    import promises

    import bad_inputs
    from bad_inputs.cases import CASES

    page = HERE.parents[1] / "docs" / "reliability.md"
    text = page.read_text()
    for name, table in (
        ("bad inputs", bad_inputs.table(CASES)),
        ("promises", promises.table(promises.PROMISES)),
    ):
        marked = rf"(?<=<!-- table of {name} -->\n).*?(?=<!-- end of table -->)"
        text = re.sub(marked, lambda _, table=table: table, text, count=1, flags=re.DOTALL)
    page.write_text(text)


if __name__ == "__main__":
    main()
