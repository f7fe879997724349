"""The exceptions for anything the user can mend.

Every check on user input (files, arguments, weights, budgets) raises `CatsError` with a sentence that names the thing and
what would fix it. Command lines turn it into that sentence and exit status 2 (`cats/cli/command.py`).
"""


class CatsError(Exception):
    """Bad input or an unmet requirement; the message is one sentence for the user."""


class BudgetError(CatsError):
    """What was asked for does not fit the memory budget; the message says what would."""


class NetworkError(CatsError):
    """Something had to be fetched and could not be.

    Attributes:
        reason: why, a few words for a sentence that goes on.
    """

    def __init__(self, reason: str, advice: str):
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


class ContractError(RuntimeError):
    """A method broke the contract of `cats.methods.base.Method`: a bug of the method, not a fault of the user."""
