"""The deterministic CNN: maps -> pool -> head, its training, and frozen features."""
