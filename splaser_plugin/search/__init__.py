"""The search for reductions worth keeping: candidates and their order, the rules that accept one, racing, guards, the
journal of a run, and the verdict on what was held out.
"""
