"""One file a command: files in, layers called, files and records out."""
