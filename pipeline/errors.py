"""The one error a user should ever see: what was found, what was expected, what to do."""


class UserError(Exception):
    """A slip of the user's or a fault of the environment; the command line prints its message without a traceback."""
