"""What holds for every test."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The same examples every time, and no clock: a red run is one that anybody can repeat.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's commands last, as they take all cores; and skip what is marked ``gpu`` where there is none."""
    items.sort(key=lambda item: item.path.name == "test_readme.py")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
