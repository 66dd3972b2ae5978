"""MLIR by torch-mlir, and IREE to compile and run it."""
