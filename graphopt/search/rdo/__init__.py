"""Rate-distortion-optimised quantization after training. `graphopt.rdo` names what is public."""
