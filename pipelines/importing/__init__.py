"""Settings of other scripts, turned into a recipe."""
