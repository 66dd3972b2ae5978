"""Triton kernels for packed weights, and the backend that writes a Python package around them."""
