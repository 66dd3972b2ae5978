"""Passes that train what a plan changed against the dense model."""
