"""A guest with all of a system's tools behind a filter: Debian's attack tools, and what is right."""
