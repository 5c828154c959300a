"""All cases."""

from __future__ import annotations

from bad_inputs import assembling, dense, imputing, plotting, preparing

CASES = [*assembling.CASES, *preparing.CASES, *imputing.CASES, *dense.CASES, *plotting.CASES]
