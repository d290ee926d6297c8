"""Behaviour logs to cleaned events and sequences, on Ray Data."""
