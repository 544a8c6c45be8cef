"""The command line: `main` parses and turns errors into exit codes, the other files run commands."""
