"""How many threads a command takes on a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from splaser_plugin.cli.threads import free_cores

pytestmark = pytest.mark.slow

COMMAND = """
import os
os.getloadavg = lambda: ({load}, 0.0, 0.0)
os.cpu_count = lambda: 2
os.sched_getaffinity = lambda process: {{0, 1}}
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
    ("cores", "load", "threads"), [(2, 0.1, 2), (2, 0.9, 1), (2, 9.0, 1), (1, 0.0, 1), (16, 4.2, 12), (64, 64.0, 1)]
)
def test_others_keep_their_cores_and_one_is_always_taken(cores, load, threads):
    assert free_cores(cores, load) == threads


def told(load: float, **environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    script = [sys.executable, "-c", COMMAND.format(load=load)]
    return subprocess.run(
        script, env={**inherited, **environment}, capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="the system knows no load")
def test_a_busy_machine_is_said_with_the_way_to_another_number_and_a_free_one_is_not():
    said, threads = told(1.4)
    assert said == "threads 1 of 2, as the machine is busy (load 1.4 on 2 cores); OMP_NUM_THREADS sets another number"
    assert threads == "1"
    assert told(0.2) == ["2"]


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="the system knows no load")
def test_the_users_own_number_wins():
    assert told(9.0, OMP_NUM_THREADS="2") == ["2"]
