"""Results for people, programs, the log and whoever watches."""
