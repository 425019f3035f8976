"""Watching a run: metric vocabulary, sinks of a logged step, and the report."""
