"""What tests, lab and bench share: nodes in namespaces, hooks and agents, guests and frames, and looks at a node.

The judge is always `ip`, `bridge`, /proc/sys or a frame on the wire, never the code that is under test.
"""
