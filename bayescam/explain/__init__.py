"""Class activation maps with their posterior, region statements, localisation against masks."""
