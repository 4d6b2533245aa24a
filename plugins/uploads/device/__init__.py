"""Ways onto a device that lays weights out itself: rows go there as the file has them."""

from __future__ import annotations

from collections.abc import Iterable

from mortice.core.plugin.hookspecs import hookimpl
from mortice.core.plugin.interfaces import UploadStrategy
from mortice.plugins.uploads.device.mapped import MappedWay
from mortice.plugins.uploads.device.measured import MeasuredUpload
from mortice.plugins.uploads.device.pageable import PageableWay
from mortice.plugins.uploads.device.pinned import PinnedWay
from mortice.plugins.uploads.device.strategy import DeviceUpload, Way


@hookimpl
def mortice_upload_strategies() -> Iterable[UploadStrategy]:
    """Three ways, and the choice between them."""
    ways: tuple[Way, ...] = (PinnedWay(), MappedWay(), PageableWay())
    return [*(DeviceUpload(way) for way in ways), MeasuredUpload(ways)]
