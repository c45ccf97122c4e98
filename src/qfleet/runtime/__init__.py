"""What a run leaves on disk and shows on the terminal, whichever topology trains it.

Nothing here imports Orbax, tensorboardX or rich before it needs them: start-up time is a feature.
"""
