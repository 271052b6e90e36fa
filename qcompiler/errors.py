"""The one exception class for errors that the user can mend, and exit codes."""

EXIT_USER, EXIT_INTERNAL, EXIT_INTERRUPT = 2, 70, 130


class UserError(Exception):
    """Something in the user's input is wrong; printed as one line, exit code 2.

    `what` says what is wrong and what would be right; `where` names the file, tensor or node.
    """

    def __init__(self, what: str, where: str = "") -> None:
        self.what = " ".join(what.split())
        self.where = where
        super().__init__(f"{self.what} ({where})" if where else self.what)
