"""Import path of the original library; see ``smdistributed.modelparallel``."""
