"""The packages, on fresh Debian systems."""
