"""Measurements, each beside what it is compared to in the same run: ./dev bench."""

# Each a module; each is in namespaces of its own, so in its own process.
PARTS = ("hook", "scale", "arrival", "filter", "migration")
