"""Looks at this machine as a run would: devices, packages, threads, memory, disk, shared memory, Ray, video.

Each check looks at one thing, says what it found, and gives a verdict with a remedy. It runs in a process of its own
with a time limit, so that none can hang, crash or change the others. Nothing here imports JAX but the check of devices.
"""
