"""The hooks against a real kernel, in namespaces of the test process's own; `ip` and `bridge` judge."""
