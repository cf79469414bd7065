"""Regions of a program that run a second time in the backward."""
