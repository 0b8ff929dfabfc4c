"""The mount: the only package that imports pyfuse3."""
