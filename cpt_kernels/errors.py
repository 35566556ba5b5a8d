"""The error that a user of the package can mend."""


class UserError(ValueError):
    """Something that the user gave cannot be used. The message names it and says how to mend it.

    Commands print the message in one line and exit with code 2. Any other exception is a bug and keeps its traceback.
    """
