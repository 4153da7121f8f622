"""Reading files that may come from anywhere, and writing output that appears whole or not at all: size limits, JSON,
locks, free space and temporary names.
"""
