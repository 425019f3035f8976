"""Recipes: one stage a file, each a verb of the command line."""
