"""One function a picture, by subject."""
