"""The node: reads facts, reads and writes ops. It decides nothing."""
