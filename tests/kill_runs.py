"""Laser the tiny model in processes that are killed at random moments, until so many were killed.

    python -m tests.kill_runs MODEL PAIRS FOLDER KILLS

FOLDER gets an output that nothing stopped, `unbroken`, and `0`, `1`, ...: each of a run that was started again
after every kill until it came to its end.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from splaser_plugin import LaserConfig, laser
from splaser_plugin.weights.loading import load_model
from tests.builders import TO_RESUME


def start(model: Any, tokenizer: Any, pairs: str, output: Path) -> int:
    """A process that does the job; as a fork of this one it need not import and load everything again."""
    if process := os.fork():
        return process
    status = 1
    try:
        laser(model, pairs, tokenizer=tokenizer, config=LaserConfig(**TO_RESUME), output=output)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(model: str, pairs: str, folder: str, kills: str) -> None:
    torch.set_num_threads(1)
    loaded = load_model(model, device="cpu")
    started = time.monotonic()
    if ended(start(*loaded, pairs, Path(folder) / "unbroken")) != 0:
        sys.exit("the unbroken run failed")
    whole_s = time.monotonic() - started
    moments = random.Random(0)
    killed, runs = 0, 0
    while True:
        output = Path(folder) / str(runs)
        process = start(*loaded, pairs, output)
        if killed < int(kills):
            time.sleep(moments.uniform(0, whole_s))
            os.kill(process, signal.SIGKILL)
        status = ended(process)
        if status not in (0, -signal.SIGKILL):
            sys.exit(f"a run that was started again ended with {status}")
        killed += status == -signal.SIGKILL
        is_whole = (output / "recipe.json").is_file()
        runs += is_whole
        if killed == int(kills) and is_whole:
            print(f"{killed} killed, {runs} runs came to their end")
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
