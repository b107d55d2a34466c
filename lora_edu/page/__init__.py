"""What the reader sees: claims, guesses, exercises, figures, widgets."""
