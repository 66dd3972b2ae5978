"""Passes that turn damages, costs and a budget into a plan."""
