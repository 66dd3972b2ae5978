"""Solvers: how the values of one weight are found for a numeric format."""
