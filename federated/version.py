"""The version of the whole product, in one place."""

VERSION = "0.1.0"
