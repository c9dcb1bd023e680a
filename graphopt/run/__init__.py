"""Running graphs node by node: layer by layer, a block again and again, from one weight on."""
