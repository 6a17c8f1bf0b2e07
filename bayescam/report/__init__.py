"""Figures (matplotlib) and the single-file HTML report."""
