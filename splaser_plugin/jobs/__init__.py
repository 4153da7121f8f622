"""The commands as functions: laser, apply and compare, and the result that they give."""
