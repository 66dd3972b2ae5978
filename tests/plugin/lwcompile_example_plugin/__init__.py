"""An analysis and a transform for lwcompile, found through entry points."""
