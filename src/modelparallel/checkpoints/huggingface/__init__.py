"""Weights in the names and files of Hugging Face."""
