"""The machinery of a page: claims, guesses, exercises, pictures and controls."""
