"""The two ways in which a run stops on purpose; the command line maps them to exit codes 2 and 1."""


class CompressError(Exception):
    """Something failed while working; exit code 1."""


class BadInput(CompressError, ValueError):
    """The request or its files are at fault: said before compute, with what to do; exit code 2."""


class GateMissed(CompressError):
    """The artifact was made but does not meet a condition; exit code 3."""
