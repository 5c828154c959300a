from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from spatial_impute._registration import SectionTransform, chain_to_reference, deform_stack, register_pair

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="session")
def deformed_pair() -> Callable[..., tuple[SectionTransform, dict[str, Any]]]:
    """Transform of one section to another, deformation included, as ``register_stack(method="syn")`` makes it."""

    def deform(fixed, moving, params):
        pair = register_pair(fixed, moving, params=params)
        placed = chain_to_reference({("fixed", "moving"): pair}, ["fixed", "moving"], "fixed")
        found = deform_stack(
            {"fixed": fixed, "moving": moving},
            placed,
            "fixed",
            params=params,
            seed=0,
            run=lambda function, tasks, _: [function(*task) for task in tasks],
        )
        field, quality = found["moving"]
        return SectionTransform.from_field(pair.matrix, field, np.eye(3)), quality

    return deform
