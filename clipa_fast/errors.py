"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Something the user gave is wrong. Its text is one line that names the input, what came and what is accepted.

    The command line prints the text and exits with code 2.
    """
