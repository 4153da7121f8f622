"""Reductions that know what a matrix is for: statistics, two-sided truncation, ranks for the whole model, storage."""
