"""Code by torch itself: Inductor, and the graph as it stands."""
