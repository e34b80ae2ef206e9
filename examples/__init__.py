"""Built-in example models, no download needed."""
