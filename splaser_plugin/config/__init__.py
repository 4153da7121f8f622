"""The options of every stage, once each: names, defaults, meanings, ranges and choices.

The command line, `run.yaml` and the documentation are made from these classes. Nothing heavy is imported here.
"""
