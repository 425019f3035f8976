"""Machinery of training: engine, the one step loop, checkpoints, methods."""
