"""The plain way onto a device: each weight is laid out in ordinary memory, then copied."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from attrs import define

from mortice.core.model.residency import ResidentWeights
from mortice.core.plugin.events import UploadProgress
from mortice.core.plugin.hookspecs import hookimpl
from mortice.core.plugin.interfaces import Emit, UploadStrategy


@define(eq=False)
class PageableUpload:
    """Needs nothing but a copy; the driver stages it, so it reaches a fraction of the link."""

    name: str = "pageable"
    device_kind: str = "cuda"

    def upload(self, resident: ResidentWeights, emit: Emit) -> int:
        missing = list(resident.missing())
        total = sum(planned.source().nbytes for _, planned in missing)
        done = written = 0
        for index, planned in missing:
            staged = np.empty(planned.nbytes, np.uint8)
            planned.layout.store(planned.source(), planned.columns, staged)
            resident.arena.write(planned.offset, staged)
            resident.mark(index)
            done += planned.source().nbytes
            written += planned.nbytes
            emit(UploadProgress(strategy=self.name, done_bytes=done, total_bytes=total))
        return written


@hookimpl
def mortice_upload_strategies() -> Iterable[UploadStrategy]:
    """Copies from ordinary memory."""
    return [PageableUpload()]
