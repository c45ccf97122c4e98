"""Environments: two contracts (`spec` in JAX, `host` outside), their implementations, and their names (`registry`)."""
