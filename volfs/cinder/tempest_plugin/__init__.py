"""Tempest tests for a Cinder that migrates through volfs: entry point `volfs` of tempest.test_plugins."""
