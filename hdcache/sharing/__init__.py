"""Stores that travel and are found: push, pull, streaming, catalogue, web pages, other layouts. Imports the core; rooms do not import it."""
