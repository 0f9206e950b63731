"""What every other room uses: errors, ops, the model. No I/O."""
