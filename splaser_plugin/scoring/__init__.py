"""How good a model is at its task, one number an item: by embedded answers, by the margin of the chosen answers, by
perplexity, or by a function of the user's own.
"""
