"""Simulated radiographs with ground truth: anatomy, physics, clinic, and the dataset made of them."""
