"""One run: lock, recover, plan, apply, remember."""
