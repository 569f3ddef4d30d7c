"""One tab a file: its methods as data, and how it is laid out."""
