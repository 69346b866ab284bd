"""The one exception for everything a user can cause: its text is one line that says how to mend it."""


class UserError(ValueError):
    """A mistake in a file, key or value; commands print it as one line and exit non-zero."""
