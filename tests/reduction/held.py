"""How much memory the sums of a reduction's statistics take."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from functools import partial

from splaser_plugin.reduction import moments

BOUND = 3 * 8 * 32 * 32
"""Bytes of the sums of three matrices of `tiny_llama`."""


@contextmanager
def held_bytes(monkeypatch):
    """Inside, groups have at most BOUND bytes, and at the end of each one's pass the list gets what all sums take."""
    sums, held = [], []
    begin, add_up = moments._Sums.__init__, moments._add_up

    def begins(self, *given):
        begin(self, *given)
        sums.extend(map(weakref.ref, (self.short, self.gram)))

    def adds_up(*given):
        found = add_up(*given)
        held.append(sum(living.nbytes for ref in sums if (living := ref()) is not None))
        return found

    monkeypatch.setattr(moments._Sums, "__init__", begins)
    monkeypatch.setattr(moments, "_add_up", adds_up)
    monkeypatch.setattr(moments, "measure", partial(moments.measure, group_bytes=BOUND))
    gc.disable()
    try:
        yield held
    finally:
        gc.enable()
