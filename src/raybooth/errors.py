"""The one error people are meant to read."""


class RayboothError(Exception):
    """Something the user can put right. The text is one sentence or two: what, what is wrong with it, what to do.

    The command line prints it and exits with status 2; no traceback.
    """
