"""Environments: two contracts (`spec` in JAX, `host` outside), what fulfils them, and their names (`registry`)."""
