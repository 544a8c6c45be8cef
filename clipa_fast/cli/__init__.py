"""The command line: one file a command; `main` parses and turns errors into exit codes."""
