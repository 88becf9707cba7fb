"""What the machine does: processor and memory of the trainer and its descendants, and the GPUs, read in one thread.

| what waits         | for                                        | unblocked by                  |
|--------------------|--------------------------------------------|-------------------------------|
| the reading thread | the next reading of any source being due   | time, leaving                 |
| leaving            | the thread's end, `_JOIN_TIMEOUT_S` at most| the thread, after one reading |

`SystemStatistics.latest` never waits: it gives what was read last. A source that fails is reported once and not read
again.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import psutil

from aiorl.monitoring.threads import OwnedThread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S: Final = 5.0


class Intervals(Protocol):
    """How often the machine is looked at, in seconds, and whether a reading is logged once or with every record."""

    @property
    def cpu_stats_ping_interval(self) -> float:
        """Between two readings of processes."""
        ...

    @property
    def cpu_stats_only_log_once(self) -> bool:
        """Whether `latest` gives each reading of processes once."""
        ...

    @property
    def gpu_stats_ping_interval(self) -> float:
        """Between two readings of GPUs."""
        ...

    @property
    def gpu_stats_only_log_once(self) -> bool:
        """Whether `latest` gives each reading of GPUs once."""
        ...


class SystemStatistics:
    """The ``system/`` metrics. An async context manager that owns the reading thread.

    Args:
        config: How often to read, and how often to tell.
        visible_devices: The value of ``CUDA_VISIBLE_DEVICES``, None where it is not set; NVML itself knows every
            device of the machine.
    """

    def __init__(self, config: Intervals, *, visible_devices: str | None = None) -> None:
        self._sources = [
            _Source(_Processes, config.cpu_stats_ping_interval, only_once=config.cpu_stats_only_log_once),
            _Source(
                lambda: _Devices.open(visible_devices),
                config.gpu_stats_ping_interval,
                only_once=config.gpu_stats_only_log_once,
            ),
        ]
        self._leaving = threading.Event()
        self._thread = OwnedThread(self._read, name="aiorl-system")

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        if not await self._thread.join(_JOIN_TIMEOUT_S):
            logger.warning("reading the system's figures hangs (a driver?); its thread is abandoned")

    def latest(self) -> dict[str, float]:
        """The figures that were read last, by metric name; without those that are to be told once and were."""
        figures: dict[str, float] = {}
        for source in self._sources:
            figures.update(source.take())
        return figures

    def _read(self) -> None:
        try:
            while True:
                for source in self._sources:
                    source.read_if_due()
                due_at = min(source.due_at for source in self._sources)
                if self._leaving.wait(max(0.0, min(due_at - time.monotonic(), threading.TIMEOUT_MAX))):
                    return
        finally:
            for source in self._sources:
                source.close()


class _Reader(Protocol):
    def read(self) -> dict[str, float]: ...

    def close(self) -> None: ...


class _Source:
    """One kind of figures: read in the thread when due, taken on the loop."""

    def __init__(self, open_reader: Callable[[], _Reader | None], interval_s: float, *, only_once: bool) -> None:
        self.due_at = 0.0
        self._open_reader = open_reader
        self._interval_s = interval_s
        self._only_once = only_once
        self._reader: _Reader | None = None
        self._is_open = False
        self._lock = threading.Lock()
        self._figures: Mapping[str, float] = {}

    def read_if_due(self) -> None:
        if time.monotonic() < self.due_at:
            return
        try:
            if not self._is_open:
                self._is_open = True
                self._reader = self._open_reader()
            figures = self._reader.read() if self._reader is not None else {}
        except Exception:  # figures are a view: no driver's fault may end a run; it is logged with its traceback
            logger.warning("system figures cannot be read; going on without them", exc_info=True)
            self.close()
            figures = {}
        with self._lock:
            self._figures = figures
        self.due_at = time.monotonic() + self._interval_s if self._reader is not None else float("inf")

    def take(self) -> Mapping[str, float]:
        with self._lock:
            figures = self._figures
            if self._only_once:
                self._figures = {}
            return figures

    def close(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()


class _Processes:
    """Reads this process and its descendants."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()
        self._children: dict[psutil.Process, psutil.Process] = {}  # psutil keeps the last processor times in the object
        self._total_bytes = psutil.virtual_memory().total
        self._is_first = True

    def read(self) -> dict[str, float]:
        with self._process.oneshot():
            memory = self._process.memory_info()
            figures = {
                "system/cpu_percent": self._process.cpu_percent(),
                "system/memory_percent": 100.0 * memory.rss / self._total_bytes,
                "system/rss_bytes": memory.rss,
                "system/vms_bytes": memory.vms,
            }
        figures.update(self._read_children())
        if self._is_first:  # processor time since just now says nothing
            self._is_first = False
            return {name: value for name, value in figures.items() if "cpu_percent" not in name}
        return figures

    def _read_children(self) -> dict[str, float]:
        found = self._process.children(recursive=True)
        self._children = {child: self._children.get(child, child) for child in found}
        readings: list[tuple[float, float, float, float]] = []
        for child in self._children.values():
            try:
                with child.oneshot():
                    memory = child.memory_info()
                    share = 100.0 * memory.rss / self._total_bytes
                    readings.append((child.cpu_percent(), share, memory.rss, memory.vms))
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        figures: dict[str, float] = {"system/num_children": len(readings)}
        for name, values in zip(
            ("cpu_percent", "memory_percent", "rss_bytes", "vms_bytes"), zip(*readings, strict=True), strict=False
        ):
            figures[f"system/children_{name}_sum"] = sum(values)
            figures[f"system/children_{name}_mean"] = sum(values) / len(values)
        return figures

    def close(self) -> None:
        self._children.clear()


class _Devices:
    """Reads the GPUs that CUDA sees. What a device or its driver does not tell is left out."""

    def __init__(self, nvml: Any, devices: Sequence[Any]) -> None:
        self._nvml = nvml
        self._devices = devices

    @classmethod
    def open(cls, visible_devices: str | None) -> Self | None:
        """The reader, or None where there is no NVML or no visible device."""
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            logger.debug("no figures of GPUs: %s", error)
            return None
        try:
            everything = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            uuids = [pynvml.nvmlDeviceGetUUID(device) for device in everything]
            devices = [
                everything[place] if isinstance(place, int) else pynvml.nvmlDeviceGetHandleByUUID(place)
                for place in find_visible(visible_devices, uuids)
            ]
        except pynvml.NVMLError as error:
            logger.debug("no figures of GPUs: %s", error)
            devices = []
        if not devices:
            pynvml.nvmlShutdown()
            return None
        return cls(pynvml, devices)

    def read(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for number, device in enumerate(self._devices):
            for name, ask in self._questions(device).items():
                try:
                    figures[f"system/gpu{number}_{name}"] = float(ask())
                except self._nvml.NVMLError:
                    continue
        return figures

    def _questions(self, device: Any) -> dict[str, Callable[[], float]]:
        nvml = self._nvml
        return {
            "memory_share": lambda: _share(nvml.nvmlDeviceGetMemoryInfo(device)),
            "utilisation_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(device).gpu,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1000.0,
        }

    def close(self) -> None:
        self._nvml.nvmlShutdown()


def _share(memory: Any) -> float:
    return float(memory.used / memory.total)


def find_visible(visible_devices: str | None, uuids: Sequence[str]) -> list[int | str]:
    """Which devices CUDA sees, in its order.

    CUDA's rules: entries are numbers or UUIDs, which may be cut short as long as they are unique; the first entry
    that names no device ends the list.

    Args:
        visible_devices: The value of ``CUDA_VISIBLE_DEVICES``; None where it is not set, and everything is visible.
        uuids: UUIDs of the machine's devices, ``GPU-…``, in NVML's order, which is that of the bus.

    Returns:
        For each visible device its place in `uuids`, or the UUID of a part of a device (``MIG-…``) as it was written.
    """
    if visible_devices is None:
        return list(range(len(uuids)))
    found: list[int | str] = []
    for entry in (part.strip() for part in visible_devices.split(",")):
        if entry.startswith("MIG-"):
            found.append(entry)
            continue
        if entry.isdecimal():
            places = [int(entry)] if int(entry) < len(uuids) else []
        else:
            places = [place for place, uuid in enumerate(uuids) if entry and uuid.lower().startswith(entry.lower())]
        if len(places) != 1:
            break
        found += places
    return found
