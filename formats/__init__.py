"""Number formats of weights: the quantized type, its layouts in memory, and the `plait::` ops on it with their references.

Torch and the catalogue of errors are all that this needs, so that an artifact runs such ops without the compiler.
"""

from .quantized import LAYOUTS, SCALES, Quantized, QuantizedType, quantize, scales_of

__all__ = ["LAYOUTS", "SCALES", "Quantized", "QuantizedType", "quantize", "scales_of"]
