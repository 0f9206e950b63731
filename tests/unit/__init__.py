"""What needs no privileges, no kernel and no pyroute2."""
