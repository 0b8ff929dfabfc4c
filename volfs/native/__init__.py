"""Compiled helpers. They move bytes and decide nothing; each says why it exists."""
