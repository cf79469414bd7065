"""What a step leaves behind beside its output: attributes, containers, closures; and what stages compare."""
