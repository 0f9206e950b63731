"""What everybody speaks of: errors, ops, the model. No I/O."""
