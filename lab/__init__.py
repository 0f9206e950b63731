"""The lab: live-migrates a real QEMU guest between two nodes and measures what the network sees."""
