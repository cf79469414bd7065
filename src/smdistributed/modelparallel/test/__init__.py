"""Import path of the original library's test tools, which some old scripts import."""
