"""Makes weights resident in host memory: each is written into its place by its layout, a few at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

from attrs import define

from mortice.core.errors import PluginError
from mortice.core.model.residency import ResidentWeights
from mortice.core.plugin.events import UploadProgress
from mortice.core.plugin.hookspecs import hookimpl
from mortice.core.plugin.interfaces import Emit, UploadStrategy


@define(eq=False)
class HostUpload:
    """Writes through `Layout.store` on as many threads as there are cores (NumPy lets go of the interpreter)."""

    name: str = "host"
    device_kind: str = "cpu"

    def upload(self, resident: ResidentWeights, emit: Emit) -> int:
        missing = list(resident.missing())
        view = resident.arena.host_view()
        assert view is not None, "a host arena can be written by the host"
        total = sum(planned.source_bytes for _, planned in missing)
        done = written = 0

        def store(index: int) -> int:
            planned = resident.plan.weights[index]
            out = view[planned.offset : planned.offset + planned.nbytes]
            try:
                planned.layout.store(planned.source(), planned.columns, out)
            except PluginError as error:
                raise PluginError(f"{planned.tensor.name}: {error}") from error
            return index

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            futures = [pool.submit(store, index) for index, _ in missing]
            try:
                for future in as_completed(futures):
                    index = future.result()
                    resident.mark(index)
                    planned = resident.plan.weights[index]
                    done += planned.source_bytes
                    written += planned.nbytes
                    emit(UploadProgress(strategy=self.name, done_bytes=done, total_bytes=total))
            finally:
                # an error or Ctrl-C must not wait for what has not begun
                for future in futures:
                    future.cancel()
        return written


@hookimpl
def mortice_upload_strategies() -> Iterable[UploadStrategy]:
    """The one way into host memory."""
    return [HostUpload()]
