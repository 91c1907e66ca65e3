"""Tokens as colors: principal components, and overlays on the images that they come from."""
