"""C++ for CPUs: printer, vector headers, building."""
