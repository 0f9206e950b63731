"""The scripts as a process manager runs them, and real migrations."""
