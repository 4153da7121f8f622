"""How many threads a command takes on a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from splaser_plugin.cli.threads import busy_cores, free_cores

pytestmark = pytest.mark.slow

COMMAND = """
import os, psutil
os.getloadavg = lambda: (9.0, 9.0, 9.0)
os.cpu_count = lambda: 4
os.sched_getaffinity = lambda process: {{1, 2}}
psutil.cpu_percent = lambda interval, percpu: [100.0, *{shares}, 100.0]
import torch
torch.set_num_threads(2)
from splaser_plugin.cli.threads import fit_threads
from splaser_plugin.progress import Progress
class Told(Progress):
    def fact(self, label, value):
        print(label, value)
fit_threads(Told())
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("cores", "busy", "threads"), [(2, 0.1, 2), (2, 0.9, 1), (2, 2.0, 1), (1, 0.0, 1), (16, 4.2, 12), (64, 64.0, 1)]
)
def test_others_keep_their_cores_and_one_is_always_taken(cores, busy, threads):
    assert free_cores(cores, busy) == threads


def told(shares: list[float], **environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    script = [sys.executable, "-c", COMMAND.format(shares=shares)]
    return subprocess.run(
        script, env={**inherited, **environment}, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_a_busy_machine_is_said_with_the_way_to_another_number():
    said, threads = told([90.0, 30.0])
    assert said == (
        "threads 1 of 2, as the machine is busy (others use 1.2 of 2 cores); OMP_NUM_THREADS sets another number"
    )
    assert threads == "1"


def test_neither_a_load_that_is_over_nor_other_cores_count():
    assert told([10.0, 10.0]) == ["2"]


def test_the_users_own_number_wins():
    assert told([100.0, 100.0], OMP_NUM_THREADS="2") == ["2"]


def test_a_process_that_computes_is_seen_while_it_does():
    cores = list(range(os.cpu_count() or 1))
    spinning = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        spinning.stdout.readline()
        assert 0.5 < busy_cores(cores) <= len(cores)
    finally:
        spinning.kill()
        spinning.wait()
