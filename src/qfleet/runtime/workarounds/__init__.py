"""Workarounds for the internals of software that qfleet depends on: one file for each.

A workaround relies on behaviour that nobody promises. So each file names the version in which it was seen, and each
has a test, `tests/runtime/workarounds/test_<name>.py`, that fails once the behaviour is gone. Then delete the file, its
test and the calls to it.
"""
