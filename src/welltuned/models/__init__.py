"""Models: find and load one, put adapters on it, fuse what is understood, run it packed, save adapters, generate."""
