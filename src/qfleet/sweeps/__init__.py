"""Sweeps: many runs with different settings, to find those with which an agent learns most.

`space` reads which settings vary, and how; `study` proposes and judges, by Optuna; `directory` is what a sweep leaves
on disk; `trial` trains one run of a sweep; `sweep` brings them together; `results` and `page` show what was found.
"""
