"""Triton kernels, one family a file, each with its plain PyTorch reference. They know only torch, triton and each other, so
that the backend can copy them next to a model."""
