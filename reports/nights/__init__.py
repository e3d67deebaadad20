"""Nights: runs kept, compared with the nights before and with what was accepted, and what of that is a regression."""
