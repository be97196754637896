"""What the make targets run. Not part of the package."""
