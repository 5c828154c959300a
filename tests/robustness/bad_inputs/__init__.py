"""Malformed and odd inputs to every public function, and what each gets for an answer.

One list, used twice: ``test_bad_inputs.py`` runs every case, and the table of ``docs/bad_inputs.md`` is made of it
(``python tests/robustness/bad_inputs write``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from anndata import AnnData
    from spatialdata import SpatialData


@dataclass
class World:
    """What a case may spoil and call: copies of a small prepared stack and the models fitted on it."""

    sdata: SpatialData
    truth: AnnData
    asign: Any
    pixnet: Any
    tmp: Path
    patch: Any
    """pytest's monkeypatch."""
    made: dict[str, Any] = field(default_factory=dict)
    """What the change of a case hands on to its call."""

    @property
    def table(self) -> AnnData:
        """The stack table."""
        return self.sdata.tables["stack"]

    @property
    def spots(self) -> Any:
        """Circles of the measured section."""
        return self.sdata.shapes["s1_spots"]


@dataclass(frozen=True)
class Case:
    """One input and its answer."""

    function: str
    """Public function, with its namespace."""
    given: str
    """What is odd about the input; a cell of the table."""
    call: Callable[[World], Any]
    change: Callable[[World], Any] = lambda world: None
    """Spoils the input before the call."""
    error: type[Exception] | None = None
    """What is raised; None for a right answer."""
    says: str = ""
    """Part of the message, or what the right answer is."""
    check: Callable[[World, Any], bool] | None = None
    """Whether the answer is right."""
    while_working: bool = False
    """Only the work itself can find this out."""

    def __post_init__(self) -> None:
        if (self.error is None) == (self.check is None):
            msg = f"{self.function}, {self.given}: a case raises, or has a check."
            raise ValueError(msg)

    @property
    def row(self) -> str:
        """Row of the table in the docs."""
        answer = self.says if self.error is None else f"`{self.error.__name__}`: … {self.says} …"
        cells = (f"`{self.function}`", self.given, answer)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def refuses(function: str, given: str, error: type[Exception], says: str, call: Any, **more: Any) -> Case:
    """Case that must raise `error` whose message holds `says`."""
    return Case(function, given, call, error=error, says=says, **more)


def answers(function: str, given: str, says: str, call: Any, check: Any, **more: Any) -> Case:
    """Case that must give a right answer, described by `says`."""
    return Case(function, given, call, says=says, check=check, **more)


def table(cases: list[Case]) -> str:
    """Table of the docs."""
    head = "| function | input | answer |\n|---|---|---|\n"
    return head + "\n".join(case.row for case in cases) + "\n"
