"""What can go wrong between a mirror and its bucket."""


class S3Failure(Exception):
    """One line for people. `again`: the same may work later without anybody's doing.

    Nothing that a server wrote is in it but its error code.
    """

    def __init__(self, message: str, *, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


class Changed(S3Failure):
    """The object is not the version that was asked for, or is there where none was expected."""

    def __init__(self, message: str = "it was changed meanwhile") -> None:
        super().__init__(message, again=True)


class Missing(S3Failure):
    """There is no such object."""


class Unable(S3Failure):
    """The server does not know this kind of request."""


class NoRoom(S3Failure):
    """The node's disk cannot hold what the bucket has."""


class Unsettled(S3Failure):
    """A file was written while it was being read: later."""

    def __init__(self, message: str = "it is being written") -> None:
        super().__init__(message, again=True)


class Stopped(Exception):
    """The pass was told to end."""
