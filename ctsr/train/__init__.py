"""One training loop; each trainer says only what a step is."""
