"""Models on disk before anything is loaded: the folder and its files, safetensors headers, whole tensors or parts of
them, the model that its loader makes of them, and what is refused because it can't be trusted.
"""
