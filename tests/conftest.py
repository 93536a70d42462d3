"""What every test shares: property-test settings and where the reference data lies, if anywhere."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # a test process a core: more threads would only wait for each other

settings.register_profile("default", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.load_profile(os.environ.get("CTSR_HYPOTHESIS_PROFILE", "default"))


for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    # under nohup or in a script's background they are ignored, and every command that a test starts would inherit it
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)


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
