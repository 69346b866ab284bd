"""The one exception for everything that a user can cause; its text is one line."""


class UserError(ValueError):
    """A mistake in a file, key or value; commands print it as one line and exit non-zero."""
