"""Measurements, each beside what it is compared to in the same run: ./dev bench."""
