"""Write the lists of the tests into the docs: ``python tests/robustness/bad_inputs/write.py``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]


def main() -> None:
    """Replace the tables between the marks of the pages."""
    sys.path.insert(0, str(HERE))
    import promises

    import bad_inputs
    from bad_inputs.cases import CASES

    docs = HERE.parents[1] / "docs"
    for name, page, table in (
        ("bad inputs", docs / "bad_inputs.md", bad_inputs.table(CASES)),
        ("promises", docs / "tested.md", promises.table(promises.PROMISES)),
    ):
        marked = rf"(?<=<!-- table of {name} -->\n).*?(?=<!-- end of table -->)"
        page.write_text(re.sub(marked, lambda _, table=table: table, page.read_text(), count=1, flags=re.DOTALL))


if __name__ == "__main__":
    main()
