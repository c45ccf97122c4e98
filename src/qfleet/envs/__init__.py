"""Environments: their contract (`spec`), many at once in a compiled loop (`in_graph`), and their names (`registry`)."""
