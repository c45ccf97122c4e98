"""Runs whose networks are small and untrained, in checkpoints that take no training, and policies of them."""
