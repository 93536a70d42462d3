"""What every test shares: property-test settings and where the reference data lies, if anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("default", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("CTSR_HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Real CT volumes that only the developers hold: CTSR_REFERENCE_DATA, else beside the checkout."""
    folder = Path(os.environ.get("CTSR_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        absent = f"needs the developers' CT volumes, which are not here: {folder}"
        if os.environ.get("CTSR_REQUIRE_REFERENCE"):
            pytest.fail(absent)
        pytest.skip(absent)
    return folder
