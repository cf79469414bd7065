"""Where memory goes: tensors that get their storage late."""
