"""What every test shares."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """What importing the libraries has made stays: a model that is loaded under a budget collects garbage first, and
    need not look through several hundred thousand of their objects each time."""
    gc.collect()
    gc.freeze()
