from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aiorl.monitoring.metrics import find_metric
from aiorl.monitoring.system import SystemStatistics, find_visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

pytestmark = pytest.mark.anyio

UUIDS = ("GPU-1a2b", "GPU-1ac0", "GPU-77ff")


@dataclass(frozen=True)
class Intervals:
    cpu_stats_ping_interval: float = 0.01
    cpu_stats_only_log_once: bool = False
    gpu_stats_ping_interval: float = 0.01
    gpu_stats_only_log_once: bool = False


async def figures_with(statistics: SystemStatistics, names: Iterable[str]) -> dict[str, float]:
    """The first figures that hold all names; readings come about every 10 ms."""
    wanted = set(names)
    async with asyncio.timeout(10):
        while not wanted <= (figures := statistics.latest()).keys():  # noqa: ASYNC110, they come by the clock
            await asyncio.sleep(0.005)
    return figures


def resident_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024


class DriverError(Exception):
    pass


class Driver(SimpleNamespace):
    """NVML for machines without it: three devices, of which the last tells little."""

    NVMLError = DriverError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        super().__init__(calls=[], readings=0)

    def nvmlInit(self) -> None:
        self.calls.append("init")

    def nvmlShutdown(self) -> None:
        self.calls.append("shutdown")

    def nvmlDeviceGetCount(self) -> int:
        return len(UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid != "MIG-5":
            raise DriverError("not found")
        return 5

    def nvmlDeviceGetUUID(self, device: int) -> str:
        return UUIDS[device]

    def nvmlDeviceGetMemoryInfo(self, device: int) -> Any:
        self.readings += 1
        return SimpleNamespace(used=(device + 1) * 2**30, total=8 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, device: int) -> Any:
        if device >= 2:
            raise DriverError("not supported")
        return SimpleNamespace(gpu=50 + device)

    def nvmlDeviceGetTemperature(self, device: int, sensor: int) -> int:
        del sensor
        return 60 + device

    def nvmlDeviceGetPowerUsage(self, device: int) -> int:
        if device >= 2:
            raise DriverError("not supported")
        return 250_500 + device


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    return driver


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.communicate(b"\n")


async def test_figures_of_this_process_and_its_children(child: subprocess.Popen[bytes]) -> None:
    async with SystemStatistics(Intervals()) as statistics:
        figures = await figures_with(statistics, ["system/cpu_percent", "system/children_cpu_percent_mean"])
    assert figures["system/rss_bytes"] == pytest.approx(resident_bytes(), rel=0.2)
    assert figures["system/vms_bytes"] > figures["system/rss_bytes"]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert figures["system/memory_percent"] == pytest.approx(100 * figures["system/rss_bytes"] / total, rel=0.05)
    assert figures["system/num_children"] == 1
    for name in ("cpu_percent", "memory_percent", "rss_bytes", "vms_bytes"):
        assert figures[f"system/children_{name}_sum"] == figures[f"system/children_{name}_mean"]
    assert figures["system/children_rss_bytes_sum"] > 2**20
    assert all(find_metric(name) for name in figures)
    assert child.poll() is None


async def test_processor_time_is_measured_between_two_readings() -> None:
    async with SystemStatistics(Intervals(cpu_stats_ping_interval=0.1)) as statistics:
        first = await figures_with(statistics, ["system/rss_bytes"])
        assert "system/cpu_percent" not in first
        while "system/cpu_percent" not in (figures := statistics.latest()):
            sum(range(10_000))
            await asyncio.sleep(0)
    assert 5.0 < figures["system/cpu_percent"] < 250.0


async def test_without_children_their_sums_are_missing() -> None:
    async with SystemStatistics(Intervals()) as statistics:
        figures = await figures_with(statistics, ["system/num_children"])
    assert figures["system/num_children"] == 0
    assert not any(name.startswith("system/children") for name in figures)


async def test_a_reading_that_is_told_once_is_told_once() -> None:
    async with SystemStatistics(Intervals(cpu_stats_ping_interval=60.0, cpu_stats_only_log_once=True)) as statistics:
        await figures_with(statistics, ["system/rss_bytes"])
        assert "system/rss_bytes" not in statistics.latest()
    async with SystemStatistics(Intervals(cpu_stats_ping_interval=60.0)) as statistics:
        figures = await figures_with(statistics, ["system/rss_bytes"])
        assert statistics.latest() == figures


async def test_figures_of_the_visible_devices_in_cudas_order(driver: Driver) -> None:
    async with SystemStatistics(Intervals(), visible_devices="GPU-77,0") as statistics:
        figures = await figures_with(statistics, ["system/gpu0_memory_share"])
    assert {name: value for name, value in figures.items() if "gpu" in name} == {
        "system/gpu0_memory_share": 0.375,
        "system/gpu0_temperature_c": 62.0,
        "system/gpu1_memory_share": 0.125,
        "system/gpu1_utilisation_percent": 50.0,
        "system/gpu1_temperature_c": 60.0,
        "system/gpu1_power_w": 250.5,
    }
    assert all(find_metric(name) for name in figures)
    assert driver.calls == ["init", "shutdown"]


async def test_a_part_of_a_device_is_found_by_its_uuid(driver: Driver) -> None:
    async with SystemStatistics(Intervals(), visible_devices="MIG-5") as statistics:
        figures = await figures_with(statistics, ["system/gpu0_memory_share"])
    assert figures["system/gpu0_memory_share"] == 0.75
    assert driver.calls == ["init", "shutdown"]


@pytest.mark.parametrize("visible_devices", ["", "-1", "MIG-6"])
async def test_no_visible_device_is_no_figure(driver: Driver, visible_devices: str) -> None:
    async with SystemStatistics(Intervals(), visible_devices=visible_devices) as statistics:
        figures = await figures_with(statistics, ["system/cpu_percent"])
    assert not any("gpu" in name for name in figures)
    assert driver.calls == ["init", "shutdown"]
    assert driver.readings == 0


async def test_without_nvml_it_is_silent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pynvml = pytest.importorskip("pynvml")

    def no_library() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    async with SystemStatistics(Intervals()) as statistics:
        await figures_with(statistics, ["system/cpu_percent"])
    assert caplog.records == []


async def test_this_machines_own_devices() -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        pytest.skip("this machine has no NVML")
    pynvml.nvmlShutdown()
    async with SystemStatistics(Intervals()) as statistics:
        figures = await figures_with(statistics, ["system/gpu0_memory_share", "system/gpu0_temperature_c"])
    assert 0.0 <= figures["system/gpu0_memory_share"] <= 1.0
    assert 0.0 < figures["system/gpu0_temperature_c"] < 120.0


async def test_a_source_that_breaks_is_reported_once_and_the_other_goes_on(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(device: int) -> Any:
        raise OSError("the driver is gone")

    monkeypatch.setattr(driver, "nvmlDeviceGetMemoryInfo", broken, raising=False)
    async with SystemStatistics(Intervals(cpu_stats_only_log_once=True)) as statistics:
        for _ in range(3):
            await figures_with(statistics, ["system/rss_bytes"])
    assert [record.getMessage() for record in caplog.records] == [
        "system figures cannot be read; going on without them"
    ]
    assert "the driver is gone" in caplog.text
    assert driver.calls == ["init", "shutdown"]


async def test_leaving_ends_the_thread_although_the_next_reading_is_far_away() -> None:
    before = set(threading.enumerate())
    async with SystemStatistics(Intervals(cpu_stats_ping_interval=1e9, gpu_stats_ping_interval=1e9)):
        [thread] = set(threading.enumerate()) - before
        assert thread.name == "aiorl-system"
    assert not thread.is_alive()


async def test_before_it_is_entered_there_is_nothing() -> None:
    assert SystemStatistics(Intervals()).latest() == {}


@pytest.mark.parametrize(
    ("visible_devices", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("0,-1,2", [0]),
        ("0,7,2", [0]),
        ("GPU-77ff", [2]),
        ("gpu-1a2", [0]),
        ("GPU-1a", []),
        ("GPU-77,GPU-1ac,GPU-xx,0", [2, 1]),
        ("MIG-5,1", ["MIG-5", 1]),
        ("nonsense", []),
    ],
)
def test_what_cuda_sees(visible_devices: str | None, expected: list[int | str]) -> None:
    assert find_visible(visible_devices, UUIDS) == expected
