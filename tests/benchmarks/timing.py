"""Interleaved timing: every competitor once a round, so that what else the machine does meets all of them alike."""

import os
import statistics
import time
from collections.abc import Callable

import jax


def machine() -> str:
    """The device in general words."""
    device = jax.devices()[0]
    return f"{len(os.sched_getaffinity(0))} CPU cores" if device.platform == "cpu" else f"one {device.device_kind}"


def interleaved(
    competitors: dict[str, Callable[[], object]], *, rounds: int, least: float = 0.05
) -> dict[str, list[float]]:
    """Seconds of one call of each competitor, measured once a round.

    Every call must wait for its own result (`jax.block_until_ready`). All have been called once before the clock
    runs. A measurement is of as many calls on end as take `least` seconds, the same number for all, or of one call
    with 0, after one that is not measured: another's threads may still spin. Each round begins with another competitor.
    """
    repeats = 1
    if least:
        spent = []
        for call in competitors.values():
            call()
            spent.append(_seconds(call, 1))
        repeats = max(1, round(least / max(spent)))
    names = list(competitors)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            competitors[name]()
            times[name].append(_seconds(competitors[name], repeats))
    return times


def ratio(times: dict[str, list[float]], name: str, reference: str) -> float:
    """The ratio of medians of two competitors."""
    return statistics.median(times[name]) / statistics.median(times[reference])


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
