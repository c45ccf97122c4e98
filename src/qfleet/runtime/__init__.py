"""Everything that a run leaves on disk and shows on the terminal, whichever topology trains it.

No module here imports Orbax, tensorboardX or rich before it needs them, so that programs start fast.
"""
