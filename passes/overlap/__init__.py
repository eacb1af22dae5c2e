"""Hiding communication behind computation."""
