"""Training a Moshi with a memory on recordings."""
