"""Questions about a graph that change nothing: its weights, values, blocks and stored tensors."""
