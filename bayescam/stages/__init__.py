"""The stages of a run, one file for each group of them; ``bayescam.pipeline`` calls them in order."""
