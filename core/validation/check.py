"""Validates every model at some paths: what ``mortice validate`` does before anything is shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from attrs import evolve

from mortice.core.errors import MorticeError
from mortice.core.model.findings import Findings
from mortice.core.model.template_check import template_summary
from mortice.core.model.types import ModelFile
from mortice.core.plugin.registry import Registry
from mortice.core.stages import open_file, quantize_opened, try_open_file, validate_opened
from mortice.core.validation.deep import Progress, data_findings
from mortice.core.validation.results import DataRead, ModelResult
from mortice.core.validation.walk import find_models

__all__ = ["Reading", "check_models"]

Reading = Callable[[], AbstractContextManager[Progress | None]]
"""Entered while a model's data are read; gives what is told how far that is."""


def check_models(
    paths: Iterable[Path],
    registry: Registry,
    *,
    contract: Path | None = None,
    quantize: str = "none",
    deep: bool = False,
    reading: Reading = nullcontext,
) -> Iterator[ModelResult]:
    """Results one by one, as models are found; a broken one is a result, too.

    Args:
        paths: files and folders; folders are searched.
        registry: the plugins.
        contract: a contract to use instead of the registered ones.
        quantize: the type that ``model.quantize`` names.
        deep: read the tensor data.
        reading: shows how much of a model's data have been read.

    """
    for found in find_models(paths, partial(open_file, registry), partial(try_open_file, registry)):
        started = time.perf_counter()
        if found.file is None:
            yield ModelResult(path=found.path, error=found.error)
            continue
        with found.file as stored, quantize_opened(registry, stored, quantize) as file:
            result = _validated(found.path, file, registry, contract)
            if deep:
                result = _read(result, file, registry, reading)
        yield evolve(result, seconds=time.perf_counter() - started)


def _validated(path: Path, file: ModelFile, registry: Registry, contract: Path | None) -> ModelResult:
    result = ModelResult(path=path, files=file.files, template=template_summary(file))
    try:
        report = validate_opened(registry, file, contract, check_template=True)
    except MorticeError as error:
        return evolve(result, error=error)
    return evolve(result, contract=report.contract.name, findings=report.findings)


def _read(result: ModelResult, file: ModelFile, registry: Registry, reading: Reading) -> ModelResult:
    started = time.perf_counter()
    try:
        with reading() as progress:
            found = data_findings(file, registry, progress)
    except MorticeError as error:
        return result if result.error is not None else evolve(result, error=error)
    data = DataRead(file.tensor_bytes, time.perf_counter() - started)
    return evolve(result, findings=Findings((*result.findings.items, *found)), data=data)
