"""Triton: printer, interpretation, cross-compilation."""
