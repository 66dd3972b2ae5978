"""torch.compile(model, backend="layerwise")."""
