"""Import path of the original library; holds only ``exceptions``."""
