"""The commands as functions: laser, apply, compare and expand, and the results that they give."""
