"""The error of a file that cannot be read."""


class NotReadableError(Exception):
    """A file cannot be read; the text is the end of a sentence that begins with its name."""
