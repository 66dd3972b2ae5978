"""The project's own form: a folder with the graph as JSON and the weights as safetensors."""
