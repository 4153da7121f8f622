"""Prompts, greedy answers in batches with a key-value cache, and forward passes over given texts."""
