"""The tests, as a package: pgx installs one of the same name, in which spawned processes would look for ours."""
