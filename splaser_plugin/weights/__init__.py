"""The matrices of a loaded model: which there are, reading and changing them in place, under adapters or in factored
layers, and loading the model in the first place.
"""
