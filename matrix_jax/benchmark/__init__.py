"""Speed, cost and memory of a world, and the same network in PyTorch for comparison."""
