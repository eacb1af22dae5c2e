"""Capture, pipelines, the torch.compile backend, ahead-of-time compilation, debugging, command line."""
