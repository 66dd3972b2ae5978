"""Passes that annotate sites and edit nothing."""
