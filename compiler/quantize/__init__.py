"""Quantized models: modules with quantized weights, and checkpoints of other tools, read and written."""
