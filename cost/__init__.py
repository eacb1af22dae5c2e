"""Cost model and measured profiles."""
