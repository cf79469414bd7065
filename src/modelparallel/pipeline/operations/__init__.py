"""What a program is made of: calls of modules at their homes, glue between them, pushes, doors and transforms."""
