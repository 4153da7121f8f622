"""Singular values of one matrix, its truncation to a rank, and the edges that split signal from noise."""
