"""The node: reads facts, and reads and writes ops. It decides nothing."""
