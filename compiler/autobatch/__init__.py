"""Programs written for one instance, run as batches: `plait.autobatch`."""

from .api import Batched, autobatch

__all__ = ["Batched", "autobatch"]
