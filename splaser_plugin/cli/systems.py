"""The operating system that a command runs on."""

from __future__ import annotations

import sys

from splaser_plugin.progress import Progress

SYSTEM = sys.platform


def warn_of_system(progress: Progress) -> None:
    """Say that nobody has run splaser on this system, where that is so: before the work, not after it."""
    if SYSTEM == "win32":
        progress.result(
            "warning", "splaser was never run on Windows, only its rules imposed in a test. Look at what it writes."
        )
