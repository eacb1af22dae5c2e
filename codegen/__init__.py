"""Code generation: scheduling, kernel IR, printers, templates, building."""
