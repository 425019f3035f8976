"""Work around a run: shards, inspection, reports."""
