"""Executes plans. Imports nothing of the compiler."""
