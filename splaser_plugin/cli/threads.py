"""How many threads a command computes on: on a busy machine two that wait for each other are slower than one."""

from __future__ import annotations

import os

from splaser_plugin.progress import Progress


def free_cores(cores: int, load: float) -> int:
    """How many of the cores others leave, at least 1. load: processes that run or wait for a core, on average."""
    return max(1, min(cores, round(cores - load)))


def fit_threads(progress: Progress) -> None:
    """Have torch compute on the cores that nobody uses as the command starts, and say so where that isn't all of them.

    The load is that of the last minute (`os.getloadavg`), of which this process is taken to bear its cores' share.
    Nothing is changed where OMP_NUM_THREADS is set, or where the system knows no load.
    """
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "getloadavg"):
        return
    import torch

    everywhere = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everywhere
    load = os.getloadavg()[0]
    threads = min(torch.get_num_threads(), free_cores(mine, load * mine / everywhere))
    if threads < torch.get_num_threads():
        progress.fact(
            "threads",
            f"{threads} of {torch.get_num_threads()}, as the machine is busy (load {load:.1f} on {everywhere} cores); "
            "OMP_NUM_THREADS sets another number",
        )
        torch.set_num_threads(threads)
