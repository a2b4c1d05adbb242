"""Moshi with a memory that learns while it listens."""
