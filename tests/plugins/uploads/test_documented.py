"""The strategy in the page on upload strategies does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from mortice.core.plugin.interfaces import UploadStrategy
from mortice.plugins.uploads.device import mortice_upload_strategies
from tests.plugins.uploads.fakes import FakeArena, open_model, plan_for_cuda, resident_of, stored_by_the_host

PAGE = Path(__file__).resolve().parents[3] / "docs" / "how-to" / "add-an-upload-strategy.md"


def test_the_strategy_of_the_page_works(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class PlainUpload" in block)
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    strategy = names["PlainUpload"]()  # type: ignore[operator]
    with open_model(tmp_path) as file:
        plan = plan_for_cuda(file)
        resident = resident_of(plan)
        assert strategy.upload(resident, lambda event: None) == sum(planned.nbytes for planned in plan.weights)
        assert isinstance(resident.arena, FakeArena)
        assert np.array_equal(resident.arena.memory, stored_by_the_host(plan))
        assert strategy.upload(resident, lambda event: None) == 0


def test_the_page_names_every_strategy() -> None:
    text = PAGE.read_text(encoding="utf-8")
    strategies: list[UploadStrategy] = list(mortice_upload_strategies())
    assert all(f"| `{strategy.name}` |" in text for strategy in strategies)
