"""Found by Tempest, see plugin.py."""
