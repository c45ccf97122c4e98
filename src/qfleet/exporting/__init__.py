"""Trained policies as files for other programs: weights, compiled programs, and a folder for a model hub."""
