"""One interactive thing a file."""
