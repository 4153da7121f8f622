"""Configuration files for training tools, as text: Axolotl's and LLaMA-Factory's YAML.

No framework is imported here.
"""
