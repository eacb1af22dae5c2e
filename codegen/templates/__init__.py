"""Parametrised kernels, each with its test and benchmark."""
