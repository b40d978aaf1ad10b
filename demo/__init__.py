"""The demo: four emulated devices tune a text classifier on the standard library's own documentation."""
