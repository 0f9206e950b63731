"""Errors, ops and the model: all other rooms use them. No I/O."""
