"""The scan of a whole model: its records and journal, other programs' scan files, and the choice of matrices by what a
scan found.
"""
