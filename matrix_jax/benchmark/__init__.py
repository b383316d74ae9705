"""How fast a world runs, what its program costs, and the same network in PyTorch beside it."""
