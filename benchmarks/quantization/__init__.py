"""Letters of the suite `quantize`: accuracy, speed, bytes, properties and gradients of low-bit weights."""
