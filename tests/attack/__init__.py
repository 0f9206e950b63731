"""Attack tools that Debian has, against filters."""
