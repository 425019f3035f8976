"""Shards, the order in which they are read, and what turns their bytes into tensors."""
