"""How many threads a command computes on: on a busy machine two that wait for each other are slower than one."""

from __future__ import annotations

import os

from splaser_plugin.progress import Progress

WATCH_S = 0.3
"""How long the cores are watched: the load that systems tell is a minute's, the command before this one in it."""


def free_cores(cores: int, busy: float) -> int:
    """How many of the cores others leave, at least 1. busy: cores' worth of work that others do."""
    return max(1, min(cores, round(cores - busy)))


def busy_cores(cores: list[int]) -> float:
    """How many cores' worth of work is done on these while this process waits for `WATCH_S`."""
    import psutil

    shares = psutil.cpu_percent(interval=WATCH_S, percpu=True)
    return sum(shares[core] for core in cores if core < len(shares)) / 100


def fit_threads(progress: Progress) -> None:
    """Have torch compute on the cores that nobody uses as the command starts, and say so where that isn't all of them.

    Nothing is changed where OMP_NUM_THREADS is set, or where there is one thread anyway.
    """
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or before == 1:
        return
    mine = list(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    busy = busy_cores(mine)
    threads = min(before, free_cores(len(mine), busy))
    if threads < before:
        progress.fact(
            "threads",
            f"{threads} of {before}, as the machine is busy (others use {busy:.1f} of {len(mine)} cores); "
            "OMP_NUM_THREADS sets another number",
        )
        torch.set_num_threads(threads)
