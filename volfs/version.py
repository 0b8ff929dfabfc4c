"""The version, where every module and the build can read it."""

VERSION = "0.1.0"
