"""What a model is measured with: preference pairs in all their formats and sources, and plain text in windows of equal
length.
"""
